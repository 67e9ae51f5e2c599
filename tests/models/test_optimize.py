"""`optimize`: optimized models return the same results, and modified modules fall back."""

import copy
import pickle

import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmseg.models.segmentors import EncoderDecoder
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules as register_mmseg
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from convnext_dense import optimize, optimize_for_inference
from convnext_dense.models.fp32_heads import CPURoIExtractor, FP32RoIExtractor
from convnext_dense.models.fused_heads import FusedConvModule
from convnext_dense.models.fused_uper_head import FusedUPerHead
from convnext_dense.models.optimize import nms
from convnext_dense.ops import avx512, box_ops, dispatch, head_kernels, upsampled_conv
from helpers.recipes import load

needs_kernels = pytest.mark.skipif(not head_kernels.available(), reason='the kernels are not for this machine')
SIZE = (96, 128)
ARCH = dict(depths=(1, 1, 1, 1), channels=(32, 64, 96, 128))


def build(name, **changes):
    """A small model of a recipe, with random batch norm statistics and large classification weights."""
    config = load(name)
    register_mmseg(init_default_scope=False) if config.default_scope == 'mmseg' else register_all_modules(False)
    init_default_scope(config.default_scope)
    cfg = config.model
    cfg.backbone.update(arch=ARCH, init_cfg=None, drop_path_rate=0.0)
    if 'neck' in cfg:
        cfg.neck.in_channels = list(ARCH['channels'])
    else:
        cfg.decode_head.update(in_channels=list(ARCH['channels']), channels=64, num_classes=5, dropout_ratio=0.0)
        cfg.auxiliary_head.update(in_channels=96, channels=32, num_classes=5, dropout_ratio=0.0)
        for head in (cfg.decode_head, cfg.auxiliary_head):
            head.norm_cfg = dict(type='BN')
    for key, value in changes.items():
        cfg.merge_from_dict({key.replace('__', '.'): value})
    torch.manual_seed(0)
    model = MODELS.build(cfg).eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for t, (min_value, max_value) in {
                module.running_mean: (-1, 1),
                module.running_var: (0.5, 2),
                module.weight.data: (0.5, 2),
                module.bias.data: (-1, 1),
            }.items():
                t.uniform_(min_value, max_value)
    if hasattr(model, 'roi_head'):
        heads = model.roi_head.bbox_head
        for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
            head.fc_cls.weight.data.mul_(20)
        model.rpn_head.rpn_cls.weight.data.mul_(20)
    return model


def make_samples(model):
    meta = dict(img_shape=SIZE, ori_shape=SIZE, pad_shape=SIZE, scale_factor=(1.0, 1.0))
    if not hasattr(model, 'roi_head'):
        mask = torch.randint(5, (1, *SIZE), generator=torch.Generator().manual_seed(0))
        return [SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=mask))]
    from mmdet.structures.mask import BitmapMasks

    sample = DetDataSample(metainfo=meta)
    boxes = torch.tensor([[5.3, 6.1, 60.7, 70.9], [30.2, 20.4, 90.8, 80.6]])
    masks = BitmapMasks(torch.ones(2, *SIZE, dtype=torch.uint8).numpy(), *SIZE)
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 1]), masks=masks)
    return [sample]


def make_image():
    return torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def predict(model):
    result = model.predict(make_image(), make_samples(model))[0]
    return result.pred_instances if hasattr(model, 'roi_head') else result.seg_logits.data


def train_step(model):
    model.train()
    torch.manual_seed(2)
    images = torch.cat([make_image(), make_image().flip(-1)])
    losses = model(images, make_samples(model) * 2, mode='loss')
    flat = {k: v for k, v in losses.items() if 'loss' in k}
    sum(t for v in flat.values() for t in (v if isinstance(v, list) else [v])).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {k: torch.as_tensor(v if not isinstance(v, list) else sum(v)).detach() for k, v in flat.items()}, grads


class Calls:
    """Counts the calls of operators."""

    def __init__(self, monkeypatch):
        self.names = []
        launch = head_kernels.launch
        monkeypatch.setattr(
            head_kernels, 'launch', lambda name, *a, **k: (self.names.append(name), launch(name, *a, **k))
        )
        run_nms = head_kernels.nms
        monkeypatch.setattr(head_kernels, 'nms', lambda *a: (self.names.append('nms'), run_nms(*a))[1])


DETECTORS = ['demo/mask_rcnn', 'demo/cascade']


@needs_kernels
@pytest.mark.parametrize('name', DETECTORS)
def test_detections_are_the_same(name, monkeypatch):
    model = build(name)
    expected, keys = predict(copy.deepcopy(model)), [*model.state_dict()]
    assert len(expected) > 10 and expected.scores.max() > 0.1
    calls = Calls(monkeypatch)
    actual = predict(optimize_for_inference(model))
    assert {'roi_align', 'nms'} == {*calls.names} and [*model.state_dict()] == keys
    assert torch.equal(actual.labels, expected.labels)
    torch.testing.assert_close(actual.bboxes, expected.bboxes, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=1e-4)
    assert (actual.masks != expected.masks).float().mean() < 1e-3


@needs_kernels
def test_segmentations_are_the_same(monkeypatch):
    model = build('demo/upernet')
    expected, keys = predict(copy.deepcopy(model)), [*model.state_dict()]
    calls = Calls(monkeypatch)
    actual = predict(optimize_for_inference(model))
    assert calls.names == ['tap_sum', 'tap_sum'] and [*model.state_dict()] == keys
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize('n', [1, 2])
@pytest.mark.parametrize('crop_size, stride', [((64, 64), (40, 30)), ((96, 128), (96, 128)), ((200, 50), (64, 50))])
def test_sliding_windows_are_added_up_as_in_mmseg(crop_size, stride, n):
    model = optimize(build('demo/upernet'))
    model.test_cfg = ConfigDict(mode='slide', crop_size=crop_size, stride=stride)
    images, metas = torch.cat([make_image()] * n), [dict(ori_shape=SIZE, img_shape=SIZE) for _ in range(n)]
    for dtype in (torch.float32, torch.bfloat16):
        for channels_last in (False, True):

            def encode_decode(window, metas, channels_last=channels_last):
                logits = type(model).encode_decode(model, window, metas)
                return logits.contiguous(
                    memory_format=torch.channels_last if channels_last else torch.contiguous_format
                )

            model.encode_decode = encode_decode
            with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
                expected = EncoderDecoder.slide_inference(model, images, metas)
                actual = model.slide_inference(images, metas)
            assert torch.equal(actual, expected) and actual.dtype == expected.dtype
            assert actual.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_sliding_windows_that_leave_gaps_are_refused():
    model = optimize(build('demo/upernet'))
    model.test_cfg = ConfigDict(mode='slide', crop_size=(64, 32), stride=(64, 40))
    with pytest.raises(AssertionError, match='windows of 64 x 32 pixels, 64 and 40 apart, leave gaps'):
        predict(model)


@needs_kernels
@pytest.mark.parametrize('name', ['demo/mask_rcnn', 'demo/upernet'])
def test_a_training_step_is_the_same(name, monkeypatch):
    model = build(name)
    losses, grads = train_step(copy.deepcopy(model))
    calls = Calls(monkeypatch)
    found_losses, found_grads = train_step(optimize(model))
    assert ('roi_align_backward' if 'rcnn' in name else 'tap_sum_backward') in calls.names
    torch.testing.assert_close(found_losses, losses, rtol=1e-4, atol=1e-5)
    assert found_grads.keys() == grads.keys()
    for key, grad in grads.items():
        assert (found_grads[key] - grad).norm() < 2e-3 * grad.norm() + 1e-5, key


@pytest.mark.skipif(not avx512.dtypes(), reason='the kernels are not for this machine')
@pytest.mark.parametrize('name', ['demo/mask_rcnn', 'demo/upernet'])
def test_3x3_convolutions_run_in_a_kernel(name, monkeypatch):
    calls = []
    launch = avx512.launch
    monkeypatch.setattr(avx512, 'launch', lambda *queue: (calls.extend(c.name for c in queue), launch(*queue)))
    model = optimize(build(name))
    predict(model)
    n_large = calls.count('conv3x3')
    # The largest level of the neck and of the RPN and four of the mask head; the largest level and its bottleneck.
    assert n_large == (6 if 'rcnn' in name else 2)
    del calls[:]
    train_step(model)
    assert calls.count('conv3x3') > 1.5 * n_large  # gradients, too
    hooked = optimize(build(name))
    for module in hooked.modules():
        if type(module).__name__ in ('FusedConv2d', 'FusedConvModule'):
            module.register_forward_hook(lambda *args: None)
    del calls[:]
    predict(hooked)
    assert 'conv3x3' not in calls


def test_modified_weights_take_effect():
    """Folded weights are not cached."""
    model, reference = optimize(build('demo/upernet')), build('demo/upernet')
    for p in reference.parameters():
        p.data.add_(0.01)
    for buffer in reference.buffers():
        buffer.data.mul_(2)
    before = predict(model)
    model.load_state_dict(reference.state_dict())
    after, expected = predict(model), predict(reference)
    assert (before - expected).abs().max() > 1e-2
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-3)


def test_features_stay_channels_last_where_all_consumers_support_it():
    feats_of_model = []

    class Neck(nn.Module):  # from another library
        def forward(self, feats):
            return feats

    model = build('demo/mask_rcnn')
    with_unknown_module = copy.deepcopy(model)
    with_unknown_module.add_module('extra', Neck())
    for m in (optimize(model), optimize(with_unknown_module)):
        m.neck.register_forward_pre_hook(lambda _, args: feats_of_model.append(args[0]))
        predict(m)
    known, unknown = feats_of_model
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in known)
    assert all(x.is_contiguous() for x in unknown)
    assert model.roi_head.mask_roi_extractor.channels_last and not model.roi_head.bbox_roi_extractor.channels_last
    assert optimize(build('demo/cascade')).roi_head.bbox_roi_extractor[0].channels_last
    for f, e in zip(known, unknown):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)


def test_mmdets_roi_align_gets_contiguous_features():
    for extractor in (CPURoIExtractor, FP32RoIExtractor):
        module = extractor(dict(type='RoIAlign', output_size=7, sampling_ratio=0), 32, [4, 8])
        feats = [torch.rand(1, 32, 20, 30), torch.rand(1, 32, 10, 15)]
        rois = torch.tensor([[0, 3.0, 4.0, 90.0, 60.0], [0, 1.0, 2.0, 119.0, 79.0]])
        with dispatch.disabled():
            expected = module(feats, rois, 1.2)
            channels_last_output = module([x.contiguous(memory_format=torch.channels_last) for x in feats], rois, 1.2)
        assert torch.equal(channels_last_output, expected)
        torch.testing.assert_close(module(feats, rois, 1.2), expected, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_unsupported_inputs_fall_back_to_mmcv(monkeypatch):
    calls = Calls(monkeypatch)
    feats, rois = [torch.rand(1, 32, 20, 30)], torch.tensor([[0, 3.0, 4.0, 90.0, 60.0]])

    def build_extractor(**changes):
        return CPURoIExtractor(dict(type='RoIAlign', output_size=7) | changes, 32, [4])

    build_extractor()(feats, rois)
    assert calls.names == ['roi_align']
    hooked = build_extractor()
    hooked.roi_layers[0].register_forward_hook(lambda *args: None)
    patched = build_extractor()
    patched.roi_layers[0].forward = type(patched.roi_layers[0]).forward.__get__(patched.roi_layers[0])
    for extractor, inputs in (
        (build_extractor(pool_mode='max'), feats),
        (hooked, feats),
        (patched, feats),
        (CPURoIExtractor(dict(type='RoIAlign', output_size=7), 8, [4]), [feats[0][:, :8]]),
    ):
        assert extractor(inputs, rois).shape == (1, extractor.out_channels, 7, 7)
    with dispatch.disabled():
        build_extractor()(feats, rois)
    roi_feats = build_extractor()([feats[0].double()], rois)
    assert roi_feats.dtype == torch.float64 and calls.names == ['roi_align']


def test_hooks_on_fused_modules_fire():
    model = optimize(build('demo/upernet'))
    expected, hooked_types = predict(model), []
    head = model.decode_head
    for module in (head.fpn_bottleneck, head.bottleneck.conv, head.lateral_convs[0].bn, head.psp_modules[0][1]):
        module.register_forward_hook(lambda module, _, out: hooked_types.append(type(module)))
    torch.testing.assert_close(predict(model), expected, rtol=1e-3, atol=1e-3)
    assert len(hooked_types) == 4


@pytest.mark.parametrize('name', ['demo/mask_rcnn', 'demo/upernet'])
def test_other_dtypes_and_disabled_operators_fall_back(name, monkeypatch):
    calls, model = Calls(monkeypatch), optimize(build(name))
    with dispatch.disabled():
        expected = predict(model)
    assert calls.names == []
    if 'upernet' in name:
        double = model.double()(make_image().double(), mode='tensor')
        assert double.dtype == torch.float64 and calls.names == []
    else:
        assert len(expected)


def test_subclasses_are_not_replaced_and_copies_stay_optimized():
    from mmseg.models import UPerHead

    class MyHead(UPerHead):
        pass

    model = build('demo/upernet')
    model.decode_head.__class__ = MyHead
    optimize(model)
    assert type(model.decode_head) is MyHead and type(model.decode_head.fpn_bottleneck) is FusedConvModule
    model = optimize(optimize(build('demo/upernet')))
    for model_copy in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(model_copy.decode_head) is FusedUPerHead
        assert torch.equal(predict(model_copy), predict(model))


# ---- NMS -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'settings', [{}, dict(score_threshold=0.5), dict(max_num=7), dict(offset=1, max_num=3)], ids=str
)
def test_nms_equals_mmcv(settings):
    from mmcv.ops import batched_nms
    from mmcv.ops import nms as mmcv_nms

    torch.manual_seed(0)
    corners, scores, labels = torch.rand(300, 2) * 50, torch.rand(300), torch.randint(3, (300,))
    boxes = torch.cat([corners, corners + torch.rand(300, 2) * 40], 1)
    for actual, expected in zip(nms(boxes, scores, 0.4, **settings), mmcv_nms(boxes, scores, 0.4, **settings)):
        assert torch.equal(actual, expected)
    configs = (dict(type=kind, iou_threshold=0.4, **settings) for kind in (nms, 'nms'))
    for actual, expected in zip(*(batched_nms(boxes, scores, labels, cfg) for cfg in configs)):
        assert torch.equal(actual, expected)
    arrays = nms(boxes.numpy(), scores.numpy(), 0.4)  # falls back to mmcv
    assert torch.equal(torch.from_numpy(arrays[1]), nms(boxes, scores, 0.4)[1])
    assert len(nms(boxes[:0], scores[:0], 0.4)[1]) == 0


def test_nms_configs_are_copied():
    model = build('demo/mask_rcnn')
    before = model.test_cfg, copy.deepcopy(model.test_cfg), model.rpn_head.test_cfg
    optimize(model)
    assert model.test_cfg.rcnn.nms.type is nms and model.rpn_head.test_cfg.nms.type is nms
    assert model.train_cfg.rpn_proposal.nms.type is nms
    assert before[0] == before[1] and before[2].nms.type == 'nms' and isinstance(model.test_cfg, ConfigDict)


def test_soft_nms_is_not_replaced():
    model = build('demo/mask_rcnn')
    model.roi_head.test_cfg = ConfigDict(nms=dict(type='soft_nms', iou_threshold=0.5))
    optimize(model)
    assert model.roi_head.test_cfg.nms.type == 'soft_nms'


def test_kernels_are_available():
    """A machine with the backbone's kernels has those of the heads."""
    assert head_kernels.available() or not avx512.dtypes()
    assert box_ops.DTYPES == upsampled_conv.DTYPES
