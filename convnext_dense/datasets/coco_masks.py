"""Checks of COCO instance masks (polygons or RLE) and of areas.

pycocotools, which draws masks in training, trusts what it is given: it walks along each pixel of an outline, however
long, and reads an RLE beyond its end. So both are checked here before it sees them, in linear time.
"""

from collections.abc import Callable
from operator import mul

import numpy as np

from .coco_boxes import MAX_COORD_FACTOR
from .coco_values import is_finite, is_number
from .files import to_one_line

MAX_OUTLINE = 10**7  # pixels of an outline, beyond which pycocotools takes gigabytes
MAX_DRAWN_OUTLINE = 10**6  # pixels of outlines that pycocotools draws in about a second
MAX_RLE_GROUPS = 7  # groups of five bits in a run
# An area is implausible beyond the first factor of the box or the second of the mask, with some pixels for rounding.
MAX_AREA_PER_BOX, MAX_AREA_PER_MASK, AREA_SLACK = 1.5, 5, 4


def validate_mask(mask: object, width: int, height: int, report: Callable) -> list | dict | None:
    """Return the usable polygons of a `segmentation`, or the RLE; None if nothing can be used.

    `report` is called with the code of a problem, and more about it.
    """
    if not mask:
        report('missing-mask')
        return None
    if isinstance(mask, dict):
        problem = _rle_problem(mask, width, height)
        if problem:
            report(problem, f': {to_one_line(mask.get("size"), 40)}' if problem == 'rle-size-mismatch' else '')
        return None if problem else dict(size=[height, width], counts=mask['counts'])
    if not isinstance(mask, list):
        report('mask-format-unknown', f': {to_one_line(mask, 20)}')
        return None
    if all(map(is_number, mask)):
        report('polygon-not-nested')
        mask = [mask]
    polygons = []
    for polygon in mask:
        problem = _polygon_problem(polygon, width, height)
        if problem:
            report(problem)
        else:
            polygons.append(polygon)
    return polygons or None


def _polygon_problem(polygon: object, width: int, height: int) -> str | None:
    if not isinstance(polygon, list) or not {*map(type, polygon)} <= {int, float}:
        return 'polygon-not-numeric'
    max_coord = MAX_COORD_FACTOR * max(width, height)
    is_near = all(-max_coord <= v <= max_coord for v in polygon)
    if not is_near and not all(map(is_finite, polygon)):
        return 'polygon-not-numeric'
    if len(polygon) < 6:
        return 'polygon-under-3-points'
    if len(polygon) % 2:
        return 'polygon-odd-length'
    if not is_near:  # pycocotools would walk along each pixel of it
        return 'polygon-far-outside-image'
    if len(polygon) * max_coord > MAX_OUTLINE and _outline_length(polygon) > MAX_OUTLINE:  # measured only if needed
        return 'polygon-outline-too-long'
    x, y = polygon[::2], polygon[1::2]
    is_outside = max(x) <= 0 or max(y) <= 0 or min(x) >= width or min(y) >= height
    return 'polygon-outside-image' if is_outside else None


def _rle_problem(rle: dict, width: int, height: int) -> str | None:
    size, counts = rle.get('size'), rle.get('counts')
    if not isinstance(size, list) or not all(map(is_number, size)) or size != [height, width]:
        return 'rle-size-mismatch'
    try:
        runs = decode_rle_runs(counts) if isinstance(counts, str) else counts
        is_valid = isinstance(runs, list) and {*map(type, runs)} <= {int}
        is_valid = is_valid and sum(runs) == width * height and min(runs, default=0) >= 0
    except ValueError:
        is_valid = False
    return None if is_valid else 'rle-length-mismatch'


def decode_rle_runs(counts: str) -> list[int]:
    """Decode the run lengths of a compressed RLE.

    A run is written as groups of five bits, the lowest first, each but the last with a bit that says that more follow;
    from the third run on, it is the difference from the run before the last. pycocotools has a decoder
    (`rleFrString`), but that does not look where the text ends.

    Raises:
        ValueError: a character is invalid, a run too long, or the text ends within one.
    """
    groups = np.frombuffer(counts.encode('latin-1'), np.uint8).astype(int) - 48
    ends = np.flatnonzero(groups & 32 == 0) + 1
    if not groups.size or groups.min() < 0 or groups.max() > 63 or [groups.size] != ends[-1:].tolist():
        raise ValueError(counts[:20])
    sizes = np.diff(ends, prepend=0)
    if sizes.max() > MAX_RLE_GROUPS:
        raise ValueError(counts[:20])
    shifts = 5 * (np.arange(groups.size) - np.repeat(ends - sizes, sizes))
    runs = np.add.reduceat((groups & 31) << shifts, ends - sizes)
    runs -= (groups[ends - 1] & 16) << (shifts[ends - 1] + 1)  # the highest bit is the sign
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    return runs.tolist()


def mask_to_box(mask: list | dict) -> list[float]:
    """Return the bounding box of a valid mask; of polygons as they are given, without drawing them."""
    if isinstance(mask, dict):
        return mask_api().toBbox(_compress_rle(mask)).tolist()
    x, y = [v for polygon in mask for v in polygon[::2]], [v for polygon in mask for v in polygon[1::2]]
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def mask_area(mask: list | dict, size: tuple[int, int]) -> float:
    """Return the area of a valid mask in an image of a size (height, width); of polygons as they are given."""
    return sum(map(_polygon_area, mask)) if isinstance(mask, list) else _count_pixels(mask, size)


def is_implausible_area(
    area: float, mask: list | dict | None, box: list[float], size: tuple[int, int], iscrowd: int
) -> bool:
    """Return whether an area is larger than the box, or far from that of the mask.

    Args:
        area: area in pixels.
        mask: a valid mask. The area of its polygons and the number of its pixels differ where it is thin; either fits.
        box: x, y, width, height. A crowd may be larger than its box, but not than the image.
        size: height and width of the image.
        iscrowd: 1 for a crowd.
    """
    w, h = size if iscrowd else box[2:]
    if area > max(MAX_AREA_PER_BOX * w * h, w * h + w + h + 1):
        return True
    if iscrowd or not mask:
        return False
    areas = (area_of(mask, size) for area_of in (mask_area, _count_pixels))  # pixels are counted only if needed
    return not any(a / MAX_AREA_PER_MASK - AREA_SLACK <= area <= a * MAX_AREA_PER_MASK + AREA_SLACK for a in areas)


def _polygon_area(polygon: list[float]) -> float:
    x, y = polygon[::2], polygon[1::2]
    return abs(sum(map(mul, x, y[1:] + y[:1])) - sum(map(mul, y, x[1:] + x[:1]))) / 2


def _outline_length(polygon: list[float]) -> float:
    """Return the number of pixels that pycocotools walks along a polygon."""
    x, y = polygon[::2], polygon[1::2]
    return sum(max(abs(a - b), abs(c - d)) for a, b, c, d in zip(x, x[1:] + x[:1], y, y[1:] + y[:1]))


def _count_pixels(mask: list | dict, size: tuple[int, int]) -> float:
    """Return the pixels of a mask, or the area of polygons that take too long to draw."""
    if isinstance(mask, list) and sum(map(_outline_length, mask)) > MAX_DRAWN_OUTLINE:
        return sum(map(_polygon_area, mask))
    api = mask_api()
    rle = api.merge(api.frPyObjects(mask, *size)) if isinstance(mask, list) else _compress_rle(mask)
    return int(api.area(rle))


def _compress_rle(rle: dict) -> dict:
    return mask_api().frPyObjects(rle, *rle['size']) if isinstance(rle['counts'], list) else rle


def decode_rle(rle: dict) -> np.ndarray:
    """Return the pixels of a valid RLE, (H, W) of uint8."""
    return mask_api().decode(_compress_rle(rle))


def encode_mask(pixels: np.ndarray) -> dict:
    """Return the RLE of a mask (H, W), as JSON holds it."""
    rle = mask_api().encode(np.asfortranarray(pixels, np.uint8))
    return dict(size=list(map(int, rle['size'])), counts=rle['counts'].decode())


def mask_fields(pixels: np.ndarray) -> dict:
    """Return segmentation (an RLE), bbox and area of an object by its mask (H, W)."""
    rle = encode_mask(pixels)
    return dict(segmentation=rle, bbox=mask_to_box(rle), area=int(np.count_nonzero(pixels)))


def mask_api():
    """Return pycocotools.mask, which comes with mmdet and without which this module has to import."""
    from pycocotools import mask

    return mask
