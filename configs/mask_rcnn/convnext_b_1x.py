"""Mask R-CNN, ConvNeXt-B from ImageNet-1K, 1x; in VMamba's table: 47.0 box AP, 42.7 mask AP.

VMamba's settings for ConvNeXt were not published: lr and layer decay here are those of the paper's Mask R-CNN row, the
drop path rate is about half of that of 3x, both this project's choice.
"""

_base_ = ['../_base_/mask_rcnn_1x.py', '../_base_/coco_single_scale.py']

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint='convnext_base_1k_224'),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.95))
