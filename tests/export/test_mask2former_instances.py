"""mmdet's Mask2Former as a function of images computes what mmdet computes, as module and in files."""

import numpy as np
import pytest
import torch
from mmdet.structures.mask.utils import mask2bbox

from convnext_dense.errors import UsageError
from convnext_dense.export.detector import ExportableDetector
from convnext_dense.export.mask2former import mask_boxes
from helpers.detections import assert_file_detects_the_same, assert_module_equals_mmdet
from helpers.small_detectors import build_predictor, mask2former

SIZES = [(160, 224), (131, 97)]


def test_module_equals_mmdet():
    assert assert_module_equals_mmdet(build_predictor(mask2former()), SIZES) == 60


def test_stuff_is_left_out():
    """Of 4 classes two are things: mmdet returns these alone."""
    config = mask2former()
    config.panoptic_head.update(num_things_classes=2, num_stuff_classes=2)
    config.panoptic_fusion_head.update(num_things_classes=2, num_stuff_classes=2)
    assert 0 < assert_module_equals_mmdet(build_predictor(config), SIZES) < 60


def test_boxes_of_masks_equal_mmdet():
    masks = torch.from_numpy(np.random.RandomState(0).rand(2, 9, 13, 17) > 0.97)
    masks[0, 0], masks[1, 3], masks[1, 4] = False, True, False
    masks[1, 4, 12, 16] = True
    assert torch.equal(mask_boxes(masks).flatten(0, 1), mask2bbox(masks.flatten(0, 1)))


@pytest.mark.parametrize(
    'suffix', ['.pt2', *(pytest.param(suffix, marks=pytest.mark.slow) for suffix in ('.onnx', '.xml'))]
)
def test_exported_file_equals_mmdet(suffix, tmp_path):
    assert_file_detects_the_same(build_predictor(mask2former()), tmp_path / f'detector{suffix}', SIZES)


def test_what_has_no_such_form_is_refused():
    model = build_predictor(mask2former()).model
    with pytest.raises(UsageError, match='Mask2Former has no masks in boxes: its masks are those of the image'):
        ExportableDetector(model, masks='box')
    model.panoptic_fusion_head.test_cfg.panoptic_on = True
    with pytest.raises(UsageError, match='Mask2Former can be exported for instances alone: set panoptic_on=False'):
        ExportableDetector(model)
