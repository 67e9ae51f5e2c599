"""Instance masks that are stored only within the bounding box of their object."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from ..datasets.coco_masks import decode_rle_runs


class CroppedMask(NamedTuple):
    """The part of an instance mask within the bounding box of its object, as COCO RLE.

    Its upper left pixel is at (left, top) in the image.
    """

    left: int
    top: int
    rle: dict

    @classmethod
    def from_bitmap(cls, bitmap: np.ndarray, left: int = 0, top: int = 0) -> 'CroppedMask':
        """Crop a mask (H, W) whose upper left pixel is at (left, top) in the image."""
        rows, columns = (np.flatnonzero(bitmap.any(axis)) for axis in (1, 0))
        if len(rows):
            bitmap = bitmap[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            left, top = left + int(columns[0]), top + int(rows[0])
        else:
            bitmap = np.zeros((1, 1), np.uint8)
        return cls(left, top, coco_mask.encode(np.asfortranarray(bitmap, np.uint8)))

    @property
    def window(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the part in the image."""
        height, width = self.rle['size']
        return self.left, self.top, self.left + width, self.top + height

    def bitmap(self, window: Sequence[int] | None = None) -> np.ndarray:
        """Return the mask in a window (left, top, right, bottom) of the image, by default its own: (h, w) of uint8."""
        bits = coco_mask.decode(self.rle)
        if window is None:
            return bits
        x1, y1, x2, y2 = map(int, window)
        result = np.zeros((y2 - y1, x2 - x1), np.uint8)
        left, top, right, bottom = self.window
        left, top, right, bottom = max(left, x1), max(top, y1), min(right, x2), min(bottom, y2)
        if left < right and top < bottom:
            inside = bits[top - self.top : bottom - self.top, left - self.left : right - self.left]
            result[top - y1 : bottom - y1, left - x1 : right - x1] = inside
        return result

    def in_image(self, size: tuple[int, int]) -> dict:
        """Return the mask as COCO RLE in an image of size (H, W), without allocating that image."""
        height, width = size
        bits = np.pad(self.bitmap().T, ((0, 0), (1, 1))).astype(np.int8)  # columns first, as RLE counts
        change = np.diff(bits, axis=1)
        columns, rows = np.nonzero(change > 0)
        starts = (self.left + columns) * height + self.top + rows
        columns, rows = np.nonzero(change < 0)
        ends = (self.left + columns) * height + self.top + rows
        is_new = np.append(True, starts[1:] != ends[:-1])[: len(starts)]  # a run may continue in the next column
        starts, ends = starts[is_new], ends[np.append(is_new[1:], True)[: len(ends)]]
        edges = np.stack([starts, ends], 1).ravel()
        counts = np.diff(np.concatenate([[0], edges, [height * width]])).tolist()
        counts = counts[:-1] if counts[-1] == 0 else counts  # pycocotools has no empty last run either
        return coco_mask.frPyObjects(dict(size=[height, width], counts=counts), height, width)


def decode_window(rle: dict, window: Sequence[int]) -> np.ndarray:
    """Decode a window (left, top, right, bottom) of a COCO RLE: (h, w) of uint8.

    No more than the columns of the window are allocated.
    """
    (height, _), (left, top, right, bottom) = rle['size'], window
    counts = rle['counts']
    counts = decode_rle_runs(counts.decode() if isinstance(counts, bytes) else counts)
    ends = np.cumsum(counts)
    runs = np.stack([ends[:-1:2], ends[1::2]], 1) if len(ends) > 1 else np.zeros((0, 2), np.int64)
    start_pixel, end_pixel = left * height, right * height  # pixels are counted by columns
    columns = np.zeros(end_pixel - start_pixel, np.uint8)
    is_inside = (runs[:, 1] > start_pixel) & (runs[:, 0] < end_pixel)
    for start, end in np.clip(runs[is_inside], start_pixel, end_pixel) - start_pixel:
        columns[start:end] = 1
    return np.ascontiguousarray(columns.reshape(right - left, height)[:, top:bottom].T)


def unite(masks: Sequence[CroppedMask]) -> CroppedMask:
    """Return the union of masks."""
    return combine(masks, np.ones(len(masks)), 1)


def combine(masks: Sequence[CroppedMask], weights: Sequence[float], threshold: float) -> CroppedMask:
    """Return the mask of the pixels at which the weights of the masks add up to at least a threshold."""
    windows = np.array([mask.window for mask in masks])
    window = (*windows[:, :2].min(0), *windows[:, 2:].max(0))
    total = sum(weight * mask.bitmap(window) for mask, weight in zip(masks, weights))
    return CroppedMask.from_bitmap(total >= threshold - 1e-6, int(window[0]), int(window[1]))


def overlap(a: CroppedMask, b: CroppedMask, window: Sequence[int]) -> float:
    """Return the IoU of two masks within a window (left, top, right, bottom) of the image."""
    bits = [mask.bitmap(window).astype(bool) for mask in (a, b)]
    union = np.count_nonzero(bits[0] | bits[1])
    return np.count_nonzero(bits[0] & bits[1]) / union if union else 0.0
