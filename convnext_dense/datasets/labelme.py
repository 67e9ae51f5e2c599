"""LabelMe: a JSON file per image with its shapes.

Polygons, rectangles, circles and masks become objects; shapes with the same group and label are parts of one. Without
any other shape, rectangles are boxes without masks.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import chain

from .annotation_files import read_json_label
from .coco_masks import encode_mask
from .files import DataError, has_marks
from .geometry import decode_part, draw_masks, ellipse, rectangle
from .split_annotations import parse_name, parse_objects, parse_points, parse_size, shape_annotation

is_labelme = has_marks('"shapes"', r'"(points|imagePath|imageData)"\s*:')  # in the start of a file
IGNORED_LABELS = ('__ignore__', '_background_')


def parse_labelme(file: str, label_name: str, add: Callable) -> tuple[tuple[int, int] | None, list[dict]]:
    """Return the objects of a file, as `annotation_files.read_label_files`."""
    content = read_json_label(file, 'shapes')
    size = parse_size(content.get('imageWidth'), content.get('imageHeight'))
    objects: dict[object, list[tuple]] = {}
    for number, name, group, *part in parse_objects(content['shapes'], label_name, add, partial(_parse, size=size)):
        key = number if group is None else (name, str(group))  # of the parts of one object
        objects.setdefault(key, []).append((number, name, *part))
    return size, [_annotation(parts, size) for parts in objects.values()]


def _parse(number: int, shape: dict, size: tuple[int, int] | None) -> tuple[int, str, object, list | dict, bool]:
    """Return number, class and group of a shape, its polygons or RLE, and whether it is a rectangle."""
    name = parse_name(shape.get('label'))
    if shape['label'] in IGNORED_LABELS:
        raise DataError('ignored-region')
    return number, name, shape.get('group_id'), _parse_mask(shape, size), shape.get('shape_type') == 'rectangle'


def _annotation(parts: list[tuple], size: tuple[int, int] | None) -> dict:
    """Return the annotation of an object of one or more shapes."""
    numbers, names, masks, are_rectangles = zip(*parts)
    mask = masks[0]
    if len(parts) > 1:
        are_polygons = all(isinstance(polygons, list) for polygons in masks)
        mask = [*chain(*masks)] if are_polygons else encode_mask(draw_masks(masks, size))
    return shape_annotation(numbers[0], names[0], mask, size, all(are_rectangles))


def _parse_mask(shape: dict, size: tuple[int, int] | None) -> list | dict:
    """Return the polygons or the RLE of a shape."""
    kind, points = shape.get('shape_type') or 'polygon', shape.get('points')
    coords = parse_points(points)
    if kind == 'mask':  # a PNG of the part of the image that begins at the first point
        return decode_part(shape.get('mask'), points[0], size)
    if kind == 'rectangle' and len(points) == 2:
        x1, y1, x2, y2 = coords
        return [rectangle(x1, y1, x2 - x1, y2 - y1)]
    if kind == 'circle' and len(points) == 2:
        x, y, edge_x, edge_y = coords
        radius = math.hypot(edge_x - x, edge_y - y)
        return [ellipse(x, y, radius, radius)]
    if kind in ('polygon', 'rectangle'):
        return [coords]
    raise DataError('shape-without-area')
