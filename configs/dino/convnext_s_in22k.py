"""DINO-4scale, ConvNeXt-S from ImageNet-22K and 1K at 384, 12 epochs; in detrex's README: 54.2 box AP."""

_base_ = ['../_base_/dino_12e.py', '../_base_/coco_detr.py']

model = dict(backbone=dict(arch='small', init_cfg=dict(type='Pretrained', checkpoint='convnext_small_22k_1k_384')))
