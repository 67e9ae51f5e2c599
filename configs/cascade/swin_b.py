"""Cascade Mask R-CNN, Swin-B from ImageNet-1K, 3x; in the paper (table 3): 51.9 box AP, 45.0 mask AP."""

_base_ = ['../_base_/cascade_mask_rcnn_3x_swin.py', '../_base_/coco.py']

model = dict(
    backbone=dict(
        embed_dims=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='swin_base_patch4_window7_224'),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
