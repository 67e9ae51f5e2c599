"""Small detectors of mmdet on a ConvNeXt with made weights, which find something in noise."""

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from convnext_dense.inference.checkpoint_config import ModelSource
from convnext_dense.inference.model import Predictor
from helpers.checkpoints import CLASSES
from helpers.paths import ROOT
from helpers.weights import load_random_weights

LEVELS = [8, 16, 32, 64, 128]
NMS = dict(type='nms', iou_threshold=0.5)
TEST_CFG = dict(nms_pre=200, min_bbox_size=0, score_thr=0.05, nms=NMS, max_per_img=50)
ANCHORS = dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=2, ratios=[0.5, 1.0], strides=LEVELS)
ONE_ANCHOR = dict(ANCHORS, scales_per_octave=1, octave_base_scale=8, ratios=[1.0])
NORM = dict(type='GN', num_groups=8)
HEAD = dict(num_classes=4, in_channels=64, feat_channels=64, stacked_convs=1)
RTMDET = dict(
    anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=LEVELS),
    bbox_coder=dict(type='DistancePointBBoxCoder'),
    loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True),
    with_objectness=False,
    pred_kernel_size=1,
    norm_cfg=dict(type='BN'),
)
SOFTMAX = dict(type='CrossEntropyLoss', use_sigmoid=False)
ONE_STAGE = {
    'RetinaNet': dict(HEAD, type='RetinaHead', anchor_generator=ANCHORS),
    'RetinaNet with softmax': dict(HEAD, type='RetinaHead', anchor_generator=ANCHORS, loss_cls=SOFTMAX),
    'ATSS': dict(HEAD, type='ATSSHead', anchor_generator=ONE_ANCHOR, norm_cfg=NORM),
    'FCOS': dict(HEAD, type='FCOSHead', strides=LEVELS, norm_cfg=NORM, norm_on_bbox=True, centerness_on_reg=True),
    'GFL': dict(HEAD, type='GFLHead', anchor_generator=ONE_ANCHOR, norm_cfg=NORM),
    'FSAF': dict(HEAD, type='FSAFHead', anchor_generator=ONE_ANCHOR, reg_decoded_bbox=True),
    'RTMDet': dict(HEAD, type='RTMDetHead', **RTMDET),
    'RTMDet with its own norms': dict(HEAD, type='RTMDetSepBNHead', exp_on_reg=True, **RTMDET),
}



def one_stage(name, **test_cfg):
    """The config of a model of the table, with options of its test."""
    model = Config.fromfile(ROOT / 'configs/demo/mask_rcnn.py').model
    neck = dict(type='FPN', in_channels=[80, 160, 320], out_channels=64, add_extra_convs='on_output', num_outs=5)
    return dict(
        type='SingleStageDetector',
        data_preprocessor=dict(model.data_preprocessor, pad_mask=False),
        backbone=dict(model.backbone, out_indices=[1, 2, 3]),
        neck=neck,
        bbox_head=ONE_STAGE[name],
        test_cfg=dict(TEST_CFG, **test_cfg),
    )


def build_predictor(model_cfg, recipe='mask_rcnn'):
    """A predictor of a model with made weights; what is no part of the model is a demo recipe's."""
    config = Config.fromfile(ROOT / f'configs/demo/{recipe}.py')
    init_default_scope(config.default_scope)
    config.model = model_cfg
    model = MODELS.build(config.model).eval()
    load_random_weights(model)
    source = ModelSource(file='made.pth', config=config, task='detection', classes=CLASSES[recipe], palette=())
    return Predictor(model, source, 'cpu')
