"""Resuming: find the checkpoint that a run continues from, and compare its settings."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from mmengine.config import Config

from ..checkpoints.exported_files import is_exported, read_exported
from ..checkpoints.hub import download
from ..checkpoints.io import load_checkpoint
from ..checkpoints.pretrained import naming_scheme_of
from ..engine.checkpoint_hook import LAST_CKPT_FILE
from ..engine.progress import load_partition
from ..engine.resume import OVERRIDE_KEY
from ..errors import UsageError
from ..type_names import short_name
from .batch_size import check_accumulation_unchanged
from .literal import parse_config_literal
from .recipe import MACHINE_KEYS, accumulative_counts, training_length
from .tree import flatten, is_equal
from .work_dir import TIMESTAMP_GLOB, find_resume_checkpoint

# Parts of a config whose values are also in the state of a checkpoint, which would override them.
STATE_PREFIXES = ('optim_wrapper.optimizer.', 'optim_wrapper.paramwise_cfg.', 'optim_wrapper.constructor.')
STATE_PREFIXES += ('param_scheduler.', 'auto_scale_lr.', 'randomness.seed.')
UNCHANGEABLE_KEYS = (
    'optim_wrapper.optimizer.type',
    'optim_wrapper.constructor',
    'optim_wrapper.paramwise_cfg.decay_type',
)
# Parts of a config that determine the training.
COMPARED_KEYS = ('model', 'optim_wrapper', 'param_scheduler', 'train_cfg', 'train_dataloader', 'custom_hooks')
COMPARED_KEYS += ('auto_scale_lr', 'randomness')
# Exceptions from MACHINE_KEYS, which are compared nevertheless.
PATH_KEYS = ('data_root', 'ann_file', 'img', 'img_path', 'seg_map_path', 'dtype')
# Settings that gradient accumulation multiplies; the length of the run is compared instead.
ITERATION_KEYS = ('max_iters', 'val_interval', 'val_begin', 'dynamic_intervals', 'begin_iter', 'interval')
LENGTH_KEYS = ('train_cfg.max_epochs', 'train_cfg.max_iters')  # compared as `length`
MAX_LISTED = 8  # changed settings in a message


def set_resume(config: Config, resume: str | None) -> str | None:
    """Apply `--resume [CHECKPOINT]` to a config.

    Args:
        config: Config, whose `resume` and `load_from` are changed in place.
        resume: A checkpoint; 'last' for the latest one in the work dir; 'auto' for the latest one or, without any, a
            new run; None for a new run, or for the config's own `resume` and `load_from`.

    Returns:
        The checkpoint that the run continues from, None for a new run.

    Raises:
        UsageError: If the checkpoint does not exist, or the work dir contains no run although it is to be resumed, or
            one although it is not.
    """
    work_dir = Path(config.work_dir)
    has_run = (work_dir / LAST_CKPT_FILE).is_file() or any(work_dir.glob('*.pth'))
    if resume is None and config.get('resume'):
        resume = config.get('load_from') or 'last'
    if resume is None:
        if has_run:
            raise UsageError(
                f'{work_dir} already contains a run: use --resume to continue it, or choose another --work-dir'
            )
        return None
    is_search = resume in ('last', 'auto')
    checkpoint = find_resume_checkpoint(work_dir) if is_search else resume
    if checkpoint:
        checkpoint = str(download(checkpoint))
        if not is_search and has_run and Path(checkpoint).resolve().parent != work_dir.resolve():
            raise UsageError(f'{work_dir} contains another run than that of {checkpoint}: choose another --work-dir')
    elif has_run:
        raise UsageError(
            f'{work_dir} contains checkpoints but no last_checkpoint: choose the one to resume with --resume CHECKPOINT'
        )
    elif resume == 'last' and not any(work_dir.glob(TIMESTAMP_GLOB)):  # logs of a run without a checkpoint yet
        raise UsageError(
            f'{work_dir} contains no run to resume: leave out --resume to start one, or use --resume auto, which '
            'starts one if there is none'
        )
    config.resume = bool(checkpoint)
    if checkpoint:  # a new run starts from the config's own load_from, if any
        config.load_from = checkpoint
    return checkpoint


def check_resume(
    config: Config, checkpoint: str | None, length_changed: bool = False, override: bool = False
) -> str | None:
    """Compare a run with the checkpoint that it resumes from.

    Args:
        config: Config of the run.
        checkpoint: Path of the checkpoint; None for a new run.
        length_changed: Whether the command line sets the length of the run.
        override: Whether the settings of the config replace those in the state of the checkpoint.

    Returns:
        One line that names the settings that changed; None if none did.

    Raises:
        UsageError: If the checkpoint has no training state, counts iterations in another way, or has other settings
            than the config; or if `override` is set for a new run.
    """
    if override and (not checkpoint or 'runner_type' in config):
        raise UsageError('--override needs --resume' + ('' if not checkpoint else ' and a config without runner_type'))
    if not checkpoint:
        return None
    content = load_checkpoint(checkpoint)
    from_weights = f'--cfg-options load_from={checkpoint}'
    if not {'meta', 'state_dict', 'optimizer'} <= set(content):
        raise UsageError(
            f'{checkpoint} contains model weights only, no optimizer state: start a new run from them with '
            f'{from_weights}'
        )
    source = naming_scheme_of(content, checkpoint)
    if source not in (None, 'original'):
        raise UsageError(
            f'{checkpoint} is the state of another ConvNeXt implementation, with the parameter names of {source}: '
            f'start a new run from its weights with {from_weights}'
        )
    old = checkpoint_config(checkpoint)
    if length_changed and old is not None and not override:
        old_length, length = training_length(old), training_length(config)
        if old_length != length:
            raise UsageError(
                f'{checkpoint} is the state of a run of {old_length:g} epochs or optimizer steps, not {length:g}, '
                'whose schedules continue: resume with its length, use the new schedules with --override, or start a '
                f'new run from its weights with {from_weights}'
            )
    if load_partition(content['meta']) is None:
        check_accumulation_unchanged(config, content['meta'], checkpoint)
    config[OVERRIDE_KEY] = override
    if old is None:
        return f'{checkpoint} does not contain its config: settings were not compared'
    return compare_settings(old, config, checkpoint, override)


def checkpoint_config(checkpoint: str) -> Config | None:
    """Return the config in the file of a checkpoint or exported model; None if it contains none."""
    if is_exported(checkpoint):
        return parse_config_literal(read_exported(checkpoint).meta.config)
    text = (load_checkpoint(checkpoint).get('meta') or {}).get('cfg')
    return parse_config_literal(text) if text else None


def compare_settings(old: Config, new: Config, checkpoint: str, override: bool) -> str | None:
    """Compare the settings of a run with those that it resumes with.

    Args:
        old: Config in the checkpoint.
        new: Config of the run.
        checkpoint: Path of the checkpoint, for the messages.
        override: Whether settings in the state of the checkpoint may change; the config's then replace them.

    Returns:
        One line that names the settings that changed; None if none did.

    Raises:
        UsageError: If a setting changed that the checkpoint would override, or that does not fit any of its state.
    """
    changes = {key: (a, b) for key, a, b in _iter_changes(old, new)}
    unchangeable = {key: values for key, values in changes.items() if key in UNCHANGEABLE_KEYS}
    in_state = {key: values for key, values in changes.items() if f'{key}.'.startswith(STATE_PREFIXES)}
    from_weights = f'start a new run from its weights with --cfg-options load_from={checkpoint}'
    if unchangeable:
        raise UsageError(
            f'{checkpoint} contains the state of another optimizer ({_format_changes(unchangeable)}): {from_weights}'
        )
    if in_state and not override:
        raise UsageError(
            f'{checkpoint} contains the state of other settings, which would override yours '
            f'({_format_changes(in_state)}): resume with the old settings, use yours with --override, or {from_weights}'
        )
    return f'resumed with changed settings: {_format_changes(changes)}' if changes else None


def _iter_changes(old: Config, new: Config) -> Iterator[tuple[str, object, object]]:
    same_accumulation = accumulative_counts(old) == accumulative_counts(new)
    old_settings, new_settings = (_flatten_settings(config, same_accumulation) for config in (old, new))
    for key in {**old_settings, **new_settings}:
        a, b = (settings.get(key, '(not set)') for settings in (old_settings, new_settings))
        if not is_equal(a, b):
            yield key, a, b


def _flatten_settings(config: Config, with_iterations: bool) -> dict[str, object]:
    """Return the settings that are compared, by dotted keys."""
    settings = {'length': training_length(config)}
    for part in COMPARED_KEYS:
        for key, value in flatten(part, config.get(part)):
            name = key.split('.')[-1]
            is_compared = name not in MACHINE_KEYS or name in PATH_KEYS
            is_compared &= key not in LENGTH_KEYS and (with_iterations or name not in ITERATION_KEYS)
            if value is not None and is_compared:
                settings[key] = _comparable(name, value)
    return settings


def _comparable(name: str, value: object) -> object:
    if name in ('type', 'constructor'):
        return short_name(value)
    if name == 'ann_file' and isinstance(value, str) and '/data/' in value:
        return value.rsplit('/data/', 1)[-1]  # of a custom data set, below the work dir, which may have moved
    return value


def _format_changes(changes: Mapping[str, tuple[object, object]]) -> str:
    lines = [f'{key} was {old!r}, is {new!r}' for key, (old, new) in list(changes.items())[:MAX_LISTED]]
    n_more = len(changes) - len(lines)
    return '; '.join([*lines, *([f'and {n_more} more'] if n_more else [])])
