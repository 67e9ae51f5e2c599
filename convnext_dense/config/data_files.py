"""Config files in YAML and JSON, read as data: nothing in them runs."""

from collections.abc import Iterator

import yaml
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.fileio import register_handler
from mmengine.fileio.handlers import YamlHandler

from ..errors import UsageError
from ..type_names import SCOPES

DATA_SUFFIXES = ('.yaml', '.yml', '.json')  # of config files that are data
TYPE_KEYS = ('type', 'constructor', 'runner_type')  # keys whose values mmengine looks up to build something
MAX_CONFIG_VALUES = 1_000_000  # that a YAML file may have, counted as often as its aliases repeat them


class _YamlLoader(getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):
    """PyYAML's safe loader, and tuples, which mmengine writes."""


_YamlLoader.add_constructor(
    'tag:yaml.org,2002:python/tuple', lambda loader, node: tuple(loader.construct_sequence(node, True))
)


class SafeYamlHandler(YamlHandler):
    """mmengine's handler of YAML files with a loader that makes plain values alone: its own runs what a file names."""

    def load_from_fileobj(self, file, **kwargs):
        content = yaml.load(file, Loader=_YamlLoader)
        if sum(1 for _, _ in zip(range(MAX_CONFIG_VALUES + 1), _iter_values(content))) > MAX_CONFIG_VALUES:
            raise UsageError(f'it has more than {MAX_CONFIG_VALUES:,} values: its aliases repeat one another')
        return content


def register_safe_yaml() -> None:
    """Have mmengine read YAML files, as configs and as their bases, by `SafeYamlHandler`, in this process."""
    register_handler(['yaml', 'yml'])(SafeYamlHandler)


def check_type_names(config: Config, path: str) -> None:
    """Raise UsageError where a config file that is data names something else than a registered type: mmengine imports
    what is written as a path, `subprocess.Popen` for instance, and calls it."""
    if not path.lower().endswith(DATA_SUFFIXES):
        return
    for value in _iter_values(config.to_dict()):
        for key in TYPE_KEYS if isinstance(value, dict) else ():
            kind = value.get(key)
            scope = kind.rpartition('.')[0] if isinstance(kind, str) else ''
            if scope and scope not in (*SCOPES, *MODULE2PACKAGE):
                raise UsageError(f"{path}: {key}='{kind}' is no registered type: give its name alone, or mmdet.NAME")


def _iter_values(value: object) -> Iterator[object]:
    """A value and all that are in it."""
    left = [value]
    while left:
        value = left.pop()
        yield value
        if isinstance(value, dict):
            value = [*value, *value.values()]
        left += value if isinstance(value, (list, tuple)) else []
