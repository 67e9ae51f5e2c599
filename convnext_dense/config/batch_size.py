"""The recipe's total batch size on any number of GPUs: images per GPU and gradient accumulation."""

import logging
from collections.abc import Mapping

from mmengine.config import Config
from mmengine.registry import HOOKS
from torch import nn

from ..errors import Notice, UsageError, count
from ..type_names import is_type, short_name
from .literal import parse_config_literal
from .options import is_explicit
from .recipe import accumulative_counts
from .schedule import _fill_implicit_defaults
from .tree import as_list, iter_dicts
from .value_types import check_value_types

SYNC_BN = ('SyncBN', 'MMSyncBN', 'NaiveSyncBN', 'SyncBatchNorm')  # names in configs


def choose_batch(world_size: int, max_per_gpu: int, target: int, min_per_gpu: int = 1) -> tuple[int, int]:
    """Choose the batch on each GPU for a total batch size nearest to `target`.

    Args:
        world_size: Number of processes, one per GPU.
        max_per_gpu: Maximum number of images per GPU.
        target: Total batch size, in images per optimizer step.
        min_per_gpu: Minimum number of images per GPU.

    Returns:
        Images per GPU, and gradient accumulation steps. Among equally near choices, the one with the fewest steps.
    """
    choices = [(n, k) for n in range(min_per_gpu, max_per_gpu + 1) for k in range(1, target + 1)]
    return min(choices, key=lambda choice: (abs(world_size * choice[0] * choice[1] - target), choice[1], -choice[0]))


def set_accumulation(config: Config, world_size: int, steps: int | None) -> Notice | None:
    """Set the total batch size that results from a number of gradient accumulation steps, for `scale_batch`.

    Args:
        config: Config; it is changed in place.
        world_size: Number of processes, one per GPU.
        steps: Iterations per optimizer step; None to keep the total batch size of the config.

    Returns:
        A warning if the total batch size differs from the recipe's.

    Raises:
        UsageError: If the config sets gradient accumulation itself.
    """
    if steps is None:
        return None
    if 'accumulative_counts' in config.optim_wrapper:
        raise UsageError('--accumulate: the config sets optim_wrapper.accumulative_counts itself: change it there')
    check_value_types(config)
    old, total = config.get('total_batch'), world_size * config.train_dataloader.batch_size * steps
    config.total_batch = total
    if old and old != total:
        return Notice(
            f"total batch {total} instead of the recipe's {old}: results may differ from the paper", logging.WARNING
        )


def scale_batch(
    config: Config, world_size: int, keep_config: bool = False, options: Mapping[str, object] | None = None
) -> Notice | None:
    """Adapt a config that has a `total_batch` to a number of GPUs.

    With few GPUs, gradients are accumulated; with many, each GPU takes fewer images. All settings that count iterations
    are multiplied by the accumulation steps.

    Args:
        config: Config; it is changed in place.
        world_size: Number of processes, one per GPU.
        keep_config: Whether to keep the batch size and accumulation of the config.
        options: Settings from the command line; a batch size among them is kept.

    Returns:
        The total batch size, as a warning if it differs from the recipe's; None for configs without `total_batch`.

    Raises:
        UsageError: If a schedule of the config cannot be scaled, or a setting has the wrong type.
    """
    if not config.get('total_batch'):
        return None
    check_value_types(config)
    target, loader, wrapper = config.get('total_batch'), config.train_dataloader, config.optim_wrapper
    if not keep_config and 'accumulative_counts' not in wrapper:
        min_per_gpu = loader.batch_size if is_explicit(options or (), 'train_dataloader.batch_size') else 1
        loader.batch_size, accumulation = choose_batch(world_size, loader.batch_size, target, min_per_gpu)
        if accumulation > 1:
            _apply_accumulation(config, accumulation)
    accumulation, per_iter = accumulative_counts(config), world_size * loader.batch_size
    if per_iter == 1 and _has_sync_bn(config.model) and 'decode_head' in config.model:
        raise UsageError(
            'batch norm needs at least two images per iteration: set train_dataloader.batch_size=2 or use more GPUs'
        )
    total = per_iter * accumulation
    factors = [count(world_size, 'process', 'processes'), count(loader.batch_size, 'image')]
    if accumulation > 1:
        factors.append(count(accumulation, 'gradient accumulation step'))
    line = f'total batch {total} = {" x ".join(factors)}'
    if total != target:
        line += f"; the recipe's is {target}: results may differ from the paper"
    elif accumulation > 1 and 'max_iters' in config.train_cfg:
        max_iters = config.train_cfg.max_iters
        line += f', so {max_iters} iterations are {max_iters // accumulation} optimizer steps'
    if per_iter < target and _has_sync_bn(config.model):
        line += f'; batch norm sees {count(per_iter, "image")} per iteration, {target} in the recipe'
    return Notice(line, logging.INFO if total == target else logging.WARNING)


def check_accumulation_unchanged(config: Config, meta: dict, checkpoint: str) -> None:
    """Raise UsageError if a checkpoint was trained with another number of gradient accumulation steps.

    Its iteration counter would have another meaning. Used only for checkpoints without a batch partition.
    """
    old = accumulative_counts(parse_config_literal(meta['cfg'])) if meta.get('cfg') else 1
    new = accumulative_counts(config)
    if old != new:
        raise UsageError(
            f'{checkpoint} comes from a run with {count(old, "gradient accumulation step")}, this run has {new}: '
            f'resume on as many GPUs as before, or choose train_dataloader.batch_size so that it has {old}'
        )


def _apply_accumulation(config: Config, n: int) -> None:
    """Accumulate gradients over `n` iterations.

    An iteration-based loop runs n times as many iterations; schedules are unchanged and step once per optimizer step.
    """
    for scheduler in as_list(config.get('param_scheduler')):
        if scheduler.get('convert_to_iter_based'):
            raise UsageError(
                f'{short_name(scheduler.type)} with convert_to_iter_based cannot be adapted to this number of GPUs: '
                'give begin and end in iterations, or use --no-auto-batch'
            )
    config.optim_wrapper.accumulative_counts = n
    if 'default_hooks' not in config:
        config.default_hooks = {}
    hooks = config.default_hooks
    hooks['param_scheduler'] = dict(type='UpdateParamSchedulerHook')
    train_cfg, checkpoint = config.train_cfg, hooks.get('checkpoint') or {}
    _fill_implicit_defaults(config)
    counts = [(part, 'warmup_iters') for part in iter_dicts(config.model)]
    if 'max_iters' in train_cfg:
        counts += [(train_cfg, key) for key in ('max_iters', 'val_interval', 'val_begin')]
        if train_cfg.get('dynamic_intervals'):
            train_cfg.dynamic_intervals = [(start * n, length * n) for start, length in train_cfg.dynamic_intervals]
    if not checkpoint.get('by_epoch', True) and checkpoint.get('interval', -1) > 0:
        counts.append((checkpoint, 'interval'))
    for hook in config.get('custom_hooks') or []:
        if is_type(hook.get('type'), HOOKS, 'EMAHook'):  # averages every `interval` iterations, from `begin_iter` on
            hook.setdefault('interval', 1)
            counts += [(hook, key) for key in ('begin_iter', 'interval', 'gamma')]
    for holder, key in counts:
        if holder.get(key):
            holder[key] *= n


def _has_sync_bn(model: dict) -> bool:
    types = (part.get('type') for part in iter_dicts(model))
    return any(short_name(type_) in SYNC_BN or type_ is nn.SyncBatchNorm for type_ in types)
