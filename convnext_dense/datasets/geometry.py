"""Shapes that annotation programs draw, as polygons and RLEs of COCO."""

import io
import math
from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image

from .check_images import MAX_PIXELS
from .coco_masks import mask_area, mask_to_box
from .coco_values import is_finite, is_number

MIN_ELLIPSE_POINTS = 12


def are_numbers(values: object) -> bool:
    """Return whether a value is a list of finite numbers, with at least one of them."""
    return isinstance(values, list) and bool(values) and all(is_number(v) and is_finite(v) for v in values)


def flatten_points(points: object) -> list[float] | None:
    """Return x, y, x, y, ... of a list of pairs; None if it is anything else."""
    if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
        return None
    flat = [value for point in points for value in point]
    return list(map(float, flat)) if are_numbers(flat) else None


def rectangle(x: float, y: float, width: float, height: float, degrees: float = 0.0) -> list[float]:
    """Return the polygon of a rectangle that is rotated clockwise about its corner (x, y)."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    corners = ((0, 0), (width, 0), (width, height), (0, height))
    return [v for dx, dy in corners for v in (x + dx * cos - dy * sin, y + dx * sin + dy * cos)]


def ellipse(x: float, y: float, radius_x: float, radius_y: float, degrees: float = 0.0) -> list[float]:
    """Return the polygon of an ellipse about (x, y), rotated clockwise, that is less than a pixel from it.

    Its points are those that LabelMe gives a circle.
    """
    radius = max(abs(radius_x), abs(radius_y))
    n = max(int(math.pi / math.acos(1 - 1 / radius)), MIN_ELLIPSE_POINTS) if radius > 1 else MIN_ELLIPSE_POINTS
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    points = ((radius_x * math.sin(a), radius_y * math.cos(a)) for a in (2 * math.pi / n * i for i in range(n)))
    return [v for dx, dy in points for v in (x + dx * cos - dy * sin, y + dx * sin + dy * cos)]


def box_annotation(number: object, name: str, box: list[float]) -> dict:
    """Return the annotation of a box (x, y, width, height), as `shape_annotation`."""
    fields = dict(number=number, category_id=name, bbox=box, area=box[2] * box[3], iscrowd=0)
    return fields | dict(segmentation=[rectangle(*box)], is_rectangle=True)


def shape_annotation(
    number: object, name: str, mask: list | dict, size: tuple[int, int] | None, is_rectangle: bool = False
) -> dict:
    """Return the annotation of a shape, as of `label_files.Label`.

    Args:
        number: of the shape in its file.
        name: of its class.
        mask: polygons or RLE.
        size: width and height of the image; None if they are not known, and then the mask is no RLE.
        is_rectangle: whether the mask says no more than the box.
    """
    box = mask_to_box(mask)
    area = mask_area(mask, size[::-1] if size else (0, 0)) or box[2] * box[3]
    fields = dict(number=number, category_id=name, bbox=box, area=area, iscrowd=0, segmentation=mask)
    return fields | dict(is_rectangle=is_rectangle)


def drop_masks_of_boxes(results: Mapping, *_) -> None:
    """Remove the masks, in place, if all annotations of the splits are rectangles along the sides of their images."""
    annotations = [a for result in results.values() for a in result.coco['annotations']]
    if all(annotation['is_rectangle'] for annotation in annotations):
        for annotation in annotations:
            del annotation['segmentation']


def decode_png(data: bytes) -> np.ndarray | None:
    """Return which pixels of a PNG are of an object, (H, W): by its alpha if it has one; None if it cannot be read."""
    try:
        with Image.open(io.BytesIO(data), formats=('PNG',)) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            has_alpha = image.mode in ('RGBA', 'LA') or 'transparency' in image.info
            return np.asarray(image.convert('RGBA').getchannel('A') if has_alpha else image.convert('L')) > 0
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError):
        return None


def paste_mask(part: np.ndarray, x: int, y: int, size: tuple[int, int]) -> dict | None:
    """Return the RLE of a mask that begins at a corner (x, y) of an image; None if that is outside.

    Args:
        part: pixels of the object, (H, W).
        x: of the corner.
        y: likewise.
        size: width and height of the image.
    """
    width, height = size
    if not 0 <= x < width or not 0 <= y < height or width * height > MAX_PIXELS:
        return None
    pixels = np.zeros((height, width), np.uint8, order='F')
    target = pixels[y : y + part.shape[0], x : x + part.shape[1]]
    target[:] = part[: target.shape[0], : target.shape[1]]
    return encode(pixels)


def polygons_to_rle(polygons: list[list[float]], holes: list[list[float]], size: tuple[int, int]) -> dict:
    """Return the RLE of the pixels in some polygons and in none of the holes."""
    pixels = _mask_api().decode(_merge([polygons], size))
    if holes:
        pixels[_mask_api().decode(_merge([holes], size)) > 0] = 0
    return encode(pixels)


def union(masks: Iterable[list | dict], size: tuple[int, int]) -> dict:
    """Return the RLE of the union of polygons and RLEs in an image of a size (width, height)."""
    return _as_text(_merge(masks, size))


def encode(pixels: np.ndarray) -> dict:
    """Return the RLE of a mask, (H, W) in the order of Fortran."""
    return _as_text(_mask_api().encode(pixels))


def _merge(masks: Iterable[list | dict], size: tuple[int, int]) -> dict:
    api, (width, height) = _mask_api(), size
    rles = [rle for m in masks for rle in (api.frPyObjects(m, height, width) if isinstance(m, list) else [m])]
    return api.merge(rles)


def _as_text(rle: dict) -> dict:
    return dict(size=list(map(int, rle['size'])), counts=rle['counts'].decode('ascii'))


def _mask_api():
    from pycocotools import mask  # a dependency of mmdet, without which this module has to import

    return mask
