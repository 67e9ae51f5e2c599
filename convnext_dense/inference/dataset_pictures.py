"""Visualize a data set as a training will see it: annotated images, classes, sizes, and anchor coverage."""

import os
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import TASK_UTILS, TRANSFORMS

from ..channel_files import ChannelReader
from ..config.channels import set_channels
from ..config.class_balance import count_pixels
from ..config.image_size import resize_scale
from ..config.training_set import build_training_set, leaf_dataset
from ..datasets.cache import save_cache
from ..datasets.configure import apply_dataset
from ..datasets.mask_encoding import convert_masks
from ..datasets.request import CheckedDataset
from ..engine.dry_run import stack_rows
from ..engine.seeding import seed_everything
from ..errors import UsageError
from ..type_names import is_type
from .drawing import draw_ground_truth, write_caption

MAX_IMAGES = 12  # images in the contact sheet, evenly spaced
PAIRS_PER_ROW = 2
SIDE = 600  # pixels: longer side of an image in the contact sheet
GAP = 16  # pixels between two images
MIN_IOU = 0.5  # minimum IoU of an anchor that covers a box
SMALL, MEDIUM = 32, 96  # COCO's size limits: square roots of areas, in pixels
NUM_BINS = 24  # bins of box sizes
MAX_BARS = 40  # classes in the histogram
LOADERS = ('LoadImageFromFile', 'LoadAnnotations', 'PackDetInputs', 'PackSegInputs')
COLOR = '#0b6fb8'


def write_pictures(config: Config, data: CheckedDataset, folder: str) -> list[str]:
    """Write a contact sheet and histograms of a checked data set.

    Args:
        config: Config of the recipe that would train on it; it is changed in place.
        data: The data set, for the recipe's task.
        folder: Folder for the files, which are named after the task; it is created.

    Returns:
        Lines for the user: the written files and, for a detector with anchors, the fraction of boxes that they cover.

    Raises:
        UsageError: If the recipe cannot be used with the data set.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    data = replace(data, splits=deepcopy(data.splits))
    with tempfile.TemporaryDirectory() as cache:
        convert_masks(data, cache)
        apply_dataset(config, data, save_cache(cache, ('pictures',), data), data.has_masks)
        if data.channels:
            set_channels(config, ChannelReader(**data.channels))
        dataset = build_training_set(config)
        leaf = leaf_dataset(config)
        if not dataset or not leaf:
            raise UsageError(
                '--pictures: the recipe cannot train on this data set: start train.py --dry-run to see why'
            )
        steps = [step for step in leaf['pipeline'] if is_type(step.get('type'), TRANSFORMS, *LOADERS)]
        unaugmented_config = Config(dict(train_dataloader=dict(dataset=leaf), default_scope=config.default_scope))
        unaugmented = build_training_set(unaugmented_config, pipeline=deepcopy(steps))
        sheet, statistics = (os.path.join(folder, f'{data.task}_{name}.png') for name in ('images', 'statistics'))
        cv2.imwrite(sheet, draw_contact_sheet(unaugmented, dataset, data.palette or ()))
        lines = [f'pictures: {sheet}: images as they are, and as the training sees them']
        if data.task == 'detection':
            boxes, sizes, labels = read_boxes(unaugmented, resize_scale(config))
            coverage = anchor_coverage(config.model, boxes, sizes)
            lines += [_describe_coverage(coverage, config)] if coverage is not None else []
            plot_boxes(boxes, labels, coverage, unaugmented.metainfo['classes'], statistics)
        else:
            plot_pixels(*count_pixels(config), statistics)
    return [*lines, f'pictures: {statistics}: classes and sizes']


def draw_contact_sheet(unaugmented, augmented, palette: Sequence) -> np.ndarray:
    """Draw images of a data set with their annotations, each before and after augmentation: (H, W, 3) BGR of uint8.

    Args:
        unaugmented: The data set with a pipeline that only loads images and annotations.
        augmented: The data set with the training pipeline; it may repeat or mix images.
        palette: RGB colors of the classes; empty for the default.
    """
    names, cells = {unaugmented.get_data_info(i)['img_path']: i for i in range(len(unaugmented))}, []
    for i in np.linspace(0, len(augmented) - 1, min(len(unaugmented), MAX_IMAGES)).astype(int).tolist():
        path = augmented.get_data_info(i)['img_path']
        seed_everything(0, i)
        for sample, title in ((unaugmented[names[path]], os.path.basename(path)), (augmented[i], 'in training')):
            image = sample['inputs'].permute(1, 2, 0).numpy()
            height, width = image.shape[:2]
            picture = draw_ground_truth(image, sample['data_samples'], unaugmented.metainfo['classes'], palette, SIDE)
            picture = write_caption(picture, f'{title}, {width} x {height}')
            gap = GAP if title == 'in training' else 1  # the two pictures of an image are adjacent
            cells.append(cv2.copyMakeBorder(picture, 0, GAP, 0, gap, cv2.BORDER_CONSTANT, value=(255, 255, 255)))
    row = 2 * PAIRS_PER_ROW
    return stack_rows([cells[start : start + row] for start in range(0, len(cells), row)])


def read_boxes(dataset, scale: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the boxes of a detection data set at the test scale, without crowds.

    Args:
        dataset: Detection data set of mmdet.
        scale: (long, short) sides of the test scale in pixels; None for the original size.

    Returns:
        Boxes (N, 4) as x1, y1, x2, y2, the sizes (N, 2) of their images as (H, W), and labels (N,).
    """
    boxes, sizes, labels = [], [], []
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        size = np.array([info['height'], info['width']], float)
        ratio = min(max(scale) / size.max(), min(scale) / size.min()) if scale else 1.0
        for instance in info['instances']:
            if not instance.get('ignore_flag'):
                boxes.append(np.array(instance['bbox']) * ratio)
                sizes.append(size * ratio)
                labels.append(instance['bbox_label'])
    return np.reshape(boxes, (-1, 4)), np.reshape(sizes, (-1, 2)), np.array(labels, int)


def anchor_coverage(model: dict, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray | None:
    """Return the IoU of each box with its best anchor.

    Among anchors of the same size, the best one is that with the nearest center.

    Args:
        model: Config of a detector.
        boxes: (N, 4) as x1, y1, x2, y2, in pixels of the resized image.
        sizes: (N, 2) of the images, (H, W).

    Returns:
        (N,); None for a detector without anchors.
    """
    heads = [head for name in ('rpn_head', 'bbox_head') if isinstance(head := model.get(name), dict)]
    cfg = next((head['anchor_generator'] for head in heads if 'anchor_generator' in head), None)
    generator = None if cfg is None else TASK_UTILS.build(deepcopy(cfg))
    if not hasattr(generator, 'base_anchors'):  # a generator of points
        return None
    from mmdet.structures.bbox import bbox_overlaps

    best = np.zeros(len(boxes))
    for anchors, stride in zip(generator.base_anchors, generator.strides):
        step = np.array(stride, float)  # (x, y)
        max_index = np.ceil(sizes[:, ::-1] / step) - 1  # of the feature map
        for anchor in anchors.numpy().astype(float):
            offset = (boxes[:, :2] + boxes[:, 2:] - anchor[:2] - anchor[2:]) / 2
            shift = np.clip(np.round(offset / step), 0, max_index) * step
            nearest = torch.from_numpy(anchor + np.tile(shift, 2))
            best = np.maximum(best, bbox_overlaps(torch.from_numpy(boxes), nearest, is_aligned=True).numpy())
    return best


def _describe_coverage(ious: np.ndarray, config: Config) -> str:
    scale = resize_scale(config)
    size = f' of images at {scale[0]} x {scale[1]}' if scale else ''
    return f'anchors: {np.mean(ious >= MIN_IOU):.1%} of the boxes{size} meet an anchor with IoU {MIN_IOU} or more'


def plot_boxes(
    boxes: np.ndarray, labels: np.ndarray, coverage: np.ndarray | None, classes: Sequence[str], file: str
) -> None:
    """Plot the number of boxes (N, 4) per class, their sizes, and the fraction that anchors cover, by size.

    `labels` (N,) are their classes, `coverage` (N,) their IoUs with the best anchor: None without anchors.
    """
    figure, axes = _figure(classes, 2 if coverage is None else 3)
    _plot_bars(axes[0], classes, np.bincount(labels, minlength=len(classes)), 'boxes')
    sides = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))
    edges = np.geomspace(max(sides.min(), 1), max(sides.max(), 2) * 1.001, NUM_BINS + 1)
    axes[1].hist(sides, edges, color=COLOR)
    counts = np.histogram(sides, [0, SMALL, MEDIUM, np.inf])[0]
    title = ', '.join(f'{count:,} {name}' for count, name in zip(counts, ('small', 'medium', 'large')))
    xlabel = 'square root of the area, in pixels of the resized image'
    axes[1].set(xscale='log', xlabel=xlabel, ylabel='boxes', title=title)
    if coverage is not None:
        bins = np.clip(np.digitize(sides, edges) - 1, 0, NUM_BINS - 1)
        present = np.unique(bins)
        percentages = [100 * np.mean(coverage[bins == i] >= MIN_IOU) for i in present]
        axes[2].plot(np.sqrt(edges[present] * edges[present + 1]), percentages, 'o-', color=COLOR)
        title = f'{np.mean(coverage >= MIN_IOU):.1%} meet an anchor (IoU >= {MIN_IOU})'
        axes[2].set(xscale='log', ylim=(-3, 103), xlabel=xlabel, ylabel='% of the boxes', title=title)
        axes[2].grid(alpha=0.3)
    ticks = 2.0 ** np.arange(np.floor(np.log2(edges[0])), np.ceil(np.log2(edges[-1])) + 1)
    for axis in axes[1:]:
        axis.set_xticks(ticks, [f'{tick:.0f}' for tick in ticks])
        axis.minorticks_off()
        for limit in (SMALL, MEDIUM):
            axis.axvline(limit, color='0.6', linestyle=':', linewidth=1)
    figure.savefig(file, dpi=110)


def plot_pixels(classes: Sequence[str], counts: np.ndarray, sizes: Sequence[tuple[int, int]], file: str) -> None:
    """Plot the pixels of each class of a segmentation data set, and the sizes (H, W) of its images.

    `counts` (256,) are the pixels of each label; 255 is ignored.
    """
    figure, axes = _figure(classes, 2)
    percent = 100 * counts / max(counts.sum(), 1)
    _plot_bars(axes[0], classes, percent[: len(classes)], f'% of the pixels ({percent[255]:.1f}% are ignored)')
    axes[1].scatter(*np.array(sizes)[:, ::-1].T, color=COLOR, alpha=0.3)
    axes[1].set(xlabel='width in pixels', ylabel='height in pixels', title=f'{len(sizes):,} images', xlim=0, ylim=0)
    axes[1].grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def _figure(classes: Sequence[str], panels: int):
    from matplotlib.figure import Figure

    height = max(3.6, 0.9 + 0.2 * min(len(classes), MAX_BARS))
    figure = Figure(figsize=(5 * panels, height), layout='constrained')
    return figure, figure.subplots(1, panels)


def _plot_bars(axis, classes: Sequence[str], values: np.ndarray, label: str) -> None:
    """Plot a value by class, the largest on top."""
    order = np.argsort(values, kind='stable')[::-1]
    shown = order[: MAX_BARS if len(order) <= MAX_BARS else MAX_BARS - 1][::-1]
    names = [name if len(name) <= 24 else f'{name[:23]}…' for name in (classes[i] for i in shown)]
    bars = axis.barh(range(len(shown)), values[shown], color=COLOR)
    axis.bar_label(
        bars, [f'{value:,.3g}' if value % 1 else f'{value:,.0f}' for value in values[shown]], padding=2, fontsize=8
    )
    axis.set_yticks(range(len(shown)), names, fontsize=8)
    axis.margins(x=0.15)
    more = f', and {len(order) - len(shown)} more classes' if len(order) > len(shown) else ''
    axis.set_xlabel(label + more)
