"""Predict images in overlapping tiles; memory does not grow with the number of tiles."""

import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from mmengine.structures import BaseDataElement, PixelData

from ..datasets.tiles import tile_starts
from .merging import detector_limits, merge_tiles, to_tile_detections
from .options import PredictOptions
from .row_reader import RowReader, open_rows

MAX_CARRY_BYTES = 128 << 20  # logits that wait in memory for the tiles below; more go to a temporary file


def blend_weights(starts: Sequence[int], tile: int, length: int) -> list[np.ndarray]:
    """Return the blending weights of each tile along one side, which ramp down in overlaps and add up to 1.

    Tiles of a side start as `tile_starts` says; `length` is that of the image.
    """
    sides = [min(tile, length - start) for start in starts]
    ramp = max([1, *(start + side - next_start for (start, next_start), side in zip(pairwise(starts), sides))])
    weights, total = [], np.zeros(length)
    for start, side in zip(starts, sides):
        place = np.arange(side) + 0.5
        low = place if start > 0 else np.full(side, ramp)
        high = side - place if start + side < length else np.full(side, ramp)
        weights.append(np.minimum(np.minimum(low, high) / ramp, 1))
        total[start : start + side] += weights[-1]
    return [(w / total[start : start + len(w)]).astype(np.float32) for w, start in zip(weights, starts)]


@torch.inference_mode()
def predict_tiled(
    predictor, image: np.ndarray | str | Path, options: PredictOptions, with_logits: bool = False
) -> BaseDataElement:
    """Predict an image in tiles.

    Args:
        predictor: A `Predictor`.
        image: (H, W, C) in the form of `read_image`, or the path of a file.
        options: Options of the prediction, with `tile` and `overlap`.
        with_logits: Whether segmentors also return `seg_logits` (C, H, W), whose memory grows with the image.

    Returns:
        DetDataSample with the merged detections and masks as COCO RLEs, or SegDataSample with `pred_sem_seg` of uint8
        (int32 for more than 255 classes).

    Raises:
        UnreadableImageError: If the file cannot be read.
    """
    reader = open_rows(image, predictor.color_type)
    try:
        if predictor.task == 'detection':
            return _detect(predictor, reader, options)
        return _segment(predictor, reader, options, with_logits)
    finally:
        reader.close()


def _iter_tiles(predictor, reader: RowReader, options: PredictOptions) -> Iterator[tuple[tuple, BaseDataElement]]:
    """Iterate over the tiles row by row: (left, top, right, bottom), and the prediction in pixels of the tile."""
    (height, width), side = reader.size, options.tile
    lefts = tile_starts(width, side, options.overlap)
    for top in tile_starts(height, side, options.overlap):
        bottom = min(top + side, height)
        rows = reader.read(top, bottom)
        windows = iter([(left, top, min(left + side, width), bottom) for left in lefts])
        while batch := list(islice(windows, options.batch_size)):
            tiles = [np.ascontiguousarray(rows[:, left:right]) for left, _, right, _ in batch]
            if options.multiscale:
                samples = (predictor.predict_views(tile, with_logits=True) for tile in tiles)
            else:
                samples = predictor.forward([predictor.prepare(tile) for tile in tiles], options.batch_size)
            yield from zip(batch, samples)


def _detect(predictor, reader: RowReader, options: PredictOptions) -> BaseDataElement:
    from mmdet.structures import DetDataSample

    tiles = [
        to_tile_detections(sample.pred_instances, window, reader.size)
        for window, sample in _iter_tiles(predictor, reader, options)
    ]
    merged = merge_tiles(tiles, detector_limits(predictor.model)[0])
    if 'masks' in merged:
        merged.masks = [mask.in_image(reader.size) for mask in merged.masks]
    sample = DetDataSample(metainfo=dict(img_id=0, ori_shape=reader.size, img_shape=reader.size))
    sample.pred_instances = merged
    return sample


def _segment(predictor, reader: RowReader, options: PredictOptions, with_logits: bool) -> BaseDataElement:
    from mmseg.structures import SegDataSample

    labels, logits = None, None
    for top, left, block in iter_logits(predictor, reader, options):
        if labels is None:
            dtype = torch.uint8 if len(block) <= 255 else torch.int32  # 255 is the ignore_index
            labels = torch.empty((1, *reader.size), dtype=dtype)
            logits = torch.empty((len(block), *reader.size)) if with_logits else None
        area = (slice(None), slice(top, top + block.shape[1]), slice(left, left + block.shape[2]))
        # A single class has probabilities, as mmseg's `seg_logits` then are.
        is_one = len(block) == 1
        labels[area] = block > predictor.model.decode_head.threshold if is_one else block.argmax(0, keepdim=True)
        if with_logits:
            logits[area] = block
    sample = SegDataSample(metainfo=dict(ori_shape=reader.size, img_shape=reader.size))
    sample.pred_sem_seg = PixelData(data=labels)
    if with_logits:
        sample.seg_logits = PixelData(data=logits)
    return sample


def iter_logits(predictor, reader: RowReader, options: PredictOptions) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Iterate over the blended logits of an image by areas, which cover each pixel once.

    Yields:
        Top, left and logits (C, h, w) of an area; with `multiscale`, probabilities.
    """
    (height, width), side = reader.size, options.tile
    tops, lefts = (tile_starts(length, side, options.overlap) for length in (height, width))
    weights_y, weights_x = (blend_weights(s, side, n) for s, n in ((tops, height), (lefts, width)))
    carry = _Carry()
    samples = _iter_tiles(predictor, reader, options)
    for i, top in enumerate(tops):
        next_top = tops[i + 1] if i + 1 < len(tops) else height
        from_left = None
        for j, left in enumerate(lefts):
            _, sample = next(samples)
            block = _weigh(sample.seg_logits.data.float(), weights_y[i], weights_x[j])
            del sample
            if from_left is not None:
                block[..., : from_left.shape[2]] += from_left
            n_done = (lefts[j + 1] if j + 1 < len(lefts) else width) - left
            from_left = block[..., n_done:].clone()
            block = block[..., :n_done]
            if i > 0:
                above = carry.pop(j).to(block.device)
                block[:, : above.shape[1]] += above
            if i + 1 < len(tops):
                carry.put(j, block[:, next_top - top :])
            yield top, left, block[:, : next_top - top]


def _weigh(logits: torch.Tensor, rows: np.ndarray, columns: np.ndarray) -> torch.Tensor:
    if rows.min() == 1 and columns.min() == 1:  # nothing overlaps
        return logits
    rows, columns = (torch.from_numpy(w).to(logits.device) for w in (rows, columns))
    return logits * rows[:, None] * columns


class _Carry:
    """Logits by tile column that wait for the tiles below: in memory up to a limit, then in a temporary file."""

    def __init__(self, limit: int = MAX_CARRY_BYTES):
        self.file = tempfile.SpooledTemporaryFile(limit)  # noqa: SIM115
        self.slots: dict[int, tuple[int, int]] = {}
        self.shapes: dict[int, torch.Size] = {}

    def put(self, key: int, logits: torch.Tensor) -> None:
        n_bytes = logits.numel() * 4
        place, size = self.slots.get(key, (0, 0))
        if n_bytes > size:
            self.file.seek(0, 2)
            place = self.file.tell()
            self.slots[key] = (place, n_bytes)
        self.file.seek(place)
        self.file.write(logits.cpu().contiguous().numpy())
        self.shapes[key] = logits.shape

    def pop(self, key: int) -> torch.Tensor:
        shape = self.shapes.pop(key)
        self.file.seek(self.slots[key][0])
        return torch.frombuffer(bytearray(self.file.read(shape.numel() * 4)), dtype=torch.float32).reshape(shape)
