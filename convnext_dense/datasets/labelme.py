"""LabelMe: a JSON file per image with its shapes.

Polygons, rectangles, circles and masks become objects; shapes with the same group and label are parts of one. Without
any other shape, rectangles are boxes without masks.
"""

import base64
import binascii
import math
import re
from collections.abc import Callable

from .geometry import (
    decode_png,
    ellipse,
    flatten_points,
    paste_mask,
    rectangle,
    shape_annotation,
    union,
)
from .label_files import Label, read_json_label
from .split_annotations import parse_size

MARKS_RE = re.compile(r'"(points|imagePath|imageData)"\s*:')
IGNORED_LABELS = ('__ignore__', '_background_')


def is_labelme(start: str) -> bool:
    """Return whether a JSON file is LabelMe's, by its start."""
    return '"shapes"' in start and MARKS_RE.search(start) is not None


def parse_labelme(file: str, where: str, add: Callable) -> Label | None:
    """Return the objects of a file, as `label_files.read_label_files`."""
    content = read_json_label(file, where, add, 'shapes')
    if content is None:
        return None
    size = parse_size(content.get('imageWidth'), content.get('imageHeight'))
    return Label(size, _objects(content['shapes'], size, where, add))


def _objects(shapes: list, size: tuple[int, int] | None, where: str, add: Callable) -> list[dict]:
    """Return the objects of an image: shapes, or several of one group and label."""
    groups: dict[object, list] = {}
    for number, shape in enumerate(shapes, 1):
        shape = shape if isinstance(shape, dict) else {}
        label, group = shape.get('label'), shape.get('group_id')
        problem, mask = None, None
        if not isinstance(label, str) or not label.strip():
            problem = 'label-without-name'
        elif label in IGNORED_LABELS:
            problem = 'ignored-region'
        else:
            problem, mask = _mask_of(shape, size)
        if problem:
            add(problem, f'{where}:{number}')
            continue
        key = number if group is None else (label, str(group))
        groups.setdefault(key, []).append((number, label.strip(), mask, shape.get('shape_type') == 'rectangle'))
    return [_object(parts, size) for parts in groups.values()]


def _object(parts: list[tuple], size: tuple[int, int] | None) -> dict:
    """Return the annotation of the shapes of one object."""
    number, label, mask, _ = parts[0]
    masks = [part[2] for part in parts]
    if len(parts) > 1:
        are_polygons = all(isinstance(each, list) for each in masks)
        mask = [polygon for each in masks for polygon in each] if are_polygons else union(masks, size)
    return shape_annotation(number, label, mask, size, all(part[3] for part in parts))


def _mask_of(shape: dict, size: tuple[int, int] | None) -> tuple[str | None, list | dict | None]:
    """Return the code of what is wrong with a shape, or its polygons or RLE."""
    kind, points = shape.get('shape_type') or 'polygon', shape.get('points')
    flat = flatten_points(points)
    if flat is None:
        return 'label-not-numbers', None
    if kind == 'mask':
        return _decode_mask(shape.get('mask'), points[0], size)
    if kind == 'rectangle' and len(points) == 2:
        x1, y1, x2, y2 = flat
        return None, [rectangle(x1, y1, x2 - x1, y2 - y1)]
    if kind == 'circle' and len(points) == 2:
        x, y, edge_x, edge_y = flat
        radius = math.hypot(edge_x - x, edge_y - y)
        return None, [ellipse(x, y, radius, radius)]
    if kind in ('polygon', 'rectangle'):
        return None, [flat]
    return 'shape-without-area', None


def _decode_mask(text: object, corner: list, size: tuple[int, int] | None) -> tuple[str | None, dict | None]:
    """Return the RLE of a mask, a PNG of the part of the image that begins at a corner."""
    try:
        part = decode_png(base64.b64decode(text, validate=True)) if isinstance(text, str) and size else None
    except (binascii.Error, ValueError):
        part = None
    rle = None if part is None else paste_mask(part, round(corner[0]), round(corner[1]), size)
    return (None, rle) if rle else ('mask-format-unknown', None)
