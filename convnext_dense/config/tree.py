"""Helpers for the nested dicts and lists of a config, and for its custom imports."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config

LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
# Keys that hold pipelines besides those of the data sets; a hook may switch to another pipeline.
EXTRA_PIPELINE_KEYS = ('custom_hooks', 'default_hooks', 'tta_pipeline')
PIPELINE_KEYS = (*LOADERS, *EXTRA_PIPELINE_KEYS)


def iter_dicts(value: object) -> Iterator[dict]:
    """Iterate over a value and all dicts nested in it, from the outside in."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from iter_dicts(item)


def as_list(value: object) -> list:
    """Return a setting that may be a single item or a list as a list; [] for None."""
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []


def get_dotted(config: object, key: str, default: Any = None) -> Any:
    """Return the value of a dotted key, in which list items are numbers.

    Args:
        config: A config, or a dict or list in it.
        key: Dotted key, such as 'param_scheduler.0.type'.
        default: Value to return if there is no such key.
    """
    for part in key.split('.'):
        if isinstance(config, (list, tuple)) and part.isdigit() and int(part) < len(config):
            config = config[int(part)]
        elif hasattr(config, 'get') and part in config:
            config = config[part]
        else:
            return default
    return config


def flatten(key: str, value: object) -> Iterator[tuple[str, object]]:
    """Iterate over the dotted keys and values of a part of a config; a list of plain values counts as one value.

    Args:
        key: Key of the part, which is the prefix of all keys.
        value: Value of the part.
    """
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from flatten(f'{key}.{name}', item)
    elif isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in value):
        for i, item in enumerate(value):
            yield from flatten(f'{key}.{i}', item)
    else:
        yield key, value


def is_equal(a: object, b: object) -> bool:
    """Whether two settings are equal; a list equals a tuple of the same items, and NaN equals NaN."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(is_equal, a, b))
    return a == b or (a != a and b != b)


def add_custom_imports(config: Config, *modules: str) -> None:
    """Add modules, by full name, to the custom imports of a config in place, and import them now."""
    imports = config.setdefault('custom_imports', dict(imports=[], allow_failed_imports=False))
    imports['imports'] = [*dict.fromkeys([*as_list(imports['imports']), *modules])]
    for module in modules:
        importlib.import_module(module)
