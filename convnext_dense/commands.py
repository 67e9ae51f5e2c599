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
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint
from torch import nn

from .backbone import ConvNeXt
from .errors import UsageError
from .fitting import check_same_accumulation
from .weights.loading import check_same, read
from .weights.zoo import URLS, fetch, is_url, locate

RUNS_WITHOUT_AMP = ('cpu', 'mps')  # mmengine's AmpOptimWrapper refuses these


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input ends the process with one line and exit code 2; a bug keeps its traceback."""
    try:
        yield
    except UsageError as error:
        sys.exit(_say(f'error: {error}', 2))
    except KeyboardInterrupt:
        sys.exit(_say('interrupted: what was saved is kept, --resume goes on from it', 130))


def config_parser(description: str, **config) -> argparse.ArgumentParser:
    """The arguments of every tool that reads a config; `config` is for argparse."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument('config', help='a recipe, such as configs/cascade/convnext_t.py', **config)
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
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


def load_config(path: str, options: dict) -> Config:
    """A config file with the command line's options filled in.

    Raises:
        UsageError: the config cannot be read, or what it needs is not installed.
    """
    if not os.path.isfile(path):
        raise UsageError(f"no config '{path}': give the path of a .py file, such as configs/cascade/convnext_t.py")
    try:
        config = Config.fromfile(path)
        config.merge_from_dict(options)
    except (SyntaxError, OSError, KeyError, TypeError, ValueError, ImportError, AssertionError) as error:
        raise UsageError(f'{path}: {_first_line(error)}') from error
    check_installed(config.get('default_scope', 'mmengine'))
    check_backbones(config.get('model', {}))
    return config


def load_run(args: argparse.Namespace) -> Config:
    """The config of a command line that runs it, with its work dir and launcher; raises as `load_config`."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    config = load_config(args.config, args.cfg_options)
    config.launcher = args.launcher
    config.work_dir = args.work_dir or config.get('work_dir') or str(_default_work_dir(args.config))
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
    """Raise UsageError where the `init_cfg` of a ConvNeXt names a checkpoint that is nowhere."""
    for settings in _backbones_in(model):
        init_cfg = settings.get('init_cfg') or []
        for cfg in [init_cfg] if isinstance(init_cfg, dict) else init_cfg:
            if 'checkpoint' in cfg:
                locate(cfg['checkpoint'])


def check_data(config: Config, splits: tuple[str, ...]) -> None:
    """Raise UsageError naming the first folder or annotation file of these splits ('train', 'val', 'test') that is
    not there."""
    for split in splits:
        for dataset in _dicts_in(config.get(f'{split}_dataloader') or {}):
            for path in _data_paths(dataset):
                _check_exists(path, split)
        for evaluator in _dicts_in(config.get(f'{split}_evaluator') or {}):
            if evaluator.get('ann_file'):
                _check_exists(evaluator['ann_file'], split)


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
    if resume is None:
        if _is_first_process() and ((work_dir / 'last_checkpoint').exists() or any(work_dir.glob('*.pth'))):
            raise UsageError(
                f'{work_dir} holds a run already: --resume goes on with it, another --work-dir starts anew'
            )
        return None
    checkpoint = find_latest_checkpoint(str(work_dir)) if resume == 'auto' else resume
    if checkpoint:
        checkpoint = local_checkpoint(checkpoint)
    config.resume, config.load_from = True, checkpoint
    return checkpoint


def check_resume(config: Config, checkpoint: str | None) -> None:
    """Raise UsageError where `checkpoint` counts its iterations otherwise than the config that is to go on from it."""
    if checkpoint:
        check_same_accumulation(config, read(checkpoint).get('meta') or {}, checkpoint)


def local_checkpoint(source: str) -> str:
    """The file of a checkpoint, downloaded where `source` is a URL or a known name; UsageError where there is none."""
    if not os.path.isfile(source) and not is_url(source) and source not in URLS:
        raise UsageError(f"no checkpoint '{source}': give the path of a .pth file, a URL or a recipe's released name")
    return str(fetch(source))


def build_runner(config: Config, checkpoint: str | None) -> Runner:
    """The runner of a config.

    Raises:
        UsageError: `checkpoint`, which the runner is going to load, is not exactly of its model.
    """
    runner = RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)
    if checkpoint:
        check_same(_unwrapped(runner.model), checkpoint)
    return runner


def summary(metrics: dict[str, float]) -> str:
    """An evaluation in a line: box and mask AP (percent, as the paper gives them) or mIoU, else all there is."""
    found = []
    for title, key in (('box', 'coco/bbox_mAP'), ('mask', 'coco/segm_mAP')):
        if key in metrics:
            ap, ap50, ap75 = (100 * metrics[k] for k in (key, f'{key}_50', f'{key}_75'))
            found.append(f'{title} AP {ap:.1f}  {title} AP50 {ap50:.1f}  {title} AP75 {ap75:.1f}')
    if 'mIoU' in metrics:
        found.append(f'mIoU {metrics["mIoU"]:.2f}  mAcc {metrics["mAcc"]:.2f}  aAcc {metrics["aAcc"]:.2f}')
    return '  '.join(found or (f'{key} {value}' for key, value in metrics.items()))


def set_pictures(config: Config, folder: str | None, show: bool, wait_time: float) -> None:
    """Have the library's visualization hook draw predictions beside the truth, into a folder or a window.

    Raises:
        UsageError: the config has no such hook.
    """
    if not (folder or show):
        return
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
    evaluator = config.test_evaluator
    if config.get('default_scope') == 'mmseg':
        evaluator.update(output_dir=out, keep_results=True)
    elif not out.endswith(('.pkl', '.pickle')):
        raise UsageError(f"--out '{out}': detections are kept in a file whose name ends with .pkl")
    else:
        config.test_evaluator = [evaluator, dict(type='DumpDetResults', out_file_path=out)]


def _say(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


def _first_line(error: Exception) -> str:
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


def _dicts_in(value) -> Iterator[dict]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _dicts_in(item)


def _backbones_in(model: dict) -> Iterator[dict]:
    for settings in _dicts_in(model):
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


def _check_exists(path: str, split: str) -> None:
    if not os.path.exists(path):
        raise UsageError(
            f"no {split} data at '{os.path.abspath(path)}': put or link them there, or set COCO_ROOT, "
            "ADE20K_ROOT or SHAPES_ROOT to their folder (README, 'Data')"
        )


def _is_first_process() -> bool:
    return os.environ.get('RANK', os.environ.get('SLURM_PROCID', '0')) == '0'


def _unwrapped(model: nn.Module) -> nn.Module:
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model
