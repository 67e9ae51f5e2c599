"""Under autocast, proposals, RoIs, RoI features and losses of the detectors stay fp32; mmdet's own heads round them."""

import pytest
import torch
from mmcv.ops import batched_nms
from mmdet.models import RPNHead, SingleRoIExtractor
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

from convnext_dense.models.fp32_heads import FP32RoIExtractor, FP32RPNHead
from helpers.recipes import load

DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True, scope='module')
def mmdet_scope():
    register_all_modules(init_default_scope=False)
    init_default_scope('mmdet')


class Recorder(torch.nn.Module):
    """Replaces RoIAlign, whose CPU kernel supports fp32 only, and records its RoIs."""

    output_size = (7, 7)

    def __init__(self):
        super().__init__()
        self.rois = []

    def forward(self, feat, rois):
        self.rois.append(rois)
        return feat.new_zeros(len(rois), feat.shape[1], 7, 7)


@pytest.mark.parametrize('dtype', DTYPES)
def test_roi_coordinates_stay_exact(dtype):
    settings = dict(
        roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0), out_channels=8, featmap_strides=[4, 8]
    )
    feats = [torch.rand(1, 8, 64, 400, dtype=dtype), torch.rand(1, 8, 32, 200, dtype=dtype)]
    rois = torch.tensor([[0, 1277.3, 10.2, 1391.7, 99.9], [0, 1277.3, 0.1, 1599.1, 250.3]])
    rois_of_class = {}
    for cls in (SingleRoIExtractor, FP32RoIExtractor):
        module = cls(**settings)
        module.roi_layers = torch.nn.ModuleList([Recorder(), Recorder()])
        with torch.autocast('cpu', dtype):
            module(feats, rois)
        rois_of_class[cls] = torch.cat([roi for layer in module.roi_layers for roi in layer.rois])
    assert rois_of_class[FP32RoIExtractor].dtype == torch.float32
    assert (rois_of_class[FP32RoIExtractor][:, 1] - 1277.3).abs().max() < 1e-3
    assert (rois_of_class[SingleRoIExtractor][:, 1].float() - 1277.3).abs().min() > 0.1
    with torch.autocast('cpu', dtype):
        features = FP32RoIExtractor(**settings)(feats, rois)
    reference = SingleRoIExtractor(**settings)([m.float() for m in feats], rois)
    assert features.dtype == torch.float32 and torch.equal(features, reference)


def test_any_memory_format_gives_same_features():
    module = FP32RoIExtractor(
        roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0), out_channels=8, featmap_strides=[4]
    )
    feats, rois = torch.rand(1, 8, 20, 30), torch.tensor([[0, 3.0, 4.0, 90.0, 60.0]])
    assert torch.equal(module([feats], rois), module([feats.contiguous(memory_format=torch.channels_last)], rois))


@pytest.mark.parametrize('dtype', DTYPES)
def test_proposals_equal_fp32(dtype, monkeypatch):
    config = load('cascade/convnext_t').model
    settings = {k: v for k, v in config.rpn_head.items() if k != 'type'} | dict(test_cfg=config.test_cfg.rpn)
    torch.manual_seed(0)
    fp32_head, stock = FP32RPNHead(**settings), RPNHead(**settings)
    stock.load_state_dict(fp32_head.state_dict())
    boxes = []  # recorded: mmcv's CPU kernel supports fp32 only

    def nms(bboxes, scores, *args):
        boxes.append(bboxes)
        return batched_nms(bboxes.float(), scores.float(), *args)

    monkeypatch.setattr('mmdet.models.dense_heads.rpn_head.batched_nms', nms)
    feats = [torch.rand(1, 256, max(8 // 2**i, 1), 352 // 2**i) for i in range(5)]
    metas = [dict(img_shape=(32, 1408), scale_factor=(1, 1))]
    with torch.no_grad(), torch.autocast('cpu', dtype):
        outputs = stock(feats)
        for head in (fp32_head, stock):
            head.predict_by_feat(*head(feats), batch_img_metas=metas)
    assert outputs[0][0].dtype == dtype
    stock.predict_by_feat(*([x.detach().float() for x in xs] for xs in outputs), batch_img_metas=metas)
    fp32_head, stock, in_fp32 = boxes
    assert fp32_head.dtype == torch.float32 and torch.equal(fp32_head, in_fp32)
    beyond = stock.float()[stock > 1024]  # bfloat16 and float16 are integers there
    assert len(beyond) and torch.equal(beyond, beyond.round())
    assert not torch.equal(fp32_head[fp32_head > 1024], fp32_head[fp32_head > 1024].round())


@pytest.mark.parametrize('name', ['demo/mask_rcnn', 'demo/cascade'])
def test_a_training_step_under_autocast(name):
    """Every RoI, RoI feature and every head's output is fp32 in all stages, and only convolutions and Linears are
    not."""
    config = load(name)
    model = MODELS.build(config.model)
    boxes = torch.tensor([[5.3, 6.1, 60.7, 70.9], [30.2, 20.4, 90.8, 80.6]])
    sample = DetDataSample(metainfo=dict(img_shape=(96, 128), ori_shape=(96, 128), pad_shape=(96, 128)))
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 1]), masks=_masks(boxes, 96, 128))
    roi_head = model.roi_head
    is_cascade = hasattr(roi_head, 'num_stages')
    heads = [*(roi_head.bbox_head if is_cascade else [roi_head.bbox_head])]
    heads += [*(roi_head.mask_head if is_cascade else [roi_head.mask_head]), model.rpn_head]
    outputs, inner_dtypes, rois = [], set(), []
    for head in heads:
        head.register_forward_hook(lambda _, __, out: outputs.extend(_flat(out)))
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(lambda _, __, out: inner_dtypes.add(out.dtype))
        if type(module).__name__ == 'RoIAlign':
            module.register_forward_pre_hook(lambda _, args: rois.extend(args[:2]))
    with torch.autocast('cpu', torch.bfloat16):
        losses = model(torch.rand(1, 3, 96, 128), [sample], mode='loss')
    assert inner_dtypes == {torch.bfloat16}
    assert len(outputs) >= 2 * 5 + 3 and len(rois) >= 4
    assert {x.dtype for x in outputs} == {x.dtype for x in rois} == {torch.float32}
    values = [v for name, loss in losses.items() if 'loss' in name for v in _flat(loss)]
    assert all(v.dtype == torch.float32 and v.isfinite() for v in values)
    sum(values).backward()


def test_recipes_use_fp32_heads():
    for name in ('mask_rcnn/convnext_t', 'cascade/convnext_t'):
        model = load(name).model
        head = model.roi_head.bbox_head
        types = [model.rpn_head.type, model.roi_head.mask_head.type, (head[0] if isinstance(head, list) else head).type]
        types += [model.roi_head.bbox_roi_extractor.type, model.roi_head.mask_roi_extractor.type]
        assert all(kind.startswith('FP32') for kind in types), types


def _masks(boxes, height, width):
    from mmdet.structures.mask import BitmapMasks

    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
        mask[y0:y1, x0:x1] = 1
    return BitmapMasks(masks.numpy(), height, width)


def _flat(value):
    if isinstance(value, (tuple, list)):
        return [x for v in value for x in _flat(v)]
    return [value]
