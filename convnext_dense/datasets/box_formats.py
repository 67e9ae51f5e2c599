"""Formats of boxes and polygons, by one entry each: how a folder is recognized, and how its annotations are read."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError
from .annotation_files import ListSplit, find_label_files, find_lists, label_split, read_label_files, read_lists
from .coco_files import read_coco_files
from .createml import is_createml, parse_createml
from .diagnostics import Report
from .files import read_ends
from .find_yolo import find_yolo, yolo_split
from .image_folder import METADATA_SUFFIXES, is_image_folder, name_numbers, parse_image_folder
from .instance_masks import find_instance_masks, read_instance_masks
from .label_studio import is_label_studio, parse_label_studio
from .labelme import is_labelme, parse_labelme
from .layouts import HEADER_BYTES, FolderTree, find_annotations
from .panoptic import PANOPTIC, find_panoptic, is_panoptic, read_panoptic
from .read_yolo import read_yolo
from .request import DatasetRequest
from .split_annotations import SplitAnnotations, drop_masks_of_boxes
from .supervisely import is_supervisely, parse_supervisely
from .via import choose_class_attribute, is_via, parse_via
from .voc import is_voc, parse_voc, shift_to_zero

COCO = 'COCO json'
INSTANCES, INSTANCES_KEY = 'instance masks', 'instances'


class BoxFormat(NamedTuple):
    """A format that is COCO or is converted to it as it is read.

    Attributes:
        key (str): value of `--format`.
        find (Callable): returns what says it (such as a file's name) and the sources of each split ('train', 'val',
            'test' or 'all') of a `FolderTree`; None if it is not of this format. It does not read annotations.
        read (Callable): returns `SplitAnnotations` by split; its arguments are the folder of the data set, those
            sources, the report and the request.
        is_file (Callable | None): whether a file for many images is of this format, by its ends.
        suffixes (tuple[str, ...]): ends of the names of such files.
        from_folder (Callable | None): returns the source of a split, None if there are no such annotations; its
            arguments are the `FolderTree` of the annotations and the folder of the images.
    """

    key: str
    find: Callable[[FolderTree], tuple[str, Mapping[str, object]] | None]
    read: Callable[[Path, Mapping, Report, DatasetRequest], dict[str, SplitAnnotations]]
    is_file: Callable[[str], bool] | None = None
    suffixes: tuple[str, ...] = ('.json',)
    from_folder: Callable[[FolderTree, Path], object] | None = None


def _list_format(key: str, suffixes: tuple[str, ...], is_list: Callable, parse: Callable, **options) -> BoxFormat:
    """Return the entry of a format with one file for many images, as of `annotation_files`."""
    find = partial(find_lists, suffixes=suffixes, is_list=is_list)
    return BoxFormat(key, find, partial(read_lists, parse=parse, **options), is_list, suffixes)


def _label_format(key: str, suffix: str, is_label: Callable, parse: Callable, finish: Callable) -> BoxFormat:
    """Return the entry of a format with one file per image, as of `annotation_files`."""
    files = dict(suffix=suffix, is_label=is_label)
    read = partial(read_label_files, suffix=suffix, parse=parse, finish=finish)
    return BoxFormat(key, partial(find_label_files, **files), read, from_folder=partial(label_split, **files))


# Formats are looked for in this order.
BOX_FORMATS = {
    COCO: BoxFormat('coco', lambda tree: find_annotations(tree.root), read_coco_files),
    'YOLO': BoxFormat('yolo', find_yolo, read_yolo, from_folder=yolo_split),
    'Pascal VOC': _label_format('voc', '.xml', is_voc, parse_voc, shift_to_zero),
    'LabelMe': _label_format('labelme', '.json', is_labelme, parse_labelme, drop_masks_of_boxes),
    'Label Studio': _list_format('labelstudio', ('.json',), is_label_studio, parse_label_studio),
    'VIA': _list_format('via', ('.json',), is_via, parse_via, resolve_names=choose_class_attribute),
    'Supervisely': _label_format('supervisely', '.json', is_supervisely, parse_supervisely, drop_masks_of_boxes),
    'CreateML': _list_format('createml', ('.json',), is_createml, parse_createml),
    'ImageFolder': _list_format(
        'imagefolder', METADATA_SUFFIXES, is_image_folder, parse_image_folder, resolve_names=name_numbers
    ),
    PANOPTIC: BoxFormat('panoptic', find_panoptic, read_panoptic, is_panoptic),
    INSTANCES: BoxFormat(INSTANCES_KEY, find_instance_masks, read_instance_masks),
}
FORMAT_KEYS = tuple(box_format.key for box_format in BOX_FORMATS.values())  # values of --format


class BoxSources(NamedTuple):
    """Where the boxes of a data set are.

    Attributes:
        format (str): a key of `BOX_FORMATS`.
        layout (str): which of its layouts.
        by_split (dict[str, object]): what `BoxFormat.find` returns, by split.
        other_formats (tuple[str, ...]): formats of other boxes in the same folder, which are not used.
    """

    format: str
    layout: str
    by_split: dict[str, object]
    other_formats: tuple[str, ...] = ()


def find_boxes(path: Path, key: str | None = None) -> BoxSources | None:
    """Find the boxes of a data set in any format; if there are several, those of the first.

    Args:
        path: folder of the data set, or the data.yaml of one.
        key: one of `FORMAT_KEYS`; None for any.

    Raises:
        UsageError: several files could be a split's, or they contradict the disk.
    """
    tree, sources_by_format, error = FolderTree(path), {}, None
    for name, box_format in BOX_FORMATS.items():
        # Masks come last: they are rarely annotations of their own, and the search takes as long as for all others.
        if key == box_format.key or (key is None and not (sources_by_format and name == INSTANCES)):
            try:
                options = dict(is_requested=True) if key == INSTANCES_KEY else {}
                sources = box_format.find(tree, **options)
            except UsageError as reason:
                error = error or (None if sources_by_format else reason)
            else:
                sources_by_format |= {name: sources} if sources else {}
    if error:
        other_keys = [BOX_FORMATS[name].key for name in sources_by_format]
        if other_keys:
            raise UsageError(f'{error}, or use the other labels in {path} by --format {other_keys[0]}')
        raise error
    if not sources_by_format:
        return None
    first_format, *other_keys = sources_by_format
    return BoxSources(first_format, *sources_by_format[first_format], tuple(other_keys))


def find_given_boxes(request: DatasetRequest) -> BoxSources:
    """Find the boxes of a data set of which the user names annotations.

    A split that is not named is looked for, for COCO json, in the folder of the data set.

    Raises:
        UsageError: what is named is of no known format, or of several.
    """
    sources = {split: _source(request, split) for split in request.ann_files}
    formats = list(dict.fromkeys(name for name, _ in sources.values()))
    if len(formats) > 1:
        raise UsageError(f'--train-ann is {formats[0]}, --val-ann is {formats[1]}: give two of one format')
    by_split = {split: source for split, (_, source) in sources.items()}
    layout, other_files = f'of {os.path.basename(request.data_yaml)}' if request.data_yaml else 'of the given files', {}
    if formats[0] == COCO and request.path and not request.data_yaml and len(by_split) < 2:
        layout, other_files = find_annotations(Path(request.path), by_split) or (layout, {})
    return BoxSources(formats[0], layout, other_files | by_split)


def _source(request: DatasetRequest, split: str) -> tuple[str, object]:
    """Return the format and the source of a split of which the user names the annotations."""
    path, images = Path(request.ann_files[split]), request.image_dirs.get(split)
    for name, box_format in BOX_FORMATS.items():
        if request.format not in (None, box_format.key):
            continue
        if path.is_dir() and box_format.from_folder:
            source = box_format.from_folder(FolderTree(path), Path(images or path))
        elif box_format.is_file and path.name.lower().endswith(box_format.suffixes):
            source = ListSplit(path, images) if box_format.is_file(read_ends(path, HEADER_BYTES)) else None
        else:
            source = None
        if source:
            return name, source
    if path.is_dir():
        names = ', '.join(name for name, box_format in BOX_FORMATS.items() if box_format.from_folder)
        raise UsageError(f'--{split}-ann {path}: the folder holds no labels of one of {names}')
    if request.format not in (None, BOX_FORMATS[COCO].key):
        raise UsageError(f'--{split}-ann {path} is not of this format: leave out --format {request.format}')
    return COCO, path
