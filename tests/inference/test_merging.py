"""Merging the detections of views and of tiles."""

import numpy as np
import pytest
import torch
from mmdet.models.test_time_augs import DetTTAModel
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask

from convnext_dense.inference.cropped_mask import CroppedMask, combine, overlap, unite
from convnext_dense.inference.merging import merge_detections, merge_tiles, to_tile_detections

SIZE = (60, 100)


def box_mask(box, size=SIZE):
    mask = np.zeros(size, bool)
    x1, y1, x2, y2 = (round(v) for v in box)
    mask[max(y1, 0) : y2, max(x1, 0) : x2] = True
    return mask


def make_sample(*rows, size=SIZE, masks=True):
    """A sample of (label, score, box)."""
    boxes = [row[2] for row in rows]
    sample = DetDataSample(metainfo=dict(ori_shape=size))
    sample.pred_instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor([row[1] for row in rows], dtype=torch.float32),
        labels=torch.tensor([row[0] for row in rows], dtype=torch.long),
    )
    if masks:
        bitmaps = [box_mask(box, size) for box in boxes]
        sample.pred_instances.masks = torch.from_numpy(np.stack(bitmaps) if bitmaps else np.zeros((0, *size), bool))
    return sample


def to_rows(instances):
    return sorted(
        (int(c), round(float(s), 4), [float(v) for v in b])
        for c, s, b in zip(instances.labels, instances.scores, instances.bboxes)
    )


@pytest.mark.parametrize('seed', range(20))
def test_cropped_mask_equals_the_bitmap(seed):
    rng = np.random.RandomState(seed)
    height, width = rng.randint(1, 12, 2)
    bitmap = rng.rand(height, width) < rng.choice([0, 0.2, 0.6, 1])
    mask = CroppedMask.from_bitmap(bitmap)
    assert (mask.bitmap((0, 0, width, height)) == bitmap).all()
    expected = coco_mask.encode(np.asfortranarray(bitmap, np.uint8))
    assert mask.in_image((height, width)) == expected  # identical RLE, with full columns
    size = (height + 5, width + 7)
    moved = CroppedMask.from_bitmap(bitmap, 4, 3)
    full = np.zeros(size, np.uint8)
    full[3 : 3 + height, 4 : 4 + width] = bitmap
    assert (coco_mask.decode(moved.in_image(size)) == full).all()
    assert (moved.bitmap((2, 1, 9, 8)) == np.pad(full, ((0, 9), (0, 9)))[1:8, 2:9]).all()


def test_mask_union_iou_and_vote():
    rng = np.random.RandomState(0)
    bitmaps = rng.rand(3, 20, 30) < 0.4
    masks = [CroppedMask.from_bitmap(bitmap) for bitmap in bitmaps]
    image_window = (0, 0, 30, 20)
    assert (unite(masks).bitmap(image_window) == bitmaps.any(0)).all()
    assert (combine(masks, [1, 1, 1], 1.5).bitmap(image_window) == (bitmaps.sum(0) >= 2)).all()
    a, b = bitmaps[0, 5:15, 10:20], bitmaps[1, 5:15, 10:20]
    assert overlap(*masks[:2], (10, 5, 20, 15)) == pytest.approx((a & b).sum() / (a | b).sum())
    assert overlap(masks[0], CroppedMask.from_bitmap(np.zeros((3, 3))), (0, 0, 1, 1)) in (0, 1)


@pytest.mark.parametrize('seed', range(3))
def test_merged_boxes_equal_mmdets_tta_model(seed):
    rng = np.random.RandomState(seed)
    views = []
    for _ in range(4):
        corner = rng.uniform(0, 50, (15, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(5, 40, (15, 2))], 1)
        views.append(make_sample(*[(rng.randint(2), rng.rand(), list(box)) for box in boxes], masks=False))
    model = DetTTAModel.__new__(DetTTAModel)
    torch.nn.Module.__init__(model)
    model.tta_cfg = __import__('mmengine').ConfigDict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=25)
    for view in views:
        view.set_metainfo(dict(flip=False, flip_direction=None, img_shape=SIZE))
    expected = model._merge_single_sample([view.clone() for view in views])
    merged = merge_detections(iter(views), max_per_image=25)
    assert len(merged.pred_instances) == 25
    assert to_rows(merged.pred_instances) == to_rows(expected.pred_instances)


def test_equal_views_merge_to_one():
    rows = [(0, 0.9, [5, 5, 30, 40]), (1, 0.8, [5, 5, 30, 40]), (0, 0.7, [50, 10, 90, 50])]
    merged = merge_detections([make_sample(*rows) for _ in range(6)])
    expected = make_sample(*rows).pred_instances
    assert to_rows(merged.pred_instances) == to_rows(expected)
    assert merged.pred_instances.masks.dtype == torch.bool and (merged.pred_instances.masks == expected.masks).all()


def test_masks_are_merged_by_majority_vote():
    boxes = [[10, 10, 50, 50], [10, 10, 50, 46], [10, 14, 50, 50]]
    merged = merge_detections(
        [make_sample((0, 0.9, boxes[0])), make_sample((0, 0.85, boxes[1])), make_sample((0, 0.8, boxes[2]))]
    )
    instances = merged.pred_instances
    assert to_rows(instances) == [(0, 0.9, boxes[0])]
    votes = sum(s * box_mask(b).astype(float) for s, b in zip((0.9, 0.85, 0.8), boxes))
    assert (instances.masks[0].numpy() == (votes >= 2.55 / 2)).all()
    # A view has one vote: the best of its detections.
    views = [make_sample((0, 0.9, boxes[0])), make_sample((0, 0.85, boxes[1]), (0, 0.2, [12, 12, 44, 44]))]
    assert (merge_detections(views).pred_instances.masks[0].numpy() == box_mask(boxes[0])).all()


def test_views_without_detections():
    merged = merge_detections([make_sample(), make_sample((1, 0.5, [0, 0, 10, 10])), make_sample()])
    assert len(merged.pred_instances) == 1
    merged = merge_detections([make_sample(), make_sample()])
    assert merged.pred_instances.masks.shape == (0, *SIZE) and len(merged.pred_instances) == 0


def make_tile(window, *rows, size=SIZE, masks=True):
    """Detections of a tile, whose boxes are given in the image and cut to it."""
    x1, y1, x2, y2 = window
    local = [
        (c, s, [max(b[0], x1) - x1, max(b[1], y1) - y1, min(b[2], x2) - x1, min(b[3], y2) - y1]) for c, s, b in rows
    ]
    instances = make_sample(*local, size=(y2 - y1, x2 - x1), masks=masks).pred_instances
    return to_tile_detections(instances, window, size)


LEFT, RIGHT = (0, 0, 60, 60), (40, 0, 100, 60)


def merge_to_rows(*tiles):
    return to_rows(merge_tiles(tiles))


@pytest.mark.parametrize('masks', [True, False])
def test_object_in_two_tiles_is_merged(masks):
    box = [44, 20, 56, 40]
    rows = merge_to_rows(make_tile(LEFT, (0, 0.9, box), masks=masks), make_tile(RIGHT, (0, 0.8, box), masks=masks))
    assert rows == [(0, 0.9, box)]


@pytest.mark.parametrize('masks', [True, False])
def test_cut_object_is_replaced_by_the_complete_one(masks):
    box = [30, 20, 55, 40]  # whole in the left tile
    rows = merge_to_rows(make_tile(LEFT, (0, 0.6, box), masks=masks), make_tile(RIGHT, (0, 0.8, box), masks=masks))
    assert rows == [(0, 0.8, box)]


@pytest.mark.parametrize('masks', [True, False])
@pytest.mark.parametrize('gap', [0, 20])
def test_object_cut_by_both_tiles_is_united(masks, gap):
    left, right = (LEFT, RIGHT) if gap else ((0, 0, 50, 60), (50, 0, 100, 60))
    box = [10, 20, 90, 40]
    merged = merge_tiles([make_tile(left, (0, 0.6, box), masks=masks), make_tile(right, (0, 0.8, box), masks=masks)])
    assert to_rows(merged) == [(0, 0.8, box)]
    if masks:
        assert (coco_mask.decode(merged.masks[0].in_image(SIZE)) == box_mask(box)).all()


def test_other_classes_and_objects_are_not_merged():
    box = [10, 20, 90, 40]
    assert len(merge_to_rows(make_tile(LEFT, (0, 0.9, box)), make_tile(RIGHT, (1, 0.9, box)))) == 2
    # Neighbors of one class on the two sides of a seam.
    assert (
        len(merge_to_rows(make_tile(LEFT, (0, 0.9, [45, 2, 59, 12])), make_tile(RIGHT, (0, 0.9, [45, 20, 59, 30]))))
        == 2
    )
    assert (
        len(merge_to_rows(make_tile(LEFT, (0, 0.9, [5, 2, 43, 12])), make_tile(RIGHT, (0, 0.9, [50, 2, 95, 12])))) == 2
    )


def test_unmatched_part_within_its_object_is_dropped():
    object_box, part_box = [20, 10, 58, 50], [40, 30, 50, 50]  # not the object's height there
    assert merge_to_rows(make_tile(LEFT, (0, 0.9, object_box)), make_tile(RIGHT, (0, 0.5, part_box))) == [
        (0, 0.9, object_box)
    ]
    # Not dropped: a small object in front of a large one, and a part of an object with a low score.
    assert len(merge_to_rows(make_tile(LEFT, (0, 0.9, object_box)), make_tile(RIGHT, (0, 0.5, [46, 30, 56, 50])))) == 2
    assert len(merge_to_rows(make_tile(LEFT, (0, 0.1, object_box)), make_tile(RIGHT, (0, 0.5, part_box)))) == 2


def test_small_object_in_front_of_a_large_one():
    large_box, small_box = [5, 2, 95, 58], [30, 20, 70, 40]
    tiles = [make_tile(window, (0, 0.9, large_box), (0, 0.8, small_box)) for window in (LEFT, RIGHT)]
    assert merge_to_rows(*tiles) == [(0, 0.8, small_box), (0, 0.9, large_box)]


def test_detections_are_matched_one_to_one():
    box_a, box_b = [20, 20, 58, 40], [30, 24, 90, 44]
    tiles = make_tile(LEFT, (0, 0.7, box_a), (0, 0.9, box_b)), make_tile(RIGHT, (0, 0.8, box_b))
    assert merge_to_rows(*tiles) == [(0, 0.7, box_a), (0, 0.9, box_b)]


def test_box_ending_near_the_tile_edge_counts_as_cut():
    tiles = make_tile(LEFT, (0, 0.9, [10, 20, 57, 40])), make_tile(RIGHT, (0, 0.8, [42, 20, 90, 40]))
    assert merge_to_rows(*tiles) == [(0, 0.9, [10, 20, 90, 40])]


def test_diagonal_object_is_united_by_mask_overlap():
    """In the overlap of the tiles the boxes of the two parts have a low IoU, the masks a high one."""
    size = (100, 100)
    y, x = np.mgrid[:100, :100]
    band = (abs(y - x) < 6) & (x > 5) & (x < 95)
    windows = [(0, 0, 60, 100), (40, 0, 100, 100)]
    tiles = []
    for window in windows:
        part = band[:, window[0] : window[2]]
        rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        instances = make_sample((0, 0.9, box), size=part.shape).pred_instances
        instances.masks = torch.from_numpy(part.copy())[None]
        tiles.append(to_tile_detections(instances, window, size))
    merged = merge_tiles(tiles)
    assert len(merged) == 1 and (coco_mask.decode(merged.masks[0].in_image(size)) == band).all()


def test_object_larger_than_any_tile_and_no_objects():
    windows = [(x, y, x + 50, y + 40) for y in (0, 20) for x in (0, 25, 50)]
    box = [2, 3, 98, 57]
    assert merge_to_rows(*[make_tile(window, (0, 0.9, box)) for window in windows]) == [(0, 0.9, box)]
    assert merge_to_rows(*[make_tile(window) for window in windows]) == []
