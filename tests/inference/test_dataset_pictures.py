"""`check_data.py --pictures`: anchors that meet boxes, compared with all of mmdet's, and what is drawn."""

import cv2
import numpy as np
import pytest
import torch
from mmdet.structures.bbox import bbox_overlaps
from mmengine.registry import TASK_UTILS, init_default_scope
from mmengine.structures import BaseDataElement, InstanceData, PixelData

from convnext_dense.inference.dataset_pictures import anchor_coverage, read_boxes
from convnext_dense.inference.drawing import draw_ground_truth
from helpers.datasets import DETECTOR, SEGMENTOR, run
from helpers.recipes import load


@pytest.mark.parametrize('scale', [8, 1])  # of 1, boxes at the border are beyond the center of the last anchor
def test_coverage_equals_all_anchors(scale):
    """Of boxes within an image and at its borders, of all sizes."""
    model = load('mask_rcnn/convnext_t').model
    model.rpn_head.anchor_generator.scales = [scale]
    rng = np.random.RandomState(0)
    height, width = 224, 320
    centers, sides = rng.uniform(0, (width, height), (300, 2)), np.exp(rng.uniform(1, 6, (300, 2)))
    boxes = np.clip(np.hstack((centers - sides / 2, centers + sides / 2)), 0, [width, height] * 2)
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2]).min(1) > 1]
    generator = TASK_UTILS.build(dict(model.rpn_head.anchor_generator))
    maps = [(-(-height // y), -(-width // x)) for x, y in generator.strides]
    anchors = torch.cat(generator.grid_priors(maps, device='cpu'))
    expected = bbox_overlaps(torch.tensor(boxes, dtype=torch.float32), anchors).max(1).values
    sizes = np.tile([height, width], (len(boxes), 1)).astype(float)
    assert anchor_coverage(model, boxes, sizes) == pytest.approx(expected.numpy(), abs=1e-5)
    assert anchor_coverage(load('rtmdet/convnext_b').model, boxes, sizes) is None  # points


class Dataset(list):
    def get_data_info(self, i):
        return self[i]


def test_boxes_are_scaled_to_the_test_size():
    """An image of 100 x 400 in (1333, 800) becomes 333 x 1333; crowds are left out."""
    instances = [dict(bbox=[10, 20, 30, 60], bbox_label=2, ignore_flag=i) for i in (0, 1)]
    boxes, sizes, labels = read_boxes(Dataset([dict(height=100, width=400, instances=instances)]), (1333, 800))
    ratio = 1333 / 400
    assert boxes == pytest.approx(np.array([[10, 20, 30, 60]]) * ratio) and labels.tolist() == [2]
    assert sizes == pytest.approx(np.array([[100, 400]]) * ratio)


def test_annotations_are_drawn_at_their_positions():
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks

    image, mask = np.full((40, 80, 3), 90, np.uint8), np.zeros((1, 40, 80), np.uint8)
    mask[0, 10:30, 20:60] = 1
    truth = InstanceData(bboxes=HorizontalBoxes([[20, 10, 60, 30]]), labels=torch.tensor([1]))
    truth.masks = BitmapMasks(mask, 40, 80)
    sample = BaseDataElement(gt_instances=truth)
    picture = draw_ground_truth(image, sample, ['a', 'b'], [(255, 0, 0), (0, 255, 0)], 320)
    assert picture.shape == (160, 320, 3)
    inside, outside = picture[80, 160], picture[150, 10]
    assert inside[1] > inside[0] + 50 and (outside == 90).all()
    labels = np.zeros((1, 40, 80), int)
    labels[:, :, 40:] = 255
    sample = BaseDataElement(gt_sem_seg=PixelData(data=torch.from_numpy(labels)))
    picture = draw_ground_truth(image, sample, ['a', 'b'], [(255, 0, 0), (0, 255, 0)], 320)
    assert picture[80, 40, 2] > 140 and (picture[80, 300] == 90).all() and len(picture) > 160  # with a legend


@pytest.mark.parametrize('task, config', [('detection', DETECTOR), ('segmentation', SEGMENTOR)])
def test_tool_draws_a_dataset(task, config, data, tmp_path, capsys):
    args = ('--data', data, '--task', task, '--config', config, '--pictures', tmp_path / 'out', '--image-size', 96)
    assert run('check_data.py', *args) == 0
    out = capsys.readouterr().out
    assert ('% of the boxes of images at 96 x 96 meet an anchor' in out) == (task == 'detection')
    sheet, statistics = (cv2.imread(str(tmp_path / f'out/{task}_{name}.png')) for name in ('images', 'statistics'))
    rows = np.array_split(sheet, 4)  # eight images, two in a row
    assert all(part.std() > 5 for row in rows for part in np.array_split(row, 4, axis=1)) and statistics.std() > 5
    init_default_scope('mmdet')


def test_a_config_for_the_other_task(data, tmp_path, capsys):
    args = ('--data', data, '--task', 'segmentation', '--config', DETECTOR, '--pictures', tmp_path / 'out')
    assert run('check_data.py', *args) == 2
    assert 'is not for segmentation: give a recipe such as configs/upernet/' in capsys.readouterr().err


def test_options_that_need_another_option(capsys):
    for args, words in (
        (('--config', DETECTOR), '--config needs --pictures'),
        (('--fix', 'x', '--tile', 9), '--fix and --tile'),
    ):
        assert run('check_data.py', '--data', 'x', *args) == 2
        assert words in capsys.readouterr().err
