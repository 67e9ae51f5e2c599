"""The training set of a config: built to look at its images, and wrapped in others."""

import contextlib
import io

from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from ..errors import is_user_code_error
from ..type_names import is_type
from .tree import iter_dicts


def build_training_set(config: Config, **settings) -> object | None:
    """Return the training set, filters and wrappers included; None where it cannot be built.

    Why it cannot be, the building of the runner says.

    Args:
        config: whose data set names existing files.
        **settings: of the outermost data set, in place of the config's.
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
    """Return the length of the training set; None where it is empty or cannot be built."""
    dataset = build_training_set(config)
    return None if dataset is None else len(dataset) or None


def wrap_training_set(config: Config, **wrapper) -> None:
    """Put the training set of a config into a wrapper, but within one that mixes images, which hooks expect outermost.

    Args:
        config: changed in place.
        **wrapper: config of the wrapper, without its `dataset`.
    """
    holder = config.train_dataloader
    while is_type(holder['dataset'].get('type'), DATASETS, 'MultiImageMixDataset'):
        holder = holder['dataset']
    holder['dataset'] = dict(**wrapper, dataset=holder['dataset'])


def leaf_dataset(config: Config) -> dict | None:
    """Return the config of the data set that reads images, within its wrappers; None if there are several."""
    leaves = [part for part in iter_dicts(config.train_dataloader.dataset) if isinstance(part.get('pipeline'), list)]
    return leaves[0] if len(leaves) == 1 else None
