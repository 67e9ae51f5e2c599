"""A linear head on the frozen ConvNeXt-S of DINOv3, 512 x 512; in DINOv3's model card: 44.8 mIoU."""

_base_ = ['../_base_/linear_40k.py', '../_base_/ade20k_linear.py']

model = dict(
    backbone=dict(arch='small', init_cfg=dict(checkpoint='hf-hub:timm/convnext_small.dinov3_lvd1689m')),
    decode_head=dict(in_channels=768),
)
