"""DINO-4scale, ConvNeXt-T from DINOv3, 12 epochs; untrained: no result was published. All else is convnext_t.py's."""

_base_ = 'convnext_t.py'

model = dict(backbone=dict(init_cfg=dict(checkpoint='hf-hub:timm/convnext_tiny.dinov3_lvd1689m')))
