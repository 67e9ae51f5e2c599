"""Load a config file and merge the settings from the command line into it."""

import importlib
import importlib.util
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import init_default_scope

from ..errors import UsageError, is_user_code_error, root_message
from .data_files import DATA_SUFFIXES, check_type_names, register_safe_yaml
from .options import merge_options, rename_old_keys
from .preflight import check_backbones, check_installed, check_levels


def resolve_config_path(name: str) -> str:
    """Return the path of a config file.

    Args:
        name: A path, or PACKAGE::NAME as configs write it in `_base_`.

    Raises:
        UsageError: If the file or the package does not exist.
    """
    package, separator, rest = name.partition('::')
    path = Path(name)
    if separator and package.isidentifier():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UsageError(f"no package '{package}' for the config '{name}': install it")
        path = Path(spec.submodule_search_locations[0], '.mim/configs', rest)
    if not path.is_file():
        raise UsageError(f"no config '{name}': give the path of a .py file, such as configs/cascade/convnext_t.py")
    return str(path)


def load_config(path: str, options: dict, required: tuple[str, ...] = ('model',)) -> Config:
    """Load a config file and merge the settings from the command line into it.

    Args:
        path: Path of the file, or PACKAGE::NAME.
        options: Values by dotted key, as `KeyValueAction` parses them.
        required: Top-level keys that the config must have.

    Raises:
        UsageError: If the config cannot be read or lacks a key, an option is wrong, or a package is not installed.
    """
    path = resolve_config_path(str(path))
    register_safe_yaml()
    try:
        config = Config.fromfile(path)
    except Exception as error:  # a config is a program and can raise anything
        if is_user_code_error(error, path) and not isinstance(error, (ImportError, SyntaxError)):
            raise
        raise UsageError(f'{path}: {_read_failure(error, path)}') from error
    if {'data', 'optimizer'} <= set(config) and 'train_dataloader' not in config:
        raise UsageError(
            f'{path} is a config of mmdet 2 or mmseg 0 (data, optimizer, runner): start from a recipe, such as '
            'configs/cascade/convnext_t.py, or convert it by the migration guide of mmdet 3'
        )
    rename_old_keys(config, path)
    _require_keys(config, path, required)
    check_type_names(config, path)
    scope = config.get('default_scope') or 'mmengine'
    check_installed(scope)
    init_default_scope(scope)
    merge_options(config, options)
    _require_keys(config, path, required)
    check_backbones(config.get('model', {}))
    check_levels(config.get('model', {}))
    return config


def _read_failure(error: Exception, path: str) -> str:
    if isinstance(error, RecursionError):
        return 'it is nested too deeply, or its _base_ refers back to it'
    if isinstance(error, AttributeError) and path.lower().endswith(DATA_SUFFIXES):
        return 'a config consists of keys and values, such as model: {type: ...}'
    return f'{type(error).__name__}: {root_message(error)}'


def _require_keys(config: Config, path: str, required: tuple[str, ...]) -> None:
    for key in required:
        if not config.get(key):
            raise UsageError(f'{path} has no {key}: use a complete recipe, such as configs/cascade/convnext_t.py')
        if not isinstance(config[key], (dict, list)):
            raise UsageError(f'{path}: {key} is {config[key]!r}: give a dict')
