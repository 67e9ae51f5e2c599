"""The training set of a config: build it to inspect its images, or wrap it."""

import contextlib
import io

from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from ..errors import is_user_code_error
from ..type_names import is_type
from .tree import iter_dicts


def build_training_set(config: Config, **settings) -> object | None:
    """Build the training set with its filters and wrappers; return None if it cannot be built.

    Building the runner then reports the reason.

    Args:
        config: Config with a training set of existing files.
        **settings: Settings of the outermost data set that override the config's.
    """
    cfg = {**config.train_dataloader.dataset, 'lazy_init': False, **settings}
    try:
        with (
            DefaultScope.overwrite_default_scope(config.get('default_scope')),
            contextlib.redirect_stdout(io.StringIO()),  # of pycocotools
        ):
            return DATASETS.build(cfg)
    except Exception as error:
        if is_user_code_error(error):
            raise
        return None


def count_training_images(config: Config) -> int | None:
    """Return the number of training images; None if there are none or the training set cannot be built."""
    dataset = build_training_set(config)
    return None if dataset is None else len(dataset) or None


def wrap_training_set(config: Config, **wrapper) -> None:
    """Wrap the training set of a config in place, below a wrapper that mixes images, which hooks expect outermost."""
    holder = config.train_dataloader
    while is_type(holder['dataset'].get('type'), DATASETS, 'MultiImageMixDataset'):
        holder = holder['dataset']
    holder['dataset'] = dict(**wrapper, dataset=holder['dataset'])


def leaf_dataset(config: Config) -> dict | None:
    """Return the config of the data set that reads images, inside its wrappers; None if there are several."""
    leaves = [part for part in iter_dicts(config.train_dataloader.dataset) if isinstance(part.get('pipeline'), list)]
    return leaves[0] if len(leaves) == 1 else None
