"""Mask R-CNN, ConvNeXt V2-L from FCMAE, 3x, LSJ; in ConvNeXt V2's table 6: 54.4 box AP, 47.7 mask AP."""

_base_ = ['../_base_/mask_rcnn_3x_lsj.py', '../_base_/coco_lsj.py']

model = dict(
    backbone=dict(
        arch='large',
        use_grn=True,
        init_cfg=dict(type='Pretrained', checkpoint='convnextv2_large_1k_224_fcmae'),
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
