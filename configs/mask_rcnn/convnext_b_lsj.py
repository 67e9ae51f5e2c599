"""Mask R-CNN, ConvNeXt-B from ImageNet-1K, 3x, LSJ; in ConvNeXt V2's table 6: 50.3 box AP, 44.9 mask AP."""

_base_ = ['../_base_/mask_rcnn_3x_lsj.py', '../_base_/coco_lsj.py']

model = dict(
    backbone=dict(
        arch='base',
        init_cfg=dict(type='Pretrained', checkpoint='convnext_base_1k_224'),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
