"""Change the length of a training; warmup, milestones, decay, evaluation and checkpoints are scaled with it."""

from collections.abc import Mapping
from itertools import accumulate

from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, PARAM_SCHEDULERS

from ..errors import UsageError
from ..type_names import is_type, short_name
from .options import is_explicit, reapply_options
from .tree import as_list, iter_dicts
from .value_types import check_value_types

# Settings of hooks and models in epochs or iterations, and the defaults of the classes that have them.
HOOK_START_KEYS = ('begin_epoch', 'begin_iter', 'switch_epoch', 'num_last_epochs')
MODEL_WARMUP_KEYS = ('initial_epoch', 'warmup_iters')  # in TOOD and BoxInst
IMPLICIT_DEFAULTS = {
    'YOLOXModeSwitchHook': (HOOKS, 'num_last_epochs', 15),
    'BoxInstMaskHead': (MODELS, 'warmup_iters', 10_000),
}
# Schedulers that multiply the value by a factor at their begin and divide it by the factor at a later step.
FACTOR_SCHEDULERS = ('LinearParamScheduler', 'ConstantParamScheduler')
UNIT_NAMES = {'epochs': 'epochs', 'iters': 'iterations'}


def scale_schedule(
    config: Config, epochs: int | None = None, iters: int | None = None, options: Mapping[str, object] | None = None
) -> str | None:
    """Change the length of a training and scale all that depends on it proportionally.

    Warmup, milestones, decay, evaluation and checkpoint intervals are scaled unless the command line sets them.

    Args:
        config: Config; it is changed in place.
        epochs: New length of an epoch-based training.
        iters: New length of an iteration-based training. At most one of the two may be set.
        options: Settings from the command line.

    Returns:
        One line for the log; None without a new length.

    Raises:
        UsageError: If the config uses the other unit, or the length is not positive.
    """
    if epochs is None and iters is None:
        return None
    unit, length = ('epochs', epochs) if epochs is not None else ('iters', iters)
    options = options or {}
    old_length = _check_length(config, unit, length, options)
    ratio = length / old_length
    config.train_cfg[f'max_{unit}'] = length
    _scale_intervals(config, ratio, length)
    for scheduler in as_list(config.get('param_scheduler')):
        _scale_param_scheduler(scheduler, ratio, length if unit == 'epochs' else None)
    model_keys = [key for key in options if key.split('.')[-1] in MODEL_WARMUP_KEYS]
    reapply_options(
        config, options, 'train_cfg.', 'default_hooks.checkpoint.', 'custom_hooks.', 'param_scheduler.', *model_keys
    )
    line = f'{length:,} {unit} instead of {old_length:,}: warmup, steps and decay are scaled proportionally'
    removed = _remove_ineffective_schedulers(config, length)
    if removed:
        step = 'epoch' if unit == 'epochs' else 'iteration'
        line += (
            f'; {", ".join(removed)} would last less than one {step} and {"is" if len(removed) == 1 else "are"} removed'
        )
    return line


def _check_length(config: Config, unit: str, length: int, options: Mapping[str, object]) -> int:
    """Return the length of a config; raise UsageError if it cannot be changed."""
    if is_explicit(options, f'train_cfg.max_{unit}'):
        raise UsageError(f'--{unit} {length} and --cfg-options train_cfg.max_{unit}: give one of them')
    check_value_types(config)
    old_length = config.train_cfg.get(f'max_{unit}')
    if old_length is None:
        other_unit = 'iters' if unit == 'epochs' else 'epochs'
        raise UsageError(f'--{unit}: this config counts {UNIT_NAMES[other_unit]}: use --{other_unit}')
    if length < 1:
        raise UsageError(f'--{unit} {length}: give a positive number')
    return old_length


def _scale_intervals(config: Config, ratio: float, length: int) -> None:
    """Scale the intervals and starts of evaluation, checkpoints, hooks and warmups in the model."""
    train_cfg, saving = config.train_cfg, (config.get('default_hooks') or {}).get('checkpoint') or {}
    _fill_implicit_defaults(config)
    counts = [(train_cfg, 'val_interval'), (train_cfg, 'val_begin'), (saving, 'interval'), (saving, 'save_begin')]
    counts += [(hook, key) for hook in config.get('custom_hooks') or [] for key in HOOK_START_KEYS]
    counts += [(part, key) for part in iter_dicts(config.get('model')) for key in MODEL_WARMUP_KEYS]
    for holder, key in counts:
        if isinstance(holder.get(key), (int, float)) and holder[key] > 0:
            holder[key] = max(1, round(holder[key] * ratio))
            if key in ('begin_epoch', 'switch_epoch'):  # counted from 0; leaves one epoch for what begins there
                holder[key] = min(holder[key], max(1, length - 1))
    if train_cfg.get('dynamic_intervals'):
        train_cfg.dynamic_intervals = [
            tuple(max(1, round(n * ratio)) for n in pair) for pair in train_cfg.dynamic_intervals
        ]


def _remove_ineffective_schedulers(config: Config, length: int) -> list[str]:
    """Remove the schedulers that have no effect any more, and return the names of their types."""
    schedulers = as_list(config.get('param_scheduler'))
    removed = [scheduler for scheduler in schedulers if not _has_effect(scheduler, length)]
    if removed:
        config.param_scheduler = [scheduler for scheduler in schedulers if _has_effect(scheduler, length)]
    return [str(short_name(scheduler.get('type'))) for scheduler in removed]


def _fill_implicit_defaults(config: Config) -> None:
    """Write the defaults of classes (`IMPLICIT_DEFAULTS`) into the config, so that they can be scaled."""
    for name, (registry, key, default) in IMPLICIT_DEFAULTS.items():
        for part in iter_dicts([config.get('custom_hooks'), config.get('model')]):
            if is_type(part.get('type'), registry, name):
                part.setdefault(key, default)


def _scale_param_scheduler(scheduler: dict, ratio: float, epochs: int | None) -> None:
    """Scale begin, steps and end of a scheduler in a training of `epochs` (None if it is iteration-based).

    mmengine counts `end - begin - 1` iterations, and as many steps of factors, so their `end` is one too large.
    """
    by_epoch = scheduler.get('by_epoch', True)
    extra = end_offset(scheduler)
    minimum = 0 if by_epoch and epochs == 1 else 1  # in a single epoch only the longest scheduler remains
    old_duration = _duration(scheduler, extra)
    if scheduler.get('begin'):
        scheduler['begin'] = max(minimum, round(scheduler['begin'] * ratio))
    if 'end' in scheduler:
        scheduler['end'] = max(minimum, round((scheduler['end'] - extra) * ratio)) + extra
        if by_epoch and epochs:
            scheduler['end'] = min(scheduler['end'], epochs)
    duration = _duration(scheduler, extra)
    if old_duration and duration and duration > 0:
        ratio = duration / old_duration  # the settings below are relative to `begin`
    for key in ('T_max', 'step_size', 'total_steps'):
        if scheduler.get(key):
            scheduler[key] = max(1, round(scheduler[key] * ratio))
    if 'milestones' in scheduler:
        scheduler['milestones'] = sorted({max(1, round(m * ratio)) for m in scheduler['milestones']})
    if 'periods' in scheduler:
        _scale_periods(scheduler, ratio)


def _scale_periods(scheduler: dict, ratio: float) -> None:
    """Scale the periods of a scheduler with restarts, and remove those that become empty."""
    ends = [round(end * ratio) for end in accumulate(scheduler['periods'])]
    ends[-1] = max(ends[-1], 1)
    periods = [end - begin for begin, end in zip([0, *ends], ends)]
    remaining = [i for i, period in enumerate(periods) if period > 0]
    weights = scheduler.get('restart_weights')
    if isinstance(weights, (list, tuple)) and len(weights) == len(periods):
        scheduler['restart_weights'] = [weights[i] for i in remaining]
    scheduler['periods'] = [periods[i] for i in remaining]


def _duration(scheduler: dict, extra: int) -> int | None:
    """Return the duration of a scheduler; None if it has no end."""
    return scheduler['end'] - extra - scheduler.get('begin', 0) if 'end' in scheduler else None


def _has_effect(scheduler: dict, length: int) -> bool:
    """Whether a scheduler changes anything in a training of this length."""
    begin, end = scheduler.get('begin', 0), scheduler.get('end')
    if end is None or end <= begin:
        return end is None
    has_steps = end - begin > 1 or not _is_factor(scheduler) or not scheduler.get('by_epoch', True)
    return has_steps or (begin > 0 and end >= length)  # otherwise its factor would never be undone


def end_offset(scheduler: dict) -> int:
    """Return by how much mmengine's `end` of a scheduler exceeds its last epoch or iteration."""
    return 1 if not scheduler.get('by_epoch', True) or _is_factor(scheduler) else 0


def _is_factor(scheduler: dict) -> bool:
    converted = scheduler.get('convert_to_iter_based')
    return not converted and is_type(scheduler.get('type'), PARAM_SCHEDULERS, *FACTOR_SCHEDULERS)
