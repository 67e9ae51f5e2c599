"""One-stage detectors as functions of images compute what mmdet computes, as modules and in files."""

import math

import numpy as np
import pytest
import torch
from mmdet.models import SingleStageDetector
from mmdet.registry import MODELS

from convnext_dense.errors import UsageError
from convnext_dense.export import rtmdet_ins
from convnext_dense.export.detector import ExportableDetector
from convnext_dense.export.files import onnx_to_openvino, write_onnx
from convnext_dense.export.program import Traced, custom_operators
from convnext_dense.export.rtmdet_ins import scaled_ceil
from convnext_dense.inference.sessions import session_class
from helpers.detections import assert_file_detects_the_same, assert_module_equals_mmdet
from helpers.exported import make_meta
from helpers.small_detectors import HEAD, LEVELS, NORM, ONE_ANCHOR, ONE_STAGE, build_predictor, one_stage

SIZES = [(160, 224), (131, 97), (64, 64)]


def build(name, **test_cfg):
    if 'Ins' in name and rtmdet_ins.SWAPS_SIDES:
        pytest.skip('this mmdet swaps the sides of masks')
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


@pytest.mark.parametrize('name', ['RetinaNet', 'YOLOX', 'PAA with score voting', 'RTMDet-Ins'])
def test_image_without_detections(name):
    assert assert_module_equals_mmdet(build(name, score_thr=0.9999), SIZES[:1]) == 0


@pytest.mark.parametrize('name', ['ATSS', 'YOLOX', 'PAA with score voting', 'RTMDet-Ins'])
def test_batch_of_two(name):
    assert assert_module_equals_mmdet(build(name, score_thr=0.2), SIZES[1:2], batch=2) > 30


def test_masks_are_resized_as_float64_rounds():
    """Of each side one that mmdet takes for a pixel longer."""
    height, width = (next(n for n in range(300, 999) if math.ceil(side * (1 / (side / n))) > n) for side in SIZES[0])
    assert assert_module_equals_mmdet(build('RTMDet-Ins'), SIZES[:1], (height, width)) > 30


def test_ceiling_is_that_of_float64(tmp_path):
    """In runtimes that compute float64 otherwise, too."""
    rng = np.random.RandomState(0)
    n, n_result = rng.randint(16, 2048, 50000), rng.randint(16, 4096, 50000)
    sides = np.concatenate([n, n * 2, (n + 31) // 32 * 32]), np.tile(n, 3), np.tile(n_result, 3)
    expected = [math.ceil(a * (1 / (b / c))) for a, b, c in zip(*(x.tolist() for x in sides))]
    inputs = tuple(map(torch.from_numpy, sides))
    assert scaled_ceil(*inputs).tolist() == expected
    traced = Traced(None, torch.export.export(Ceiling(), inputs), ('pixels',), make_meta('mask_rcnn'))
    write_onnx(traced, onnx_path := tmp_path / 'ceiling.onnx')
    onnx_to_openvino(onnx_path, openvino_path := tmp_path / 'ceiling.xml', traced.meta)
    for path in (onnx_path, openvino_path):
        session = session_class(path)(str(path), torch.device('cpu'))
        assert session._infer(dict(zip(('padded', 'n', 'n_result'), sides)))['pixels'].tolist() == expected


class Ceiling(torch.nn.Module):
    def forward(self, padded, n, n_result):
        return scaled_ceil(padded, n, n_result)


def test_swapped_sides_of_masks_are_refused(monkeypatch):
    monkeypatch.setattr(rtmdet_ins, 'SWAPS_SIDES', True)
    message = (
        'RTMDetInsHead of mmdet .* cannot be exported, because it swaps the sides of masks: install convnext_dense'
    )
    with pytest.raises(UsageError, match=message):
        ExportableDetector(build_predictor(one_stage('RTMDet-Ins')).model)


def test_masks_in_boxes_are_refused():
    with pytest.raises(UsageError, match='SingleStageDetector has no masks in boxes: its masks are those of the image'):
        ExportableDetector(build('RTMDet-Ins').model, masks='box')


FAST = [
    ('RTMDet with its own norms', '.onnx'),
    ('YOLOX', '.pt2'),
    ('PAA with score voting', '.pt2'),
    ('RTMDet-Ins', '.pt2'),
]
SLOW = [(name, suffix) for name in ONE_STAGE for suffix in ('.xml', '.pt2') if (name, suffix) not in FAST]
SLOW += [(name, '.onnx') for name in ('YOLOX', 'PAA with score voting', 'RTMDet-Ins')]
FILES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize('name, suffix', FILES)
def test_exported_file_equals_mmdet(name, suffix, tmp_path):
    assert_file_detects_the_same(build(name), tmp_path / f'detector{suffix}', SIZES[1:])


BASE = 'is not that of BaseDenseHead'
REFUSED = {
    'TOODHead': 'its deform_sampling is deform_conv2d of mmcv.ops, which torch.export does not know',
    'FoveaHead': f'its _predict_by_feat_single {BASE}',
    'RepPointsHead': f'its _predict_by_feat_single {BASE}',
    **dict.fromkeys(('SABLRetinaHead', 'GARetinaHead', 'YOLOV3Head', 'CenterNetHead'), f'its predict_by_feat {BASE}'),
}


@pytest.mark.parametrize('head', REFUSED)
def test_heads_with_other_results_are_refused(head):
    model = empty(SingleStageDetector)
    model.bbox_head = empty(MODELS.get(head))
    model.bbox_head.test_cfg = {}
    with pytest.raises(UsageError, match=f'^{head} cannot be exported: {REFUSED[head]}$'):
        ExportableDetector(model)


def empty(cls):
    """A module without its parts."""
    module = cls.__new__(cls)
    torch.nn.Module.__init__(module)
    return module


DEFORMABLE = {
    'VFNetHead': 'DeformConv2d of mmcv.ops, which is its bbox_head.vfnet_reg_refine_dconv',
    'NASFCOSHead': 'ModulatedDeformConv2dPack of mmcv.ops, which is its bbox_head.cls_convs.0.conv',
    'DDODHead': 'DeformConv2dPack of mmcv.ops, which is its bbox_head.cls_convs.0.conv',
}


@pytest.mark.parametrize('head', DEFORMABLE)
def test_deformable_convolutions_are_named(head):
    priors = dict(anchor_generator=ONE_ANCHOR) if head == 'DDODHead' else dict(strides=LEVELS)
    cfg = dict(one_stage('ATSS'), bbox_head=dict(HEAD, type=head, norm_cfg=NORM, **priors))
    assert custom_operators(build_predictor(cfg).model) == f'torch.export does not know {DEFORMABLE[head]}'


def test_detectors_with_another_way_to_results_are_named():
    class OtherDetector(SingleStageDetector):
        def predict(self, *args, **kwargs):
            """What it does is not known."""

    with pytest.raises(UsageError, match='OtherDetector cannot be exported: its predict is not that of SingleStageDet'):
        ExportableDetector(empty(OtherDetector))


def test_heads_without_a_number_of_candidates_are_refused():
    with pytest.raises(UsageError, match='FCOSHead without nms_pre cannot be exported: set it in test_cfg'):
        ExportableDetector(build('FCOS', nms_pre=-1).model)
