"""What the tools share: a config from the command line, checks before anything is built, errors in one line."""

import argparse
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import CheckpointLoader, Runner, find_latest_checkpoint
from mmengine.runner.checkpoint import get_torchvision_models
from torch import nn

from .backbone import ConvNeXt
from .errors import UsageError
from .fitting import check_same_accumulation, dicts_in, listed, n_processes, set_inputs
from .paper import figures_of
from .weights.loading import PretrainedConvNeXt, check_same, match
from .weights.reading import read
from .weights.zoo import URLS, fetch, is_url, locate

# All from which mmengine loads checkpoints: what our loader does not find there is an error.
PLACES = ('', 'http://', 'https://', 'torchvision://', 'modelzoo://', 'open-mmlab://', 'openmmlab://', 'mmcls://')
PLACES += ('pavi://', 's3://', r'(\S+\:)?s3://')
RUNS_WITHOUT_AMP = ('cpu', 'mps')  # mmengine's AmpOptimWrapper refuses these


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input ends the process with one line and exit code 2; a bug keeps its traceback."""
    try:
        yield
    except UsageError as error:
        sys.exit(_say(f'error: {error}', 2))
    except OSError as error:
        if not error.filename:
            raise
        sys.exit(_say(f'error: {error.filename}: {error.strerror}', 2))
    except KeyboardInterrupt:
        sys.exit(_say('interrupted: what was saved is kept', 130))


class Options(DictAction):
    """mmengine's KEY=VALUE options; anything else is a usage error."""

    def __call__(self, parser, namespace, values, option_string=None):
        wrong = next((value for value in values if '=' not in value), None)
        if wrong is not None:
            parser.error(f"{option_string} '{wrong}': give KEY=VALUE, such as train_cfg.max_epochs=12")
        super().__call__(parser, namespace, values, option_string)


def config_parser(description: str, **config) -> argparse.ArgumentParser:
    """The arguments of every tool that reads a config; `config` is for argparse."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument('config', help='a recipe, such as configs/cascade/convnext_t.py', **config)
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=Options,
        default={},
        metavar='KEY=VALUE',
        help='settings that replace those of the config, such as train_cfg.max_epochs=12',
    )
    return parser


def run_parser(description: str) -> argparse.ArgumentParser:
    """The arguments of every tool that runs a config, as users of mmdet and mmseg know them."""
    parser = config_parser(description)
    parser.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/ and the recipe)')
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def load_config(path: str, options: dict, needed: tuple[str, ...] = ('model',)) -> Config:
    """A config file with the command line's options filled in.

    Raises:
        UsageError: the config cannot be read, lacks one of the `needed` keys, or what it needs is not installed.
    """
    if not os.path.isfile(path):
        raise UsageError(f"no config '{path}': give the path of a .py file, such as configs/cascade/convnext_t.py")
    try:
        config = Config.fromfile(path)
        config.merge_from_dict(options)
    except Exception as error:  # a config is a program: it can fail in any way
        raise UsageError(f'{path}: {type(error).__name__}: {_first_line(error)}') from error
    for key in needed:
        if not config.get(key):
            raise UsageError(f'{path} has no {key}: give a whole recipe, such as configs/cascade/convnext_t.py')
    check_installed(config.get('default_scope', 'mmengine'))
    check_backbones(config.get('model', {}))
    return config


def load_run(args: argparse.Namespace, needed: tuple[str, ...], subfolder: str = '') -> Config:
    """The config of a command line that runs it, with its launcher and its work dir, or a folder in it.

    Raises:
        UsageError: as `load_config`; the launcher's variables are not set; the work dir's copy of the config would
            overwrite the config itself.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    config = load_config(args.config, args.cfg_options, needed)
    n_processes(args.launcher)
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


def check_installed(library: str) -> None:
    """Raise UsageError where mmcv lacks its operators or `library` (mmdet, mmseg) cannot be imported."""
    try:
        importlib.import_module('mmcv')
        importlib.import_module(library)
    except ImportError as error:
        raise UsageError(f"{error}: run pip install --no-build-isolation 'convnext_dense[onedl]'") from error
    try:
        importlib.import_module('mmcv._ext')
    except ImportError as error:
        raise UsageError(
            f'mmcv is installed without its operators ({_first_line(error)}): run pip install --no-build-isolation '
            '--no-cache-dir --no-deps --force-reinstall onedl-mmcv==2.3.6'
        ) from error


def check_backbones(model: dict) -> None:
    """Raise UsageError where a ConvNeXt in a model config cannot be built; costs no memory."""
    for settings in _backbones_in(model):
        try:
            with torch.device('meta'):
                ConvNeXt(**settings)
        except TypeError as error:
            raise UsageError(f'backbone: {_first_line(error)}') from error


def check_pretrained(model: dict) -> None:
    """Raise UsageError where the weights that a ConvNeXt's `init_cfg` names cannot be had or do not fit it. On the meta
    device, before data or a model take time; a download is left to the first process."""
    for settings in _backbones_in(model):
        with torch.device('meta'):
            backbone = ConvNeXt(**settings)
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
        wrapper.type, wrapper.dtype = 'AmpOptimWrapper', amp_dtype
    if wrapper.get('type') == 'AmpOptimWrapper' and get_device() in RUNS_WITHOUT_AMP:
        raise UsageError(
            f'mixed precision ({wrapper.get("dtype", "float16")}) needs a GPU and none was found: '
            '--amp-dtype float32 trains in full precision'
        )


def set_resume(config: Config, resume: str | None) -> str | None:
    """Fill in what `--resume [CHECKPOINT]` means and return the checkpoint to go on from, if any.

    Raises:
        UsageError: the checkpoint is not there, or the work dir holds a run and `--resume` was not given.
    """
    work_dir = Path(config.work_dir)
    holds_run = (work_dir / 'last_checkpoint').exists() or any(work_dir.glob('*.pth'))
    if resume is None:
        if holds_run:
            raise UsageError(
                f'{work_dir} holds a run already: --resume goes on with it, another --work-dir starts anew'
            )
        return None
    checkpoint = find_latest_checkpoint(str(work_dir)) if resume == 'auto' else resume
    if checkpoint:
        checkpoint = local_checkpoint(checkpoint)
        if holds_run and Path(checkpoint).resolve().parent != work_dir.resolve():
            raise UsageError(f'{work_dir} holds another run than {checkpoint}: give another --work-dir')
    elif holds_run:
        raise UsageError(
            f'{work_dir} has checkpoints but no last_checkpoint: --resume CHECKPOINT says which to go on from'
        )
    config.resume, config.load_from = True, checkpoint
    return checkpoint


def check_resume(config: Config, checkpoint: str | None) -> None:
    """Raise UsageError where `checkpoint` is no state of a training, or counts its iterations otherwise than the config
    that is to go on from it."""
    if not checkpoint:
        return
    content = read(checkpoint)
    if not {'meta', 'state_dict', 'optimizer'} <= set(content):
        raise UsageError(
            f'{checkpoint} holds weights alone: --cfg-options load_from={checkpoint} starts a run from them'
        )
    check_same_accumulation(config, content['meta'], checkpoint)


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
    CheckpointLoader.register_scheme(prefixes=PLACES, loader=_safely, force=True)
    try:
        runner = RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)
    except (KeyError, TypeError, AssertionError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f'the config cannot be built: {_first_line(error)}') from error
    model = _unwrapped(runner.model)
    if checkpoint:
        check_same(model, checkpoint)
    elif config.get('load_from'):
        backbones = tuple(f'{name}.' for name, module in model.named_modules() if isinstance(module, ConvNeXt))
        check_same(model, config.load_from, backbones)
    return runner


def _safely(filename: str, map_location=None) -> dict:
    """mmengine's loader of files for what our tools run: its own unpickles in full where the safe way fails, and a
    resumed runner runs the config in the file."""
    if filename.startswith('torchvision://'):
        filename = get_torchvision_models()[filename.removeprefix('torchvision://')]
    content = read(local_checkpoint(filename), mapped=False)
    if isinstance(content.get('meta'), dict):
        content['meta'] = {k: v for k, v in content['meta'].items() if k not in ('cfg', 'config')}
    return content


def summary(metrics: dict[str, float]) -> str:
    """An evaluation in a line: box and mask AP (percent, as the paper gives them) or mIoU, else all there is."""
    found = [
        f'{name} {value:.2f}' if name == 'mIoU' else f'{name} {value:.1f}'
        for name, value in figures_of(metrics).items()
    ]
    found += [f'{name} {metrics[name]:.2f}' for name in ('mAcc', 'aAcc') if name in metrics]
    return '  '.join(found or (f'{key} {value}' for key, value in metrics.items()))


def set_pictures(config: Config, folder: str | None, show: bool, wait_time: float) -> None:
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
    if folder and 'Seg' in hook.type:
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
        evaluators[0].output_dir = out
    elif not out.endswith(('.pkl', '.pickle')):
        raise UsageError(f"--out '{out}': detections are kept in a file whose name ends with .pkl")
    else:
        config.test_evaluator = [*evaluators, dict(type='DumpDetResults', out_file_path=out)]


def _say(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


def _first_line(error: BaseException) -> str:
    """The first line of the error that began it all: mmengine wraps a failed import in a long text of its own."""
    while error.__cause__ or (isinstance(error, ImportError) and isinstance(error.__context__, ImportError)):
        error = error.__cause__ or error.__context__
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__


def _default_work_dir(config: str) -> Path:
    """work_dirs/cascade/convnext_t for .../configs/cascade/convnext_t.py: recipes share their file names."""
    path = Path(config).absolute().with_suffix('')
    parents = path.parts[:-1]
    if 'configs' not in parents:
        return Path('work_dirs', path.name)
    after = len(parents) - parents[::-1].index('configs')
    return Path('work_dirs', *path.parts[after:])


def _backbones_in(model: dict) -> Iterator[dict]:
    for settings in dicts_in(model):
        if settings.get('type') in ('ConvNeXt', 'convnext_dense.ConvNeXt', ConvNeXt):
            yield {key: value for key, value in settings.items() if key not in ('type', '_scope_')}


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
    return os.environ.get('RANK', os.environ.get('SLURM_PROCID', '0')) == '0'


def _unwrapped(model: nn.Module) -> nn.Module:
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model
