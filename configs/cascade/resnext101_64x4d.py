"""Cascade Mask R-CNN, X101-64x4d from ImageNet-1K, 3x; in the paper (table 3): 48.3 box AP, 41.7 mask AP."""

_base_ = 'resnext101_32x4d.py'

model = dict(
    backbone=dict(
        groups=64,
        init_cfg=dict(checkpoint='https://mmassets.onedl.ai/pretrain/third_party/resnext101_64x4d-ee2c6f71.pth'),
    )
)
