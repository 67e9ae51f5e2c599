"""Config files in YAML and JSON, read as data: nothing in them is executed."""

import re
from collections.abc import Iterator
from importlib import import_module

import yaml
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.fileio import register_handler
from mmengine.fileio.handlers import YamlHandler

from ..errors import UsageError
from ..type_names import SCOPES

DATA_SUFFIXES = ('.yaml', '.yml', '.json')
TYPE_KEYS = ('type', 'constructor', 'runner_type')  # keys whose values mmengine looks up to build something
WEIGHT_KEYS = ('init_cfg', 'pretrained')  # keys whose values say where a model's weights are
# Words, numbers, and type names with their scope; no calls, paths, URLs or names of pickle files.
PLAIN_STRING = re.compile(
    r'(?!(.*\.)?(pkl|pickle)$)'
    r'([\w \[\]+,-]*(\.\d[\w +,-]*)*|(mmengine|mmcv|mmdet|mmseg|mmpretrain|convnext_dense)\.\w+)'
)
MAX_CONFIG_VALUES = 1_000_000  # in a YAML file, with every repetition by an alias


class _YamlLoader(getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):
    """PyYAML's safe loader with tuples, which mmengine writes."""


_YamlLoader.add_constructor(
    'tag:yaml.org,2002:python/tuple', lambda loader, node: tuple(loader.construct_sequence(node, True))
)


class SafeYamlHandler(YamlHandler):
    """YAML handler that builds plain values only; mmengine's can call whatever a file names."""

    def load_from_fileobj(self, file, **kwargs) -> object:
        """Load an open YAML file; raise UsageError if its aliases expand without end."""
        content = yaml.load(file, Loader=_YamlLoader)
        if sum(1 for _, _ in zip(range(MAX_CONFIG_VALUES + 1), _iter_values(content))) > MAX_CONFIG_VALUES:
            raise UsageError(f'it has more than {MAX_CONFIG_VALUES:,} values: remove aliases that repeat one another')
        return content


def register_safe_yaml() -> None:
    """Have mmengine read YAML configs and their bases with `SafeYamlHandler` in this process."""
    register_handler(['yaml', 'yml'])(SafeYamlHandler)


def check_type_names(config: Config, path: str) -> None:
    """Raise UsageError if a YAML or JSON config names anything but registered types; one in Python may do so.

    mmengine imports a type that is written as a path, such as `subprocess.Popen`, and calls it.
    """
    if not path.lower().endswith(DATA_SUFFIXES):
        return
    for value in _iter_values(config.to_dict()):
        for key in TYPE_KEYS if isinstance(value, dict) else ():
            name = value.get(key)
            scope = name.rpartition('.')[0] if isinstance(name, str) else ''
            if scope and (scope not in (*SCOPES, *MODULE2PACKAGE) or _is_function_of(scope, name)):
                raise UsageError(f"{path}: {key}='{name}' is not a registered type: give NAME or mmdet.NAME")
    check_plain_strings(config.get('model'), path, 'write the config in Python')


def check_plain_strings(value: object, file: str, hint: str) -> None:
    """Raise UsageError if a model or pipeline that is read as data contains a string that could be more than a name.

    Some classes of OpenMMLab evaluate a string argument as code, or load a pickle from that path: mmdet's
    CameraMotionCompensation, mmcv's NMS, the class weights of losses.

    Args:
        value: Part of a config. Its `init_cfg` and `pretrained` are not checked.
        file: File that it came from, for the message.
        hint: What to do instead, for the message.
    """
    if isinstance(value, dict):
        value = [item for key, item in value.items() if key not in WEIGHT_KEYS]
    if isinstance(value, (list, tuple)):
        for item in value:
            check_plain_strings(item, file, hint)
    elif isinstance(value, str) and not PLAIN_STRING.fullmatch(value):
        raise UsageError(f"{file}: '{value[:100]}' in its config could be code, a path or an address: {hint}")


def _is_function_of(scope: str, name: str) -> bool:
    """Whether a name such as `mmengine.dump` is also an import path, which mmengine calls if no type is registered."""
    try:
        value = getattr(import_module(scope), name.rpartition('.')[2], None)
    except ImportError:  # nothing that could be called
        return False
    return value is not None and not isinstance(value, type)


def _iter_values(value: object) -> Iterator[object]:
    """Iterate over a value and all values in it."""
    pending = [value]
    while pending:
        value = pending.pop()
        yield value
        if isinstance(value, dict):
            value = [*value, *value.values()]
        pending += value if isinstance(value, (list, tuple)) else []
