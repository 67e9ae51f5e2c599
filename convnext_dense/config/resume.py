"""Resuming: which checkpoint a run continues from, and which of its settings may have changed."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from mmengine.config import Config

from ..checkpoints.io import load_checkpoint
from ..checkpoints.pretrained import naming_scheme_of
from ..engine.build import resolve_checkpoint
from ..engine.checkpoint_hook import LAST_CKPT_FILE
from ..engine.progress import load_partition
from ..engine.resume import OVERRIDE_KEY
from ..errors import UsageError
from ..type_names import short_name
from .batch_size import check_accumulation_unchanged
from .literal import parse_config_literal
from .recipe import MACHINE_KEYS, accumulative_counts, training_length
from .work_dir import TIMESTAMP_GLOB, find_resume_checkpoint


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
    holds_run = (work_dir / LAST_CKPT_FILE).is_file() or any(work_dir.glob('*.pth'))
    if resume is None and config.get('resume'):
        resume = config.get('load_from') or 'last'
    if resume is None:
        if holds_run:
            raise UsageError(
                f'{work_dir} holds a run already: --resume goes on with it, another --work-dir starts anew'
            )
        return None
    finds = resume in ('last', 'auto')
    checkpoint = find_resume_checkpoint(work_dir) if finds else resume
    if checkpoint:
        checkpoint = resolve_checkpoint(checkpoint)
        if not finds and holds_run and Path(checkpoint).resolve().parent != work_dir.resolve():
            raise UsageError(f'{work_dir} holds another run than {checkpoint}: give another --work-dir')
    elif holds_run:
        raise UsageError(
            f'{work_dir} has checkpoints but no last_checkpoint: --resume CHECKPOINT says which to go on from'
        )
    elif resume == 'last' and not any(work_dir.glob(TIMESTAMP_GLOB)):  # the logs of a run that was not saved yet
        raise UsageError(
            f'{work_dir} holds no run to resume: leave out --resume to start one there; --resume auto starts one where '
            'there is none'
        )
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
    content = load_checkpoint(checkpoint)
    if not {'meta', 'state_dict', 'optimizer'} <= set(content):
        raise UsageError(
            f'{checkpoint} holds weights alone: --cfg-options load_from={checkpoint} starts a run from them'
        )
    source = naming_scheme_of(content, checkpoint)
    if source not in (None, 'original'):
        raise UsageError(
            f'{checkpoint} comes from a run of another ConvNeXt, in the names of {source}, and its optimizer likewise: '
            f'--cfg-options load_from={checkpoint} starts a run from its weights'
        )
    settings = parse_config_literal(content['meta']['cfg']) if content['meta'].get('cfg') else None
    if another_length and settings is not None and not override:
        before, now = training_length(settings), training_length(config)
        if before != now:
            raise UsageError(
                f'{checkpoint} comes from a run of {before:g} epochs or updates, not {now:g}, and its schedules go on: '
                f'resume with its length, take the new schedules with --override, or start from its weights with '
                f'--cfg-options load_from={checkpoint}'
            )
    if load_partition(content['meta']) is None:
        check_accumulation_unchanged(config, content['meta'], checkpoint)
    config[OVERRIDE_KEY] = override
    if settings is None:
        return f'{checkpoint} does not say its settings: they were not compared with those of now'
    return compare_settings(settings, config, checkpoint, override)


# Parts of a config whose values the checkpoint's state holds as well, and that would be overridden by it.
STATE_KEYS = ('optim_wrapper.optimizer', 'optim_wrapper.paramwise_cfg', 'optim_wrapper.constructor', 'param_scheduler')
STATE_KEYS += ('auto_scale_lr', 'randomness.seed')
UNCHANGEABLE_KEYS = (
    'optim_wrapper.optimizer.type',
    'optim_wrapper.constructor',
    'optim_wrapper.paramwise_cfg.decay_type',
)
# Parts that are taken from the config as it is now.
COMPARED_KEYS = ('model', 'optim_wrapper', 'param_scheduler', 'train_cfg', 'train_dataloader', 'custom_hooks')
COMPARED_KEYS += ('auto_scale_lr', 'randomness')
PATH_KEYS = ('data_root', 'ann_file', 'img', 'img_path', 'seg_map_path', 'dtype')  # of FITTED, and no machine's matter
# What gradient accumulation multiplies: the length of the run is compared instead.
ITERATION_KEYS = ('max_iters', 'val_interval', 'val_begin', 'dynamic_intervals', 'begin_iter', 'interval')
LENGTH_KEYS = ('train_cfg.max_epochs', 'train_cfg.max_iters')  # compared as `length`
MAX_LISTED = 8  # settings that a line names


def compare_settings(before: Config, now: Config, checkpoint: str, override: bool) -> str | None:
    """Compare the settings of a run with those that it is to go on with.

    Args:
        before: the config in the checkpoint.
        override: whether settings that the checkpoint's state holds may be others, which then take its place.

    Returns:
        One line that names what changed; None where nothing did.

    Raises:
        UsageError: a setting changed that the checkpoint's state would override, or that no state fits.
    """
    changed = {key: (a, b) for key, a, b in _iter_changes(before, now)}
    fixed = {key: values for key, values in changed.items() if key in UNCHANGEABLE_KEYS}
    held = {key: values for key, values in changed.items() if _is_below(key, STATE_KEYS)}
    weights = f'start a run from its weights with --cfg-options load_from={checkpoint}'
    if fixed:
        raise UsageError(f'{checkpoint} holds the state of another optimizer ({_format_changes(fixed)}): {weights}')
    if held and not override:
        raise UsageError(
            f'{checkpoint} holds the state of other settings, which would override yours ({_format_changes(held)}): '
            f'resume '
            f'with those of before, take yours with --override, or {weights}'
        )
    if not changed:
        return None
    return f'resumed with other settings than before: {_format_changes(changed)}'


def _iter_changes(before: Config, now: Config) -> Iterator[tuple[str, object, object]]:
    accumulations = {accumulative_counts(config) for config in (before, now)}
    old, new = (_flatten_settings(config, len(accumulations) == 1) for config in (before, now))
    for key in {**old, **new}:
        a, b = (settings.get(key, '(not set)') for settings in (old, new))
        if not _equal(a, b):
            yield key, a, b


def _flatten_settings(config: Config, counted: bool) -> dict[str, object]:
    """What is compared, by dotted keys."""
    found = {'length': training_length(config)}
    for part in COMPARED_KEYS:
        for key, value in _flatten(part, config.get(part)):
            leaf = key.split('.')[-1]
            machine = leaf in MACHINE_KEYS and leaf not in PATH_KEYS
            if not machine and key not in LENGTH_KEYS and (counted or leaf not in ITERATION_KEYS):
                found[key] = short_name(value) if leaf in ('type', 'constructor') else value
    return found


def _flatten(key: str, value: object) -> Iterator[tuple[str, object]]:
    """The values in a part of a config by dotted keys; lists of plain values are values."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flatten(f'{key}.{name}', item)
    elif isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in value):
        for i, item in enumerate(value):
            yield from _flatten(f'{key}.{i}', item)
    elif key.endswith('.ann_file') and isinstance(value, str) and '/data/' in value:
        yield key, value.rsplit('/data/', 1)[-1]  # own data: written into the work dir, which may have moved
    elif value is not None:
        yield key, value


def _equal(a: object, b: object) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b or (a != a and b != b)


def _is_below(key: str, parts: tuple[str, ...]) -> bool:
    return any(key == part or key.startswith(f'{part}.') for part in parts)


def _format_changes(changed: Mapping[str, tuple[object, object]]) -> str:
    named = [f'{key} was {a!r}, is {b!r}' for key, (a, b) in list(changed.items())[:MAX_LISTED]]
    return '; '.join([*named, *([f'and {len(changed) - MAX_LISTED} more'] if len(changed) > MAX_LISTED else [])])
