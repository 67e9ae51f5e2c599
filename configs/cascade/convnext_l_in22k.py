"""Cascade Mask R-CNN, ConvNeXt-L from ImageNet-22K, 3x, fp32; in the paper (table 3): 54.8 box AP, 47.6 mask AP."""

_base_ = ['../_base_/cascade_mask_rcnn_3x.py', '../_base_/coco.py']

model = dict(
    backbone=dict(
        arch='large', drop_path_rate=0.7, init_cfg=dict(type='Pretrained', checkpoint='convnext_large_22k_224')
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.7))
