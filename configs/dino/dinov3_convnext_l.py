"""DINO-4scale, ConvNeXt-L from DINOv3, 12 epochs; untrained: no result was published. All else is convnext_l.py's."""

_base_ = 'convnext_l.py'

model = dict(backbone=dict(init_cfg=dict(checkpoint='hf-hub:timm/convnext_large.dinov3_lvd1689m')))
