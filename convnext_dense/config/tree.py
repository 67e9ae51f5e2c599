"""Walking through the nested dicts and lists of a config."""

from collections.abc import Iterator, Mapping

from mmengine.config import Config

from ..type_names import short_name


def iter_dicts(value) -> Iterator[dict]:
    """All dicts in a config's value, itself included, from the outside in."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from iter_dicts(item)


def as_list(value) -> list:
    """A setting that may be one or a list of them, as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []


def mismatched_keys(config: Config, wanted: Mapping[str, object]) -> list[str]:
    return [key for key, value in wanted.items() if not _equal(_get_dotted(config, key), value, key)]


def _equal(found, wanted, key: str) -> bool:
    found = short_name(found) if key.endswith('.type') else found
    return (tuple(found) if isinstance(found, list) else found) == wanted


def _get_dotted(config: Config, dotted: str):
    for key in dotted.split('.'):
        if not hasattr(config, 'get'):
            return None
        config = config.get(key)
    return config
