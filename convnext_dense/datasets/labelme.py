"""LabelMe: a JSON file per image with its shapes.

Polygons, rectangles, circles and masks become objects; shapes with the same group and label are parts of one. Without
any other shape, rectangles are boxes without masks.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import NamedTuple

from .coco_masks import encode_mask
from .files import DataError, has_marks
from .geometry import decode_part, draw_masks, ellipse, rectangle
from .label_files import Label, read_json_label
from .objects import parse_name, parse_objects, parse_points, shape_annotation
from .split_annotations import parse_size

is_labelme = has_marks('"shapes"', r'"(points|imagePath|imageData)"\s*:')  # in the start of a file
IGNORED_LABELS = ('__ignore__', '_background_')


class Part(NamedTuple):
    """A shape, which is an object or a part of one.

    Attributes:
        number (int): number of the shape in its file.
        name (str): name of its class.
        group (object): which parts of one object have in common; None for a shape that is an object.
        mask (list | dict): polygons or RLE.
        is_rectangle (bool): whether it is a rectangle.
    """

    number: int
    name: str
    group: object
    mask: list | dict
    is_rectangle: bool


def parse_labelme(file: str, label_name: str, add: Callable) -> Label:
    """Return the objects of a file, as `label_files.read_label_files`."""
    content = read_json_label(file, 'shapes')
    size = parse_size(content.get('imageWidth'), content.get('imageHeight'))
    objects: dict[object, list[Part]] = {}
    for part in parse_objects(content['shapes'], label_name, add, partial(_parse_shape, size=size)):
        key = part.number if part.group is None else (part.name, str(part.group))
        objects.setdefault(key, []).append(part)
    return Label(size, [_annotation(parts, size) for parts in objects.values()])


def _parse_shape(number: int, shape: dict, size: tuple[int, int] | None) -> Part:
    label, kind = shape.get('label'), shape.get('shape_type')
    name = parse_name(label)
    if label in IGNORED_LABELS:
        raise DataError('ignored-region')
    return Part(number, name, shape.get('group_id'), _parse_mask(shape, size), kind == 'rectangle')


def _annotation(parts: list[Part], size: tuple[int, int] | None) -> dict:
    """Return the annotation of an object."""
    mask, masks = parts[0].mask, [part.mask for part in parts]
    if len(parts) > 1:
        are_polygons = all(isinstance(polygons, list) for polygons in masks)
        mask = [*chain(*masks)] if are_polygons else encode_mask(draw_masks(masks, size))
    return shape_annotation(*parts[0][:2], mask, size, all(part.is_rectangle for part in parts))


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
