"""Settings from the command line (`--cfg-options KEY=VALUE`).

Keys that nothing reads are refused. The user's settings take precedence over values that are derived from other
arguments or from the number of GPUs.
"""

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache

from mmengine.config import Config, DictAction
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, set_random_seed
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from ..errors import UsageError
from ..optim.layer_decay import DEFAULT_CONSTRUCTOR_KEYS
from ..type_names import class_of
from .tree import LOADERS, get_dotted, is_equal

# Top-level keys that mmengine's runner and this package's tools read besides the runner's own arguments.
TOP_LEVEL_KEYS = {'custom_imports', 'runner_type', 'find_unused_parameters', 'model_wrapper_cfg', 'compile', 'sync_bn'}
TOP_LEVEL_KEYS |= {'activation_checkpointing', 'env_cfg', 'randomness', 'experiment_name'}
TOP_LEVEL_KEYS |= {'total_batch', 'max_unreadable', 'health_check', 'schedule_fit'}
RENAMED_KEYS = {'max_bad_images': 'max_unreadable'}  # old name -> name, at the top level
# Parts of a config without a type, and the classes and functions that take them as arguments.
BUILT_WITHOUT_TYPE = dict.fromkeys(LOADERS, (DataLoader,)) | {
    'train_cfg': (EpochBasedTrainLoop, IterBasedTrainLoop),
    'randomness': (set_random_seed,),
    'optim_wrapper.clip_grad': (clip_grad_norm_,),
}
# Keys that mmengine reads from parts of a config besides the arguments of what they build.
EXTRA_KEYS = {loader: {'dataset', 'num_batch_per_epoch'} for loader in LOADERS} | {
    'train_cfg': {'by_epoch'},
    'env_cfg': {'cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'},
    'env_cfg.mp_cfg': {'mp_start_method', 'opencv_num_threads'},
    'env_cfg.dist_cfg': {'backend', 'timeout', 'init_backend'},
    'optim_wrapper': {'constructor', 'optimizer', 'paramwise_cfg'},
    'optim_wrapper.paramwise_cfg': set(DEFAULT_CONSTRUCTOR_KEYS),
    'auto_scale_lr': {'enable', 'base_batch_size'},
    'default_hooks': {'timer', 'logger', 'param_scheduler', 'checkpoint'}
    | {'sampler_seed', 'runtime_info', 'visualization'},
}
DEFAULT_TYPES = {'optim_wrapper': 'OptimWrapper'}  # of parts whose type is optional
_MISSING = object()  # value of a key that the config does not have
MMENGINE_KEYS = {'type', '_delete_', '_scope_'}  # keys that mmengine reads in any part


class KeyValueAction(DictAction):
    """mmengine's action for KEY=VALUE arguments, with +KEY=VALUE for new keys and an error for anything else."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Parse the values into a dict by key; exit with code 2 if one is malformed."""
        malformed = next((value for value in values if not re.match(r'\+?[^+=][^=]*=', value)), None)
        if malformed is not None:
            parser.error(f"{option_string} '{malformed}': give KEY=VALUE, such as train_cfg.max_epochs=12")
        with_dict = next((value for value in values if value.partition('=')[2].lstrip('[( ')[:1] == '{'), None)
        if with_dict is not None:  # mmengine would parse it as a string
            parser.error(
                f'{option_string} {with_dict}: a dict cannot be given here: give KEY.SUBKEY=VALUE, or use a config file'
            )
        try:
            super().__call__(parser, namespace, values, option_string)
        except AssertionError as error:  # brackets that do not match
            parser.error(f'{option_string}: {error}')
        rename_old_keys(getattr(namespace, self.dest), option_string)


def rename_old_keys(settings: Config | dict, source: str) -> None:
    """Rename top-level keys with an old name (`RENAMED_KEYS`) in place, with a warning that names their source."""
    for old, new in RENAMED_KEYS.items():
        for plus in ('', '+'):
            if plus + old in settings:
                settings.setdefault(plus + new, settings.pop(plus + old))
                print(f'warning: {source} {old} was renamed to {new}; please use the new name', file=sys.stderr)


def merge_options(config: Config, options: Mapping[str, object]) -> dict[str, object]:
    """Merge settings from the command line into a config.

    Args:
        config: Config; it is changed in place.
        options: Values by dotted key; a key with a leading + may be new.

    Returns:
        The values by key without the leading plus.

    Raises:
        UsageError: If nothing reads a key, or a value does not fit.
    """
    for key in options:
        if not key.startswith('+'):
            check_key(config, key)
            _check_replaceable(config, key, options[key])
    options = {key.removeprefix('+'): value for key, value in options.items()}
    try:
        config.merge_from_dict(options)
    except (TypeError, KeyError) as error:  # a dict where a value is expected, an index out of range
        raise UsageError(f'--cfg-options: {str(error.args[0]).splitlines()[0]}') from error
    return options


def check_key(config: Config, key: str) -> None:
    """Raise UsageError for a dotted key that is neither in the config nor an argument of what the config builds."""
    parts, node = key.split('.'), config
    for i, part in enumerate(parts):
        parent, path = '.'.join(parts[:i]), '.'.join(parts[: i + 1])
        if not hasattr(node, 'keys') or part not in node:
            valid = _valid_keys(node, parent)
            if part not in valid:
                raise UsageError(f'--cfg-options {key}: {_unknown_key_message(config, parts, i, valid)}')
        if i == 0 and part not in _top_level_keys():
            raise UsageError(f'--cfg-options {key}: {_config_variable_message(config, part, parts[1:])}')
        if isinstance(node, tuple):
            raise UsageError(f'--cfg-options {key}: items of a tuple cannot be set: give all of {parent}')
        if isinstance(node, list):
            node = node[int(part)]
        else:
            node = node[part] if hasattr(node, 'get') and part in node else None
        if node is None and path not in EXTRA_KEYS and path not in BUILT_WITHOUT_TYPE:
            return  # an argument that the config leaves at its default; its keys are unknown
        node = {} if node is None else node


def _check_replaceable(config: Config, key: str, value: object) -> None:
    """Raise UsageError if a number or a string would replace a whole part of the config."""
    old = get_dotted(config, key)
    if hasattr(old, 'keys') and isinstance(value, (int, float, str)) and ('.' not in key or 'type' in old):
        raise UsageError(f'--cfg-options {key}={value!r}: {key} is a dict: give {key}.KEY=VALUE')


def _valid_keys(node: object, path: str) -> Collection[str]:
    """Return the valid keys of a part of a config: its own, and the arguments of what it builds."""
    if isinstance(node, (list, tuple)):
        return [str(i) for i in range(len(node))]
    if not hasattr(node, 'keys'):
        return []
    keys = {*node.keys(), *EXTRA_KEYS.get(path, ())}
    if not path:
        return keys | _top_level_keys()
    built = class_of(node.get('type', DEFAULT_TYPES.get(path)))
    callables = ([built] if built else []) + list(BUILT_WITHOUT_TYPE.get(path, ()))
    return keys.union(MMENGINE_KEYS, *map(argument_names, callables))


@cache
def _top_level_keys() -> set[str]:
    return TOP_LEVEL_KEYS | set(argument_names(Runner)) - {'cfg'}


@cache
def argument_names(function: Callable) -> frozenset[str]:
    """Return the names of the arguments of a function or class.

    Args:
        function: The function or class. The arguments that a class passes to its bases as `**kwargs` count too.
    """
    names, classes = set(), function.__mro__ if isinstance(function, type) else (function,)
    for each in classes:
        init = each.__dict__.get('__init__') if isinstance(each, type) else each
        if init is None:
            continue
        parameters = inspect.signature(init).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return frozenset(names - {'self'})


def _unknown_key_message(config: Config, parts: list[str], i: int, valid: Collection[str]) -> str:
    """Format the message for an unknown part `i` of a key, with the nearest known key."""
    known = [key for key, _ in _iter_items(config) if key.split('.')[0] in _top_level_keys()]
    key, parent = '.'.join(parts), '.'.join(parts[:i])
    siblings = ['.'.join([*parts[:i], name, *parts[i + 1 :]]) for name in difflib.get_close_matches(parts[i], valid, 1)]
    longer_keys = [candidate for candidate in known if candidate.endswith(f'.{key}')]
    suggestions = [*longer_keys, *siblings, *difflib.get_close_matches(key, known, 1, 0.7)]
    hint = f' (did you mean {suggestions[0]}?)' if suggestions else ''
    return f'{parent or "the config"} has no {parts[i]}{hint}; to add a new key, write +{key}=...'


def _config_variable_message(config: Config, name: str, rest: list[str]) -> str:
    """Format the message for a variable of a config file, with the key that is read instead."""
    value = config[name]
    items = ((key, item) for key, item in _iter_items(config) if '.' in key)
    users = [key for key, item in items if type(item) is type(value) and item == value]
    target = '.'.join([users[0], *rest]) if users else 'the key that uses it'
    return f'{name} is a variable of the config file, which nothing reads once the file is loaded: set {target} instead'


def _iter_items(node: object, prefix: str = '') -> Iterator[tuple[str, object]]:
    """Iterate over all dotted keys below a part of a config with their values, dicts and lists included."""
    items = enumerate(node) if isinstance(node, (list, tuple)) else node.items() if hasattr(node, 'items') else ()
    for key, value in items:
        yield f'{prefix}{key}', value
        yield from _iter_items(value, f'{prefix}{key}.')


def is_explicit(options: Collection[str], *keys: str) -> bool:
    """Whether one of these keys, or a part of the config that contains it, is set on the command line."""
    return any(key == option or key.startswith(f'{option}.') for key in keys for option in options)


def reapply_options(config: Config, options: Mapping[str, object], *prefixes: str) -> None:
    """Apply the user's settings with one of these prefixes again, after other settings were derived."""
    config.merge_from_dict({key: value for key, value in options.items() if key.startswith(prefixes)})


def overridden_options(config: Config, options: Mapping[str, object]) -> list[str]:
    """Find settings from the command line that the final config overrides.

    Args:
        config: The final config.
        options: Settings from the command line by dotted key.

    Returns:
        One line per setting that another argument, the data or the number of GPUs changed.
    """
    lines = []
    for key, value in options.items():
        if key.split('.')[-1] == '_delete_':
            continue
        final = get_dotted(config, key, _MISSING)
        if final is _MISSING or not is_equal(final, value):
            outcome = 'was removed' if final is _MISSING else f'became {final!r}'
            lines.append(
                f'--cfg-options {key}={value!r} {outcome}: other arguments, the data or the number of GPUs determine it'
            )
    return lines
