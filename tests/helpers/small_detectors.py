"""Small detectors of mmdet on a ConvNeXt with made weights, which find something in noise."""

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from convnext_dense.inference.checkpoint_config import ModelSource
from convnext_dense.inference.model import Predictor
from helpers.checkpoints import CLASSES
from helpers.paths import ROOT
from helpers.weights import load_random_weights

BACKBONE = dict(type='ConvNeXt', arch=dict(depths=(1, 1, 1, 1), channels=(40, 80, 160, 320)))
LEVELS = [8, 16, 32]
NMS = dict(type='nms', iou_threshold=0.5)
TEST_CFG = dict(nms_pre=200, min_bbox_size=0, score_thr=0.05, nms=NMS, max_per_img=50, mask_thr_binary=0.5)
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
    'FCOS': dict(HEAD, type='FCOSHead', strides=LEVELS, norm_cfg=NORM, centerness_on_reg=True),
    'GFL': dict(HEAD, type='GFLHead', anchor_generator=ONE_ANCHOR, norm_cfg=NORM),
    'FSAF': dict(HEAD, type='FSAFHead', anchor_generator=ONE_ANCHOR, reg_decoded_bbox=True),
    'RTMDet': dict(HEAD, type='RTMDetHead', **RTMDET),
    'RTMDet with its own norms': dict(HEAD, type='RTMDetSepBNHead', exp_on_reg=True, **RTMDET),
    'RTMDet-Ins': dict(HEAD, type='RTMDetInsHead', **RTMDET),
    'RTMDet-Ins with its own norms': dict(HEAD, type='RTMDetInsSepBNHead', **RTMDET),
    'RetinaNet with its own norms': dict(
        HEAD, type='RetinaSepBNHead', num_ins=3, norm_cfg=dict(type='BN'), anchor_generator=ANCHORS
    ),
    'FreeAnchor': dict(HEAD, type='FreeAnchorRetinaHead', anchor_generator=ANCHORS),
    'PISA': dict(HEAD, type='PISARetinaHead', anchor_generator=ANCHORS),
    'AutoAssign': dict(HEAD, type='AutoAssignHead', strides=LEVELS, norm_cfg=NORM),
    'CenterNet': dict(HEAD, type='CenterNetUpdateHead', strides=LEVELS, norm_cfg=NORM),
    'DDOD': dict(HEAD, type='DDODHead', use_dcn=False, anchor_generator=ONE_ANCHOR, norm_cfg=NORM),
    'LD': dict(
        HEAD,
        type='LDHead',
        anchor_generator=ONE_ANCHOR,
        norm_cfg=NORM,
        loss_ld=dict(type='KnowledgeDistillationKLDivLoss', T=10),
    ),
    'YOLOF': dict(
        type='YOLOFHead',
        num_classes=4,
        in_channels=64,
        anchor_generator=dict(type='AnchorGenerator', ratios=[1.0], scales=[1, 2, 4], strides=[32]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', add_ctr_clamp=True, ctr_clamp=32),
    ),
    'YOLOX': dict(HEAD, type='YOLOXHead', strides=LEVELS),
    'PAA': dict(HEAD, type='PAAHead', anchor_generator=ONE_ANCHOR, norm_cfg=NORM, score_voting=False),
    'PAA with score voting': dict(HEAD, type='PAAHead', anchor_generator=ONE_ANCHOR, norm_cfg=NORM),
    'LAD': dict(HEAD, type='LADHead', anchor_generator=ONE_ANCHOR, norm_cfg=NORM),
}
ONE_LEVEL = dict(  # of YOLOF
    backbone=dict(BACKBONE, out_indices=[3]),
    neck=dict(
        type='DilatedEncoder',
        in_channels=320,
        out_channels=64,
        block_mid_channels=32,
        num_residual_blocks=2,
        block_dilations=[2, 4],
    ),
)


DN = dict(label_noise_scale=0.5, box_noise_scale=1.0, group_cfg=dict(dynamic=True, num_dn_queries=10))
TWO_STAGE = dict(num_feature_levels=3, with_box_refine=True, as_two_stage=True)
DETRS = {
    'DETR': {},
    'DeformableDETR': dict(num_feature_levels=3),
    'DeformableDETR with proposals': TWO_STAGE,
    'DINO': dict(TWO_STAGE, type='DetrexDINO', dn_cfg=DN),
}

M2F_PARTS = 'pixel_decoder', 'positional_encoding', 'transformer_decoder'


def one_stage(name, **test_cfg):
    """The config of a model of the table, with options of its test."""
    model = Config.fromfile(ROOT / 'configs/demo/mask_rcnn.py').model
    neck = dict(type='FPN', in_channels=[80, 160, 320], out_channels=64, num_outs=3)
    cfg = dict(
        type='SingleStageDetector',
        data_preprocessor=dict(model.data_preprocessor, pad_mask=False),
        backbone=dict(BACKBONE, out_indices=[1, 2, 3]),
        neck=neck,
        bbox_head=ONE_STAGE[name],
        test_cfg=dict(TEST_CFG, **test_cfg),
    )
    return cfg | ONE_LEVEL if name == 'YOLOF' else cfg


def detr(name, pad_size_divisor=32):
    """The config of a DETR, Deformable DETR or DINO."""
    model = Config.fromfile(ROOT / 'configs/demo/mask_rcnn.py').model
    # DETRHead writes into the default of its argument.
    loss = dict(SOFTMAX, class_weight=1.0) if name == 'DETR' else dict(type='FocalLoss', use_sigmoid=True)
    dims = 256 if 'proposals' in name else 64  # mmdet has fixed their encoding
    self_attn, ffn = dict(embed_dims=dims, num_heads=4), dict(embed_dims=dims, feedforward_channels=96)
    deformable = dict(embed_dims=dims, num_heads=4, num_levels=3)
    if name == 'DETR':
        encoder, cross, out = self_attn, self_attn, dict(in_channels=[320], num_outs=1)
    else:
        encoder, cross, out = deformable, deformable, dict(in_channels=[160, 320], num_outs=3)
    cfg = dict(
        type=name.partition(' ')[0],
        num_queries=20,
        data_preprocessor=dict(model.data_preprocessor, pad_mask=False, pad_size_divisor=pad_size_divisor),
        backbone=dict(BACKBONE, out_indices=[2, 3][-len(out['in_channels']) :]),
        neck=dict(type='ChannelMapper', kernel_size=1, out_channels=dims, norm_cfg=NORM, act_cfg=None, **out),
        encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=encoder, ffn_cfg=ffn)),
        decoder=dict(
            num_layers=2,
            return_intermediate=True,
            **({} if name == 'DETR' else dict(post_norm_cfg=None)),
            layer_cfg=dict(self_attn_cfg=self_attn, cross_attn_cfg=cross, ffn_cfg=ffn),
        ),
        positional_encoding=dict(num_feats=dims // 2, normalize=True, offset=-0.5),
        bbox_head=dict(type=f'{name.partition(" ")[0]}Head', num_classes=4, embed_dims=dims, loss_cls=loss),
        test_cfg=dict(max_per_img=15),
    )
    return cfg | DETRS[name]


def mask2former():
    """The config of the recipe of Mask2Former for instances, with the sizes of the demo."""
    model = Config.fromfile(ROOT / 'configs/mask2former/convnext_b_in22k_coco.py').model
    sizes = Config.fromfile(ROOT / 'configs/demo/mask2former.py').model.decode_head
    model.backbone, head = BACKBONE, model.panoptic_head
    for key in ('in_channels', 'feat_channels', 'out_channels', 'num_queries', *M2F_PARTS):
        head[key] = sizes[key]
    head.loss_cls.class_weight = [1.0] * 4 + [0.1]
    head.num_things_classes = model.panoptic_fusion_head.num_things_classes = 4
    model.test_cfg.max_per_image = 30
    return model


def build_predictor(model_cfg, recipe='mask_rcnn'):
    """A predictor of a model with made weights; what is no part of the model is a demo recipe's."""
    config = Config.fromfile(ROOT / f'configs/demo/{recipe}.py')
    init_default_scope(config.default_scope)
    config.model = model_cfg
    model = MODELS.build(config.model).eval()
    load_random_weights(model)
    if hasattr(getattr(model, 'bbox_head', None), 'conv_reg'):
        model.bbox_head.conv_reg.bias.data += 2  # distances, of which some heads clamp negative ones
    if hasattr(getattr(model, 'bbox_head', None), 'rtm_kernel'):
        _predict_diamonds(model.bbox_head)
    source = ModelSource(file='made.pth', config=config, task='detection', classes=CLASSES[recipe], palette=())
    return Predictor(model, source, 'cpu')


def _predict_diamonds(head):
    """Let an RTMDetInsHead predict masks of some pixels around the prior; weights change them."""
    first = torch.zeros(8, 10)
    first[:4, :2] = torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]])  # of the distance, and ReLU
    parts = first, torch.eye(8), torch.tensor([-1.0] * 4 + [0] * 4), torch.zeros(16), torch.tensor([0.5])
    convs = head.rtm_kernel if isinstance(head.rtm_kernel, torch.nn.ModuleList) else [head.rtm_kernel]
    for conv in convs:
        conv.bias.data = torch.cat([part.flatten() for part in parts])
