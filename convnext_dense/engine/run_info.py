"""`run.json`: the facts about a training session that plots and tables need.

Every session (a start or a resume) writes its own file into its log folder, `WORK_DIR/TIMESTAMP/run.json`, before its
first iteration. `read_run_info` reads it back.
"""

import dataclasses
import json
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop

from ..errors import UsageError
from .atomic_files import warn_on_disk_full, write_atomic
from .progress import BatchSizes, batch_sizes

RUN_INFO_FILE = 'run.json'  # name of the file in the log folder of a session
POSITIVE = tuple(field.name for field in dataclasses.fields(BatchSizes))
VERSIONED_PACKAGES = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'convnext_dense')


@dataclass(frozen=True)
class ParamGroup:
    """Parameters with the same optimizer settings.

    Attributes:
        name: 'layer_3_decay' or 'layer_3_no_decay' under layer-wise learning rate decay, else 'decay' or 'no_decay'.
        layer_id: From 0, the stem, to N + 1, everything outside the backbone; None without layer-wise decay.
        lr: Base learning rate, before warmup and schedules.
        lr_scale: `lr` divided by the learning rate of the optimizer.
        weight_decay: Weight decay.
        num_params: Number of trainable parameters.
    """

    name: str
    layer_id: int | None
    lr: float
    lr_scale: float
    weight_decay: float
    num_params: int


@dataclass(frozen=True)
class RunInfo(BatchSizes):
    """The content of `run.json`; the keys of the file are the attributes.

    Attributes:
        config_file: Path of the session's config; None if it did not come from a file.
        precision: 'float32', 'float16' or 'bfloat16'.
        by_epoch: Whether the length of the run is counted in epochs.
        max_epochs: Length in epochs; None if it is counted in iterations.
        max_iters: Length in iterations.
        start_epoch: Finished epochs when the session started; 0 for a new run.
        start_iter: Finished iterations when the session started; 0 for a new run.
        param_groups: Parameter groups, by layer.
        versions: Version of Python ('python') and of each package that is loaded, by name.
    """

    config_file: str | None
    precision: str
    by_epoch: bool
    max_epochs: int | None
    max_iters: int
    start_epoch: int
    start_iter: int
    param_groups: list[ParamGroup]
    versions: dict[str, str]

    @property
    def layer_lr_scales(self) -> dict[int, float]:
        """Learning rate scale by layer id; empty without layer-wise decay."""
        return {group.layer_id: group.lr_scale for group in self.param_groups if group.layer_id is not None}


def read_run_info(log_dir: str | Path) -> RunInfo | None:
    """Read the `run.json` of a session.

    Args:
        log_dir: The session's log folder, `WORK_DIR/TIMESTAMP`.

    Returns:
        The facts; None if the session wrote none (it is older, or ended before its first iteration).

    Raises:
        UsageError: If the file is damaged.
    """
    file = Path(log_dir, RUN_INFO_FILE)
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
        groups = [ParamGroup(**_check_types(ParamGroup, group)) for group in content['param_groups']]
        return RunInfo(**_check_types(RunInfo, content) | dict(param_groups=groups))
    except (ValueError, TypeError, KeyError, OSError, RecursionError) as error:
        raise UsageError(f'{file} is damaged ({type(error).__name__}: {error}): remove it') from error


def _check_types(cls: type, content: dict) -> dict:
    """Check the types of a dataclass's attributes from a file, and return them; keys of later versions are dropped."""
    values = {field.name: content[field.name] for field in dataclasses.fields(cls)}
    for field in dataclasses.fields(cls):
        value = values[field.name]
        kind = dict if field.name == 'versions' else list if field.name == 'param_groups' else field.type
        is_bool = isinstance(value, bool)  # which is an int for Python
        if not isinstance(value, kind | int if kind is float else kind) or is_bool is not (kind is bool):
            raise TypeError(f'{field.name} is {value!r:.40}')
        if field.name in POSITIVE and value < 1:
            raise ValueError(f'{field.name} is {value}')
    return values


class RunInfoHook(Hook):
    """Writes `run.json` before the first iteration."""

    priority = 'LOWEST'  # after a resumed run has restored its progress

    def before_train(self, runner) -> None:
        """Write the file on rank 0."""
        if is_main_process():
            with warn_on_disk_full(runner):
                content = json.dumps(dataclasses.asdict(collect_run_info(runner)), indent=2)
                write_atomic(Path(runner.log_dir, RUN_INFO_FILE), f'{content}\n'.encode())


def collect_run_info(runner) -> RunInfo:
    """Return the facts of a training session whose model, optimizer and loop are built."""
    loop = runner.train_loop
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    return RunInfo(
        **batch_sizes(runner),
        config_file=runner.cfg.filename,
        precision=_precision(runner.optim_wrapper),
        by_epoch=by_epoch,
        max_epochs=loop.max_epochs if by_epoch else None,
        max_iters=loop.max_iters,
        start_epoch=runner.epoch,
        start_iter=runner.iter,
        param_groups=_param_groups(runner.optim_wrapper),
        versions=_versions(),
    )


def _precision(optim_wrapper: OptimWrapper) -> str:
    if not isinstance(optim_wrapper, AmpOptimWrapper):
        return 'float32'
    return str(optim_wrapper.cast_dtype or 'float16').removeprefix('torch.')


def _param_groups(optim_wrapper: OptimWrapper | OptimWrapperDict) -> list[ParamGroup]:
    """Return the parameter groups of an optimizer; groups with the same settings are merged."""
    wrappers = optim_wrapper.values() if isinstance(optim_wrapper, OptimWrapperDict) else [optim_wrapper]
    counts = {}
    for wrapper in wrappers:
        base_lr = wrapper.optimizer.defaults.get('lr')
        for group in wrapper.optimizer.param_groups:
            lr, weight_decay = group.get('initial_lr', group['lr']), group.get('weight_decay', 0.0)
            layer_id = _layer_id(group)
            kind = 'decay' if weight_decay else 'no_decay'
            name = kind if layer_id is None else f'layer_{layer_id}_{kind}'
            scale = group.get('lr_scale', lr / base_lr if base_lr else 1.0)
            key = (name, layer_id, float(lr), float(scale), float(weight_decay))
            counts[key] = counts.get(key, 0) + sum(p.numel() for p in group['params'])
    return [ParamGroup(*key, num_params) for key, num_params in counts.items()]


def _layer_id(group: dict) -> int | None:
    """Return the layer id of a parameter group; mmdet's and mmseg's constructors have it in the name of the group."""
    name = re.match(r'(?:layer|stage)_(\d+)_', str(group.get('group_name', '')))
    return group.get('layer_id', int(name[1]) if name else None)


def _versions() -> dict[str, str]:
    loaded = {name: getattr(sys.modules.get(name), '__version__', None) for name in VERSIONED_PACKAGES}
    return {'python': platform.python_version()} | {k: str(v) for k, v in loaded.items() if v is not None}
