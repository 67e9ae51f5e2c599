"""Resuming: which checkpoint a run continues from, and which of its settings may have changed."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import print_log

from ..checkpoints.io import read
from ..checkpoints.pretrained import source_of
from ..engine.build import local_checkpoint
from ..engine.checkpoint_hook import LAST
from ..engine.resume import OVERRIDE
from ..errors import UsageError
from ..type_names import short_name
from .batch_size import check_same_accumulation
from .literal import read_dumped
from .recipe import FITTED, accumulation_of, training_length
from .work_dir import TIMESTAMP, latest


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


# Parts of a config whose values the checkpoint's state holds as well, and that would be overridden by it.
HELD = ('optim_wrapper.optimizer', 'optim_wrapper.paramwise_cfg', 'optim_wrapper.constructor', 'param_scheduler')
HELD += ('auto_scale_lr', 'randomness.seed')
FIXED = ('optim_wrapper.optimizer.type', 'optim_wrapper.constructor', 'optim_wrapper.paramwise_cfg.decay_type')
# Parts that are taken from the config as it is now.
COMPARED = ('model', 'optim_wrapper', 'param_scheduler', 'train_cfg', 'train_dataloader', 'custom_hooks')
COMPARED += ('auto_scale_lr', 'randomness')
PLACES = ('data_root', 'ann_file', 'img', 'img_path', 'seg_map_path', 'dtype')  # of FITTED, and no machine's matter
# What gradient accumulation multiplies: the length of the run is compared instead.
COUNTED = ('max_iters', 'val_interval', 'val_begin', 'dynamic_intervals', 'begin_iter', 'interval')
LENGTHS = ('train_cfg.max_epochs', 'train_cfg.max_iters')  # compared as `length`
MOST = 8  # settings that a line names


def compare(before: Config, now: Config, checkpoint: str, override: bool) -> str | None:
    """Compare the settings of a run with those that it is to go on with.

    Args:
        before: the config in the checkpoint.
        override: whether settings that the checkpoint's state holds may be others, which then take its place.

    Returns:
        One line that names what changed; None where nothing did.

    Raises:
        UsageError: a setting changed that the checkpoint's state would override, or that no state fits.
    """
    changed = {key: (a, b) for key, a, b in _changes(before, now)}
    fixed = {key: values for key, values in changed.items() if key in FIXED}
    held = {key: values for key, values in changed.items() if _is_in(key, HELD)}
    weights = f'start a run from its weights with --cfg-options load_from={checkpoint}'
    if fixed:
        raise UsageError(f'{checkpoint} holds the state of another optimizer ({_listed(fixed)}): {weights}')
    if held and not override:
        raise UsageError(
            f'{checkpoint} holds the state of other settings, which would override yours ({_listed(held)}): resume '
            f'with those of before, take yours with --override, or {weights}'
        )
    if not changed:
        return None
    return f'resumed with other settings than before: {_listed(changed)}'


def _changes(before: Config, now: Config) -> Iterator[tuple[str, object, object]]:
    accumulations = {accumulation_of(config) for config in (before, now)}
    old, new = (_settings(config, len(accumulations) == 1) for config in (before, now))
    for key in {**old, **new}:
        a, b = (settings.get(key, '(not set)') for settings in (old, new))
        if not _same(a, b):
            yield key, a, b


def _settings(config: Config, counted: bool) -> dict[str, object]:
    """What is compared, by dotted keys."""
    found = {'length': training_length(config)}
    for part in COMPARED:
        for key, value in _flat(part, config.get(part)):
            leaf = key.split('.')[-1]
            machine = leaf in FITTED and leaf not in PLACES
            if not machine and key not in LENGTHS and (counted or leaf not in COUNTED):
                found[key] = short_name(value) if leaf in ('type', 'constructor') else value
    return found


def _flat(key: str, value: object) -> Iterator[tuple[str, object]]:
    """The values in a part of a config by dotted keys; lists of plain values are values."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(f'{key}.{name}', item)
    elif isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in value):
        for i, item in enumerate(value):
            yield from _flat(f'{key}.{i}', item)
    elif key.endswith('.ann_file') and isinstance(value, str) and '/data/' in value:
        yield key, value.rsplit('/data/', 1)[-1]  # own data: written into the work dir, which may have moved
    elif value is not None:
        yield key, value


def _same(a: object, b: object) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b or (a != a and b != b)


def _is_in(key: str, parts: tuple[str, ...]) -> bool:
    return any(key == part or key.startswith(f'{part}.') for part in parts)


def _listed(changed: Mapping[str, tuple[object, object]]) -> str:
    named = [f'{key} was {a!r}, is {b!r}' for key, (a, b) in list(changed.items())[:MOST]]
    return '; '.join([*named, *([f'and {len(changed) - MOST} more'] if len(changed) > MOST else [])])
