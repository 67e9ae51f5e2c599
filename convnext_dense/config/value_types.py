"""The kinds of the values in a config that a recipe is fitted by, checked before anything is computed from them."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from mmengine.config import Config

from ..errors import UsageError


class ValueType(NamedTuple):
    """What a value has to be, in words and as a test; `optional` ones may be None."""

    words: str
    test: Callable[[object], bool]
    optional: bool = False


def _is_whole(value: object) -> bool:
    return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))


def _is_list(value: object, test: Callable[[object], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(map(test, value))


def _is_dict(value: object) -> bool:
    return isinstance(value, Mapping)


DICT = ValueType('a dict', _is_dict)
TEXT = ValueType('a text', lambda value: isinstance(value, str))
DICTS = ValueType('a list of dicts', lambda value: _is_list(value, _is_dict), True)
COUNT = ValueType('a whole number above 0', lambda value: _is_whole(value) and isinstance(value, int) and value > 0)
STEPS = ValueType('a whole number above 0', lambda value: _is_whole(value) and value > 0)
PLACE = ValueType('a whole number', _is_whole)
PLACES = ValueType('a list of whole numbers', lambda value: _is_list(value, _is_whole))
PAIRS = ValueType(
    'a list of pairs (from where on, interval), whole numbers above 0',
    lambda value: _is_list(value, lambda pair: _is_list(pair, STEPS.test) and len(pair) == 2),
    True,
)
# By dotted key, from the outside in; `*` is every item of a list, or the one that stands in its place.
EXPECTED_TYPES = {
    'total_batch': COUNT._replace(optional=True),
    'train_dataloader': DICT,
    'train_dataloader.batch_size': COUNT,
    'optim_wrapper': DICT,
    'optim_wrapper.accumulative_counts': COUNT,
    'train_cfg': DICT,
    **{f'train_cfg.{name}': STEPS for name in ('max_epochs', 'max_iters', 'val_interval')},
    'train_cfg.val_begin': PLACE,
    'train_cfg.dynamic_intervals': PAIRS,
    'default_hooks': DICT,
    'default_hooks.checkpoint': DICT._replace(optional=True),
    **{f'default_hooks.checkpoint.{name}': PLACE for name in ('interval', 'save_begin')},
    'custom_hooks': DICTS,
    **{
        f'custom_hooks.*.{name}': PLACE
        for name in ('begin_epoch', 'begin_iter', 'switch_epoch', 'num_last_epochs', 'interval')
    },
    'param_scheduler': ValueType('a dict or a list of them', lambda value: _is_dict(value) or DICTS.test(value), True),
    **{f'param_scheduler.*.{name}': PLACE for name in ('begin', 'end', 'step_size')},
    **{f'param_scheduler.*.{name}': PLACE._replace(optional=True) for name in ('T_max', 'total_steps')},
    **{f'param_scheduler.*.{name}': PLACES for name in ('milestones', 'periods')},
}


def check_value_types(config: Config) -> None:
    """Raise UsageError naming the first setting that is not what fitting needs."""
    for place, value, kind in find_wrong_types(config, EXPECTED_TYPES):
        raise UsageError(f'{place}={value!s:.60}: give {kind.words}')


def find_wrong_types(config: Config, kinds: Mapping[str, ValueType]) -> Iterator[tuple[str, object, ValueType]]:
    """The settings that are there and not of the kinds that they should be: their keys, values and these kinds."""
    for key, kind in kinds.items():
        for place, value in _iter_key(config, key.split('.')):
            if not (kind.test(value) or (kind.optional and value is None)):
                yield place, value, kind


def _iter_key(node: object, parts: list[str], place: tuple[str, ...] = ()) -> Iterator[tuple[str, object]]:
    """The values of a dotted key that are there, each with its own key."""
    if not parts:
        yield '.'.join(place), node
    elif parts[0] == '*' and isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            yield from _iter_key(item, parts[1:], (*place, str(i)))
    elif parts[0] == '*':
        yield from _iter_key(node, parts[1:], place)
    elif isinstance(node, Mapping | Config) and parts[0] in node:
        yield from _iter_key(node[parts[0]], parts[1:], (*place, parts[0]))
