"""A linear head on the frozen ConvNeXt-B of DINOv3, 512 x 512; in DINOv3's model card: 46.3 mIoU."""

_base_ = ['../_base_/linear_40k.py', '../_base_/ade20k_linear.py']

model = dict(
    backbone=dict(arch='base', init_cfg=dict(checkpoint='hf-hub:timm/convnext_base.dinov3_lvd1689m')),
    decode_head=dict(in_channels=1024),
)
