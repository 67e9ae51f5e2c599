"""Formats of boxes and polygons, by one entry each: how a folder is recognized, and how its annotations are read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError
from .diagnostics import Report
from .find_yolo import find_yolo
from .labelme import find_labelme, read_labelme
from .layouts import find_annotations
from .read_yolo import read_yolo
from .split_annotations import SplitAnnotations
from .voc import find_voc, read_voc


class BoxFormat(NamedTuple):
    """A format that is converted to COCO as it is read.

    Attributes:
        find (Callable): from the path of a data set to what says it (such as a file's name) and the sources of each
            split ('train', 'val', 'test' or 'all'); None if it is not of this format. It does not read annotations.
        read (Callable): from the folder of the data set, those sources and the report to `SplitAnnotations` by split.
    """

    find: Callable[[Path], tuple[str, Mapping[str, object]] | None]
    read: Callable[[Path, Mapping, Report], dict[str, SplitAnnotations]]


# In the order in which they are looked for, after COCO json.
BOX_FORMATS = {
    'YOLO': BoxFormat(find_yolo, read_yolo),
    'Pascal VOC': BoxFormat(find_voc, read_voc),
    'LabelMe': BoxFormat(find_labelme, read_labelme),
}


class BoxSources(NamedTuple):
    """Where the boxes of a data set are.

    Attributes:
        format (str): 'COCO json', or a key of `BOX_FORMATS`.
        layout (str): which of its layouts.
        by_split (dict[str, object]): COCO json, or what `BoxFormat.find` returns, by split.
        others (tuple[str, ...]): formats of other boxes in the same folder, which are not used.
    """

    format: str
    layout: str
    by_split: dict[str, object]
    others: tuple[str, ...] = ()


# Values of --format, by what reports call them.
FORMAT_KEYS = {'COCO json': 'coco', 'YOLO': 'yolo', 'Pascal VOC': 'voc', 'LabelMe': 'labelme'}


def find_boxes(path: Path, key: str | None = None) -> BoxSources | None:
    """Find the boxes of a data set in any format; if there are several, those of the first.

    Args:
        path: folder of the data set, or the data.yaml of one.
        key: a value of `FORMAT_KEYS`; None for any.

    Raises:
        UsageError: several files could be a split's, or they contradict the disk.
    """
    finders = {'COCO json': lambda path: find_annotations(path) if path.is_dir() else None}
    finders |= {name: box_format.find for name, box_format in BOX_FORMATS.items()}
    found, error = {}, None
    for name, find in finders.items():
        if key in (None, FORMAT_KEYS[name]):
            try:
                sources = find(path)
            except UsageError as reason:
                error = error or (None if found else reason)
            else:
                found |= {name: sources} if sources else {}
    if error:
        others = [FORMAT_KEYS[name] for name in found]
        raise UsageError(f'{error}, or use the other labels in {path} by --format {others[0]}') if others else error
    if not found:
        return None
    first, *others = found
    return BoxSources(first, *found[first], tuple(others))
