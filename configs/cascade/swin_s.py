"""Cascade Mask R-CNN, Swin-S from ImageNet-1K, 3x; in the paper (table 3): 51.9 box AP, 45.0 mask AP."""

_base_ = ['../_base_/cascade_mask_rcnn_3x_swin.py', '../_base_/coco.py']

model = dict(
    backbone=dict(
        embed_dims=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='swin_small_patch4_window7_224'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
