"""UperNet, ConvNeXt-B from DINOv3, 512 x 512; untrained: no result was published. All else is convnext_b.py's."""

_base_ = 'convnext_b.py'

model = dict(backbone=dict(init_cfg=dict(checkpoint='hf-hub:timm/convnext_base.dinov3_lvd1689m')))
