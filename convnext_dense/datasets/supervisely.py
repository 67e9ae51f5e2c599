"""Supervisely: a JSON file per image, in `ann/` next to the images in `img/`, in a folder per data set.

Corners of rectangles are the first and the last pixel, as in Supervisely's own SDK.
"""

import base64
import binascii
import re
import zlib
from collections.abc import Callable

from .check_images import MAX_PIXELS
from .coco_values import as_dicts
from .geometry import (
    box_annotation,
    decode_png,
    flatten_points,
    paste_mask,
    polygons_to_rle,
    shape_annotation,
)
from .label_files import Label, read_json_label
from .split_annotations import parse_size

MARKS_RE = re.compile(r'"(classTitle|geometryType)"|"size"\s*:\s*\{\s*"(height|width)"')
MIN_POINTS = 3


def is_supervisely(start: str) -> bool:
    """Return whether a JSON file is Supervisely's, by its start."""
    return '"objects"' in start and MARKS_RE.search(start) is not None


def parse_supervisely(file: str, where: str, add: Callable) -> Label | None:
    """Return the objects of a file, as `label_files.read_label_files`."""
    content = read_json_label(file, where, add, 'objects')
    if content is None:
        return None
    size = content.get('size')
    size = parse_size(size.get('width'), size.get('height')) if isinstance(size, dict) else None
    annotations = []
    for number, figure in enumerate(as_dicts(content['objects']), 1):
        name = figure.get('classTitle')
        name = name.strip() if isinstance(name, str) else ''
        problem, annotation = ('label-without-name', None) if not name else _annotation(number, name, figure, size)
        if problem:
            add(problem, f'{where}:{number}')
        else:
            annotations.append(annotation)
    return Label(size, annotations)


def _annotation(number: int, name: str, figure: dict, size: tuple[int, int] | None) -> tuple[str | None, dict | None]:
    """Return the code of what is wrong with a figure, or its annotation."""
    kind = figure.get('geometryType') or ('bitmap' if figure.get('bitmap') else 'polygon')
    if kind in ('bitmap', 'alpha_mask'):
        rle = _decode_bitmap(figure.get('bitmap'), size)
        return (None, shape_annotation(number, name, rle, size)) if rle else ('mask-format-unknown', None)
    if kind not in ('rectangle', 'polygon'):
        return 'shape-without-area', None
    points = figure.get('points')
    points = points if isinstance(points, dict) else {}
    exterior, holes = flatten_points(points.get('exterior')), points.get('interior')
    holes = [flatten_points(hole) for hole in holes] if isinstance(holes, list) else []
    if exterior is None or None in holes:
        return 'label-not-numbers', None
    if kind == 'rectangle':
        if len(exterior) != 4:
            return 'label-not-numbers', None
        (x1, x2), (y1, y2) = sorted(exterior[::2]), sorted(exterior[1::2])
        last = int(all(map(float.is_integer, exterior)))
        return None, box_annotation(number, name, [x1, y1, x2 - x1 + last, y2 - y1 + last])
    mask = [exterior]
    if holes and size and size[0] * size[1] <= MAX_PIXELS and min(map(len, [exterior, *holes])) >= 2 * MIN_POINTS:
        mask = polygons_to_rle([exterior], holes, size)
    return None, shape_annotation(number, name, mask, size)


def _decode_bitmap(bitmap: object, size: tuple[int, int] | None) -> dict | None:
    """Return the RLE of a bitmap: a PNG, compressed, of the part of the image that begins at its origin."""
    data, origin = (bitmap.get('data'), bitmap.get('origin')) if isinstance(bitmap, dict) else (None, None)
    corner = flatten_points([origin])
    if not isinstance(data, str) or corner is None or size is None:
        return None
    try:
        png = zlib.decompressobj().decompress(base64.b64decode(data, validate=True), MAX_PIXELS)
    except (binascii.Error, ValueError, zlib.error):
        return None
    part = decode_png(png)
    return None if part is None else paste_mask(part, round(corner[0]), round(corner[1]), size)
