"""Checks of the types of settings from which batch size and schedule are computed."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from mmengine.config import Config

from ..errors import UsageError


class ValueType(NamedTuple):
    """Expected type of a value.

    Attributes:
        description: Description for the error message.
        is_valid: Function that tells whether a value has the type.
        optional: Whether the value may be None.
    """

    description: str
    is_valid: Callable[[object], bool]
    optional: bool = False


def _is_whole(value: object) -> bool:
    return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))


def _is_list(value: object, test: Callable[[object], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(map(test, value))


def _is_dict(value: object) -> bool:
    return isinstance(value, Mapping)


DICT = ValueType('a dict', _is_dict)
TEXT = ValueType('a string', lambda value: isinstance(value, str))
DICTS = ValueType('a list of dicts', lambda value: _is_list(value, _is_dict), True)
COUNT = ValueType('a positive integer', lambda value: _is_whole(value) and isinstance(value, int) and value > 0)
STEPS = ValueType('a positive integer', lambda value: _is_whole(value) and value > 0)
POSITION = ValueType('an integer', _is_whole)
POSITIONS = ValueType('a list of integers', lambda value: _is_list(value, _is_whole))
PAIRS = ValueType(
    'a list of pairs (start, interval) of positive integers',
    lambda value: _is_list(value, lambda pair: _is_list(pair, STEPS.is_valid) and len(pair) == 2),
    True,
)
# By dotted key, outer keys first; `*` is every item of a list, or a single item in place of a list.
EXPECTED_TYPES = {
    'total_batch': COUNT._replace(optional=True),
    'train_dataloader': DICT,
    'train_dataloader.batch_size': COUNT,
    'optim_wrapper': DICT,
    'optim_wrapper.accumulative_counts': COUNT,
    'train_cfg': DICT,
    **{f'train_cfg.{name}': STEPS for name in ('max_epochs', 'max_iters', 'val_interval')},
    'train_cfg.val_begin': POSITION,
    'train_cfg.dynamic_intervals': PAIRS,
    'default_hooks': DICT,
    'default_hooks.checkpoint': DICT._replace(optional=True),
    **{f'default_hooks.checkpoint.{name}': POSITION for name in ('interval', 'save_begin')},
    'custom_hooks': DICTS,
    **{
        f'custom_hooks.*.{name}': POSITION
        for name in ('begin_epoch', 'begin_iter', 'switch_epoch', 'num_last_epochs', 'interval')
    },
    'param_scheduler': ValueType(
        'a dict or a list of them', lambda value: _is_dict(value) or DICTS.is_valid(value), True
    ),
    **{f'param_scheduler.*.{name}': POSITION for name in ('begin', 'end', 'step_size')},
    **{f'param_scheduler.*.{name}': POSITION._replace(optional=True) for name in ('T_max', 'total_steps')},
    **{f'param_scheduler.*.{name}': POSITIONS for name in ('milestones', 'periods')},
}


def check_value_types(config: Config) -> None:
    """Raise UsageError for the first setting of the wrong type (`EXPECTED_TYPES`)."""
    for key, value, expected in find_wrong_types(config, EXPECTED_TYPES):
        raise UsageError(f'{key}={value!s:.60}: give {expected.description}')


def find_wrong_types(config: Config, expected: Mapping[str, ValueType]) -> Iterator[tuple[str, object, ValueType]]:
    """Find the settings in a config that have the wrong type.

    Args:
        config: Config whose settings are checked; missing ones are skipped.
        expected: Expected types by dotted key.

    Yields:
        Their keys, values and expected types.
    """
    for pattern, value_type in expected.items():
        for key, value in _iter_matches(config, pattern.split('.')):
            if not (value_type.is_valid(value) or (value_type.optional and value is None)):
                yield key, value, value_type


def _iter_matches(node: object, parts: list[str], path: tuple[str, ...] = ()) -> Iterator[tuple[str, object]]:
    """Iterate over the keys and values that match a dotted key with `*`."""
    if not parts:
        yield '.'.join(path), node
    elif parts[0] == '*' and isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            yield from _iter_matches(item, parts[1:], (*path, str(i)))
    elif parts[0] == '*':
        yield from _iter_matches(node, parts[1:], path)
    elif isinstance(node, Mapping | Config) and parts[0] in node:
        yield from _iter_matches(node[parts[0]], parts[1:], (*path, parts[0]))
