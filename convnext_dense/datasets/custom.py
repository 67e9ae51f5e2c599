"""The user's own data: `--data PATH` fills in a recipe from what is there, after a check of every image and label."""

import argparse
import importlib
import os
from collections.abc import Sequence
from dataclasses import replace

from mmengine.config import Config

from ..checkpoints.io import find_state_dicts, load_checkpoint
from ..errors import UsageError
from .cache import hold_busy_file, is_local_rank0, load_cached, save_cache, wait_for_cache
from .configure import apply_dataset, check_cfg_options, check_classes
from .image_sizes import Limit, limits_of
from .readers import TASKS, detect_tasks, find_sources, read_data
from .request import CheckedDataset, DatasetRequest, summarize_classes

__all__ = [
    'CheckedDataset',
    'DatasetRequest',
    'add_data_arguments',
    'apply_custom_data',
    'check_classes',
    'checkpoint_classes',
    'detect_tasks',
    'parse_request',
    'read_data',
]


def add_data_arguments(parser: argparse.ArgumentParser, strict: bool = True) -> None:
    """The arguments by which a tool is told of the user's own data; `strict` is whether it may refuse them."""
    group = parser.add_argument_group('own data')
    group.add_argument('--data', metavar='PATH', help='folder of a data set, in any layout of docs/datasets.md')
    group.add_argument('--train-ann', metavar='JSON', help='COCO json to train on, where --data does not find it')
    group.add_argument('--val-ann', metavar='JSON', help='COCO json to evaluate on')
    group.add_argument('--train-images', metavar='FOLDER', help='images of --train-ann, where they are not found')
    group.add_argument('--val-images', metavar='FOLDER', help='images of --val-ann')
    group.add_argument(
        '--val-fraction',
        type=float,
        metavar='FRACTION',
        help='fraction of images used for validation when the data set has no split (default: 0.1)',
    )
    group.add_argument(
        '--classes',
        metavar='FILE',
        help='segmentation: names of the labels, one a line (or JSON, with colours), or ade20k, cityscapes, voc',
    )
    group.add_argument(
        '--ignore',
        type=int,
        nargs='+',
        metavar='LABEL',
        help='segmentation: labels that are no class, besides 255; with 0 among them classes begin at 1',
    )
    if not strict:
        parser.set_defaults(strict=False)
        return
    group.add_argument('--strict', action='store_true', help='refuse data of which something must be left out')


def parse_request(args: argparse.Namespace) -> DatasetRequest | None:
    """What the arguments ask for; None where they name no data.

    Raises:
        UsageError: arguments that need others.
    """
    files = {split: file for split in ('train', 'val') if (file := getattr(args, f'{split}_ann'))}
    images = {split: folder for split in ('train', 'val') if (folder := getattr(args, f'{split}_images'))}
    for split in images:
        if split not in files:
            raise UsageError(f'--{split}-images goes with --{split}-ann')
        if not os.path.isdir(images[split]):
            raise UsageError(f"--{split}-images '{images[split]}' is no folder")
    if not args.data and not files:
        for option in ('classes', 'ignore', 'val_fraction', 'strict'):
            if getattr(args, option) not in (None, False):
                raise UsageError(f'--{option.replace("_", "-")} goes with --data PATH')
        return None
    return DatasetRequest(args.data, files, images, args.classes, args.ignore, args.val_fraction, args.strict)


def apply_custom_data(
    config: Config,
    request: DatasetRequest | None,
    splits: Sequence[str] = ('train', 'val'),
    options: dict | None = None,
    checkpoint: str | None = None,
    ratio: float = 1.0,
) -> list[str]:
    """Fill in a config from the data that `request` names, once these are checked; what training reads of them is
    written into the work dir's folder `data`. One process a machine checks, and not again while nothing changes.

    Args:
        splits: those that are needed; 'test' is val's where there is none.
        options: the command line's settings, which may not contradict the data.
        checkpoint: of a model that is tested, whose classes and mask branch are taken, or of a training to resume,
            whose classes must be these.
        ratio: the smallest of those by which a multi-scale test changes the config's scale.

    Returns:
        What is there and what is wrong with it, in lines.

    Raises:
        UsageError: the data cannot be used, or with `strict` not all of them.
    """
    if request is None:
        return []
    task = TASKS.get(config.get('default_scope'))
    if task is None:
        raise UsageError(f"--data: the config's default_scope is {config.get('default_scope')}, not mmdet or mmseg")
    classes, with_masks = checkpoint_classes(checkpoint) if checkpoint else (None, None)
    wanted = classes if 'train' not in splits else None
    folder, limits = os.path.join(config.work_dir, 'data'), limits_of(config, ratio)
    data, files = _load_or_check(folder, config.launcher, request, task, splits, wanted, limits)
    if 'train' in splits and 'train' not in files:
        raise UsageError(f'{request.root} has no data to train on: give --train-ann, or a folder with train')
    data.report.raise_if_errors(request.strict)
    if classes and classes != data.classes:
        raise UsageError(
            f'{checkpoint} was trained on {summarize_classes(classes)}; the data have {summarize_classes(data.classes)}'
        )
    check_cfg_options(options or {}, len(data.classes))
    has_branch = 'mask_head' in (config.model.get('roi_head') or {})  # which a training on boxes takes out
    with_masks = data.masks if with_masks is None or not has_branch else with_masks
    data = replace(data, masks=data.masks and with_masks)
    lines = [f'data: {line}' for line in data.report.lines()]
    if task == 'detection' and not with_masks and has_branch:
        lines.append("data: boxes alone, so that the recipe's mask branch is taken out")
    if task == 'segmentation':
        importlib.import_module('convnext_dense.datasets.paired_dataset')
    apply_dataset(config, data, files, with_masks)
    return lines


def _load_or_check(
    folder: str,
    launcher: str,
    request: DatasetRequest,
    task: str,
    splits: Sequence[str],
    classes: list[str] | None,
    limits: dict[str, Limit],
) -> tuple[CheckedDataset, dict[str, str]]:
    """Data, checked now or before, and the files of their splits."""
    key = (task, tuple(splits), classes, os.path.abspath(request.root), replace(request, strict=False))
    key += (str(find_sources(request, task)), str(limits))
    if not is_local_rank0(launcher):
        return wait_for_cache(folder, key)
    found = load_cached(folder, key)
    if found:
        return found
    with hold_busy_file(folder):
        data = read_data(request, task, splits, classes, limits)
    data.report.raise_if_errors(request.strict)
    return data, save_cache(folder, key, data)


def checkpoint_classes(file: str) -> tuple[list[str] | None, bool]:
    """The classes that a checkpoint was trained on, None where it does not say, and whether it has a mask branch."""
    content = load_checkpoint(file)
    meta = content.get('meta') or {}
    classes = (meta.get('dataset_meta') or {}).get('classes') or meta.get('CLASSES')
    names = (name for tensors in find_state_dicts(content).values() for name in tensors)
    return list(classes) if classes else None, any('mask_head.' in name for name in names)
