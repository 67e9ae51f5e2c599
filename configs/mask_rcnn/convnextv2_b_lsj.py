"""Mask R-CNN, ConvNeXt V2-B from FCMAE, 3x, LSJ; in ConvNeXt V2's table 6: 52.9 box AP, 46.6 mask AP."""

_base_ = ['../_base_/mask_rcnn_3x_lsj.py', '../_base_/coco_lsj.py']

model = dict(
    backbone=dict(
        arch='base',
        use_grn=True,
        init_cfg=dict(type='Pretrained', checkpoint='convnextv2_base_1k_224_fcmae'),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
