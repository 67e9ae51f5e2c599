"""Find the checkpoint or exported model that a user names, and its config, which is read as data."""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from ..checkpoints.exported_files import ExportedFile, is_exported, read_exported
from ..checkpoints.hub import WEIGHT_URLS, download
from ..checkpoints.io import find_state_dicts, load_checkpoint
from ..config.channels import adapt_input_channels
from ..config.data_files import WEIGHT_KEYS, check_plain_strings
from ..config.literal import parse_config_literal
from ..config.load import load_config
from ..config.preflight import check_backbones, check_installed, check_levels
from ..config.tree import iter_dicts
from ..config.work_dir import find_resume_checkpoint
from ..errors import UsageError
from ..paper.results import RESULTS
from ..type_names import REGISTRIES, SCOPES, TASKS, class_of
from .preprocessing import innermost_dataset

# Patterns of parameter names that only models for one task have.
HEAD_RE = {
    'detection': re.compile(r'(?<![^.])(roi_head|rpn_head|bbox_head)\.'),
    'segmentation': re.compile(r'(?<![^.])decode_head\.'),
}
RECIPES_BY_RELEASED = {result.released: result.recipe for result in RESULTS if result.released}
PACKAGE = __name__.partition('.')[0]
CONFIG_HINT = 'give the config that it was trained with as --config'


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint or an exported model, and facts about the model before it is built.

    Attributes:
        file: Path of the checkpoint or exported model.
        config: Config of the model and of its test pipeline.
        task: 'detection' or 'segmentation'.
        classes: Names of the classes, in the order of the model's outputs.
        palette: RGB color of each class; empty if unknown.
        notices: Lines to show to the user.
        exported: Metadata of the file if it is an exported model.
    """

    file: str
    config: Config
    task: str
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    notices: tuple[str, ...] = field(default=())
    exported: ExportedFile | None = None


def find_model(checkpoint: str | Path, config: str | Path | Config | None = None) -> ModelSource:
    """Find the checkpoint that a user names and its config; no model is built.

    Args:
        checkpoint: A file, a work dir (its best checkpoint, else its last one), a URL, the name of released weights, or
            the file of an exported model.
        config: Path of the config, or the config; None for the config in the file, or that of the recipe to which
            released weights belong.

    Returns:
        The model source.

    Raises:
        UsageError: If there is no checkpoint or no config, or if they are for different tasks.
    """
    file = _find_file(str(checkpoint))
    exported = read_exported(file) if is_exported(file) else None
    content = _as_checkpoint(exported) if exported else load_checkpoint(file)
    config = _load_config(config, file, str(checkpoint), content)
    scope = config.get('default_scope')
    if scope not in TASKS:
        raise UsageError(f"{file}: the config's default_scope is {scope}: prediction needs one of mmdet or mmseg")
    if exported:
        check_exported_fits(exported, config)
    else:
        _check_task(content, file, TASKS[scope])
    notice = adapt_input_channels(config)
    classes, palette = _find_classes(content, config)
    return ModelSource(file, config, TASKS[scope], classes, palette, (notice,) if notice else (), exported)


def _as_checkpoint(exported: ExportedFile) -> dict:
    """Return the metadata of an exported model in the form of a checkpoint."""
    meta = exported.meta
    return dict(meta=dict(cfg=meta.config, dataset_meta=dict(classes=meta.classes, palette=meta.palette or None)))


def check_exported_fits(exported: ExportedFile, config: Config) -> None:
    """Raise UsageError if an exported model has another task or number of classes than a config."""
    meta, task = exported.meta, TASKS.get(config.get('default_scope'))
    if meta.task != task:
        raise UsageError(f'{exported.path} is a model for {meta.task}, the config is for {task}: {CONFIG_HINT}')
    numbers = [part['num_classes'] for part in iter_dicts(config.model) if isinstance(part.get('num_classes'), int)]
    if numbers and meta.classes and max(numbers) != len(meta.classes):
        raise UsageError(
            f'{exported.path} has {len(meta.classes)} classes, the config has {max(numbers)}: {CONFIG_HINT}'
        )


def _find_file(checkpoint: str) -> str:
    path = Path(checkpoint)
    if not path.is_dir():
        return str(download(checkpoint))
    best = sorted(path.glob('best_*.pth'), key=lambda file: file.stat().st_mtime)
    file = str(best[-1]) if best else find_resume_checkpoint(path)
    if file is None or not Path(file).is_file():
        raise UsageError(f'{checkpoint} contains no checkpoint: give the work dir of a training, or a .pth file')
    return file


def _load_config(config: str | Path | Config | None, file: str, name: str, content: Mapping) -> Config:
    required = ('model', 'test_dataloader')
    if isinstance(config, Config):
        return _prepared(Config(config.to_dict()), 'the config')
    if config is not None:
        return load_config(str(config), {}, required)
    recipe = RECIPES_BY_RELEASED.get(name) or RECIPES_BY_RELEASED.get(Path(file).stem)
    if recipe:
        return load_config(f'convnext_dense::{recipe}.py', {}, required)
    meta = content.get('meta') if isinstance(content.get('meta'), dict) else {}
    text = meta.get('cfg') or meta.get('config')
    if not isinstance(text, str) or not text.strip():
        problem = 'is a backbone, not a detector or segmentor' if name in WEIGHT_URLS else 'contains no config'
        raise UsageError(f'{file} {problem}: {CONFIG_HINT}')
    try:
        config = parse_config_literal(text)
    except UsageError as error:
        raise UsageError(f'{file}: {error}: {CONFIG_HINT}') from error
    missing = next((key for key in required if not isinstance(config.get(key), dict)), None)
    if missing:
        raise UsageError(f'{file}: the config in it has no {missing}: {CONFIG_HINT}')
    config = _prepared(config, file)
    _check_types(config, file)
    return config


def _prepared(config: Config, name: str) -> Config:
    """Check a config that does not come from a file as `load_config` does, import what it imports, and return it."""
    scope = config.get('default_scope') or 'mmengine'
    if scope in TASKS:
        check_installed(scope)
        init_default_scope(scope)
        importlib.import_module(f'{scope}.utils').register_all_modules(init_default_scope=False)
    imports = (config.get('custom_imports') or {}).get('imports') or []
    for module in [imports] if isinstance(imports, str) else imports:
        if str(module).partition('.')[0] != PACKAGE:
            raise UsageError(f'{name}: its config imports {module}, which prediction does not run: {CONFIG_HINT}')
        importlib.import_module(module)
    check_backbones(config.get('model', {}))
    check_levels(config.get('model', {}))
    return config


def _check_types(config: Config, file: str) -> None:
    """Refuse a config from a checkpoint that names anything but registered types: mmengine would import and call it."""
    ops = importlib.import_module('mmcv.ops')
    known = _registered_names() | {name for name in ops.__all__ if name.isidentifier()}
    for part in (config.model, config.test_dataloader):
        for item in iter_dicts(part):
            for key in WEIGHT_KEYS:
                item.pop(key, None)  # the weights are in the checkpoint
            type_ = item.get('type')
            if type_ is not None and str(type_) not in known:
                raise UsageError(f"{file}: type='{str(type_)[:100]}' in its config is not registered: {CONFIG_HINT}")
            if item.get('_scope_') not in (None, *SCOPES):
                raise UsageError(f"{file}: its config has the unknown scope '{item['_scope_']}': {CONFIG_HINT}")
    dataset = innermost_dataset(config.test_dataloader.get('dataset') or {})
    for part in (config.model, dataset.get('pipeline')):
        check_plain_strings(part, file, CONFIG_HINT)


def _registered_names() -> set[str]:
    """Names in all registries, with and without their scope; this package's classes are in mmengine's."""
    names, registries = set(), list(REGISTRIES)
    for registry in registries:  # which grows
        registries += registry.children.values()
        for name, cls in registry.module_dict.items():
            package = getattr(cls, '__module__', '').partition('.')[0]
            names |= {name, f'{registry.scope}.{name}', *([f'{package}.{name}'] if package == PACKAGE else [])}
    return names


def _check_task(content: Mapping, file: str, task: str) -> None:
    """Refuse the checkpoint of a detector with the config of a segmentor, and vice versa."""
    names = [name for tensors in find_state_dicts(content).values() for name in tensors]
    has = {t: any(map(pattern.search, names)) for t, pattern in HEAD_RE.items()}
    other_task = next(other_task for other_task in TASKS.values() if other_task != task)
    if has[other_task] and not has[task]:
        raise UsageError(f'{file} is a model for {other_task}, the config is for {task}: {CONFIG_HINT}')


def dataset_classes(config: Config) -> tuple[str, ...]:
    """Return the class names of a config's test data; empty if they are unknown."""
    return _names(_dataset_meta(config))


def _dataset_meta(config: Config) -> dict:
    dataset = innermost_dataset(config.test_dataloader.get('dataset') or {})
    cls = class_of(dataset.get('type'), DATASETS)
    return {**getattr(cls, 'METAINFO', {}), **(dataset.get('metainfo') or {})}


def _names(meta: Mapping) -> tuple[str, ...]:
    classes = meta.get('classes') or ()
    return (classes,) if isinstance(classes, str) else tuple(map(str, classes))


def _find_classes(content: Mapping, config: Config) -> tuple[tuple, tuple]:
    """Return class names and palette: those in the checkpoint, else those of the config's data set."""
    meta = content.get('meta') if isinstance(content.get('meta'), dict) else {}
    meta_values = {str(k).lower(): v for k, v in {**meta, **(meta.get('dataset_meta') or {})}.items()}
    config_meta = _dataset_meta(config)
    if not meta_values.get('classes'):
        meta_values = config_meta
    classes = _names(meta_values)
    palette = (
        meta_values.get('palette')
        or (config_meta.get('palette') if tuple(config_meta.get('classes') or ()) == classes else None)
        or ()
    )
    is_colors = isinstance(palette, (list, tuple)) and len(palette) == len(classes)
    return classes, tuple(tuple(map(int, color)) for color in palette) if is_colors else ()
