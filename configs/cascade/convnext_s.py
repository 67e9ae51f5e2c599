"""Cascade Mask R-CNN, ConvNeXt-S from ImageNet-1K, 3x; in the paper (table 3): 51.9 box AP, 45.0 mask AP."""

_base_ = ['../_base_/cascade_mask_rcnn_3x.py', '../_base_/coco.py']

model = dict(
    backbone=dict(
        arch='small', drop_path_rate=0.6, init_cfg=dict(type='Pretrained', checkpoint='convnext_small_1k_224')
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4), paramwise_cfg=dict(decay_rate=0.7))
