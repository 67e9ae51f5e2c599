"""Reading a config file, with the settings of the command line filled in."""

import importlib
import importlib.util
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import init_default_scope

from ..errors import UsageError, is_users_bug, root_message
from .data_files import DATA_ENDINGS, check_types, read_yaml_safely
from .options import merge
from .preflight import check_backbones, check_installed, check_levels


def config_path(name: str) -> str:
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
    path = config_path(str(path))
    read_yaml_safely()
    try:
        config = Config.fromfile(path)
    except Exception as error:  # a config is a program: it can fail in any way
        if is_users_bug(error, path) and not isinstance(error, (ImportError, SyntaxError)):
            raise
        raise UsageError(f'{path}: {_why_not_read(error, path)}') from error
    if {'data', 'optimizer'} <= set(config) and 'train_dataloader' not in config:
        raise UsageError(
            f'{path} is a config of mmdet 2 or mmseg 0 (data, optimizer, runner): start from a recipe, such as '
            'configs/cascade/convnext_t.py, or move it as mmdet 3 says (docs/en/migration/config_migration.md)'
        )
    _check_parts(config, path, needed)
    check_types(config, path)
    scope = config.get('default_scope') or 'mmengine'
    check_installed(scope)
    init_default_scope(scope)
    merge(config, options)
    _check_parts(config, path, needed)
    check_backbones(config.get('model', {}))
    check_levels(config.get('model', {}))
    return config


def _why_not_read(error: Exception, path: str) -> str:
    if isinstance(error, RecursionError):
        return 'it is nested without an end, or its _base_ leads back to it'
    if isinstance(error, AttributeError) and path.lower().endswith(DATA_ENDINGS):
        return 'a config has names and their settings: model: {type: ...}'
    return f'{type(error).__name__}: {root_message(error)}'


def _check_parts(config: Config, path: str, needed: tuple[str, ...]) -> None:
    for key in needed:
        if not config.get(key):
            raise UsageError(f'{path} has no {key}: give a whole recipe, such as configs/cascade/convnext_t.py')
        if not isinstance(config[key], (dict, list)):
            raise UsageError(f'{path}: {key} is {config[key]!r}, where a dict is due')
