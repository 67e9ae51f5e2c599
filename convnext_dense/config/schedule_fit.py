"""Fit the schedule of a recipe to the size of a custom data set.

The recipes' lengths are for COCO (epochs) and ADE20K (iterations). With a few images, 36 epochs would end before the
warmup, and 160,000 iterations would see each image thousands of times.
"""

import logging
import math
from collections.abc import Mapping

from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS

from ..errors import Notice
from ..type_names import is_type
from .options import is_explicit
from .recipe import accumulative_counts, counts_epochs
from .schedule import end_offset, scale_schedule
from .training_set import wrap_training_set
from .tree import as_list
from .value_types import check_value_types

MIN_STEPS = 1000  # optimizer steps of a training whose length the user does not set
TOO_FEW_STEPS = 200  # optimizer steps below which there is a warning
MAX_PASSES = 200  # passes over the images in an iteration-based training, unless they are less than MIN_STEPS
MAX_WARMUP = 0.1  # fraction of the optimizer steps
MAX_EVALUATIONS = 20  # evaluations and checkpoints, unless more than MIN_STEPS lie between two
MIN_STEPS_PER_EPOCH = 8  # optimizer steps; with fewer, the total batch is halved
MIN_TOTAL_BATCH = 4
BATCH_KEYS = ('total_batch', 'train_dataloader.batch_size', 'optim_wrapper.accumulative_counts')
WARMUP_TYPES = ('LinearParamScheduler', 'ConstantParamScheduler', 'QuadraticWarmupParamScheduler')
# Optimizers whose lr is scaled with the square root of the batch size; with others it is proportional to it.
ADAPTIVE_OPTIMIZERS = ('Adam', 'Adamax', 'NAdam', 'RAdam', 'AdamW', 'LAMB')


def fit_schedule(
    config: Config,
    num_images: int,
    world_size: int = 1,
    options: Mapping[str, object] | None = None,
    fixed_length: bool = False,
    fixed_batch: bool = False,
    record: Mapping[str, int] | None = None,
) -> list[Notice]:
    """Fit total batch, length, warmup, evaluations and checkpoints of a training to its number of images.

    Settings from the command line are kept. If the config has a `total_batch`, the same images give the same schedule
    on any number of GPUs.

    Args:
        config: Config without gradient accumulation; it is changed in place.
        num_images: Number of images in the training set.
        world_size: Number of processes, one per GPU.
        options: Settings from the command line.
        fixed_length: Whether the command line sets the length.
        fixed_batch: Whether to keep the config's images per GPU and accumulation.
        record: `schedule_fit` of the config in the checkpoint to resume, whose schedule continues even if the length or
            the number of GPUs changed.

    Returns:
        One line about the changes, and a warning if there are too few optimizer steps to learn from.
    """
    check_value_types(config)
    options = options or {}
    fixed_length = fixed_length or is_explicit(options, 'train_cfg.max_epochs', 'train_cfg.max_iters')
    schedulers = as_list(config.get('param_scheduler'))
    warmups = {i: _duration(scheduler) for i, scheduler in enumerate(schedulers) if _is_warmup(scheduler)}
    record = record or {}
    recipe_batch = record.get('recipe_batch') or _total_batch(config, world_size)
    changes, times = [], record.get('times', 1)
    if not fixed_batch and not is_explicit(options, *BATCH_KEYS):
        changes += _fit_batch(config, num_images, recipe_batch, options)
    total_batch = _total_batch(config, world_size)
    if counts_epochs(config):
        if not fixed_length and not record:
            times = max(1, math.ceil(MIN_STEPS * total_batch / (config.train_cfg.max_epochs * num_images)))
        if times > 1:
            wrap_training_set(config, type='RepeatDataset', times=times)
            changes.append(f'all images {times} times in each of {config.train_cfg.max_epochs} epochs')
    elif not fixed_length:
        changes += _fit_iterations(config, num_images, total_batch, options)
    steps = _count_steps(config, num_images * times, total_batch)
    config.schedule_fit = dict(recipe_batch=recipe_batch, times=times, steps=record.get('steps', steps))
    changes += _fit_warmup(config, config.schedule_fit.steps, warmups, options)
    changes += _fit_intervals(config, steps, options)
    notices = []
    if changes:
        line = f'schedule fitted to {num_images:,} training images: {", ".join(changes)}'
        notices.append(Notice(f'{line}; --no-auto-schedule keeps the schedule of the recipe'))
    if steps < TOO_FEW_STEPS:
        notices.append(Notice(_too_few_steps(config, num_images * times, total_batch, steps), logging.WARNING))
    return notices


def _count_steps(config: Config, images_per_epoch: int, total_batch: int) -> int:
    """Return the number of optimizer steps of a training."""
    if counts_epochs(config):
        return int(config.train_cfg.max_epochs) * math.ceil(images_per_epoch / total_batch)
    return int(config.train_cfg.max_iters) // accumulative_counts(config)


def _total_batch(config: Config, world_size: int) -> int:
    per_step = world_size * config.train_dataloader.batch_size * accumulative_counts(config)
    return per_step if 'accumulative_counts' in config.optim_wrapper else config.get('total_batch') or per_step


def _fit_batch(config: Config, num_images: int, old: int, options: Mapping[str, object]) -> list[str]:
    """Halve the total batch until an epoch has `MIN_STEPS_PER_EPOCH`, and scale the lr accordingly."""
    optimizer = config.optim_wrapper.get('optimizer')
    batch = old
    while batch > MIN_TOTAL_BATCH and batch * MIN_STEPS_PER_EPOCH > num_images:
        batch = max(batch // 2, MIN_TOTAL_BATCH)
    if batch == old or not optimizer or 'accumulative_counts' in config.optim_wrapper:
        return []
    config.total_batch = batch
    changes = [f'total batch {batch} instead of {old}']
    lr, is_scaled = optimizer.get('lr'), (config.get('auto_scale_lr') or {}).get('enable')
    if isinstance(lr, (int, float)) and not is_scaled and not is_explicit(options, 'optim_wrapper.optimizer.lr'):
        # With Adam, the square root preserves the noise scale (Malladi et al. 2022, On the SDEs and Scaling Rules for
        # Adaptive Gradient Algorithms).
        is_adaptive = str(optimizer.get('type')).split('.')[-1] in ADAPTIVE_OPTIMIZERS
        optimizer['lr'] = float(f'{lr * (math.sqrt(batch / old) if is_adaptive else batch / old):.3g}')
        changes.append(f'lr {optimizer["lr"]:g} instead of {lr:g}')
    return changes


def _fit_iterations(config: Config, num_images: int, total_batch: int, options: Mapping[str, object]) -> list[str]:
    """Limit an iteration-based training to `MAX_PASSES` over the images, but to no less than `MIN_STEPS`."""
    old, accumulation = int(config.train_cfg.max_iters), accumulative_counts(config)
    most = max(MIN_STEPS, math.ceil(MAX_PASSES * num_images / total_batch))
    iters = min(max(old, MIN_STEPS * accumulation), most * accumulation)
    if iters == old:
        return []
    scale_schedule(config, iters=iters, options=options)
    return [f'{iters:,} iterations instead of {old:,}']


def _is_warmup(scheduler: Mapping) -> bool:
    is_first = not scheduler.get('begin') and 'end' in scheduler
    rises = scheduler.get('start_factor', 0) < scheduler.get('end_factor', 1)
    return is_first and rises and is_type(scheduler.get('type'), PARAM_SCHEDULERS, *WARMUP_TYPES)


def _duration(scheduler: Mapping) -> int:
    return scheduler['end'] - end_offset(scheduler)


def _fit_warmup(config: Config, steps: int, durations: Mapping[int, int], options: Mapping[str, object]) -> list[str]:
    """Keep the duration of warmups in the recipe (`durations`, by index), up to `MAX_WARMUP` of the training."""
    changes, schedulers = [], as_list(config.get('param_scheduler'))
    for i, old in durations.items():
        is_there = i < len(schedulers) and _is_warmup(schedulers[i])
        if not is_there or is_explicit(options, f'param_scheduler.{i}.end'):
            continue
        by_epoch = schedulers[i].get('by_epoch', True)
        new = min(old, max(1, int(MAX_WARMUP * (config.train_cfg.max_epochs if by_epoch else steps))))
        shift = new - _duration(schedulers[i])
        for scheduler in schedulers:  # a scheduler that follows the warmup moves with its end
            is_next = scheduler.get('begin') and scheduler['begin'] + 1 >= schedulers[i]['end'] >= scheduler['begin']
            if is_next and scheduler.get('by_epoch', True) == by_epoch:
                scheduler['begin'] += shift
                if scheduler.get('T_max'):
                    scheduler['T_max'] -= shift
        schedulers[i]['end'] += shift
        if new != old:
            changes.append(f'warmup of {new:,} {"epochs" if by_epoch else "optimizer steps"} instead of {old:,}')
    return changes


def _fit_intervals(config: Config, steps: int, options: Mapping[str, object]) -> list[str]:
    """Limit evaluations and checkpoints to `MAX_EVALUATIONS`, unless more than `MIN_STEPS` lie between two."""
    by_epoch = counts_epochs(config)
    unit, length = ('epochs', config.train_cfg.max_epochs) if by_epoch else ('iterations', config.train_cfg.max_iters)
    saving, changes = (config.get('default_hooks') or {}).get('checkpoint') or {}, []
    intervals = [(config.train_cfg, 'val_interval', 1 if by_epoch else 1000, 'train_cfg', 'evaluation')]
    if saving.get('by_epoch', True) == by_epoch:
        intervals.append((saving, 'interval', -1, 'default_hooks.checkpoint', 'a checkpoint'))
    for settings, key, default, prefix, event in intervals:
        old, new = settings.get(key, default), math.ceil(length / MAX_EVALUATIONS)
        if is_explicit(options, f'{prefix}.{key}') or settings.get('dynamic_intervals') or old < 1:
            continue
        if new > old and steps * old / length < MIN_STEPS:
            settings[key] = new
            changes.append(f'{event} every {new:,} {unit} instead of {old:,}')
    return changes


def _too_few_steps(config: Config, images_per_epoch: int, total_batch: int, steps: int) -> str:
    """Format the warning about too few optimizer steps, with arguments that give enough of them."""
    if counts_epochs(config):
        enough = f'--epochs {math.ceil(MIN_STEPS / math.ceil(images_per_epoch / total_batch)):,}'.replace(',', '')
    else:
        enough = f'--iters {MIN_STEPS * accumulative_counts(config)}'
    return (
        f'{steps:,} optimizer steps are too few to learn from: use {enough}, or leave out what sets the length, which '
        f'makes at least {MIN_STEPS:,}'
    )
