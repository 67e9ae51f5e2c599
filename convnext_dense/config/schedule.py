"""A training of another length: warmup, milestones, decay, evaluation and checkpoints are scaled with it."""

from collections.abc import Mapping
from itertools import accumulate

from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, PARAM_SCHEDULERS

from ..errors import UsageError
from ..type_names import is_type, short_name
from .options import is_explicit, reapply_options
from .tree import as_list, iter_dicts
from .value_types import check_value_types

# Settings of hooks and of models that count epochs or iterations, and those that classes have where configs are silent.
HOOK_START_KEYS = ('begin_epoch', 'begin_iter', 'switch_epoch', 'num_last_epochs')
MODEL_WARMUP_KEYS = ('initial_epoch', 'warmup_iters')  # TOOD's and BoxInst's
IMPLICIT_DEFAULTS = {
    'YOLOXModeSwitchHook': (HOOKS, 'num_last_epochs', 15),
    'BoxInstMaskHead': (MODELS, 'warmup_iters', 10_000),
}
# Schedules that multiply by a factor where they begin, and divide by it at a later step alone.
FACTOR_SCHEDULERS = ('LinearParamScheduler', 'ConstantParamScheduler')


def scale_schedule(
    config: Config, epochs: int | None = None, iters: int | None = None, options: Mapping[str, object] | None = None
) -> str | None:
    """Make a training last `epochs`, or `iters` where it counts iterations; warmup, steps, decay, evaluation and
    checkpoints keep their share of it, but for those that the command line's `options` set.

    Returns one line that says so; None where neither is given.

    Raises:
        UsageError: the config counts in the other unit, or a length is not positive.
    """
    if epochs is None and iters is None:
        return None
    unit, wanted = ('epochs', epochs) if epochs is not None else ('iters', iters)
    options = options or {}
    if is_explicit(options, f'train_cfg.max_{unit}'):
        raise UsageError(f'--{unit} {wanted} and --cfg-options train_cfg.max_{unit}: give one of them')
    check_value_types(config)
    train_cfg = config.train_cfg
    before = train_cfg.get(f'max_{unit}')
    if before is None:
        other = 'iters' if unit == 'epochs' else 'epochs'
        raise UsageError(f'--{unit}: this config counts {"iterations" if other == "iters" else other}, give --{other}')
    if wanted < 1:
        raise UsageError(f'--{unit} {wanted}: give a positive number')
    share = wanted / before
    train_cfg[f'max_{unit}'] = wanted
    saving = (config.get('default_hooks') or {}).get('checkpoint') or {}
    hooks = config.get('custom_hooks') or []
    _fill_implicit_defaults(config)
    timed = [(train_cfg, 'val_interval'), (train_cfg, 'val_begin'), (saving, 'interval'), (saving, 'save_begin')]
    timed += [(hook, key) for hook in hooks for key in HOOK_START_KEYS]
    timed += [(part, key) for part in iter_dicts(config.get('model')) for key in MODEL_WARMUP_KEYS]
    for holder, key in timed:
        if isinstance(holder.get(key), (int, float)) and holder[key] > 0:
            holder[key] = max(1, round(holder[key] * share))
            if key in ('begin_epoch', 'switch_epoch'):  # counted from 0: there is a last epoch for what it begins
                holder[key] = min(holder[key], max(1, wanted - 1))
    if train_cfg.get('dynamic_intervals'):
        train_cfg.dynamic_intervals = [
            tuple(max(1, round(n * share)) for n in pair) for pair in train_cfg.dynamic_intervals
        ]
    for scheduler in as_list(config.get('param_scheduler')):
        _scale_param_scheduler(scheduler, share, wanted if unit == 'epochs' else None)
    of_model = [key for key in options if key.split('.')[-1] in MODEL_WARMUP_KEYS]
    reapply_options(
        config, options, 'train_cfg.', 'default_hooks.checkpoint.', 'custom_hooks.', 'param_scheduler.', *of_model
    )
    line = f'{wanted:,} {unit} instead of {before:,}: warmup, steps and decay keep their shares'
    left_out = [s for s in as_list(config.get('param_scheduler')) if not _has_effect(s, wanted)]
    if left_out:
        config.param_scheduler = [s for s in as_list(config.param_scheduler) if _has_effect(s, wanted)]
        names = ', '.join(str(short_name(scheduler.get('type'))) for scheduler in left_out)
        line += (
            f'; of {names} less than {"an epoch" if unit == "epochs" else "an iteration"} is left, so it is left out'
        )
    return line


def _fill_implicit_defaults(config: Config) -> None:
    """Write out what classes count by default."""
    for name, (registry, key, default) in IMPLICIT_DEFAULTS.items():
        for part in iter_dicts([config.get('custom_hooks'), config.get('model')]):
            if is_type(part.get('type'), registry, name):
                part.setdefault(key, default)


def _scale_param_scheduler(scheduler: dict, share: float, epochs: int | None) -> None:
    """Scale where a schedule begins, steps and ends, in a training of so many epochs. mmengine's counts of iterations,
    and of factors, are `end - begin - 1`, so that ends have one more than what they mean."""
    by_epoch = scheduler.get('by_epoch', True)
    extra = 1 if not by_epoch or _is_factor(scheduler) else 0
    least = 0 if by_epoch and epochs == 1 else 1  # nothing but the longest has a share in a single epoch
    before = _duration(scheduler, extra)
    if scheduler.get('begin'):
        scheduler['begin'] = max(least, round(scheduler['begin'] * share))
    if 'end' in scheduler:
        scheduler['end'] = max(least, round((scheduler['end'] - extra) * share)) + extra
        if by_epoch and epochs:
            scheduler['end'] = min(scheduler['end'], epochs)
    after = _duration(scheduler, extra)
    own = after / before if before and after and after > 0 else share  # what it counts, it counts from its begin
    for key in ('T_max', 'step_size', 'total_steps'):
        if scheduler.get(key):
            scheduler[key] = max(1, round(scheduler[key] * own))
    if 'milestones' in scheduler:
        scheduler['milestones'] = sorted({max(1, round(m * own)) for m in scheduler['milestones']})
    if 'periods' in scheduler:
        _scale_periods(scheduler, own)


def _scale_periods(scheduler: dict, share: float) -> None:
    """Scale the periods after which a schedule begins anew; those of which nothing is left are left out."""
    ends = [round(end * share) for end in accumulate(scheduler['periods'])]
    ends[-1] = max(ends[-1], 1)
    periods = [end - begin for begin, end in zip([0, *ends], ends)]
    kept = [i for i, period in enumerate(periods) if period > 0]
    weights = scheduler.get('restart_weights')
    if isinstance(weights, (list, tuple)) and len(weights) == len(periods):
        scheduler['restart_weights'] = [weights[i] for i in kept]
    scheduler['periods'] = [periods[i] for i in kept]


def _duration(scheduler: dict, extra: int) -> int | None:
    """How long a schedule lasts; None where it has no end."""
    return scheduler['end'] - extra - scheduler.get('begin', 0) if 'end' in scheduler else None


def _has_effect(scheduler: dict, wanted: int) -> bool:
    """Whether a schedule does what it is for in a training of this length."""
    begin, end = scheduler.get('begin', 0), scheduler.get('end')
    if end is None or end <= begin:
        return end is None
    is_whole = end - begin > 1 or not _is_factor(scheduler) or not scheduler.get('by_epoch', True)
    return is_whole or (begin > 0 and end >= wanted)  # else its factor would stay


def _is_factor(scheduler: dict) -> bool:
    converted = scheduler.get('convert_to_iter_based')
    return not converted and is_type(scheduler.get('type'), PARAM_SCHEDULERS, *FACTOR_SCHEDULERS)
