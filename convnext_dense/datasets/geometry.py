"""Shapes that annotation programs draw, as polygons and RLEs of COCO."""

import base64
import io
import math
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image

from .check_images import MAX_PIXELS
from .coco_masks import encode_mask, mask_api
from .files import DataError

MIN_ELLIPSE_POINTS = 12


def rectangle(x: float, y: float, width: float, height: float, degrees: float = 0.0) -> list[float]:
    """Return the polygon of a rectangle that is rotated clockwise about its corner (x, y)."""
    corners = ((0, 0), (width, 0), (width, height), (0, height))
    return _rotate(corners, x, y, degrees)


def ellipse(x: float, y: float, radius_x: float, radius_y: float, degrees: float = 0.0) -> list[float]:
    """Return the polygon of an ellipse about (x, y), rotated clockwise, that is less than a pixel from it.

    Its points are those that LabelMe gives a circle.
    """
    radius = max(abs(radius_x), abs(radius_y))
    n = max(int(math.pi / math.acos(1 - 1 / radius)), MIN_ELLIPSE_POINTS) if radius > 1 else MIN_ELLIPSE_POINTS
    points = ((radius_x * math.sin(a), radius_y * math.cos(a)) for a in (2 * math.pi / n * i for i in range(n)))
    return _rotate(points, x, y, degrees)


def _rotate(points: Iterable[tuple[float, float]], x: float, y: float, degrees: float) -> list[float]:
    """Return x, y, x, y, ... of points about (x, y), rotated clockwise."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [v for dx, dy in points for v in (x + dx * cos - dy * sin, y + dx * sin + dy * cos)]


def decode_part(
    text: object, corner: object, size: tuple[int, int] | None, decompress: Callable[[bytes], bytes] = bytes
) -> dict:
    """Return the RLE of a mask that is stored as a PNG of a part of its image, in base64.

    Its pixels are those whose alpha is not 0 if the PNG has one, else those that are not black.

    Args:
        text: the base64.
        corner: x and y of the image at which the part begins.
        size: width and height of the image; None if they are not known.
        decompress: turns the bytes into the PNG.

    Raises:
        DataError: it is no such mask, or begins outside the image.
    """
    try:
        (x, y), (width, height) = map(round, corner), size
        with Image.open(io.BytesIO(decompress(base64.b64decode(text, validate=True))), formats=('PNG',)) as image:
            if max(image.width * image.height, width * height) <= MAX_PIXELS and 0 <= x < width and 0 <= y < height:
                has_alpha = image.mode in ('RGBA', 'LA') or 'transparency' in image.info
                part = np.asarray(image.convert('RGBA').getchannel('A') if has_alpha else image.convert('L')) > 0
                pixels = np.zeros((height, width), np.uint8, order='F')
                target = pixels[y : y + part.shape[0], x : x + part.shape[1]]
                target[:] = part[: target.shape[0], : target.shape[1]]
                return encode_mask(pixels)
    except Exception as error:  # a broken file can fail in any way
        raise DataError('mask-format-unknown') from error
    raise DataError('mask-format-unknown')


def draw_masks(masks: Iterable[list | dict], size: tuple[int, int]) -> np.ndarray:
    """Return the pixels in any of some lists of polygons and RLEs, (H, W), of an image of a size (width, height)."""
    api, (width, height) = mask_api(), size
    rles = [rle for m in masks for rle in (api.frPyObjects(m, height, width) if isinstance(m, list) else [m])]
    return api.decode(api.merge(rles))
