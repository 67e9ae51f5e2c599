"""Settings from the command line (`--cfg-options KEY=VALUE`): those that nothing reads are refused, and what follows
from another argument or from the number of GPUs gives way to what the user says."""

import difflib
import inspect
import logging
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from functools import cache

from mmengine.config import Config, DictAction
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, set_random_seed
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from ..errors import UsageError
from ..optim.layer_decay import DEFAULT_CONSTRUCTOR_KEYS
from ..type_names import class_of

# What mmengine's runner and this package's tools read of a config beside the runner's own arguments.
TOP_LEVEL_KEYS = {
    'custom_imports',
    'runner_type',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'compile',
    'total_batch',
}
TOP_LEVEL_KEYS |= {'activation_checkpointing', 'sync_bn', 'max_unreadable', 'env_cfg', 'randomness', 'experiment_name'}
TOP_LEVEL_KEYS.add('health_check')
RENAMED_KEYS = {'max_bad_images': 'max_unreadable'}  # of the top level: old name -> name
# Classes and functions whose arguments a part of a config is that names no type.
BUILT_WITHOUT_TYPE = {
    'train_dataloader': (DataLoader,),
    'val_dataloader': (DataLoader,),
    'test_dataloader': (DataLoader,),
    'train_cfg': (EpochBasedTrainLoop, IterBasedTrainLoop),
    'randomness': (set_random_seed,),
    'optim_wrapper.clip_grad': (clip_grad_norm_,),
}
# Keys of parts that name no type and build nothing: what mmengine looks up in them.
EXTRA_KEYS = {
    'train_dataloader': {'dataset', 'num_batch_per_epoch'},
    'val_dataloader': {'dataset', 'num_batch_per_epoch'},
    'test_dataloader': {'dataset', 'num_batch_per_epoch'},
    'train_cfg': {'by_epoch'},
    'env_cfg': {'cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'},
    'env_cfg.mp_cfg': {'mp_start_method', 'opencv_num_threads'},
    'env_cfg.dist_cfg': {'backend', 'timeout', 'init_backend'},
    'optim_wrapper': {'constructor', 'optimizer', 'paramwise_cfg'},
    'optim_wrapper.paramwise_cfg': set(DEFAULT_CONSTRUCTOR_KEYS),
    'auto_scale_lr': {'enable', 'base_batch_size'},
    'default_hooks': {
        'timer',
        'logger',
        'param_scheduler',
        'checkpoint',
        'sampler_seed',
        'runtime_info',
        'visualization',
    },
}
DEFAULT_TYPES = {'optim_wrapper': 'OptimWrapper'}  # of parts that need not name theirs
MMENGINE_KEYS = {'type', '_delete_', '_scope_'}  # of mmengine, in any part


class KeyValueAction(DictAction):
    """mmengine's KEY=VALUE options, +KEY=VALUE for keys that are meant to be new; anything else is a usage error."""

    def __call__(self, parser, namespace, values, option_string=None):
        wrong = next((value for value in values if not re.match(r'\+?[^+=][^=]*=', value)), None)
        if wrong is not None:
            parser.error(f"{option_string} '{wrong}': give KEY=VALUE, such as train_cfg.max_epochs=12")
        wrong = next((value for value in values if value.partition('=')[2].lstrip('[( ')[:1] == '{'), None)
        if wrong is not None:  # to mmengine they are text
            parser.error(f'{option_string} {wrong}: dicts have no form here: give KEY.SUBKEY=VALUE, or a config file')
        try:
            super().__call__(parser, namespace, values, option_string)
        except AssertionError as error:  # brackets that do not match
            parser.error(f'{option_string}: {error}')
        options = getattr(namespace, self.dest)
        for old, new in RENAMED_KEYS.items():
            for plus in ('', '+'):
                if plus + old in options:
                    options[plus + new] = options.pop(plus + old)
                    print(
                        f'warning: {option_string} {old} was renamed to {new}; please use the new name', file=sys.stderr
                    )


def rename_old_keys(config: Config, path: str) -> None:
    """Give the keys of a config file that have another name now (`RENAMED_KEYS`) that name, with a warning."""
    for old, new in RENAMED_KEYS.items():
        if old in config:
            config.setdefault(new, config.pop(old))
            print_log(f'{path}: {old} was renamed to {new}; please use the new name', 'current', logging.WARNING)


def merge_options(config: Config, options: Mapping[str, object]) -> dict[str, object]:
    """Put options into a config and return them by their keys without the plus of new ones.

    Raises:
        UsageError: nothing reads a key, or it does not fit what is there.
    """
    for key in options:
        if not key.startswith('+'):
            check_key(config, key)
            _check_replaced(config, key, options[key])
    options = {key.removeprefix('+'): value for key, value in options.items()}
    try:
        config.merge_from_dict(options)
    except (TypeError, KeyError) as error:  # a dict in the place of a value, an index that is not there
        raise UsageError(f'--cfg-options: {str(error.args[0]).splitlines()[0]}') from error
    return options


def check_key(config: Config, key: str) -> None:
    """Raise UsageError where a dotted key is none of the config's and no argument of what the config builds."""
    parts, node, place = key.split('.'), config, []
    for i, part in enumerate(parts):
        if not hasattr(node, 'keys') or part not in node:
            known = _valid_keys(node, '.'.join(place))
            if part not in known:
                raise UsageError(f'--cfg-options {key}: {_unknown_key_message(config, parts, i, known)}')
        if i == 0 and part not in _top_level_keys():
            raise UsageError(f'--cfg-options {key}: {_config_variable_message(config, part, parts[1:])}')
        place.append(part)
        if isinstance(node, tuple):
            raise UsageError(f'--cfg-options {key}: it is a part of a tuple: give all of {".".join(place[:-1])}')
        if isinstance(node, list):
            node = node[int(part)]
        elif hasattr(node, 'get') and part in node:
            node = node[part]
        else:
            node = None
        if node is None and not {'.'.join(place)} & {*EXTRA_KEYS, *BUILT_WITHOUT_TYPE}:
            return  # an argument that the config leaves at its default: what is below it is its own
        node = {} if node is None else node


def _check_replaced(config: Config, key: str, value: object) -> None:
    """Raise UsageError where a number or a text takes the place of a part of the config."""
    old = _get_dotted(config, key.split('.'))
    if hasattr(old, 'keys') and isinstance(value, (int, float, str)) and ('.' not in key or 'type' in old):
        raise UsageError(f'--cfg-options {key}={value!r}: {key} is a part of the config: give {key}.KEY=VALUE')


def _valid_keys(node: object, place: str) -> Collection[str]:
    """What may stand below a part of a config: its own keys, and the arguments of what it builds."""
    if isinstance(node, (list, tuple)):
        return [str(i) for i in range(len(node))]
    if not hasattr(node, 'keys'):
        return []
    own = {*node.keys(), *EXTRA_KEYS.get(place, ())}
    if not place:
        return own | _top_level_keys()
    kind = class_of(node.get('type', DEFAULT_TYPES.get(place)))
    built = ([kind] if kind else []) + list(BUILT_WITHOUT_TYPE.get(place, ()))
    return own.union(MMENGINE_KEYS, *map(argument_names, built))


@cache
def _top_level_keys() -> set[str]:
    return TOP_LEVEL_KEYS | set(argument_names(Runner)) - {'cfg'}


@cache
def argument_names(function) -> frozenset[str]:
    """The names of a function's or class's arguments, those included that it passes on to the classes it is derived
    from."""
    found, classes = set(), function.__mro__ if isinstance(function, type) else (function,)
    for each in classes:
        init = each.__dict__.get('__init__') if isinstance(each, type) else each
        if init is None:
            continue
        parameters = inspect.signature(init).parameters.values()
        found |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return frozenset(found - {'self'})


def _unknown_key_message(config: Config, parts: list[str], i: int, known: Collection[str]) -> str:
    """What is wrong with a key whose part `i` is not known, and the nearest one that is."""
    every = dict.fromkeys(_iter_dotted_keys(config))
    key, before = '.'.join(parts), '.'.join(parts[:i])
    tail = next((other for other in every if other.endswith(f'.{key}')), None)
    sibling = difflib.get_close_matches(parts[i], known, 1, 0.6)
    near = difflib.get_close_matches(key, every, 1, 0.7)
    meant = '.'.join([*parts[:i], sibling[0], *parts[i + 1 :]]) if sibling else None
    suggestion = tail or meant or (near[0] if near else None)
    there = f'{before} has no {parts[i]}' if before else f'the config has no {parts[i]}'
    hint = f'perhaps {suggestion}; ' if suggestion else ''
    return f'{there}: {hint}for what is meant to be new write +{key}=...'


def _config_variable_message(config: Config, name: str, rest: list[str]) -> str:
    """What is read in the place of a variable of a config file."""
    value = config[name]
    users = [key for key, other in _iter_items(config) if key != name and _is_equal(other, value) and '.' in key]
    read = '.'.join([users[0], *rest]) if users else 'what it was put into'
    return f'{name} is a variable of the config file, which nothing reads once the file is loaded: set {read} instead'


def _is_equal(a: object, b: object) -> bool:
    return type(a) is type(b) and a == b


def _iter_dotted_keys(config: Config) -> Iterator[str]:
    """All keys of a config that are read, from the outside in."""
    return (key for key, _ in _iter_items(config) if key.split('.')[0] in _top_level_keys())


def _iter_items(node: object, place: str = '') -> Iterator[tuple[str, object]]:
    items = enumerate(node) if isinstance(node, (list, tuple)) else node.items() if hasattr(node, 'items') else ()
    for key, value in items:
        yield f'{place}{key}', value
        yield from _iter_items(value, f'{place}{key}.')


def is_explicit(options: Collection[str], *keys: str) -> bool:
    """Whether the user gave one of these settings on the command line."""
    return any(key == option or key.startswith(f'{option}.') for key in keys for option in options)


def reapply_options(config: Config, options: Mapping[str, object], *parts: str) -> None:
    """Put the user's settings of some parts of a config back in, after others in them were derived."""
    config.merge_from_dict({key: value for key, value in options.items() if key.startswith(parts)})


def overridden_options(config: Config, options: Mapping[str, object]) -> list[str]:
    """Options that do not hold in the end, a line each: other arguments or the number of GPUs changed them."""
    lines = []
    for key, value in options.items():
        if key.split('.')[-1] == '_delete_':
            continue
        found = _get_dotted(config, key.split('.'))
        if found is _MISSING or not _equal(found, value):
            now = 'is not there any more' if found is _MISSING else f'became {found!r}'
            lines.append(
                f'--cfg-options {key}={value!r} {now}: other arguments, the data or the number of GPUs decide it'
            )
    return lines


_MISSING = object()


def _get_dotted(node: object, parts: list[str]) -> object:
    for part in parts:
        if isinstance(node, (list, tuple)) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif hasattr(node, 'get') and part in node:
            node = node[part]
        else:
            return _MISSING
    return node


def _equal(found: object, value: object) -> bool:
    if isinstance(found, (list, tuple)) and isinstance(value, (list, tuple)):
        return len(found) == len(value) and all(map(_equal, found, value))
    return found == value
