"""LabelMe: a JSON file per image with its shapes.

Polygons, rectangles, circles and masks become objects; shapes with the same group and label are parts of one. Without
any other shape, rectangles are boxes without masks.
"""

import base64
import binascii
import io
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UsageError
from .check_images import MAX_PIXELS
from .coco_masks import mask_area, mask_to_box
from .coco_values import is_finite, is_number, is_positive
from .diagnostics import Report
from .files import read_json, to_one_line
from .label_files import Label, LabelSplit, find_label_files, read_label_files
from .split_annotations import SplitAnnotations

MARKS_RE = re.compile(r'"(points|imagePath|imageData)"\s*:')
IGNORED_LABELS = ('__ignore__', '_background_')
MIN_CIRCLE_POINTS = 12


def find_labelme(path: Path) -> tuple[str, dict[str, LabelSplit]] | None:
    """Find the JSON files of each split, as `find_label_files`."""
    return find_label_files(path, '.json', lambda start: '"shapes"' in start and MARKS_RE.search(start) is not None)


def read_labelme(root: Path, splits: Mapping[str, LabelSplit], report: Report) -> dict[str, SplitAnnotations]:
    """Read the JSON files of each split as COCO.

    Args:
        root: folder of the data set.
        splits: as of `find_labelme`.
        report: to add to.

    Raises:
        UsageError: a list cannot be read.
    """
    results = read_label_files(root, splits, report, '.json', _read_label)
    annotations = [a for result in results.values() for a in result.coco['annotations']]
    if all(annotation['is_rectangle'] for annotation in annotations):
        for annotation in annotations:
            del annotation['segmentation']
    return results


def _read_label(file: str, where: str, add: Callable) -> Label | None:
    try:
        content = read_json(Path(file))
    except UsageError as error:
        add('unreadable-label', f'{where}: {to_one_line(error.__cause__ or error, 60)}')
        return None
    if not isinstance(content, dict) or not isinstance(content.get('shapes'), list):
        add('unreadable-label', f'{where}: it has no list of shapes')
        return None
    size = (content.get('imageWidth'), content.get('imageHeight'))
    size = tuple(map(int, size)) if all(is_positive(side) and is_finite(side) for side in size) else None
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
        if all(isinstance(each, list) for each in masks):
            mask = [polygon for each in masks for polygon in each]
        else:
            mask = _union(masks, size)
    height_width = size[::-1] if size else (0, 0)
    box = mask_to_box(mask)
    area = mask_area(mask, height_width) or box[2] * box[3]
    fields = dict(number=number, category_id=label, bbox=box, area=area, iscrowd=0, segmentation=mask)
    return fields | dict(is_rectangle=all(part[3] for part in parts))


def _mask_of(shape: dict, size: tuple[int, int] | None) -> tuple[str | None, list | dict | None]:
    """Return the code of what is wrong with a shape, or its polygons or RLE."""
    kind, points = shape.get('shape_type') or 'polygon', shape.get('points')
    if not _are_points(points):
        return 'label-not-numbers', None
    flat = [float(value) for point in points for value in point]
    if kind == 'mask':
        return _decode_mask(shape.get('mask'), points[0], size)
    if kind == 'rectangle' and len(points) == 2:
        x1, y1, x2, y2 = flat
        return None, [[x1, y1, x2, y1, x2, y2, x1, y2]]
    if kind == 'circle' and len(points) == 2:
        return None, [_circle(*flat)]
    if kind in ('polygon', 'rectangle'):
        return None, [flat]
    return 'shape-without-area', None


def _are_points(points: object) -> bool:
    if not isinstance(points, list) or not points:
        return False
    pairs = [point for point in points if isinstance(point, list) and len(point) == 2]
    return len(pairs) == len(points) and all(is_number(v) and is_finite(v) for point in pairs for v in point)


def _circle(x: float, y: float, edge_x: float, edge_y: float) -> list[float]:
    """Return the polygon of a circle that is less than a pixel from it, with LabelMe's own points."""
    radius = math.hypot(edge_x - x, edge_y - y)
    n = max(int(math.pi / math.acos(1 - 1 / radius)), MIN_CIRCLE_POINTS) if radius > 1 else MIN_CIRCLE_POINTS
    angles = [2 * math.pi / n * i for i in range(n)]
    return [v for angle in angles for v in (x + radius * math.sin(angle), y + radius * math.cos(angle))]


def _decode_mask(text: object, corner: list, size: tuple[int, int] | None) -> tuple[str | None, dict | None]:
    """Return the RLE of a mask, a PNG of the part of the image that begins at a corner."""
    if not isinstance(text, str) or size is None or size[0] * size[1] > MAX_PIXELS:
        return 'mask-format-unknown', None
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=('PNG',)) as image:
            part = np.asarray(image.convert('L')) > 0 if image.width * image.height <= MAX_PIXELS else None
    except (binascii.Error, ValueError, OSError, SyntaxError, Image.DecompressionBombError):
        part = None
    x, y = round(corner[0]), round(corner[1])
    if part is None or x < 0 or y < 0 or x >= size[0] or y >= size[1]:
        return 'mask-format-unknown', None
    pixels = np.zeros(size[::-1], np.uint8, order='F')
    target = pixels[y : y + part.shape[0], x : x + part.shape[1]]
    target[:] = part[: target.shape[0], : target.shape[1]]
    return None, _encode(pixels)


def _union(masks: list[list | dict], size: tuple[int, int]) -> dict:
    """Return the RLE of the union of polygons and RLEs."""
    from pycocotools import mask as api  # a dependency of mmdet, without which this module has to import

    width, height = size
    rles = [rle for m in masks for rle in (api.frPyObjects(m, height, width) if isinstance(m, list) else [m])]
    return _as_text(api.merge(rles))


def _encode(pixels: np.ndarray) -> dict:
    from pycocotools import mask as api

    return _as_text(api.encode(pixels))


def _as_text(rle: dict) -> dict:
    return dict(size=list(map(int, rle['size'])), counts=rle['counts'].decode('ascii'))
