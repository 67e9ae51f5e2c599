"""DINO-4scale, ConvNeXt-S from DINOv3, 12 epochs; untrained: no result was published. All else is convnext_s.py's."""

_base_ = 'convnext_s.py'

model = dict(backbone=dict(init_cfg=dict(checkpoint='hf-hub:timm/convnext_small.dinov3_lvd1689m')))
