"""What a resumed run takes from its checkpoint and what from its config. The state of an optimizer and of its schedules
holds the values of the settings that it was built with, so that these are compared with those of now."""

import warnings
from collections.abc import Iterator, Mapping

from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop

from ..errors import UsageError
from ..paper.results import FITTED, accumulation_of, training_length
from ..type_names import short_name
from .batch_size import UpdateParamSchedulerHook

OVERRIDE = 'override_resumed'  # key of a config whose own settings take the place of the checkpoint's
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


# ---- taking the config's settings ---------------------------------------------------------------------------------


def take_own_settings(optim_wrapper: OptimWrapper, checkpoint: dict) -> None:
    """Put the settings of a freshly built optimizer into the state that it is about to load, and leave out the state of
    the schedules, which `replay` brings to where the run is.

    Raises:
        UsageError: the state has other groups of parameters.
    """
    fresh, saved = optim_wrapper.state_dict(), checkpoint['optimizer']
    groups = [[len(group['params']) for group in state.get('param_groups', ())] for state in (fresh, saved)]
    if groups[0] != groups[1] or not groups[0]:
        raise UsageError('--override: the checkpoint groups its parameters otherwise: start a run from its weights')
    own = [{**f, 'params': s['params']} for f, s in zip(fresh['param_groups'], saved['param_groups'])]
    checkpoint['optimizer'] = {**saved, 'param_groups': own}
    if 'base_param_settings' in fresh:
        checkpoint['optimizer']['base_param_settings'] = fresh['base_param_settings']
    checkpoint.pop('param_schedulers', None)


def replay(runner) -> None:
    """Step the schedules of a run as often as it has stepped."""
    by_update = any(isinstance(hook, UpdateParamSchedulerHook) for hook in runner.hooks)
    interval = runner.optim_wrapper._accumulative_counts if by_update else 1
    by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
    epoch_length = len(runner.train_dataloader) if by_epoch else runner.iter + 1
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # schedules expect a step of the optimizer before each of theirs
        for iteration in range(1, runner.iter + 1):
            for scheduler in runner.param_schedulers or ():
                if iteration % (epoch_length if scheduler.by_epoch else interval) == 0:
                    scheduler.step()
