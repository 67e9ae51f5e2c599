"""Where a config departs from the recipe of the paper."""

from collections.abc import Iterator
from pathlib import Path, PurePath

from mmengine.config import Config

from ..config.recipe import MACHINE_KEYS, training_length
from ..config.tree import _get_dotted
from ..type_names import short_name
from .results import PaperResult

CONFIGS = Path(__file__).parents[1] / '.mim/configs'
# What makes a recipe, and in it what is not the recipe's but the user's machine's.
COMPARED_KEYS = ('model', 'optim_wrapper', 'param_scheduler', 'train_dataloader', 'val_dataloader', 'val_evaluator')
COMPARED_KEYS += ('custom_hooks', 'load_from')


def load_recipe(row: PaperResult) -> Config:
    """The config of a row as this package holds it."""
    return Config.fromfile(CONFIGS / f'{row.recipe}.py', import_custom_modules=False)


def diff_from_recipe(config: Config, row: PaperResult) -> list[str]:
    """The settings, by their last names, in which a config departs from the recipe of its row; places of data, workers
    and what `tools/train.py` fits to a number of GPUs are none, precision and batch have their own names elsewhere."""
    ours, theirs = (dict(_flatten_settings(c)) for c in (config, load_recipe(row)))
    changed = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
    return list(dict.fromkeys(next(part for part in reversed(key.split('.')) if not part.isdigit()) for key in changed))


def _flatten_settings(config: Config) -> Iterator[tuple[str, object]]:
    """What a training and its evaluation are made of, by dotted keys."""
    for part in COMPARED_KEYS:
        yield from _flatten(part, config.get(part) or None)
    yield 'length', training_length(config)
    yield 'weights', _pretrained_name(config)


def _flatten(key: str, value) -> Iterator[tuple[str, object]]:
    if key.split('.')[-1] in MACHINE_KEYS or key == 'optim_wrapper.type':
        return
    items = enumerate(value) if isinstance(value, (list, tuple)) else value.items() if hasattr(value, 'items') else None
    if items is None:
        yield key, short_name(value) if key.endswith('.type') else value
        return
    for name, item in items:
        yield from _flatten(f'{key}.{name}', item)


def _pretrained_name(config: Config) -> str:
    """The name of the file that a config's backbone starts from, wherever it lies."""
    init_cfg = _get_dotted(config, 'model.backbone.init_cfg')
    checkpoint = init_cfg.get('checkpoint') if hasattr(init_cfg, 'get') else None
    return PurePath(str(checkpoint)).name.removesuffix('.pth')
