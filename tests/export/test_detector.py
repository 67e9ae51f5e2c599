"""Detectors as functions of images compute what mmdet computes, as modules and in files."""

import onnx
import openvino
import pytest
import torch
from mmcv.ops import batched_nms
from mmdet.models import SingleRoIExtractor
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
from mmengine.registry import init_default_scope
from onnxruntime import InferenceSession

from convnext_dense.checkpoints.exported_meta import KEY, ExportedMeta
from convnext_dense.errors import UsageError
from convnext_dense.export import check
from convnext_dense.export.boxes import batched_nms as padded_nms
from convnext_dense.export.detector import ExportableDetector, paste_masks
from convnext_dense.export.files import WRITERS
from convnext_dense.export.onnx_ops import TRANSLATIONS
from convnext_dense.export.program import ExportOptions
from convnext_dense.export.two_stage import extract
from convnext_dense.inference.sessions import session_class
from convnext_dense.ops.export_ops import nms_mask, pyramid_roi_align, soft_nms
from helpers.detections import assert_same_detections, assert_session_detects_the_same, make_photo

# Larger than what is traced, portrait, odd, and less than two cells of the coarsest map.
SIZES = [(224, 288), (300, 411), (257, 129), (97, 211), (64, 64), (40, 50)]
RECIPES = ['mask_rcnn', 'cascade']
F32 = dict(INFERENCE_PRECISION_HINT='f32')  # left alone, OpenVINO takes bfloat16 where the processor has it


@pytest.mark.parametrize('recipe', RECIPES)
def test_module_equals_mmdet(recipe, predictors):
    predictor = predictors[recipe]
    detector = ExportableDetector(predictor.model)
    for size in SIZES:
        image, output_size = make_photo(*size), (size[0] * 2 // 3, size[1] * 5 // 4)
        with torch.no_grad():
            outputs = detector(image[None], torch.tensor(output_size))
        assert outputs[3].shape[2:] == output_size
        assert_same_detections(predictor, image, output_size, outputs)


@pytest.mark.parametrize('suffix', WRITERS)
@pytest.mark.parametrize('recipe', RECIPES)
def test_exported_file_equals_mmdet(recipe, suffix, predictors, files):
    """At other sizes than the traced one, of one image and of a batch."""
    path = files(recipe)[suffix]
    session = session_class(path)(str(path), torch.device('cpu'))
    for size in SIZES:
        images, output_size = (
            torch.stack([make_photo(*size), make_photo(*size, seed=1)]),
            (size[0] * 2, size[1] * 5 // 4),
        )
        for batch in (images[:1], images):
            assert_session_detects_the_same(predictors[recipe], session, batch, output_size)


def test_onnx_has_standard_operators_and_names(files):
    model = onnx.load(files('mask_rcnn')['.onnx'])
    onnx.checker.check_model(model)
    assert {(item.domain, item.version) for item in model.opset_import} == {('', 18)} and not model.functions
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes['images'] == ['batch', 3, 'height', 'width'] and shapes['output_size'] == [2]
    assert shapes['boxes'] == ['batch', 'detections', 4] and shapes['labels'] == ['batch', 'detections']
    assert shapes['masks'] == ['batch', 'detections', 'mask_height', 'mask_width']
    text = next(item.value for item in model.metadata_props if item.key == KEY)
    meta = ExportedMeta.from_json(text, 'd.onnx')
    assert meta.classes == ('disc', 'square', 'triangle', 'cross') and meta.masks == 'image'
    assert 'ann_file' not in meta.config and 'data_root' not in meta.config  # paths are the user's own


@pytest.mark.parametrize('height', [30, 75])
def test_masks_are_pasted_as_in_mmdet(height):
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(1, 5, 28, 28, generator=generator)
    boxes = torch.tensor([[3.2, 4.1, 17.9, 22], [0, 0, 40, 30], [-3, 5, 9, 28.5], [10, 10, 11, 11.5], [38, 20, 40, 30]])
    expected, _ = _do_paste_mask(masks[0][:, None], boxes, height, 40, skip_empty=False)
    torch.testing.assert_close(paste_masks(masks, boxes[None], (height, 40))[0], expected, rtol=0, atol=1e-5)


def random_boxes():
    """(2, 200, 4), with scores (2, 200)."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 200, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + 5 + torch.rand(2, 200, 2, generator=generator) * 20], 2)
    return boxes, torch.rand(2, 200, generator=generator)


@pytest.mark.parametrize(
    'cfg',
    [
        dict(type='nms', iou_threshold=0.5),
        dict(type='nms', iou_threshold=0.3, class_agnostic=True),
        dict(type='soft_nms'),
        dict(type='soft_nms', iou_threshold=0.5, min_score=0.2, class_agnostic=True),
        dict(type='soft_nms', method='gaussian', sigma=0.2, min_score=0.1),
        dict(type='soft_nms', method='naive', iou_threshold=0.4),
    ],
    ids=str,
)
def test_batched_nms_equals_single_images(cfg):
    (boxes, scores), groups = random_boxes(), torch.arange(400).reshape(2, 200) % 3
    candidates = torch.where(scores > 0.3, scores, -1)
    for limit in (20, 200):
        actual = padded_nms(boxes, candidates, groups, cfg, limit)
        for i in range(2):
            indices = (scores[i] > 0.3).nonzero().flatten()
            kept, order = batched_nms(boxes[i][indices], scores[i][indices], groups[i][indices], cfg)
            expected = torch.full((200,), -1.0).scatter(0, indices[order[:limit]], kept[:limit, 4])
            torch.testing.assert_close(actual[i], expected, rtol=0, atol=1e-6)
    nothing = padded_nms(boxes, torch.full_like(scores, -1), groups, cfg, 20)
    assert nothing.shape == (2, 200) and (nothing == -1).all()


class SoftNMS(torch.nn.Module):
    def forward(self, boxes, scores):
        limits = dict(linear=20, gaussian=150, naive=150)
        return [soft_nms(boxes, scores, 0.4, 0.3, limits[method], method, 0.3, 0.05) for method in limits]


def test_soft_nms_in_files(tmp_path):
    """Of another number of images and boxes than traced, and where there is no candidate."""
    boxes, scores = random_boxes()
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(SoftNMS(), (boxes, scores), dynamic_shapes=(sizes, sizes))
    path, settings = tmp_path / 'nms.onnx', dict(dynamo=True, opset_version=18, verbose=False)
    torch.onnx.export(program, custom_translation_table=TRANSLATIONS, **settings).save(path)
    assert not onnx.load(path).functions
    session, model = InferenceSession(path), openvino.Core().compile_model(path, 'CPU', F32)
    for inputs in ((boxes, scores), (boxes[1:, :50], scores[1:, :50]), (boxes, scores * 0)):
        feed = dict(zip([item.name for item in session.get_inputs()], (x.numpy() for x in inputs)))
        for outputs in (session.run(None, feed), [*model(feed).values()]):
            for actual, expected in zip(outputs, SoftNMS()(*inputs)):
                torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=0, atol=1e-4)


def test_roi_features_equal_mmdet():
    generator = torch.Generator().manual_seed(0)
    feats = tuple(torch.randn(2, 16, 64 // 2**i, 80 // 2**i, generator=generator) for i in range(4))
    corners = torch.rand(40, 2, generator=generator) * 150
    sizes = torch.tensor([20.0, 90, 250, 500]).repeat(10)[:, None] * (0.7 + torch.rand(40, 2, generator=generator) / 2)
    images = torch.arange(40)[:, None] % 2
    rois = torch.cat([images.float(), corners, corners + sizes], 1)
    layer = dict(type='RoIAlign', output_size=7, sampling_ratio=0)
    init_default_scope('mmdet')
    extractor = SingleRoIExtractor(layer, out_channels=16, featmap_strides=[4, 8, 16, 32])
    assert len(extractor.map_roi_levels(rois, 4).unique()) == 4
    torch.testing.assert_close(extract(extractor, feats, rois), extractor(feats, rois), rtol=0, atol=1e-5)
    half = extract(extractor, tuple(x.bfloat16() for x in feats), rois)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), extractor(feats, rois), rtol=0, atol=0.05)


def test_operators_pass_torch_checks():
    boxes = torch.tensor([[[0.0, 0, 9, 9], [0, 0, 9, 8], [20, 0, 29, 9]]])
    scores = torch.tensor([[0.9, 0.8, 0.1]])
    torch.library.opcheck(nms_mask, (boxes, scores, 0.5, 0.2, 10))
    torch.library.opcheck(soft_nms, (boxes, scores, 0.5, 0.2, 10, 'linear', 0.5, 0.001))
    rois = torch.tensor([[0.0, 0, 0, 9, 9], [0, 4, 0, 29, 9]])
    feats = [torch.randn(1, 16, 8, 8), torch.randn(1, 16, 4, 4)]
    torch.library.opcheck(pyramid_roi_align, (feats, rois, torch.tensor([1, 0]), [0.25, 0.125], (7, 7), 0, True))


# ---- options and refusals --------------------------------------------------------------------------------------------


def test_raw_inputs_and_box_masks(predictors):
    from convnext_dense.export.preprocessing import Preprocess

    predictor, image = predictors['mask_rcnn'], make_photo(100, 130)[None]
    prepared = Preprocess(predictor.model.data_preprocessor)(image)
    with torch.no_grad():
        boxes, scores, labels, masks = ExportableDetector(predictor.model, raw=True, masks='box')(prepared)
    assert masks.shape == (*scores.shape, 28, 28) and masks.min() >= 0 and masks.max() <= 1
    expected = check.predict(predictor, image[0].numpy(), None, ExportOptions('raw')).pred_instances
    assert len(expected) == int((labels >= 0).sum())
    torch.testing.assert_close(boxes[0], expected.bboxes, rtol=0, atol=1e-2)


def build_detector(**changes):
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.registry import MODELS

    from helpers.paths import ROOT

    register_all_modules()
    config = Config.fromfile(ROOT / 'configs/demo/mask_rcnn.py')
    config.merge_from_dict(changes)
    return MODELS.build(config.model)


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'model.test_cfg.rcnn.nms.type': 'nms_match'}, 'NMS of type nms_match cannot be exported'),
        ({'model.test_cfg.rpn.nms.max_num': 9}, 'NMS with max_num cannot be exported: only with iou_threshold, class_'),
        ({'model.roi_head.bbox_roi_extractor.type': 'GenericRoIExtractor'}, 'GenericRoIExtractor cannot be exported'),
    ],
)
def test_unsupported_modules_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        ExportableDetector(build_detector(**changes))


def test_other_kinds_of_detectors_are_refused():
    names = 'MaskFormer or TwoStageDetector or SingleStageDetector or DetectionTransformer'
    with pytest.raises(UsageError, match=f'Identity cannot be exported: only {names} can'):
        ExportableDetector(torch.nn.Identity())
