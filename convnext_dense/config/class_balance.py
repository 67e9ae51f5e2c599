"""Rare classes in training: their images more often (detection), their pixels with more weight (segmentation)."""

import math
from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, TRANSFORMS

from ..engine.datasets import wrap_pipelines
from ..errors import UsageError
from ..type_names import class_of, is_type
from .options import argument_names
from .training_set import build_training_set, leaf_dataset, wrap_training_set
from .tree import as_list, iter_dicts

RARE = 0.5  # a class is rare if it is in fewer images than this fraction of those of the median class
ENET_OFFSET = 1.02  # Paszke et al. 2016, ENet: weight 1 / ln(1.02 + p), from 1.4 to 50
MAX_MASKS = 1000  # masks that are counted, evenly spaced
MAX_ROWS = 40  # rows of a table: the rarest classes


def balance_classes(config: Config) -> str | None:
    """Balance the classes of a training.

    In detection, images with rare classes are repeated, by mmdet's `ClassBalancedDataset` (Gupta et al. 2019, LVIS):
    rare is a class in fewer than half as many images as the median class. In segmentation, where most images have most
    classes, the loss gets class weights 1 / ln(1.02 + p) (Paszke et al. 2016, ENet, 5.2) that depend on the fraction p
    of pixels and are bounded, scaled so that a pixel weighs 1 on average.

    Args:
        config: Config with its training data; it is changed in place.

    Returns:
        A table of the frequency of each class and how often its images are repeated, or the weight of its pixels.

    Raises:
        UsageError: If the config balances classes itself, or its data set or model does not support it.
    """
    balance = {'mmdet': _repeat_rare_images, 'mmseg': _weight_classes}.get(config.get('default_scope'))
    if balance is None:
        raise UsageError('--balance needs a config of mmdet or mmseg')
    return balance(config)


def _repeat_rare_images(config: Config) -> str | None:
    for part in iter_dicts(config.train_dataloader.dataset):
        if is_type(part.get('type'), DATASETS, 'ClassBalancedDataset'):
            raise UsageError('--balance: the config has a ClassBalancedDataset already: change it there')
    dataset = build_training_set(config)
    if not dataset:  # building the runner reports why
        return None
    if not hasattr(dataset, 'get_cat_ids'):
        raise UsageError(f'--balance: {type(dataset).__name__} does not tell the classes of an image (get_cat_ids)')
    classes = dataset.metainfo['classes']
    counts = np.zeros(len(classes))
    for i in range(len(dataset)):
        counts[[*set(dataset.get_cat_ids(i))]] += 1
    frequencies = counts / len(dataset)
    threshold = float(f'{RARE * median(frequencies[counts > 0] if counts.any() else [0.0]):.4g}')
    repeats = [math.ceil(max(1, math.sqrt(threshold / f))) if f else 1 for f in frequencies]
    if max(repeats) == 1:
        return 'class balance: no class is in fewer than half as many images as the median class; nothing is repeated'
    wrap_training_set(config, type='ClassBalancedDataset', oversample_thr=threshold)
    title = f'class balance: images are repeated by their rarest class (oversample_thr={threshold:g})'
    return '\n'.join([title, *_format_rows('images', 'repeated', classes, frequencies, repeats)])


def _weight_classes(config: Config) -> str | None:
    losses = [*_iter_weighted_losses(config.model)]
    if not losses or any(loss.get('class_weight') is not None for loss in losses):
        problem = 'has class_weight already: change it' if losses else 'takes no class_weight: set the weights'
        raise UsageError(f'--balance: the loss of the model {problem} in the config')
    classes, counts, _ = count_pixels(config)
    counts = counts[: len(classes)]  # without those that are ignored
    if not counts.any():
        return None
    fractions = counts / counts.sum()
    weights = 1 / np.log(ENET_OFFSET + fractions)
    weights /= (fractions * weights).sum()
    rounded = [float(f'{weight:.4g}') for weight in weights]
    for loss in losses:
        loss['class_weight'] = list(rounded)
    title = 'class balance: weights in the loss, 1 / ln(1.02 + fraction of pixels), on average 1'
    return '\n'.join([title, *_format_rows('pixels', 'weight', classes, fractions, rounded)])


def _iter_weighted_losses(model: dict) -> Iterator[dict]:
    """Iterate over the pixel-wise losses of a segmentor that accept class weights."""
    for name in ('decode_head', 'auxiliary_head'):
        for head in as_list(model.get(name)):
            for loss in as_list(head.get('loss_decode')) if head.get('out_channels') != 1 else ():
                cls = class_of(loss.get('type'), MODELS)
                if cls is not None and 'class_weight' in argument_names(cls):
                    yield loss


def count_pixels(config: Config) -> tuple[Sequence[str], np.ndarray, list[tuple[int, int]]]:
    """Count the pixels of each class in at most `MAX_MASKS` masks of a segmentation training set.

    Args:
        config: Config whose training data are set.

    Returns:
        The names of the classes, the number of pixels of each label (256,), and the size (H, W) of each mask. They are
        empty if there are no masks; building the runner then reports why.

    Raises:
        UsageError: If there is no single data set that loads masks.
        UnreadableImageError: If a mask cannot be read.
    """
    leaf = leaf_dataset(config)
    steps = leaf['pipeline'] if leaf else ()
    loaders = [step for step in steps if is_type(step.get('type'), TRANSFORMS, 'LoadAnnotations')]
    if not loaders:
        raise UsageError('pixels by class need a single training data set whose pipeline has LoadAnnotations')
    inner = Config(dict(train_dataloader=dict(dataset=leaf), default_scope=config.default_scope))
    dataset = build_training_set(inner, pipeline=loaders)
    counts, sizes = np.zeros(256), []
    if not dataset:
        return (), counts, sizes
    wrap_pipelines(dataset)  # errors name the file
    for i in np.linspace(0, len(dataset) - 1, min(len(dataset), MAX_MASKS)).astype(int).tolist():
        labels = dataset[i]['gt_seg_map']
        counts += np.bincount(labels.ravel(), minlength=256)[:256]
        sizes.append(labels.shape)
    return dataset.metainfo['classes'], counts, sizes


def _format_rows(
    unit: str, value_name: str, classes: Sequence[str], fractions: Sequence[float], values: Sequence[float]
) -> list[str]:
    """Format a table of classes, the rarest first."""
    rows = sorted(zip(fractions, classes, values))
    shown, width = rows[:MAX_ROWS], max(len(name) for name in ['class', *classes])
    lines = [f'  {"class":{width}}  {unit:>7}  {value_name:>8}']
    lines += [f'  {name:{width}}  {fraction:7.2%}  {value:8.4g}' for fraction, name, value in shown]
    return lines + ([f'  and {len(rows) - len(shown)} more, less rare'] if rows[MAX_ROWS:] else [])
