"""Cascade Mask R-CNN, Swin-T from ImageNet-1K, 3x; in the paper (table 3): 50.4 box AP, 43.7 mask AP."""

_base_ = ['../_base_/cascade_mask_rcnn_3x_swin.py', '../_base_/coco.py']

model = dict(
    backbone=dict(
        embed_dims=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='swin_tiny_patch4_window7_224'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
