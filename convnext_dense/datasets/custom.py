"""Custom data sets: `--data PATH` checks every image and annotation and adapts a recipe to them."""

import argparse
import gc
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

from mmengine.config import Config

from ..channel_files import ChannelReader
from ..checkpoints.exported_files import is_exported, read_exported
from ..checkpoints.io import find_state_dicts, load_checkpoint
from ..config.channels import channel_reader, set_channels
from ..config.resume import checkpoint_config
from ..config.tree import is_equal
from ..errors import UsageError
from ..type_names import TASKS
from .box_formats import FORMAT_KEYS, INSTANCES, BoxSources, find_boxes, find_given_boxes
from .cache import LOCAL_RANK_VARIABLES, hold_busy_file, load_cached, save_cache, wait_for_cache
from .channels import AUTO, parse_channels
from .configure import apply_dataset, check_cfg_options
from .data_yaml import read_data_yaml
from .files import folders_in, is_below
from .find_masks import find_mask_folders
from .foreign_layouts import describe_unsupported
from .image_sizes import DEFAULT_LIMITS, ResizeLimit, resize_limits
from .layouts import FolderTree, SplitDirs, find_folders
from .mask_encoding import convert_masks
from .panoptic import PANOPTIC, find_panoptic_masks
from .read_coco import read_detection
from .read_masks import read_segmentation
from .request import CheckedDataset, DatasetRequest, summarize_classes

# Arguments of the command line that are fields of `DatasetRequest`.
OPTIONS = ('classes', 'ignore_labels', 'val_fraction', 'format', 'class_attribute', 'strict', 'channels')
OPTIONS += ('mask_threshold', 'ignore_other_colors')
READERS = {'detection': read_detection, 'segmentation': read_segmentation}
DESCRIPTIONS = {'detection': 'boxes', 'segmentation': 'segmentation masks'}
INSTANCES_HINT = ', or --format instances if the values of the masks number objects'
RECIPES = {'detection': 'configs/cascade/convnext_t.py', 'segmentation': 'configs/upernet/convnext_t.py'}


def add_data_arguments(parser: argparse.ArgumentParser, strict: bool = True) -> None:
    """Add the arguments that name a custom data set, and `--strict` if it is wanted."""
    add = parser.add_argument_group('custom dataset').add_argument
    add('--data', metavar='PATH', help='folder of a data set, in any layout of docs/datasets.md, or a data.yaml')
    add('--train-ann', metavar='PATH', help='file or folder of annotations to train on, if --data does not find it')
    add('--val-ann', metavar='PATH', help='annotations to evaluate on')
    add('--train-images', metavar='FOLDER', help='images of --train-masks, or of --train-ann if they are not found')
    add('--train-masks', metavar='FOLDER', help='segmentation masks to train on, if --data does not find them')
    add('--val-images', metavar='FOLDER', help='images of --val-masks or --val-ann')
    add('--val-masks', metavar='FOLDER', help='segmentation masks to evaluate on')
    text = 'fraction of images used for validation when the data set has no split (default: 0.1)'
    add('--val-fraction', type=float, metavar='FRACTION', help=text)
    text = (
        'segmentation: file of class names, one per line (or JSON, with colors), or ade20k, cityscapes, voc; '
        'detection: the classes to train, in this order, where a,b=c merges a and b into c'
    )
    add('--classes', nargs='+', metavar='CLASSES', help=text)
    text = 'segmentation: label values to ignore in addition to 255; with 0, class ids start at 1'
    add('--ignore', dest='ignore_labels', type=int, nargs='+', metavar='LABEL', help=text)
    text = 'segmentation: masks are gray, and a pixel is of the second class from this value on, such as 128'
    add('--mask-threshold', type=int, metavar='VALUE', help=text)
    text = 'segmentation: ignore colors of color-coded masks that are in no table'
    add('--ignore-other-colors', action='store_true', help=text)
    text = (
        "numbers of the images' channels, from 1, in the order of the model's input, such as 3,2,1,4 "
        '(default: RGB, or all channels of images of other types)'
    )
    add('--channels', metavar='NUMBERS', help=text)
    text = 'detection: which labels to use of a folder with several (default: the first of these)'
    add('--format', choices=FORMAT_KEYS, help=text)
    text = 'VIA: the attribute of regions that is their class, if they have several'
    add('--class-attribute', metavar='NAME', help=text)
    if strict:
        add('--strict', action='store_true', help='stop if anything in the data set has to be dropped')


def parse_request(args: argparse.Namespace) -> DatasetRequest | None:
    """Return the data set that the arguments name, None if they name none.

    Raises:
        UsageError: an argument needs another one, or names something that does not exist.
    """
    places = {
        field: {split: path for split in ('train', 'val') if (path := getattr(args, f'{split}_{kind}'))}
        for field, kind in (('ann_files', 'ann'), ('image_dirs', 'images'), ('mask_dirs', 'masks'))
    }
    _check_folders(**places)
    values = {name: getattr(args, name, None) for name in OPTIONS}
    options = {name: value for name, value in values.items() if value is not None and value is not False}
    if not args.data and not places['ann_files'] and not places['mask_dirs']:
        for option in options:
            raise UsageError(f'--{option.removesuffix("_labels").replace("_", "-")} needs --data PATH')
        return None
    if 'channels' in options:
        options['channels'] = parse_channels(args.channels)
    if args.data and not os.path.exists(args.data):  # checked before weights are downloaded
        raise UsageError(f'{args.data} does not exist')
    if len(options.get('classes', ())) == 1:
        options['classes'] = args.classes[0]
    described = read_data_yaml(Path(args.data)) if args.data else None
    if described is None:
        return DatasetRequest(args.data, **places, **options)
    if any(places.values()):
        text = 'says where everything is: leave out --train-ann, --train-masks and the like'
        raise UsageError(f'{described.data_yaml} {text}')
    return replace(described, **options)


def _check_folders(ann_files: Mapping, image_dirs: Mapping, mask_dirs: Mapping) -> None:
    """Raise UsageError for folders, by split, that need another argument or do not exist."""
    if ann_files and mask_dirs:
        raise UsageError('--train-ann and --train-masks are for different tasks: give one of them')
    for split in image_dirs:
        if split not in ann_files and split not in mask_dirs:
            raise UsageError(f'--{split}-images needs --{split}-ann or --{split}-masks')
    for split in mask_dirs:
        if split not in image_dirs:
            raise UsageError(f'--{split}-masks needs --{split}-images')
    for option, folders in (('images', image_dirs), ('masks', mask_dirs)):
        for split, folder in folders.items():
            if not os.path.isdir(folder):
                raise UsageError(f"--{split}-{option} '{folder}' is not a folder")


def detect_tasks(request: DatasetRequest) -> list[str]:
    """Return the tasks ('detection', 'segmentation') for which a data set has annotations.

    Raises:
        UsageError: there are none; the message says what the folder holds instead.
    """
    return list(_find_by_task(request))


def _find_by_task(request: DatasetRequest, task: str | None = None) -> dict[str, tuple]:
    """Return the annotations of a data set for each task, as of `find_sources`.

    Folders of masks in no known layout are looked for if these are asked for, or if there is nothing else: folders of
    other images are like them.

    Raises:
        UsageError: there are none; the message says what the folder holds instead.
    """
    if request.ann_files:
        return {'detection': find_given_boxes(request)}
    if request.mask_dirs:
        pairs = {split: SplitDirs(Path(request.image_dirs[split]), Path(m)) for split, m in request.mask_dirs.items()}
        return {'segmentation': ('of the given folders', pairs)}
    path = Path(request.path)
    boxes = find_boxes(path, request.format) if path.exists() else None
    if request.format and not boxes:
        raise UsageError(f'{request.path} holds no labels of this format: leave out --format {request.format}')
    masks = find_folders(path) if path.is_dir() else None
    if path.is_dir() and not masks and (task == 'segmentation' or not boxes or boxes.format == PANOPTIC):
        masks = find_panoptic_masks(FolderTree(path))
    if path.is_dir() and not masks and (task == 'segmentation' or not boxes):
        is_level_above = any(map(find_folders, folders_in(path)))  # whose labels and classes are known one level below
        masks = None if is_level_above else find_mask_folders(path)
    if not boxes and not masks:
        raise UsageError(f'{request.path} {describe_unsupported(path)}')
    if task is None and boxes and boxes.format == INSTANCES and not boxes.layout.startswith('maps'):
        masks = None  # masks of objects are not masks of classes
    sources = dict(detection=boxes, segmentation=masks)
    return {task: source for task, source in sources.items() if source}


def find_sources(request: DatasetRequest, task: str) -> BoxSources | tuple[str, dict]:
    """Return the boxes of a data set, or the layout and the folders of each split of a segmentation data set.

    Raises:
        UsageError: there are no annotations, or they are for the other task.
    """
    sources = _find_by_task(request, task)
    if task not in sources:
        other_task = next(iter(sources))
        raise UsageError(
            f'{request.root} holds {DESCRIPTIONS[other_task]}, but {task} needs {DESCRIPTIONS[task]}: '
            f'use a {other_task} recipe, such as {RECIPES[other_task]}' + INSTANCES_HINT * (task == 'detection')
        )
    if request.class_attribute is not None and getattr(sources[task], 'format', None) != 'VIA':
        raise UsageError(f'--class-attribute is for labels of VIA, which {request.root} has not: leave it out')
    return sources[task]


def read_data(
    request: DatasetRequest,
    task: str,
    splits: Sequence[str],
    classes: Sequence[str] | None = None,
    limits: Mapping[str, ResizeLimit] | None = None,
    trained: ChannelReader | str | None = AUTO,
) -> CheckedDataset:
    """Find, read and check a data set.

    Args:
        request: the data set as the user names it.
        task: 'detection' or 'segmentation'.
        splits: some of 'train', 'val', 'test'; those that do not exist are left out.
        classes: classes of a trained model, which then are the data set's, in this order.
        limits: limits of image sizes by split (default: those of the recipes).
        trained: how a trained model reads images, None if as RGB (default: as the images are).

    Returns:
        The usable part of the data set; problems are in its report.

    Raises:
        UsageError: there are no annotations, or they are for the other task.
    """
    sources = find_sources(request, task)
    gc_was_enabled = gc.isenabled()
    gc.disable()  # the millions of values of a large JSON file have no cycles; walking them outlasts the checks
    try:
        data = READERS[task](request, sources, splits, classes, limits or DEFAULT_LIMITS[task], trained)
        paths = chain.from_iterable(d.values() for d in (request.image_dirs, request.ann_files, request.mask_dirs))
        for path in paths if request.data_yaml else ():
            if not is_below(path, request.root):
                data.report.add('all', 'images-outside-folder', path)
        return data
    finally:
        if gc_was_enabled:
            gc.enable()


def apply_custom_data(
    config: Config,
    request: DatasetRequest | None,
    splits: Sequence[str] = ('train', 'val'),
    options: dict | None = None,
    checkpoint: str | None = None,
    ratio: float = 1.0,
) -> list[str]:
    """Check a custom data set and adapt a config to it, in place.

    One process per machine checks, and writes what training reads into the folder `data` of the work dir; while
    nothing changes, later runs read that.

    Args:
        config: config of the recipe, with `work_dir` and `launcher`.
        request: the data set; None to do nothing.
        splits: those that are needed; 'test' is val's if the data set has none.
        options: `--cfg-options`, which must not contradict the data set.
        checkpoint: of the model to test, from which classes and mask branch are taken, or of the training to resume,
            whose classes must match.
        ratio: the smallest scale factor of a multi-scale test.

    Returns:
        The report, one line each.

    Raises:
        UsageError: the data set cannot be used, or with `strict` something has to be dropped.
    """
    if request is None:
        return []
    task = TASKS.get(config.get('default_scope'))
    if task is None:
        raise UsageError(f"--data: the config's default_scope is {config.get('default_scope')}, not mmdet or mmseg")
    classes, keep_mask_branch = checkpoint_classes(checkpoint) if checkpoint else (None, None)
    fixed_classes = classes if 'train' not in splits else None
    trained = _trained_channels(checkpoint, request) if checkpoint else AUTO
    data, files = _load_or_check(config, request, task, splits, fixed_classes, ratio, trained)
    if 'train' in splits and 'train' not in files:
        raise UsageError(f'{request.root} has no training data: give --train-ann, or a folder with a train split')
    data.report.raise_if_errors(request.strict)
    if classes and classes != data.classes:
        trained_on, classes = map(summarize_classes, (classes, data.classes))
        raise UsageError(f'{checkpoint} was trained on {trained_on}; the data set has {classes}')
    check_cfg_options(options or {}, len(data.classes))
    has_mask_branch = 'mask_head' in (config.model.get('roi_head') or {})  # a training on boxes removed it
    if keep_mask_branch is None or not has_mask_branch:
        keep_mask_branch = data.has_masks
    lines = [f'data: {line}' for line in data.report.lines()]
    if task == 'detection' and not keep_mask_branch and has_mask_branch:
        lines.append("data: boxes without masks; the recipe's mask branch is removed")
    apply_dataset(config, replace(data, has_masks=data.has_masks and keep_mask_branch), files, keep_mask_branch)
    if data.channels:
        lines.append(f'data: {set_channels(config, ChannelReader(**data.channels))}')
    return lines


def _trained_channels(checkpoint: str, request: DatasetRequest) -> ChannelReader | None:
    """Return how the model of a checkpoint reads images, None if as RGB; UsageError if the request says otherwise."""
    saved = None
    with suppress(UsageError):  # the config may be code
        saved = checkpoint_config(checkpoint)
    trained = channel_reader(saved) if saved else None
    numbers = tuple(trained.channels) if trained else None
    if request.channels and request.channels != numbers:
        text = f'channels {",".join(map(str, numbers))}' if numbers else 'RGB'
        raise UsageError(f'--channels: {checkpoint} was trained on {text}: leave it out')
    return trained


def _load_or_check(
    config: Config,
    request: DatasetRequest,
    task: str,
    splits: Sequence[str],
    classes: list | None,
    ratio: float,
    trained: ChannelReader | str | None,
) -> tuple[CheckedDataset, dict[str, str]]:
    """Return the data set, checked now or before, and the file of each split."""
    folder, limits = os.path.join(config.work_dir, 'data'), resize_limits(config, ratio)
    key = (task, tuple(splits), classes, os.path.abspath(request.root), replace(request, strict=False))
    key += (str(find_sources(request, task)), str(limits))
    if os.environ.get(LOCAL_RANK_VARIABLES.get(config.launcher, ''), '0') != '0':  # one process per machine checks
        return wait_for_cache(folder, key)
    cached = load_cached(folder, key)
    if cached and (trained == AUTO or is_equal([*(cached[0].channels or {}).values()], [*(trained or ())])):
        return cached  # images are read as the trained model reads them
    with hold_busy_file(folder):
        data = read_data(request, task, splits, classes, limits, trained)
        data.report.raise_if_errors(request.strict)
        convert_masks(data, folder)
    return data, save_cache(folder, key, data)


def checkpoint_classes(file: str) -> tuple[list[str] | None, bool]:
    """Return the classes of a model's file (None if it names none), and whether it has a mask branch."""
    if is_exported(file):
        meta = read_exported(file).meta
        return list(meta.classes) or None, meta.masks is not None
    content = load_checkpoint(file)
    meta = content.get('meta') or {}
    classes = (meta.get('dataset_meta') or {}).get('classes') or meta.get('CLASSES')
    names = (name for tensors in find_state_dicts(content).values() for name in tensors)
    return list(classes) if classes else None, any('mask_head.' in name for name in names)
