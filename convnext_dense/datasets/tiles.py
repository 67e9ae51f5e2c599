"""Cutting a data set into tiles as predictions are made in tiles: boxes, polygons and RLE masks clipped."""

import argparse
from collections.abc import Iterator, Sequence

from .coco_masks import decode_rle, encode_mask, mask_area, mask_to_box

DEFAULT_OVERLAP = 0.25  # fraction of a tile's side that it has in common with the next
MIN_VISIBLE = 0.1  # fraction of an object's area below which its part in a tile is left out
Window = tuple[int, int, int, int]  # left, top, right and bottom, in pixels


def add_tile_arguments(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add --tile and --overlap; `purpose` is what is done in tiles, as the help says it."""
    parser.add_argument('--tile', type=int, metavar='SIZE', help=f'{purpose} in square tiles of this side, in pixels')
    parser.add_argument(
        '--overlap',
        type=float,
        default=DEFAULT_OVERLAP,
        metavar='FRACTION',
        help='with --tile: fraction of a tile that it has in common with the next one (default: %(default)s)',
    )


def tile_starts(length: int, tile: int, overlap: float) -> list[int]:
    """Return where tiles start along one side of an image: as few as possible, at even distances.

    Each has at least the fraction `overlap` in common with the next one. A side that is not longer than a tile has one.
    """
    step = max(tile - round(tile * overlap), 1)
    n = max(-(-(length - tile) // step), 0) + 1
    return [round(i * max(length - tile, 0) / max(n - 1, 1)) for i in range(n)]


def tile_windows(size: tuple[int, int], tile: int, overlap: float) -> list[Window]:
    """Return the tiles of an image (H, W), row by row."""
    height, width = size
    return [
        (left, top, min(left + tile, width), min(top + tile, height))
        for top in tile_starts(height, tile, overlap)
        for left in tile_starts(width, tile, overlap)
    ]


def clip_annotations(
    annotations: Sequence[dict], window: Window, size: tuple[int, int], min_visible: float = MIN_VISIBLE
) -> Iterator[dict]:
    """Iterate over the parts of objects that lie in a tile, in its pixels.

    Args:
        annotations: Valid annotations of COCO; crowds stay crowds.
        window: Window of the tile.
        size: Height and width of the image.
        min_visible: Fraction of an object's area below which its part is left out; crowds are kept.
    """
    left, top, right, bottom = window
    for annotation in annotations:
        x, y, w, h = annotation['bbox']
        x1, y1, x2, y2 = max(x, left), max(y, top), min(x + w, right), min(y + h, bottom)
        if x1 >= x2 or y1 >= y2:
            continue
        part = {**annotation, 'bbox': [x1 - left, y1 - top, x2 - x1, y2 - y1]}
        if annotation.get('segmentation'):
            part['segmentation'] = mask = _clip_mask(annotation['segmentation'], window)
            if not mask:
                continue
            part['bbox'] = mask_to_box(mask)
        part['area'] = _area(part, (bottom - top, right - left))
        min_area = 0 if annotation.get('iscrowd') else min_visible * _area(annotation, size)
        if part['area'] > 0 and part['area'] >= min_area:
            yield part


def _area(annotation: dict, size: tuple[int, int]) -> float:
    mask = annotation.get('segmentation')
    return float(mask_area(mask, size)) if mask else float(annotation['bbox'][2] * annotation['bbox'][3])


def _clip_mask(mask: dict | list, window: Window) -> dict | list | None:
    """Return the part of an RLE or of polygons that lies in a tile; None or an empty list where there is none."""
    left, top, right, bottom = window
    if isinstance(mask, dict):
        part = decode_rle(mask)[top:bottom, left:right]
        return encode_mask(part) if part.any() else None
    polygons = (clip_polygon(polygon, window) for polygon in mask)
    polygons = (p for p in polygons if len(p) >= 6 and mask_area([p], (0, 0)))  # the others have nothing in the tile
    return [[v - (top if i % 2 else left) for i, v in enumerate(p)] for p in polygons]


def clip_polygon(polygon: Sequence[float], window: Window) -> list[float]:
    """Return the part of a polygon (x1, y1, x2, y2, ...) in a window, by Sutherland and Hodgman.

    A polygon that falls into several parts stays one, whose parts are joined along the edge of the window.
    """
    points = list(zip(polygon[::2], polygon[1::2]))
    for axis, limit, sign in ((0, window[0], 1), (1, window[1], 1), (0, window[2], -1), (1, window[3], -1)):
        points = list(_clip_at(points, axis, limit, sign))
    return [float(v) for point in points for v in point]


def _clip_at(points: list[tuple], axis: int, limit: float, sign: int) -> Iterator[tuple]:
    """The part of a polygon on one side of a line: from `limit` on along an axis (sign 1), or up to it (-1)."""
    for a, b in zip([points[-1], *points], points) if points else ():
        distances = (sign * (a[axis] - limit), sign * (b[axis] - limit))
        if (distances[0] < 0) != (distances[1] < 0):
            t = distances[0] / (distances[0] - distances[1])
            crossing = [a[i] + t * (b[i] - a[i]) for i in range(2)]
            crossing[axis] = limit
            yield tuple(crossing)
        if distances[1] >= 0:
            yield b
