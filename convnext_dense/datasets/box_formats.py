"""Formats of boxes and polygons, by one entry each: how a folder is recognized, and how its annotations are read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from .diagnostics import Report
from .find_yolo import find_yolo
from .layouts import find_annotations
from .read_yolo import read_yolo
from .split_annotations import SplitAnnotations


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
}


class BoxSources(NamedTuple):
    """Where the boxes of a data set are.

    Attributes:
        format (str): 'COCO json', or a key of `BOX_FORMATS`.
        layout (str): which of its layouts.
        by_split (dict[str, object]): COCO json, or what `BoxFormat.find` returns, by split.
    """

    format: str
    layout: str
    by_split: dict[str, object]


def find_boxes(path: Path) -> BoxSources | None:
    """Find the boxes of a data set in any format.

    Args:
        path: folder of the data set, or the data.yaml of one.

    Raises:
        UsageError: several files could be a split's, or they contradict the disk.
    """
    found = find_annotations(path) if path.is_dir() else None
    if found:
        return BoxSources('COCO json', *found)
    for name, box_format in BOX_FORMATS.items():
        found = box_format.find(path)
        if found:
            return BoxSources(name, *found)
    return None
