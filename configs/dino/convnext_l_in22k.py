"""DINO-4scale, ConvNeXt-L from ImageNet-22K and 1K at 384, 12 epochs; in detrex's README: 55.5 box AP."""

_base_ = ['../_base_/dino_12e.py', '../_base_/coco_detr.py']

model = dict(
    backbone=dict(arch='large', init_cfg=dict(type='Pretrained', checkpoint='convnext_large_22k_1k_384')),
    neck=dict(in_channels=[384, 768, 1536]),
)
