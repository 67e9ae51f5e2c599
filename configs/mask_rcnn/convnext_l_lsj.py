"""Mask R-CNN, ConvNeXt-L from ImageNet-1K, 3x, LSJ; in ConvNeXt V2's table 6: 50.6 box AP, 45.1 mask AP."""

_base_ = ['../_base_/mask_rcnn_3x_lsj.py', '../_base_/coco_lsj.py']

model = dict(
    backbone=dict(
        arch='large',
        init_cfg=dict(type='Pretrained', checkpoint='convnext_large_1k_224_ema'),
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
