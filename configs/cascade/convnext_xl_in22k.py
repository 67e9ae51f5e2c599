"""Cascade Mask R-CNN, ConvNeXt-XL from ImageNet-22K, 3x, fp32; in the paper (table 3): 55.2 box AP, 47.7 mask AP."""

_base_ = ['../_base_/cascade_mask_rcnn_3x.py', '../_base_/coco.py']

model = dict(
    backbone=dict(
        arch='xlarge', drop_path_rate=0.8, init_cfg=dict(type='Pretrained', checkpoint='convnext_xlarge_22k_224')
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.7))
