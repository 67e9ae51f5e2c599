"""Compare a config with the recipe of the paper."""

from collections.abc import Iterator
from pathlib import Path, PurePath

from mmengine.config import Config

from ..config.recipe import MACHINE_KEYS, training_length
from ..config.tree import flatten, get_dotted, is_equal
from ..type_names import short_name
from .results import PaperResult

CONFIGS = Path(__file__).parents[1] / '.mim/configs'
# Parts of a config that define a recipe.
COMPARED_KEYS = ('model', 'optim_wrapper', 'param_scheduler', 'train_dataloader', 'val_dataloader', 'val_evaluator')
COMPARED_KEYS += ('custom_hooks', 'load_from')


def load_recipe(result: PaperResult) -> Config:
    """Load the config of this package for a result of the paper."""
    return Config.fromfile(CONFIGS / f'{result.recipe}.py', import_custom_modules=False)


def diff_from_recipe(config: Config, result: PaperResult) -> list[str]:
    """List the settings in which a config differs from a recipe.

    Data paths, workers, and settings that `tools/train.py` adapts to the number of GPUs are not compared, nor are
    precision and batch size, which `TrainingRun.deviations` compares.

    Args:
        config: Config of a training.
        result: Result of the paper with whose recipe it is compared.

    Returns:
        Short keys such as 'optimizer.lr', 'length' or 'weights', without duplicates.
    """
    settings, expected = (dict(_flatten_settings(c)) for c in (config, load_recipe(result)))
    changed = [key for key in {**expected, **settings} if not is_equal(settings.get(key), expected.get(key))]
    names = [[part for part in key.split('.') if not part.isdigit()] for key in changed]
    return list(dict.fromkeys('.'.join(parts[-2:]) for parts in names))


def _flatten_settings(config: Config) -> Iterator[tuple[str, object]]:
    """Iterate over the settings of a training and its evaluation, by dotted key."""
    for part in COMPARED_KEYS:
        for key, value in flatten(part, config.get(part) or None):
            is_recipe = set(MACHINE_KEYS).isdisjoint(key.split('.')) and key != 'optim_wrapper.type'
            if is_recipe and value not in ([], ()):  # an empty list equals None
                yield key, short_name(value) if key.endswith('.type') else value
    yield 'length', training_length(config)
    checkpoint = get_dotted(config, 'model.backbone.init_cfg.checkpoint')  # in any folder
    yield 'weights', PurePath(str(checkpoint)).name.removesuffix('.pth')
