"""Tiled prediction gives the same result as prediction of the whole image, for any tiles."""

from functools import cache

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from convnext_dense.datasets.tiles import tile_starts
from convnext_dense.inference import tiling
from convnext_dense.inference.options import PredictOptions
from convnext_dense.inference.row_reader import RowReader
from convnext_dense.inference.tiling import blend_weights, predict_tiled
from helpers.fake_models import COLORS, FakePredictor, detect_boxes, detect_colors, segment_colors


@pytest.mark.parametrize('length', [1, 63, 64, 65, 100, 128, 129, 1000])
@pytest.mark.parametrize('overlap', [0, 0.1, 0.25, 0.5, 0.7, 0.99])
def test_tiles_cover_a_side_with_the_requested_overlap(length, overlap):
    starts = tile_starts(length, 64, overlap)
    assert starts[0] == 0 and starts[-1] == max(length - 64, 0) and starts == sorted(set(starts))
    for a, b in zip(starts, starts[1:]):
        assert a + 64 - b >= round(64 * overlap)
    if len(starts) > 1:  # no more than needed
        assert (len(starts) - 2) * max(64 - round(64 * overlap), 1) + 64 < length
    weights = blend_weights(starts, 64, length)
    total = np.zeros(length)
    for start, w in zip(starts, weights):
        assert (w > 0).all()
        total[start : start + len(w)] += w
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_blend_weights_fall_at_inner_tile_edges_only():
    weights0, weights1 = blend_weights([0, 6], 10, 16)
    np.testing.assert_allclose(weights0, [1] * 6 + [0.875, 0.625, 0.375, 0.125])
    np.testing.assert_allclose(weights1, weights0[::-1])


@cache
def draw_shapes(seed, size=(1100, 1500), n=150, max_size=180):
    """Separate rectangles and discs in the classes' colors; the first one is larger than most tiles."""
    rng = np.random.RandomState(seed)
    image, is_free = np.full((*size, 3), 128, np.uint8), np.ones(size, bool)
    for i in range(n):
        w, h = rng.randint(12, max_size, 2) if i else (size[1] - 60, size[0] // 3)
        left, top = (rng.randint(2, max(size[k] - s - 2, 3)) for k, s in ((1, w), (0, h)))
        y, x = np.mgrid[:h, :w]
        disc = np.square((x + 0.5) / w - 0.5) + np.square((y + 0.5) / h - 0.5) < 0.25
        surroundings = is_free[top - 2 : top + h + 2, left - 2 : left + w + 2]
        if surroundings.all():
            image[top : top + h, left : left + w][disc if i % 3 == 2 else ...] = COLORS[rng.randint(3)]
            surroundings[:] = False
    return image


def detection_rows(sample):
    instances = sample.pred_instances
    masks = instances.get('masks', [None] * len(instances))
    masks = [m if isinstance(m, dict) else coco_mask.encode(np.asfortranarray(m, np.uint8)) for m in masks]
    rows = zip(instances.labels.tolist(), instances.bboxes.tolist(), [mask['counts'] for mask in masks])
    return sorted(rows)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('tile, overlap', [(512, 0.25), (1024, 0.25), (512, 0), (300, 0.6), (5000, 0.25)])
def test_tiled_detections_equal_untiled_ones(seed, tile, overlap):
    image = draw_shapes(seed)
    predictor = FakePredictor('detection', detect_colors)
    expected = detection_rows(detect_colors(image))
    assert len(expected) > 25
    sample = predict_tiled(predictor, image, PredictOptions(tile=tile, overlap=overlap, batch_size=3))
    assert detection_rows(sample) == expected
    assert sample.ori_shape == (1100, 1500)
    assert max(max(size) for size in predictor.sizes) == min(tile, 1500)


@pytest.mark.parametrize('tile', [512, 1024])
def test_tiled_detections_without_masks(tile):
    image = draw_shapes(7)
    sample = predict_tiled(FakePredictor('detection', detect_boxes), image, PredictOptions(tile=tile))
    expected = detect_boxes(image).pred_instances
    rows = [sorted(zip(s.labels.tolist(), s.bboxes.tolist())) for s in (sample.pred_instances, expected)]
    assert rows[0] == rows[1] and 'masks' not in sample.pred_instances


def test_image_without_objects():
    image = np.full((700, 900, 3), 128, np.uint8)
    sample = predict_tiled(FakePredictor('detection', detect_colors), image, PredictOptions(tile=512))
    assert len(sample.pred_instances) == 0 and sample.pred_instances.masks == []


@pytest.fixture
def image():
    rng = np.random.RandomState(0)
    return rng.randint(0, 256, (150, 210, 3)).astype(np.uint8)


@pytest.mark.parametrize('tile, overlap', [(64, 0.25), (64, 0), (100, 0.7), (64, 0.9), (150, 0.25), (1000, 0.25)])
@pytest.mark.parametrize('batch_size', [1, 4])
def test_tiled_segmentation_equals_untiled_segmentation(image, tile, overlap, batch_size):
    predictor = FakePredictor('segmentation', segment_colors)
    options = PredictOptions(tile=tile, overlap=overlap, batch_size=batch_size)
    sample = predict_tiled(predictor, image, options, with_logits=True)
    expected = segment_colors(image)
    torch.testing.assert_close(sample.seg_logits.data, expected.seg_logits.data, atol=1e-4, rtol=1e-5)
    assert sample.pred_sem_seg.data.dtype == torch.uint8
    differ = sample.pred_sem_seg.data != expected.pred_sem_seg.data
    top2 = expected.seg_logits.data.topk(2, 0).values
    assert not (differ & (top2[0] - top2[1] > 1e-3)).any()  # except for ties


def test_logits_are_blended_as_a_weighted_mean(image):
    """Reference: a weighted sum over the whole image; each tile has different logits."""

    def segment_with_offset(tile):
        sample = segment_colors(tile)
        sample.seg_logits.data += float(tile[0, 0, 0]) * torch.arange(4)[:, None, None]
        return sample

    options = PredictOptions(tile=64, overlap=0.4)
    sample = predict_tiled(FakePredictor('segmentation', segment_with_offset), image, options, with_logits=True)
    tops, lefts = tile_starts(150, 64, 0.4), tile_starts(210, 64, 0.4)
    weights = blend_weights(tops, 64, 150), blend_weights(lefts, 64, 210)
    expected = np.zeros((4, 150, 210))
    for top, wy in zip(tops, weights[0]):
        for left, wx in zip(lefts, weights[1]):
            area = np.s_[:, top : top + 64, left : left + 64]
            expected[area] += segment_with_offset(image[area[1:]]).seg_logits.data.numpy() * wy[:, None] * wx
    np.testing.assert_allclose(sample.seg_logits.data.numpy(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('limit', [1, 30_000])
def test_logits_beyond_the_memory_limit_are_kept_in_a_file(image, limit, monkeypatch):
    options = PredictOptions(tile=64, overlap=0.4)
    expected = predict_tiled(FakePredictor('segmentation', segment_colors), image, options, with_logits=True)
    carry_class = tiling._Carry
    carries = []
    monkeypatch.setattr(tiling, '_Carry', lambda: carries.append(carry_class(limit)) or carries[-1])
    sample = predict_tiled(FakePredictor('segmentation', segment_colors), image, options, with_logits=True)
    assert (sample.seg_logits.data == expected.seg_logits.data).all()
    assert carries[0].file._rolled and not carries[0].shapes


def test_binary_segmentation_uses_the_heads_threshold(image):
    def one_class(tile):
        sample = segment_colors(tile)
        sample.seg_logits.data = (sample.seg_logits.data[1:2] / 32 - 2).sigmoid()  # as mmseg's postprocess_result
        return sample

    predictor = FakePredictor('segmentation', one_class)
    sample = predict_tiled(predictor, image, PredictOptions(tile=64))
    expected = one_class(image).seg_logits.data > 0.3
    assert (sample.pred_sem_seg.data.bool() == expected).all() and expected.any() and not expected.all()


def test_only_rows_of_one_row_of_tiles_are_read(image):
    class RecordingReader(RowReader):
        def read(self, top, bottom):
            self.calls.append((top, bottom))
            return super().read(top, bottom)

    reader = RecordingReader(image)
    reader.calls = []
    predictor = FakePredictor('segmentation', segment_colors)
    for _ in tiling.iter_logits(predictor, reader, PredictOptions(tile=64)):
        pass
    tops = tile_starts(150, 64, 0.25)
    assert reader.calls == [(top, top + 64) for top in tops]
