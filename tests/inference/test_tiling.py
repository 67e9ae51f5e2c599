"""Images in tiles: the same as in one piece, whatever the tiles."""

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
@pytest.mark.parametrize('share', [0, 0.1, 0.25, 0.5, 0.7, 0.99])
def test_tiles_cover_a_side_with_the_overlap_that_is_asked_for(length, share):
    starts = tile_starts(length, 64, share)
    assert starts[0] == 0 and starts[-1] == max(length - 64, 0) and starts == sorted(set(starts))
    for a, b in zip(starts, starts[1:]):
        assert a + 64 - b >= round(64 * share)
    if len(starts) > 1:  # no more than needed
        assert (len(starts) - 2) * max(64 - round(64 * share), 1) + 64 < length
    weights = blend_weights(starts, 64, length)
    total = np.zeros(length)
    for start, w in zip(starts, weights):
        assert (w > 0).all()
        total[start : start + len(w)] += w
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_weights_fall_to_the_edges_of_a_tile_but_not_of_the_image():
    first, last = blend_weights([0, 6], 10, 16)
    np.testing.assert_allclose(first, [1] * 6 + [0.875, 0.625, 0.375, 0.125])
    np.testing.assert_allclose(last, first[::-1])


@cache
def draw(seed, size=(1100, 1500), n=150, largest=180):
    """Rectangles and discs of the classes' colors, apart from each other; the first is larger than most tiles."""
    rng = np.random.RandomState(seed)
    image, free = np.full((*size, 3), 128, np.uint8), np.ones(size, bool)
    for i in range(n):
        w, h = rng.randint(12, largest, 2) if i else (size[1] - 60, size[0] // 3)
        left, top = (rng.randint(2, max(size[k] - s - 2, 3)) for k, s in ((1, w), (0, h)))
        y, x = np.mgrid[:h, :w]
        disc = np.square((x + 0.5) / w - 0.5) + np.square((y + 0.5) / h - 0.5) < 0.25
        near = free[top - 2 : top + h + 2, left - 2 : left + w + 2]
        if near.all():
            image[top : top + h, left : left + w][disc if i % 3 == 2 else ...] = COLORS[rng.randint(3)]
            near[:] = False
    return image


def found(sample):
    instances = sample.pred_instances
    masks = instances.get('masks', [None] * len(instances))
    masks = [m if isinstance(m, dict) else coco_mask.encode(np.asfortranarray(m, np.uint8)) for m in masks]
    rows = zip(instances.labels.tolist(), instances.bboxes.tolist(), [mask['counts'] for mask in masks])
    return sorted(rows)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('tile, share', [(512, 0.25), (1024, 0.25), (512, 0), (300, 0.6), (5000, 0.25)])
def test_a_detector_finds_every_object_once_and_whole(seed, tile, share):
    image = draw(seed)
    predictor = FakePredictor('detection', detect_colors)
    expected = found(detect_colors(image))
    assert len(expected) > 25
    sample = predict_tiled(predictor, image, PredictOptions(tile=tile, overlap=share, batch_size=3))
    assert found(sample) == expected
    assert sample.ori_shape == (1100, 1500)
    assert max(max(size) for size in predictor.sizes) == min(tile, 1500)


@pytest.mark.parametrize('tile', [512, 1024])
def test_a_detector_of_boxes(tile):
    image = draw(7)
    sample = predict_tiled(FakePredictor('detection', detect_boxes), image, PredictOptions(tile=tile))
    expected = detect_boxes(image).pred_instances
    rows = [sorted(zip(s.labels.tolist(), s.bboxes.tolist())) for s in (sample.pred_instances, expected)]
    assert rows[0] == rows[1] and 'masks' not in sample.pred_instances


def test_an_image_without_objects():
    image = np.full((700, 900, 3), 128, np.uint8)
    sample = predict_tiled(FakePredictor('detection', detect_colors), image, PredictOptions(tile=512))
    assert len(sample.pred_instances) == 0 and sample.pred_instances.masks == []


@pytest.fixture
def image():
    rng = np.random.RandomState(0)
    return rng.randint(0, 256, (150, 210, 3)).astype(np.uint8)


@pytest.mark.parametrize('tile, share', [(64, 0.25), (64, 0), (100, 0.7), (64, 0.9), (150, 0.25), (1000, 0.25)])
@pytest.mark.parametrize('batch_size', [1, 4])
def test_a_segmentor_of_single_pixels_sees_no_tiles(image, tile, share, batch_size):
    predictor = FakePredictor('segmentation', segment_colors)
    options = PredictOptions(tile=tile, overlap=share, batch_size=batch_size)
    sample = predict_tiled(predictor, image, options, with_logits=True)
    expected = segment_colors(image)
    torch.testing.assert_close(sample.seg_logits.data, expected.seg_logits.data, atol=1e-4, rtol=1e-5)
    assert sample.pred_sem_seg.data.dtype == torch.uint8
    differ = sample.pred_sem_seg.data != expected.pred_sem_seg.data
    top2 = expected.seg_logits.data.topk(2, 0).values
    assert not (differ & (top2[0] - top2[1] > 1e-3)).any()  # but for ties


def test_logits_are_blended_as_a_weighted_mean(image):
    """Against a sum over whole images: each tile has logits of its own."""

    def numbered(tile):
        sample = segment_colors(tile)
        sample.seg_logits.data += float(tile[0, 0, 0]) * torch.arange(4)[:, None, None]
        return sample

    options = PredictOptions(tile=64, overlap=0.4)
    sample = predict_tiled(FakePredictor('segmentation', numbered), image, options, with_logits=True)
    tops, lefts = tile_starts(150, 64, 0.4), tile_starts(210, 64, 0.4)
    weights = blend_weights(tops, 64, 150), blend_weights(lefts, 64, 210)
    expected = np.zeros((4, 150, 210))
    for top, wy in zip(tops, weights[0]):
        for left, wx in zip(lefts, weights[1]):
            area = np.s_[:, top : top + 64, left : left + 64]
            expected[area] += numbered(image[area[1:]]).seg_logits.data.numpy() * wy[:, None] * wx
    np.testing.assert_allclose(sample.seg_logits.data.numpy(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('limit', [0, 30_000])
def test_what_has_no_room_in_memory_waits_in_a_file(image, limit, monkeypatch):
    options = PredictOptions(tile=64, overlap=0.4)
    expected = predict_tiled(FakePredictor('segmentation', segment_colors), image, options, with_logits=True)
    make = tiling._Carry
    carries = []
    monkeypatch.setattr(tiling, '_Carry', lambda: carries.append(make(limit)) or carries[-1])
    sample = predict_tiled(FakePredictor('segmentation', segment_colors), image, options, with_logits=True)
    assert (sample.seg_logits.data == expected.seg_logits.data).all()
    assert carries[0].file is not None and not carries[0].in_memory and not carries[0].in_file


def test_one_class_is_decided_by_the_threshold_of_the_head(image):
    def one_class(tile):
        sample = segment_colors(tile)
        sample.seg_logits.data = (sample.seg_logits.data[1:2] / 32 - 2).sigmoid()  # as mmseg's postprocess_result
        return sample

    predictor = FakePredictor('segmentation', one_class)
    sample = predict_tiled(predictor, image, PredictOptions(tile=64))
    expected = one_class(image).seg_logits.data > 0.3
    assert (sample.pred_sem_seg.data.bool() == expected).all() and expected.any() and not expected.all()


def test_only_the_rows_of_one_row_of_tiles_are_read(image):
    class Recorded(RowReader):
        def read(self, top, bottom):
            self.calls.append((top, bottom))
            return super().read(top, bottom)

    reader = Recorded(image)
    reader.calls = []
    predictor = FakePredictor('segmentation', segment_colors)
    for _ in tiling.iter_logits(predictor, reader, PredictOptions(tile=64)):
        pass
    tops = tile_starts(150, 64, 0.25)
    assert reader.calls == [(top, top + 64) for top in tops]
