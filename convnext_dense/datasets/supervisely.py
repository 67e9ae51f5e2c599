"""Supervisely: a JSON file per image, in `ann/` next to the images in `img/`, in a folder per data set.

Corners of rectangles are the first and the last pixel, as in Supervisely's own SDK.
"""

import zlib
from collections.abc import Callable
from functools import partial

from .annotation_files import read_json_label
from .check_images import MAX_PIXELS
from .coco_masks import encode_mask
from .coco_values import as_dict
from .files import DataError, has_marks
from .geometry import decode_part, draw_masks
from .split_annotations import box_annotation, parse_name, parse_objects, parse_points, parse_size, shape_annotation

# In the start of a file.
is_supervisely = has_marks('"objects"', r'"(classTitle|geometryType)"|"size"\s*:\s*\{\s*"(height|width)"')
MIN_POINTS = 3


def parse_supervisely(file: str, label_name: str, add: Callable) -> tuple[tuple[int, int] | None, list[dict]]:
    """Return the objects of a file, as `annotation_files.read_label_files`."""
    content = read_json_label(file, 'objects')
    size = as_dict(content.get('size'))
    size = parse_size(size.get('width'), size.get('height'))
    return size, parse_objects(content['objects'], label_name, add, partial(_parse_figure, size=size))


def _parse_figure(number: int, figure: dict, size: tuple[int, int] | None) -> dict:
    """Return the annotation of a figure in an image of a size (width, height)."""
    name = parse_name(figure.get('classTitle'))
    kind = figure.get('geometryType') or ('bitmap' if figure.get('bitmap') else 'polygon')
    if kind in ('bitmap', 'alpha_mask'):
        bitmap = as_dict(figure.get('bitmap'))  # a PNG, compressed, of the part of the image that begins at its origin
        decompress = partial(zlib.decompressobj().decompress, max_length=MAX_PIXELS)
        mask = decode_part(bitmap.get('data'), bitmap.get('origin'), size, decompress)
        return shape_annotation(number, name, mask, size)
    if kind not in ('rectangle', 'polygon'):
        raise DataError('shape-without-area')
    points = as_dict(figure.get('points'))
    exterior, holes = parse_points(points.get('exterior')), points.get('interior')
    holes = [parse_points(hole) for hole in holes] if isinstance(holes, list) else []
    if kind == 'rectangle':
        if len(exterior) != 4:
            raise DataError('label-not-numbers')
        (x1, x2), (y1, y2) = sorted(exterior[::2]), sorted(exterior[1::2])
        last_pixel = int(all(map(float.is_integer, exterior)))
        return box_annotation(number, name, [x1, y1, x2 - x1 + last_pixel, y2 - y1 + last_pixel])
    mask = [exterior]
    if holes and size and size[0] * size[1] <= MAX_PIXELS and min(map(len, [exterior, *holes])) >= 2 * MIN_POINTS:
        mask = encode_mask(draw_masks([[exterior]], size) & ~draw_masks([holes], size))
    return shape_annotation(number, name, mask, size)
