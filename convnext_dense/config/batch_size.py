"""A recipe fitted to the user's world: to the number of GPUs, on any of which the total batch of an update stays the
paper's, to another length, and to other inputs than RGB."""

import os
from collections.abc import Iterator, Mapping
from itertools import accumulate

from mmengine.config import Config
from mmengine.hooks import ParamSchedulerHook
from mmengine.registry import HOOKS, MODELS, PARAM_SCHEDULERS, TRANSFORMS
from torch import nn

from ..errors import UsageError
from ..paper.results import accumulation_of
from ..type_names import is_type, short_name
from .literal import read_dumped
from .options import is_explicit, restore
from .value_types import check_kinds

# The variable in which each launcher gives the number of processes, and the command that is one.
PROCESSES = {
    'pytorch': ('WORLD_SIZE', 'torchrun'),
    'slurm': ('SLURM_NTASKS', 'srun'),
    'mpi': ('OMPI_COMM_WORLD_SIZE', 'mpirun'),
}
SYNC_BN = ('SyncBN', 'MMSyncBN', 'NaiveSyncBN', 'SyncBatchNorm')  # in configs
# Where pipelines stand beside those of the data sets; a hook may put its own in their place.
OTHER_PIPELINES = ('custom_hooks', 'default_hooks', 'tta_pipeline')
# Steps of a pipeline that take colours, and those that make images of three channels, of which grey ones are not all.
OF_COLOURS = ('PhotoMetricDistortion', 'YOLOXHSVRandomAug', 'MixUp', 'CachedMixUp')
OF_THREE_CHANNELS = (*OF_COLOURS, 'Mosaic', 'CachedMosaic')
# Settings of hooks and of models that count epochs or iterations, and those that classes have where configs are silent.
OF_HOOKS = ('begin_epoch', 'begin_iter', 'switch_epoch', 'num_last_epochs')
OF_MODELS = ('initial_epoch', 'warmup_iters')  # TOOD's and BoxInst's
UNSAID = {
    'YOLOXModeSwitchHook': (HOOKS, 'num_last_epochs', 15),
    'BoxInstMaskHead': (MODELS, 'warmup_iters', 10_000),
}
# Schedules that multiply by a factor where they begin, and divide by it at a later step alone.
FACTORS = ('LinearParamScheduler', 'ConstantParamScheduler')


def n_processes(launcher: str) -> int:
    """How many processes a launcher ('none', 'pytorch', 'slurm' or 'mpi') started, one a GPU.

    Raises:
        UsageError: it did not start this process.
    """
    if launcher == 'none':
        return 1
    variable, command = PROCESSES[launcher]
    if variable not in os.environ:
        raise UsageError(f'--launcher {launcher}: {variable} is not set; start the tool with {command}')
    value = os.environ[variable].strip()
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise UsageError(f"--launcher {launcher}: {variable}='{value}' is no number of processes; start with {command}")
    return int(value)


def fit_batch(processes: int, images: int, wanted: int, fewest: int = 1) -> tuple[int, int]:
    """Images a process, from `fewest` to `images`, and how many batches to add up, for a total nearest to `wanted`; of
    equally near ones the one with the fewest batches."""
    options = [(n, k) for n in range(fewest, images + 1) for k in range(1, wanted + 1)]
    return min(options, key=lambda option: (abs(processes * option[0] * option[1] - wanted), option[1], -option[0]))


def set_total_batch(
    config: Config, processes: int, as_is: bool = False, options: Mapping[str, object] | None = None
) -> tuple[str, bool] | None:
    """Fit a config that names its `total_batch` to a number of processes: gradients of several batches are added up
    where the processes are few, each takes fewer images where they are many, unless the command line's `options` say
    how many, and what counts iterations moves along.

    Returns one line that says what was done and whether it is a warning; None for configs that name no total batch.

    Raises:
        UsageError: a schedule of the config cannot move along, or a setting is not of its kind.
    """
    if not config.get('total_batch'):
        return None
    check_kinds(config)
    wanted, loader, wrapper = config.get('total_batch'), config.train_dataloader, config.optim_wrapper
    if not as_is and 'accumulative_counts' not in wrapper:
        fewest = loader.batch_size if is_explicit(options or (), 'train_dataloader.batch_size') else 1
        loader.batch_size, accumulation = fit_batch(processes, loader.batch_size, wanted, fewest)
        if accumulation > 1:
            _accumulate(config, accumulation)
    accumulation, at_once = accumulation_of(config), processes * loader.batch_size
    if at_once == 1 and _has_sync_bn(config.model) and 'decode_head' in config.model:
        raise UsageError('batch norm needs two images at a time: give train_dataloader.batch_size=2 or more GPUs')
    total = at_once * accumulation
    parts = [f'{processes} process{"es" if processes > 1 else ""}', f'{loader.batch_size} images a batch']
    if accumulation > 1:
        parts.append(f'{accumulation} batches added up for an update')
    line = f'total batch {total} = {" x ".join(parts)}'
    if total != wanted:
        line += f"; the recipe's is {wanted}: expect other figures"
    elif accumulation > 1 and 'max_iters' in config.train_cfg:
        line += f', so {config.train_cfg.max_iters} iterations are {config.train_cfg.max_iters // accumulation} updates'
    if at_once < wanted and _has_sync_bn(config.model):
        line += f'; batch norm sees {at_once} images at a time, {wanted} in the recipe'
    return line, total != wanted


def check_same_accumulation(config: Config, meta: dict, checkpoint: str) -> None:
    """Raise UsageError where a run to be resumed, by the `meta` of its checkpoint, added up other numbers of batches:
    its count of iterations would mean something else here."""
    before = accumulation_of(read_dumped(meta['cfg'])) if meta.get('cfg') else 1
    now = accumulation_of(config)
    if before != now:
        raise UsageError(
            f'{checkpoint} comes from a run that added up {before} batches for an update, this one adds up {now}: '
            f'resume on as many GPUs as before, or with a train_dataloader.batch_size that makes it {before}'
        )


def set_length(
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
    check_kinds(config)
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
    _say_defaults(config)
    timed = [(train_cfg, 'val_interval'), (train_cfg, 'val_begin'), (saving, 'interval'), (saving, 'save_begin')]
    timed += [(hook, key) for hook in hooks for key in OF_HOOKS]
    timed += [(part, key) for part in dicts_in(config.get('model')) for key in OF_MODELS]
    for holder, key in timed:
        if isinstance(holder.get(key), (int, float)) and holder[key] > 0:
            holder[key] = max(1, round(holder[key] * share))
            if key in ('begin_epoch', 'switch_epoch'):  # counted from 0: there is a last epoch for what it begins
                holder[key] = min(holder[key], max(1, wanted - 1))
    if train_cfg.get('dynamic_intervals'):
        train_cfg.dynamic_intervals = [
            tuple(max(1, round(n * share)) for n in pair) for pair in train_cfg.dynamic_intervals
        ]
    for scheduler in listed(config.get('param_scheduler')):
        _scale_schedule(scheduler, share, wanted if unit == 'epochs' else None)
    of_model = [key for key in options if key.split('.')[-1] in OF_MODELS]
    restore(config, options, 'train_cfg.', 'default_hooks.checkpoint.', 'custom_hooks.', 'param_scheduler.', *of_model)
    line = f'{wanted:,} {unit} instead of {before:,}: warmup, steps and decay keep their shares'
    left_out = [s for s in listed(config.get('param_scheduler')) if not _lasts(s, wanted)]
    if left_out:
        config.param_scheduler = [s for s in listed(config.param_scheduler) if _lasts(s, wanted)]
        names = ', '.join(str(short_name(scheduler.get('type'))) for scheduler in left_out)
        line += (
            f'; of {names} less than {"an epoch" if unit == "epochs" else "an iteration"} is left, so it is left out'
        )
    return line


def _say_defaults(config: Config) -> None:
    """Write out what classes count by default."""
    for name, (registry, key, default) in UNSAID.items():
        for part in dicts_in([config.get('custom_hooks'), config.get('model')]):
            if is_type(part.get('type'), registry, name):
                part.setdefault(key, default)


def _scale_schedule(scheduler: dict, share: float, epochs: int | None) -> None:
    """Scale where a schedule begins, steps and ends, in a training of so many epochs. mmengine's counts of iterations,
    and of factors, are `end - begin - 1`, so that ends have one more than what they mean."""
    by_epoch = scheduler.get('by_epoch', True)
    extra = 1 if not by_epoch or _is_factor(scheduler) else 0
    least = 0 if by_epoch and epochs == 1 else 1  # nothing but the longest has a share in a single epoch
    before = _length(scheduler, extra)
    if scheduler.get('begin'):
        scheduler['begin'] = max(least, round(scheduler['begin'] * share))
    if 'end' in scheduler:
        scheduler['end'] = max(least, round((scheduler['end'] - extra) * share)) + extra
        if by_epoch and epochs:
            scheduler['end'] = min(scheduler['end'], epochs)
    after = _length(scheduler, extra)
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


def _length(scheduler: dict, extra: int) -> int | None:
    """How long a schedule lasts; None where it has no end."""
    return scheduler['end'] - extra - scheduler.get('begin', 0) if 'end' in scheduler else None


def _lasts(scheduler: dict, wanted: int) -> bool:
    """Whether a schedule does what it is for in a training of this length."""
    begin, end = scheduler.get('begin', 0), scheduler.get('end')
    if end is None or end <= begin:
        return end is None
    is_whole = end - begin > 1 or not _is_factor(scheduler) or not scheduler.get('by_epoch', True)
    return is_whole or (begin > 0 and end >= wanted)  # else its factor would stay


def _is_factor(scheduler: dict) -> bool:
    converted = scheduler.get('convert_to_iter_based')
    return not converted and is_type(scheduler.get('type'), PARAM_SCHEDULERS, *FACTORS)


def set_inputs(config: Config) -> str | None:
    """Fit a config whose backbone takes other inputs than RGB: images are read as grey or as they are, and normalised
    by the mean of RGB's values (mmengine's preprocessors take one value or three), if they are at all.

    Returns one line that says so; None where there is nothing to do.
    """
    n = config.model.get('backbone', {}).get('in_channels', 3)
    preprocessor = config.model.get('data_preprocessor') or {}
    means = len(preprocessor.get('mean') or [])
    if n == 3 or means not in (0, 3):
        return None
    for key in ('mean', 'std') if means else ():
        preprocessor[key] = [sum(preprocessor[key]) / 3]
    if 'bgr_to_rgb' in preprocessor:
        preprocessor.bgr_to_rgb = False
    unfit = OF_COLOURS if n == 1 else OF_THREE_CHANNELS
    parts = [config.get(part) for part in ('train_dataloader', 'val_dataloader', 'test_dataloader', *OTHER_PIPELINES)]
    left_out = {}
    for part in parts:
        for settings in dicts_in(part):
            if is_type(settings.get('type'), TRANSFORMS, 'LoadImageFromFile'):
                settings['color_type'] = 'grayscale' if n == 1 else 'unchanged'
        left_out |= dict.fromkeys(_leave_out(part, unfit))
    line = f'{n} input channel{"s" if n > 1 else ""}: read as {"grey" if n == 1 else "they are"}'
    if means:
        line += f', normalised by {preprocessor.mean[0]:.2f} and {preprocessor.std[0]:.2f}'
    if left_out:
        line += f', without {", ".join(sorted(left_out))}, which need{"s" * (len(left_out) == 1)} RGB'
    return line


def _leave_out(value, names: tuple[str, ...]) -> Iterator[str]:
    """Take the steps of these types out of all lists in a config's value, and give their names."""
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for item in [*items]:
        if isinstance(value, list) and isinstance(item, dict) and is_type(item.get('type'), TRANSFORMS, *names):
            value.remove(item)
            yield str(short_name(item['type']))
        yield from _leave_out(item, names)


def dicts_in(value) -> Iterator[dict]:
    """All dicts in a config's value, itself included, from the outside in."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from dicts_in(item)


@HOOKS.register_module()
class UpdateParamSchedulerHook(ParamSchedulerHook):
    """mmengine's hook where gradients are added up: schedules that count iterations count updates instead."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.optim_wrapper.should_update():
            super().after_train_iter(runner, batch_idx, data_batch, outputs)


def _accumulate(config: Config, n: int) -> None:
    """Add up `n` batches for an update: a loop that counts iterations runs n times as many, schedules stay as they are
    and step at every update."""
    for scheduler in listed(config.get('param_scheduler')):
        if scheduler.get('convert_to_iter_based'):
            raise UsageError(
                f'{short_name(scheduler.type)} with convert_to_iter_based cannot be fitted to this number of GPUs: '
                'give begin and end in iterations, or --as-is'
            )
    config.optim_wrapper.accumulative_counts = n
    if 'default_hooks' not in config:
        config.default_hooks = {}
    hooks = config.default_hooks
    hooks['param_scheduler'] = dict(type='UpdateParamSchedulerHook')
    train_cfg, checkpoint = config.train_cfg, hooks.get('checkpoint') or {}
    if 'max_iters' in train_cfg:
        for key in ('max_iters', 'val_interval', 'val_begin'):
            if key in train_cfg:
                train_cfg[key] *= n
        if train_cfg.get('dynamic_intervals'):
            train_cfg.dynamic_intervals = [(start * n, length * n) for start, length in train_cfg.dynamic_intervals]
    for hook in config.get('custom_hooks') or []:
        if is_type(hook.get('type'), HOOKS, 'EMAHook'):  # it averages every `interval` iterations, from `begin_iter` on
            hook['begin_iter'], hook['interval'] = n * hook.get('begin_iter', 0), n * hook.get('interval', 1)
    _say_defaults(config)
    for part in dicts_in(config.model):
        if part.get('warmup_iters'):
            part['warmup_iters'] *= n
    if not checkpoint.get('by_epoch', True) and checkpoint.get('interval', -1) > 0:
        checkpoint.interval *= n


def listed(value) -> list:
    """A setting that may be one or a list of them, as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []


def _has_sync_bn(model: dict) -> bool:
    kinds = (settings.get('type') for settings in dicts_in(model))
    return any(short_name(kind) in SYNC_BN or kind is nn.SyncBatchNorm for kind in kinds)
