"""DINO-4scale, ConvNeXt-T from ImageNet-22K and 1K at 384, 12 epochs; in detrex's README: 52.4 box AP."""

_base_ = ['../_base_/dino_12e.py', '../_base_/coco_detr.py']

model = dict(backbone=dict(arch='tiny', init_cfg=dict(type='Pretrained', checkpoint='convnext_tiny_22k_1k_384')))
