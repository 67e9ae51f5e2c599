"""The recipe's total batch on any number of GPUs: images per GPU and gradient accumulation."""

from collections.abc import Mapping

from mmengine.config import Config
from mmengine.registry import HOOKS
from torch import nn

from ..errors import UsageError
from ..type_names import is_type, short_name
from .literal import parse_config_literal
from .options import is_explicit
from .recipe import accumulative_counts
from .schedule import _fill_implicit_defaults
from .tree import as_list, iter_dicts
from .value_types import check_value_types

SYNC_BN = ('SyncBN', 'MMSyncBN', 'NaiveSyncBN', 'SyncBatchNorm')  # in configs


def choose_batch(processes: int, images: int, wanted: int, fewest: int = 1) -> tuple[int, int]:
    """Images a process, from `fewest` to `images`, and how many batches to add up, for a total nearest to `wanted`; of
    equally near ones the one with the fewest batches."""
    options = [(n, k) for n in range(fewest, images + 1) for k in range(1, wanted + 1)]
    return min(options, key=lambda option: (abs(processes * option[0] * option[1] - wanted), option[1], -option[0]))


def scale_batch(
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
    check_value_types(config)
    wanted, loader, wrapper = config.get('total_batch'), config.train_dataloader, config.optim_wrapper
    if not as_is and 'accumulative_counts' not in wrapper:
        fewest = loader.batch_size if is_explicit(options or (), 'train_dataloader.batch_size') else 1
        loader.batch_size, accumulation = choose_batch(processes, loader.batch_size, wanted, fewest)
        if accumulation > 1:
            _apply_accumulation(config, accumulation)
    accumulation, at_once = accumulative_counts(config), processes * loader.batch_size
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


def check_accumulation_unchanged(config: Config, meta: dict, checkpoint: str) -> None:
    """Raise UsageError where a run to be resumed, by the `meta` of its checkpoint, added up other numbers of batches:
    its count of iterations would mean something else here."""
    before = accumulative_counts(parse_config_literal(meta['cfg'])) if meta.get('cfg') else 1
    now = accumulative_counts(config)
    if before != now:
        raise UsageError(
            f'{checkpoint} comes from a run that added up {before} batches for an update, this one adds up {now}: '
            f'resume on as many GPUs as before, or with a train_dataloader.batch_size that makes it {before}'
        )


def _apply_accumulation(config: Config, n: int) -> None:
    """Add up `n` batches for an update: a loop that counts iterations runs n times as many, schedules stay as they are
    and step at every update."""
    for scheduler in as_list(config.get('param_scheduler')):
        if scheduler.get('convert_to_iter_based'):
            raise UsageError(
                f'{short_name(scheduler.type)} with convert_to_iter_based cannot be fitted to this number of GPUs: '
                'give begin and end in iterations, or --no-auto-batch'
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
    _fill_implicit_defaults(config)
    for part in iter_dicts(config.model):
        if part.get('warmup_iters'):
            part['warmup_iters'] *= n
    if not checkpoint.get('by_epoch', True) and checkpoint.get('interval', -1) > 0:
        checkpoint.interval *= n


def _has_sync_bn(model: dict) -> bool:
    kinds = (settings.get('type') for settings in iter_dicts(model))
    return any(short_name(kind) in SYNC_BN or kind is nn.SyncBatchNorm for kind in kinds)
