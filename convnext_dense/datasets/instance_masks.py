"""Instances in mask files, as COCO: one mask per object (folders or numbered files), or maps of instance ids.

In a map of 16 bits, ids are class * 1000 + number, as in Cityscapes, if that is what all of them can be; else each is
an object of the same class. Maps of 8 bits may be classes, so they are read as ids only where `--format` says so.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..engine.datasets import IMAGE_SUFFIXES
from ..errors import UsageError
from .check_images import inspect_all, mask_problem
from .class_names import class_files, read_classes
from .coco_masks import mask_fields
from .diagnostics import Report
from .file_names import normalize_spelling
from .find_masks import find_mask_folders, split_of
from .image_resolver import ImageLocation
from .layouts import (
    IMAGE_DIR_NAMES,
    MASK_DIR_NAMES,
    MASK_FILE_SUFFIXES,
    FolderTree,
    SplitDirs,
    find_folders,
    list_images,
    pair_files,
    stem_in,
    strip_image_suffix,
)
from .mask_encoding import INSTANCE_FACTOR, read_values
from .request import DatasetRequest, relative_to_root
from .split_annotations import SplitAnnotations

CITYSCAPES_SUFFIX = '_gtFine_instanceIds'
# The classes of Cityscapes whose instances are evaluated.
CITYSCAPES_CLASSES = {24: 'person', 25: 'rider', 26: 'car', 27: 'truck', 28: 'bus', 31: 'train', 32: 'motorcycle'}
CITYSCAPES_CLASSES |= {33: 'bicycle'}
DEFAULT_NAME = 'object'
MAX_SAMPLED = 3  # maps that are opened to see whether they hold ids
MAX_LABEL = 255
MIN_MATCHING = 0.5  # fraction of the images that have masks of their own
# What follows the name of an image in the names of its masks: a folder, or a number.
OWN_MASK_RE = re.compile(r'/.+|[-_. ](?:[A-Za-z]+[-_. ]?)?\d+')


class InstanceMasks(NamedTuple):
    """The masks of a split.

    Attributes:
        masks (dict[Path, list[Path]]): masks of each image, one per object, or one map of ids.
        are_maps (bool): whether they are maps of ids.
        folders (list[Path]): folders that hold images and masks.
    """

    masks: dict[Path, list[Path]]
    are_maps: bool
    folders: list[Path]

    @property
    def is_cityscapes(self) -> bool:
        """Whether ids are those of Cityscapes."""
        return any(CITYSCAPES_SUFFIX in mask.name for masks in self.masks.values() for mask in masks)


def find_instance_masks(tree: FolderTree, is_requested: bool = False) -> tuple[str, dict[str, InstanceMasks]] | None:
    """Find masks of single objects, or maps of instance ids, as `BoxFormat.find`.

    Maps of 8 bits are of instance ids only if that `is_requested`.
    """
    path = tree.root
    if not path.is_dir():
        return None
    by_image = _folders_per_image(tree)
    if by_image:
        return 'a folder per image', by_image
    layout_dirs = find_folders(path)
    if layout_dirs is None:
        with suppress(UsageError):
            layout_dirs = find_mask_folders(path)
    if layout_dirs is None:
        return None
    own_masks = {split: _own_masks(dirs) for split, dirs in layout_dirs[1].items()}
    if any(own_masks.values()):
        return 'masks of single objects', {split: masks for split, masks in own_masks.items() if masks}
    maps = {}
    for split, dirs in layout_dirs[1].items():
        is_cityscapes = any(CITYSCAPES_SUFFIX in path.name for path in list_images(dirs.labels, MASK_FILE_SUFFIXES))
        pairs = pair_files(dirs, CITYSCAPES_SUFFIX if is_cityscapes else None).pairs
        if pairs:
            maps[split] = InstanceMasks({image: [mask] for image, mask in pairs}, True, [dirs.images, dirs.labels])
    samples = [files[0] for id_maps in maps.values() for files in [*id_maps.masks.values()][:MAX_SAMPLED]]
    is_cityscapes = any(id_maps.is_cityscapes for id_maps in maps.values())
    if maps and (is_requested or is_cityscapes or any(map(_holds_ids, samples))):
        return f'maps of instance ids, {layout_dirs[0]}', maps
    return None


def _folders_per_image(tree: FolderTree) -> dict[str, InstanceMasks]:
    """Find folders of one image and its masks, such as those of the Data Science Bowl 2018."""
    root, children = tree.root, defaultdict(dict)
    for path, names in tree.folders:
        files = [path / name for name in names if name.lower().endswith(MASK_FILE_SUFFIXES)]
        for kind, dir_names in (('images', IMAGE_DIR_NAMES), ('masks', MASK_DIR_NAMES)):
            if files and path.name.lower() in dir_names:
                children[path.parent][kind] = files
    per_image = {parent: kinds for parent, kinds in children.items() if len(kinds.get('images', ())) == 1}
    if len(per_image) < 2 or not any(len(kinds.get('masks', ())) > 1 for kinds in per_image.values()):
        return {}
    splits: dict[str, dict[Path, list[Path]]] = defaultdict(dict)
    for parent, kinds in per_image.items():
        if 'masks' in kinds or split_of(parent, root) != 'test':
            splits[split_of(parent, root) or 'all'][kinds['images'][0]] = kinds.get('masks', [])
    return {split: InstanceMasks(masks, False, [root]) for split, masks in splits.items() if any(masks.values())}


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    return {normalize_spelling(stem_in(path, folder)): path for path in list_images(folder, suffixes)}


def _own_masks(dirs: SplitDirs) -> InstanceMasks | None:
    """Return the masks that are named after an image and a number, or lie in a folder of its name."""
    if dirs.images == dirs.labels:
        return None
    images = {strip_image_suffix(stem): path for stem, path in _by_stem(dirs.images, IMAGE_SUFFIXES).items()}
    masks = _by_stem(dirs.labels, MASK_FILE_SUFFIXES)
    by_image: dict[Path, list[Path]] = {path: [] for path in images.values()}
    for stem, mask in masks.items():
        if stem in images:  # a mask of the whole image
            return None
        ends = [m.start() for m in re.finditer(r'[-_. /]', stem)]
        owner = next((stem[:end] for end in reversed(ends) if stem[:end] in images), None)
        if owner and OWN_MASK_RE.fullmatch(stem[len(owner) :]):
            by_image[images[owner]].append(mask)
    counts = [len(masks_of_image) for masks_of_image in by_image.values()]
    if sum(map(bool, counts)) < MIN_MATCHING * len(counts) or max(counts, default=0) < 2:
        return None
    return InstanceMasks(by_image, False, [dirs.images, dirs.labels])


def _holds_ids(path: Path) -> bool:
    """Return whether a map has values beyond those of classes."""
    try:
        values = read_values(path)
        return values.ndim == 2 and bool(values.max() > MAX_LABEL)
    except Exception:  # a broken file can fail in any way; the check reports it
        return False


def read_instance_masks(
    root: Path, splits: Mapping[str, InstanceMasks], report: Report, request: DatasetRequest
) -> dict[str, SplitAnnotations]:
    """Read the masks of each split as COCO with RLEs, as `BoxFormat.read`."""
    are_maps = any(source.are_maps for source in splits.values())
    read = partial(_read_mask, are_maps=are_maps)
    files = [mask for source in splits.values() for masks in source.masks.values() for mask in masks]
    objects = inspect_all(read, files, 'instance masks')
    ids = {id_ for result in objects.values() if isinstance(result, list) for id_, _ in result}
    names = _class_names(root, ids, splits)
    class_ids = {key: i + 1 for i, key in enumerate(names)}
    categories = [dict(id=class_ids[key], name=name) for key, name in names.items()]
    results = {}
    for split, source in splits.items():
        images, annotations, locations = [], [], {}
        for image, masks in source.masks.items():
            name = relative_to_root(image, root)
            rles = [rle for mask in masks if isinstance(objects[mask], list) for _, rle in objects[mask]]
            size = dict(zip(('height', 'width'), rles[0]['segmentation']['size'])) if rles else {}
            images.append(dict(id=len(images) + 1, file_name=name, **size))
            locations[name] = ImageLocation(name)
            for mask in masks:
                mask_name, result = relative_to_root(mask, root), objects[mask]
                if isinstance(result, str):
                    report.add(split, result, mask_name)
                    continue
                if not result and not are_maps:
                    report.add(split, 'mask-without-object', mask_name)
                for id_, rle in result:
                    is_crowd = None not in names and id_ < INSTANCE_FACTOR  # objects that are not told apart
                    key = None if None in names else id_ if is_crowd else id_ // INSTANCE_FACTOR
                    if key in class_ids:
                        fields = dict(image_id=len(images), category_id=class_ids[key], iscrowd=int(is_crowd))
                        annotations.append(dict(id=f'{mask_name}:{id_}', **fields, **rle))
        coco = dict(images=images, annotations=annotations, categories=categories)
        results[split] = SplitAnnotations(coco, locations, source.folders[0], source.folders)
    if any(name == DEFAULT_NAME for name in names.values()):
        report.add('all', 'instances-of-one-class', DEFAULT_NAME)
    return results


def _read_mask(path: Path, are_maps: bool) -> list[tuple[int, dict]] | str:
    """Return id, and mask, box and area, of the objects in a file; or the code of a problem."""
    try:
        values = read_values(path, allow_lossy=not are_maps)
    except Exception as error:  # a broken file can fail in any way
        return mask_problem(error)
    if values.ndim == 3:
        if are_maps and not (values == values[..., :1]).all():  # a color per object
            values = values.astype(np.int64) @ (2**16, 2**8, 1)
        else:
            values = values.max(2)
    if not are_maps:
        high = values.max(initial=0)
        return [(1, mask_fields(values > high / 2))] if high else []
    return [(id_, mask_fields(values == id_)) for id_ in np.unique(values).tolist() if id_ > 0]


def _class_names(root: Path, ids: set[int], splits: Mapping[str, InstanceMasks]) -> dict[int | None, str]:
    """Return the names of the classes by the thousands of the ids; by None if all objects are of one class."""
    are_maps = any(source.are_maps for source in splits.values())
    if are_maps and any(source.is_cityscapes for source in splits.values()):
        return dict(CITYSCAPES_CLASSES)
    file = next((file for file in class_files(root, None) if file.exists()), None)
    names = read_classes(file)[0] if file else []
    classes = sorted({id_ // INSTANCE_FACTOR for id_ in ids if id_ >= INSTANCE_FACTOR})
    has_classes = classes and classes[-1] <= MAX_LABEL and not any(MAX_LABEL < id_ < INSTANCE_FACTOR for id_ in ids)
    if not are_maps or not has_classes:
        return {None: names[-1] if 1 <= len(names) <= 2 else DEFAULT_NAME}  # of two the first is the background
    return {c: names[c] if c < len(names) else f'class {c}' for c in classes}
