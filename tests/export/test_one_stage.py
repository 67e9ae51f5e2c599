"""One-stage detectors as functions of images compute what mmdet computes, as modules and in files."""

import pytest
from mmdet.models import SingleStageDetector

from convnext_dense.errors import UsageError
from convnext_dense.export.detector import ExportableDetector
from helpers.detections import assert_file_detects_the_same, assert_module_equals_mmdet
from helpers.small_detectors import ONE_STAGE, build_predictor, one_stage

SIZES = [(160, 224), (131, 97), (64, 64)]


def build(name, **test_cfg):
    return build_predictor(one_stage(name, **test_cfg))


@pytest.mark.parametrize('name', ONE_STAGE)
def test_module_equals_mmdet(name):
    assert assert_module_equals_mmdet(build(name), SIZES) > 30


@pytest.mark.parametrize(
    'test_cfg',
    [
        dict(nms_pre=5, max_per_img=9),
        dict(nms_pre=30000),
        dict(min_bbox_size=20),
        dict(nms=dict(type='soft_nms', iou_threshold=0.4, min_score=0.1)),
        dict(nms=dict(type='nms', iou_threshold=0.3, class_agnostic=True)),
    ],
    ids=str,
)
def test_test_cfg_options(test_cfg):
    assert assert_module_equals_mmdet(build('ATSS', **test_cfg), SIZES[1:]) > 5


def test_image_without_detections():
    predictor = build('RetinaNet', score_thr=0.9999)
    assert assert_module_equals_mmdet(predictor, SIZES[:1]) == 0


FILES = [
    ('RTMDet with its own norms', '.onnx'),
    *(pytest.param(name, suffix, marks=pytest.mark.slow) for name in ONE_STAGE for suffix in ('.xml', '.pt2')),
]


@pytest.mark.parametrize('name, suffix', FILES)
def test_exported_file_equals_mmdet(name, suffix, tmp_path):
    assert_file_detects_the_same(build(name), tmp_path / f'detector{suffix}', SIZES[1:])


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(type='PAAHead'), 'PAAHead cannot be exported: its predict_by_feat is not that of BaseDenseHead'),
        (
            dict(type='TOODHead', initial_loss_cls=dict(type='FocalLoss')),
            'TOODHead cannot be exported: its _predict_by',
        ),
    ],
)
def test_heads_with_other_postprocessing_are_refused(changes, message):
    cfg = one_stage('ATSS')
    cfg['bbox_head'] = dict(cfg['bbox_head'], **changes)
    with pytest.raises(UsageError, match=message):
        ExportableDetector(build_predictor(cfg).model)


def test_detectors_with_another_way_to_results_are_named():
    class OtherDetector(SingleStageDetector):
        def predict(self, *args, **kwargs):
            """What it does is not known."""

    model = build('FCOS').model
    model.__class__ = OtherDetector
    with pytest.raises(UsageError, match='OtherDetector cannot be exported: its predict is not that of SingleStageDet'):
        ExportableDetector(model)


def test_heads_without_a_number_of_candidates_are_refused():
    with pytest.raises(UsageError, match='FCOSHead without nms_pre cannot be exported: set it in test_cfg'):
        ExportableDetector(build('FCOS', nms_pre=-1).model)
