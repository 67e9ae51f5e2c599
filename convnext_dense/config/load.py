"""What the tools share: a config from the command line, checks before anything is built, errors in one line."""

import argparse
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS, METRICS, MODELS, OPTIM_WRAPPERS, RUNNERS, init_default_scope
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner.checkpoint import get_torchvision_models
from torch import nn

from ..checkpoints.hub import URLS, fetch, is_url, locate
from ..checkpoints.io import forget, read
from ..checkpoints.pretrained import PretrainedConvNeXt, check_same, match, model_weights, source_of
from ..cli.exit import Parser, config_path, is_users_bug, keep_output
from ..engine.checkpoint_hook import LAST, hold
from ..engine.runner import ResumableRunner
from ..errors import UsageError
from ..models.convnext import ConvNeXt
from ..ops import dispatch
from ..paper.results import figures_of, recipe_parts, training_length
from ..paper.work_dirs import TIMESTAMP
from ..type_names import class_of, is_type, short_name
from .batch_size import check_same_accumulation, dicts_in, listed, n_processes, set_inputs
from .literal import DATA_ENDINGS, check_types, read_dumped, read_yaml_safely
from .options import Options, is_explicit, merge
from .resume import OVERRIDE, compare

# All from which mmengine loads checkpoints: what our loader does not find there is an error.
PLACES = ('', 'http://', 'https://', 'torchvision://', 'modelzoo://', 'open-mmlab://', 'openmmlab://', 'mmcls://')
PLACES += ('pavi://', 's3://', r'(\S+\:)?s3://')
# The lines of OpenMMLab, which have the same import names: distribution of mmengine -> our extra, its mmcv.
LINES = {'onedl-mmengine': ('onedl', 'onedl-mmcv==2.3.6'), 'mmengine': ('openmmlab', 'mmcv==2.1.0')}
RUNS_WITHOUT_AMP = ('cpu', 'mps')  # mmengine's AmpOptimWrapper refuses these


def config_parser(description: str, **config) -> Parser:
    """The arguments of every tool that reads a config; `config` is for argparse."""
    parser = Parser(description=description)
    parser.add_argument('config', help='a recipe, such as configs/cascade/convnext_t.py', **config)
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=Options,
        default={},
        metavar='KEY=VALUE',
        help='settings that replace those of the config, such as train_cfg.max_epochs=12; +KEY=VALUE for a new one',
    )
    return parser


def run_parser(description: str) -> Parser:
    """The arguments of every tool that runs a config, as users of mmdet and mmseg know them."""
    parser = config_parser(description)
    parser.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/ and the recipe)')
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none')
    parser.add_argument('--compile', action='store_true', help="torch.compile the backbone's blocks: for long runs")
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def load_config(path: str, options: dict, needed: tuple[str, ...] = ('model',)) -> Config:
    """A config file with the command line's options filled in.

    Raises:
        UsageError: the config cannot be read, lacks one of the `needed` keys, or what it needs is not installed.
    """
    path = config_path(str(path))
    read_yaml_safely()
    try:
        config = Config.fromfile(path)
    except Exception as error:  # a config is a program: it can fail in any way
        if is_users_bug(error, path) and not isinstance(error, (ImportError, SyntaxError)):
            raise
        raise UsageError(f'{path}: {_why_not_read(error, path)}') from error
    if {'data', 'optimizer'} <= set(config) and 'train_dataloader' not in config:
        raise UsageError(
            f'{path} is a config of mmdet 2 or mmseg 0 (data, optimizer, runner): start from a recipe, such as '
            'configs/cascade/convnext_t.py, or move it as mmdet 3 says (docs/en/migration/config_migration.md)'
        )
    _check_parts(config, path, needed)
    check_types(config, path)
    scope = config.get('default_scope') or 'mmengine'
    check_installed(scope)
    init_default_scope(scope)
    merge(config, options)
    _check_parts(config, path, needed)
    check_backbones(config.get('model', {}))
    check_levels(config.get('model', {}))
    return config


def _why_not_read(error: Exception, path: str) -> str:
    if isinstance(error, RecursionError):
        return 'it is nested without an end, or its _base_ leads back to it'
    if isinstance(error, AttributeError) and path.lower().endswith(DATA_ENDINGS):
        return 'a config has names and their settings: model: {type: ...}'
    return f'{type(error).__name__}: {_first_line(error)}'


def _check_parts(config: Config, path: str, needed: tuple[str, ...]) -> None:
    for key in needed:
        if not config.get(key):
            raise UsageError(f'{path} has no {key}: give a whole recipe, such as configs/cascade/convnext_t.py')
        if not isinstance(config[key], (dict, list)):
            raise UsageError(f'{path}: {key} is {config[key]!r}, where a dict is due')


def load_run(args: argparse.Namespace, needed: tuple[str, ...], subfolder: str = '') -> Config:
    """The config of a command line that runs it, with its launcher and its work dir, or a folder in it.

    Raises:
        UsageError: as `load_config`; the launcher's variables are not set; the work dir's copy of the config would
            overwrite the config itself.
    """
    keep_output()
    if args.launcher == 'mpi':
        os.environ.setdefault('LOCAL_RANK', os.environ.get('OMPI_COMM_WORLD_LOCAL_RANK', '0'))
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    config = load_config(args.config, args.cfg_options, needed)
    args.cfg_options = {key.removeprefix('+'): value for key, value in args.cfg_options.items()}
    check_launcher(config, args.launcher)
    config.launcher = args.launcher
    work_dir = args.work_dir or config.get('work_dir') or _default_work_dir(args.config)
    config.work_dir = os.path.join(work_dir, subfolder).rstrip('/')
    if os.path.realpath(args.config) == os.path.realpath(os.path.join(config.work_dir, os.path.basename(args.config))):
        raise UsageError(
            f'{config.work_dir} holds the config itself, which its copy would overwrite: give a --work-dir'
        )
    fitted = set_inputs(config)
    if fitted:
        print_log(fitted, logger='current')
    return config


def check_launcher(config: Config, launcher: str) -> None:
    """Raise UsageError where a launcher did not start this process, or its processes cannot be joined."""
    n_processes(launcher)
    backend = ((config.get('env_cfg') or {}).get('dist_cfg') or {}).get('backend', 'nccl')
    if launcher != 'none' and backend == 'nccl' and get_device() == 'cpu':
        raise UsageError(f'--launcher {launcher} needs a GPU for each process and none was found: leave it out')
    if launcher == 'mpi' and 'MASTER_ADDR' not in os.environ:
        raise UsageError('--launcher mpi: MASTER_ADDR is not set; mpirun -x MASTER_ADDR=NODE gives it, the first node')


def check_installed(library: str) -> None:
    """Raise UsageError where mmcv lacks its operators, `library` (mmdet, mmseg) cannot be imported, or both lines of
    OpenMMLab are installed."""
    lines = [name for name in LINES if _is_installed(name)]
    if len(lines) > 1:
        raise UsageError(
            f'{" and ".join(lines)} are installed over one another: install one line of OpenMMLab, in a new environment'
        )
    extra, mmcv = LINES[lines[0] if lines else 'onedl-mmengine']
    try:
        importlib.import_module('mmcv')
        importlib.import_module(library)
    except ImportError as error:
        raise UsageError(f"{error}: run pip install --no-build-isolation 'convnext_dense[{extra}]'") from error
    try:
        importlib.import_module('mmcv._ext')
    except ImportError as error:
        raise UsageError(
            f'mmcv is installed without its operators ({_first_line(error)}): run pip install --no-build-isolation '
            f'--no-cache-dir --no-deps --force-reinstall {mmcv}'
        ) from error


def check_backbones(model: dict) -> None:
    """Raise UsageError where a ConvNeXt in a model config cannot be built; costs no memory."""
    for kind, settings in _backbones_in(model):
        try:
            with torch.device('meta'):
                kind(**settings)
        except TypeError as error:
            raise UsageError(f'backbone: {_first_line(error)}') from error


def check_levels(model: dict) -> None:
    """Raise UsageError where a dense head of a detector has anchors for another number of levels than the neck gives,
    which mmdet notices at the first image, in an AssertionError without a word."""
    neck = (listed(model.get('neck')) or [{}])[-1]
    for name in ('rpn_head', 'bbox_head'):
        head = model.get(name)
        anchors = (head.get('anchor_generator') or {}) if isinstance(head, dict) else {}
        strides = anchors.get('strides') or ()
        if isinstance(neck.get('num_outs'), int) and strides and len(strides) != neck['num_outs']:
            raise UsageError(
                f'the neck gives {neck["num_outs"]} levels (num_outs), {name} has anchors for {len(strides)} '
                f'(anchor_generator.strides={list(strides)}): make them as many'
            )


def check_pretrained(model: dict) -> None:
    """Raise UsageError where the weights that a ConvNeXt's `init_cfg` names cannot be had or do not fit it. On the meta
    device, before data or a model take time; a download is left to the first process."""
    for kind, settings in _backbones_in(model):
        with torch.device('meta'):
            backbone = kind(**settings)
        for cfg in backbone.pretrained:
            loader = PretrainedConvNeXt(**{k: v for k, v in cfg.items() if k != 'type'})
            if _is_first_process() or not is_url(locate(loader.checkpoint)):
                match(backbone, loader.checkpoint, loader.final_norm)


def check_data(config: Config, splits: tuple[str, ...]) -> None:
    """Raise UsageError naming the first folder or annotation file of these splits ('train', 'val', 'test') that is
    not there."""
    for split in splits:
        for dataset in dicts_in(config.get(f'{split}_dataloader') or {}):
            for path in _data_paths(dataset):
                _check_there(path, split)
        for evaluator in dicts_in(config.get(f'{split}_evaluator') or {}):
            if evaluator.get('ann_file'):
                _check_there(evaluator['ann_file'], split)


def set_precision(config: Config, amp_dtype: str | None) -> None:
    """Train in `amp_dtype` (None: as the recipe says).

    Raises:
        UsageError: mixed precision where only a CPU is there.
    """
    wrapper = config.optim_wrapper
    if amp_dtype == 'float32':
        wrapper.type = 'OptimWrapper'
        for key in ('dtype', 'loss_scale'):
            wrapper.pop(key, None)
    elif amp_dtype:
        if not is_type(wrapper.get('type'), OPTIM_WRAPPERS, 'AmpOptimWrapper'):  # it may be derived from it
            wrapper.type = 'AmpOptimWrapper'
        wrapper.dtype = amp_dtype
    if is_type(wrapper.get('type'), OPTIM_WRAPPERS, 'AmpOptimWrapper') and get_device() in RUNS_WITHOUT_AMP:
        raise UsageError(
            f'mixed precision ({wrapper.get("dtype", "float16")}) needs a GPU and none was found: '
            '--amp-dtype float32 trains in full precision'
        )


def set_keep(config: Config, n: int | None) -> None:
    """Keep the last `n` checkpoints and the one of the best evaluation (None: as the config says).

    Raises:
        UsageError: `n` is not positive.
    """
    if n is None:
        return
    if n < 1:
        raise UsageError(f'--keep {n}: give a positive number of checkpoints')
    if not config.get('default_hooks'):
        config.default_hooks = {}
    best = {} if not config.get('val_evaluator') else dict(save_best=_best_of(config.val_evaluator), rule='greater')
    hook = config.default_hooks.get('checkpoint') or dict(type='CheckpointHook', interval=1)
    config.default_hooks.checkpoint = {**best, **hook, 'max_keep_ckpts': n}


def _best_of(evaluator) -> str:
    """The figure by which the best checkpoint is chosen: box AP, mIoU, or the first that the evaluator gives."""
    for metric in dicts_in(evaluator):
        if is_type(metric.get('type'), METRICS, 'CocoMetric') and 'bbox' in listed(metric.get('metric', 'bbox')):
            return f'{metric.get("prefix") or "coco"}/bbox_mAP'
        if is_type(metric.get('type'), METRICS, 'IoUMetric') and 'mIoU' in metric.get('iou_metrics', ['mIoU']):
            return 'mIoU'
    return 'auto'


def set_max_bad_images(config: Config, given: str | None) -> None:
    """How many training images may turn out unreadable: a number of them, or a share such as 0.5% (None: 0.1 %).

    Raises:
        UsageError: it is neither.
    """
    if given is None:
        return
    try:
        limit = float(given.removesuffix('%')) / 100 if given.endswith('%') else float(given)
    except ValueError:
        limit = -1.0
    if limit < 0 or (limit >= 1 and (given.endswith('%') or limit != int(limit))):
        raise UsageError(f"--max-bad-images '{given}': give a number of images, or a share below all such as 0.5%")
    config.max_bad_images = limit


def set_resume(config: Config, resume: str | None) -> str | None:
    """Fill in what `--resume [CHECKPOINT]` means and return the checkpoint to go on from, if any.

    Args:
        resume: a checkpoint; 'last' for that of the work dir's run; 'auto' for the same, or a new run where there is
            none; None for a new run, or what the config's own `resume` and `load_from` say.

    Raises:
        UsageError: the checkpoint is not there, the work dir holds no run to go on with, or it holds one and nothing
            says to go on with it.
    """
    work_dir = Path(config.work_dir)
    holds_run = (work_dir / LAST).is_file() or any(work_dir.glob('*.pth'))
    if resume is None and config.get('resume'):
        resume = config.get('load_from') or 'last'
    if resume is None:
        if holds_run:
            raise UsageError(
                f'{work_dir} holds a run already: --resume goes on with it, another --work-dir starts anew'
            )
        return None
    finds = resume in ('last', 'auto')
    checkpoint = latest(work_dir) if finds else resume
    if checkpoint:
        checkpoint = local_checkpoint(checkpoint)
        if not finds and holds_run and Path(checkpoint).resolve().parent != work_dir.resolve():
            raise UsageError(f'{work_dir} holds another run than {checkpoint}: give another --work-dir')
    elif holds_run:
        raise UsageError(
            f'{work_dir} has checkpoints but no last_checkpoint: --resume CHECKPOINT says which to go on from'
        )
    elif resume == 'last' and not any(work_dir.glob(TIMESTAMP)):  # the logs of a run that was not saved yet
        raise UsageError(
            f'{work_dir} holds no run to resume: leave out --resume to start one there; --resume auto starts one where '
            'there is none'
        )
    else:
        print_log(f'{work_dir} holds no checkpoint: the run starts from the beginning', 'current', logging.WARNING)
    config.resume = bool(checkpoint)
    if checkpoint:  # else the run starts anew, from its own load_from if it has one
        config.load_from = checkpoint
    return checkpoint


def hold_work_dir(config: Config) -> None:
    """Keep the work dir for this run; UsageError where another one has it."""
    if _is_first_process():
        hold(config.work_dir)


def latest(work_dir: Path) -> str | None:
    """The checkpoint that a work dir's run goes on from: the one that `last_checkpoint` names, also where the work dir
    was moved since; without it, as a kill after the first checkpoint leaves it, the farthest of those written whole."""
    if (work_dir / LAST).exists():
        named = (work_dir / LAST).read_text().strip()
        here = work_dir / Path(named).name
        return str(here) if here.exists() else named
    found = {str(path): read(path) for path in work_dir.glob('*.pth')}
    reached = {p: c['meta']['iter'] for p, c in found.items() if 'optimizer' in c and 'layout' in c.get('meta', {})}
    return max(reached, key=reached.get, default=None)


def check_resume(
    config: Config, checkpoint: str | None, another_length: bool = False, override: bool = False
) -> str | None:
    """Compare a run with the checkpoint that it is to go on from.

    Args:
        another_length: whether an argument of the command line sets the length of the run.
        override: whether the config's settings take the place of those that the state in the checkpoint holds.

    Returns:
        One line that says which settings changed; None where none did.

    Raises:
        UsageError: the checkpoint is no state of a training, counts its iterations otherwise, or holds other settings
            than the config; there is none and `override` was given.
    """
    if override and (not checkpoint or 'runner_type' in config):
        raise UsageError('--override goes with --resume' + ('' if not checkpoint else ' and without a runner_type'))
    if not checkpoint:
        return None
    content = read(checkpoint)
    if not {'meta', 'state_dict', 'optimizer'} <= set(content):
        raise UsageError(
            f'{checkpoint} holds weights alone: --cfg-options load_from={checkpoint} starts a run from them'
        )
    source = source_of(content, checkpoint)
    if source not in (None, 'original'):
        raise UsageError(
            f'{checkpoint} comes from a run of another ConvNeXt, in the names of {source}, and its optimizer likewise: '
            f'--cfg-options load_from={checkpoint} starts a run from its weights'
        )
    settings = read_dumped(content['meta']['cfg']) if content['meta'].get('cfg') else None
    if another_length and settings is not None and not override:
        before, now = training_length(settings), training_length(config)
        if before != now:
            raise UsageError(
                f'{checkpoint} comes from a run of {before:g} epochs or updates, not {now:g}, and its schedules go on: '
                f'resume with its length, take the new schedules with --override, or start from its weights with '
                f'--cfg-options load_from={checkpoint}'
            )
    if 'layout' not in content['meta']:
        check_same_accumulation(config, content['meta'], checkpoint)
    config[OVERRIDE] = override
    if settings is None:
        return f'{checkpoint} does not say its settings: they were not compared with those of now'
    return compare(settings, config, checkpoint, override)


def compile_backbones(model: nn.Module) -> None:
    """Have the blocks of every ConvNeXt in a model compiled when they first run."""
    for module in model.modules():
        if isinstance(module, ConvNeXt):
            module.compile_blocks()


def local_checkpoint(source: str) -> str:
    """The file of a checkpoint, downloaded where `source` is a URL or a known name; UsageError where there is none."""
    if not os.path.isfile(source) and not is_url(source) and source not in URLS:
        raise UsageError(f"no checkpoint '{source}': give the path of a .pth file, a URL or a recipe's released name")
    return str(fetch(source))


def build_runner(config: Config, checkpoint: str | None = None) -> Runner:
    """The runner of a config. `checkpoint` is a training or a model that it is going to load; without it that is the
    config's `load_from`, whose heads may be another model's (other classes) while its backbone may not.

    Raises:
        UsageError: the file is not of the runner's model.
    """
    if not checkpoint and config.get('load_from'):
        config.load_from = local_checkpoint(config.load_from)
    file = checkpoint or config.get('load_from')
    whole = {}  # the file of the whole model, with the model, once that is there
    CheckpointLoader.register_scheme(prefixes=PLACES, loader=_safe_loader(whole), force=True)
    try:
        runner = RUNNERS.build(config) if 'runner_type' in config else ResumableRunner.from_cfg(config)
    except (KeyError, TypeError, AssertionError, ValueError, AttributeError) as error:
        if isinstance(error, UsageError) or is_users_bug(error):
            raise
        raise UsageError(f'the config cannot be built: {_first_line(error)}') from error
    model = _unwrapped(runner.model)
    if get_device() == 'cpu' and any(isinstance(module, ConvNeXt) for module in model.modules()):
        runner.logger.info(f'ConvNeXt on this CPU: {dispatch.described()}')
    if file:
        whole[file] = model
        backbones = tuple(f'{name}.' for name, module in model.named_modules() if isinstance(module, ConvNeXt))
        check_same(model, model_weights(read(file), file, model), file, ('',) if checkpoint else backbones)
    return runner


def _safe_loader(whole: Mapping[str, nn.Module]) -> Callable[..., dict]:
    """mmengine's loader of files for what our tools run: its own unpickles in full where the safe way fails, and a
    resumed runner runs the config in the file. Of the files in `whole` come the weights of the models there, by the
    names of these."""

    def load(filename: str, map_location=None) -> dict:
        if filename.startswith('torchvision://'):
            filename = get_torchvision_models()[filename.removeprefix('torchvision://')]
        content = read(local_checkpoint(filename), mapped=False)
        forget()  # from here on the run has its own
        if filename in whole:
            content['state_dict'] = model_weights(content, filename, whole[filename])
        if isinstance(content.get('meta'), dict):
            content['meta'] = {k: v for k, v in content['meta'].items() if k not in ('cfg', 'config')}
        return content

    return load


def summary(metrics: dict[str, float]) -> str:
    """An evaluation in a line: box and mask AP (percent, as the paper gives them) or mIoU, else all there is."""
    found = [
        f'{name} {value:.2f}' if name == 'mIoU' else f'{name} {value:.1f}'
        for name, value in figures_of(metrics).items()
    ]
    found += [f'{name} {metrics[name]:.2f}' for name in ('mAcc', 'aAcc') if name in metrics]
    return '  '.join(found or (f'{key} {value}' for key, value in metrics.items()))


def set_pictures(
    config: Config, folder: str | None, show: bool, wait_time: float, options: Mapping[str, object] | None = None
) -> None:
    """Have the library's visualization hook draw predictions beside the truth, into a folder or a window.

    Raises:
        UsageError: the config has no such hook.
    """
    if not (folder or show):
        return
    if folder:
        _check_new(folder, '--show-dir')
    hook = config.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise UsageError(
            'pictures need default_hooks.visualization in the config: DetVisualizationHook or SegVisualizationHook'
        )
    hook.update(draw=True, show=show, wait_time=wait_time)
    if not is_explicit(options or (), 'default_hooks.visualization.interval'):
        hook.interval = 1  # the classic mmseg draws every 50th by default
    if folder and is_type(hook.type, HOOKS, 'SegVisualizationHook'):
        config.visualizer.save_dir = folder
    elif folder:
        hook.test_out_dir = folder


def set_out(config: Config, out: str | None) -> None:
    """Have the predictions kept: label maps in a folder (segmentation) or a pickle file (detection)."""
    if out is None:
        return
    _check_new(out, '--out')
    evaluators = listed(config.test_evaluator)
    if config.get('default_scope') == 'mmseg':
        metric = next((e for e in evaluators if is_type(e.get('type'), METRICS, 'IoUMetric')), None)
        if metric is None:
            raise UsageError("--out needs dict(type='IoUMetric') among test_evaluator, which writes label maps")
        metric.output_dir = out
    elif not out.endswith(('.pkl', '.pickle')):
        raise UsageError(f"--out '{out}': detections are kept in a file whose name ends with .pkl")
    else:
        config.test_evaluator = [*evaluators, dict(type='DumpDetResults', out_file_path=out)]


def _is_installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


def _first_line(error: BaseException) -> str:
    """The first line of the error that began it all: mmengine wraps a failed import in a long text of its own."""
    while error.__cause__ or (isinstance(error, ImportError) and isinstance(error.__context__, ImportError)):
        error = error.__cause__ or error.__context__
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__


def _default_work_dir(config: str) -> Path:
    """work_dirs/cascade/convnext_t for .../configs/cascade/convnext_t.py: recipes share their file names."""
    return Path('work_dirs', *recipe_parts(config))


def _backbones_in(model: dict) -> Iterator[tuple[type, dict]]:
    """The class, ours or derived from it, and the arguments of every ConvNeXt in a model's config."""
    for holder in dicts_in({'model': model}):
        for key, settings in holder.items():
            kind = settings.get('type') if isinstance(settings, dict) else None
            if short_name(kind) == 'ConvNeXt' or 'backbone' in key:
                found = ConvNeXt if short_name(kind) == 'ConvNeXt' else class_of(kind, MODELS)
                if found is not None and issubclass(found, ConvNeXt):
                    yield found, {k: v for k, v in settings.items() if k not in ('type', '_scope_')}


def _data_paths(dataset: dict) -> Iterator[str]:
    """The folders and files a dataset config names, joined as mmengine's BaseDataset joins them."""
    if not ({'data_root', 'ann_file', 'data_prefix'} & set(dataset)) or dataset.get('backend_args'):
        return
    root = dataset.get('data_root') or ''
    prefixes = [p for p in (dataset.get('data_prefix') or {}).values() if isinstance(p, str)]
    for path in (root, dataset.get('ann_file'), *prefixes):
        if path and '://' not in os.path.join(root, path):
            yield os.path.join(root, path) if path != root else root


def _check_there(path: str, split: str) -> None:
    if not os.path.exists(path):
        raise UsageError(
            f"no {split} data at '{os.path.abspath(path)}': put or link them there, or set COCO_ROOT, "
            "ADE20K_ROOT or SHAPES_ROOT to their folder (README, 'Data')"
        )
    if path.endswith('.json') and not _is_whole_json(path):
        raise UsageError(f'{path} is not a whole JSON file: download or write it again')


def _is_whole_json(path: str) -> bool:
    """Whether a file begins and ends as JSON, as a broken download does not; COCO's are too large to read twice."""
    with open(path, 'rb') as file:
        first = file.read(64).lstrip()[:1]
        file.seek(max(os.path.getsize(path) - 64, 0))
        return first + file.read().rstrip()[-1:] in (b'{}', b'[]')


def _check_new(path: str, option: str) -> None:
    """Raise UsageError where a result would overwrite something."""
    if os.path.isfile(path) or (os.path.isdir(path) and os.listdir(path)):
        raise UsageError(f"{option} '{path}' exists already: give another place")


def _is_first_process() -> bool:
    ranks = (os.environ.get(name) for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'))
    return next((rank for rank in ranks if rank is not None), '0') == '0'


def _unwrapped(model: nn.Module) -> nn.Module:
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model
