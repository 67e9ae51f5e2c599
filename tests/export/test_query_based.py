"""DETR and its successors as functions of images compute what mmdet computes, as modules and in files."""

import pytest

from convnext_dense.errors import UsageError
from convnext_dense.export.detector import ExportableDetector
from helpers.detections import assert_file_detects_the_same, assert_module_equals_mmdet
from helpers.small_detectors import DETRS, build_predictor, detr

SIZES = [(160, 224), (131, 97)]


@pytest.mark.parametrize('divisor', [1, 32])
@pytest.mark.parametrize('name', DETRS)
def test_module_equals_mmdet(name, divisor):
    """With images that are padded, and with others."""
    assert assert_module_equals_mmdet(build_predictor(detr(name, divisor)), SIZES) == 30


def test_export_does_not_change_the_model():
    model = build_predictor(detr('DINO')).model
    before = {name: (type(module), {*vars(module)}) for name, module in model.named_modules()}
    detector = ExportableDetector(model)
    assert {name: (type(module), {*vars(module)}) for name, module in model.named_modules()} == before
    theirs, ours = dict(model.named_parameters()), dict(detector.detect.model.named_parameters())
    assert theirs.keys() == ours.keys() and all(theirs[name] is ours[name] for name in theirs)


FILES = [
    ('DINO', '.pt2'),  # the ONNX file takes a minute
    *(pytest.param(name, '.xml', marks=pytest.mark.slow) for name in DETRS),
    pytest.param('DINO', '.onnx', marks=pytest.mark.slow),
]


@pytest.mark.parametrize('name, suffix', FILES)
def test_exported_file_equals_mmdet(name, suffix, tmp_path):
    assert_file_detects_the_same(build_predictor(detr(name)), tmp_path / f'detector{suffix}', SIZES)


def test_subclasses_with_other_computations_are_refused():
    cfg = dict(detr('DETR'), type='ConditionalDETR')
    cfg['bbox_head'] = dict(cfg['bbox_head'], type='ConditionalDETRHead', loss_cls=dict(type='FocalLoss'))
    with pytest.raises(UsageError, match='ConditionalDETR cannot be exported: its forward_decoder is not that of DETR'):
        ExportableDetector(build_predictor(cfg).model)
