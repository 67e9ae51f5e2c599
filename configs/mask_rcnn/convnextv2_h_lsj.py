"""Mask R-CNN, ConvNeXt V2-H from FCMAE, 3x, LSJ; in ConvNeXt V2's table 6: 55.7 box AP, 48.9 mask AP."""

_base_ = ['../_base_/mask_rcnn_3x_lsj.py', '../_base_/coco_lsj.py']

model = dict(
    backbone=dict(
        arch='huge',
        use_grn=True,
        init_cfg=dict(type='Pretrained', checkpoint='convnextv2_huge_1k_224_fcmae'),
    ),
    neck=dict(in_channels=[352, 704, 1408, 2816]),
)
