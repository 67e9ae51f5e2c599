"""Reading a config file, with the settings of the command line filled in."""

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
    """The file of a config: a path, or PACKAGE::NAME as configs write it in `_base_`.

    Raises:
        UsageError: there is none.
    """
    package, found, rest = name.partition('::')
    path = Path(name)
    if found and package.isidentifier():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UsageError(f"no package '{package}', which the config '{name}' is of: install it")
        path = Path(spec.submodule_search_locations[0], '.mim/configs', rest)
    if not path.is_file():
        raise UsageError(f"no config '{name}': give the path of a .py file, such as configs/cascade/convnext_t.py")
    return str(path)


def load_config(path: str, options: dict, needed: tuple[str, ...] = ('model',)) -> Config:
    """A config file with the command line's options filled in.

    Raises:
        UsageError: the config cannot be read, lacks one of the `needed` keys, or what it needs is not installed.
    """
    path = resolve_config_path(str(path))
    register_safe_yaml()
    try:
        config = Config.fromfile(path)
    except Exception as error:  # a config is a program: it can fail in any way
        if is_user_code_error(error, path) and not isinstance(error, (ImportError, SyntaxError)):
            raise
        raise UsageError(f'{path}: {_read_failure(error, path)}') from error
    if {'data', 'optimizer'} <= set(config) and 'train_dataloader' not in config:
        raise UsageError(
            f'{path} is a config of mmdet 2 or mmseg 0 (data, optimizer, runner): start from a recipe, such as '
            'configs/cascade/convnext_t.py, or move it as mmdet 3 says (docs/en/migration/config_migration.md)'
        )
    rename_old_keys(config, path)
    _require_keys(config, path, needed)
    check_type_names(config, path)
    scope = config.get('default_scope') or 'mmengine'
    check_installed(scope)
    init_default_scope(scope)
    merge_options(config, options)
    _require_keys(config, path, needed)
    check_backbones(config.get('model', {}))
    check_levels(config.get('model', {}))
    return config


def _read_failure(error: Exception, path: str) -> str:
    if isinstance(error, RecursionError):
        return 'it is nested without an end, or its _base_ leads back to it'
    if isinstance(error, AttributeError) and path.lower().endswith(DATA_SUFFIXES):
        return 'a config has names and their settings: model: {type: ...}'
    return f'{type(error).__name__}: {root_message(error)}'


def _require_keys(config: Config, path: str, needed: tuple[str, ...]) -> None:
    for key in needed:
        if not config.get(key):
            raise UsageError(f'{path} has no {key}: give a whole recipe, such as configs/cascade/convnext_t.py')
        if not isinstance(config[key], (dict, list)):
            raise UsageError(f'{path}: {key} is {config[key]!r}, where a dict is due')
