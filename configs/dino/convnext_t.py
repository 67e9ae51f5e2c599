"""DINO-4scale, ConvNeXt-T from ImageNet-1K, 12 epochs; in detrex's README: 51.4 box AP.

detrex says "384", but of this size no weights from ImageNet-1K alone were published at 384, and its config names those
from ImageNet-22K: the file here is this project's choice.
"""

_base_ = ['../_base_/dino_12e.py', '../_base_/coco_detr.py']

model = dict(backbone=dict(arch='tiny', init_cfg=dict(type='Pretrained', checkpoint='convnext_tiny_1k_224_ema')))
