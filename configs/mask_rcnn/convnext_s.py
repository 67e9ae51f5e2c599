"""Mask R-CNN, ConvNeXt-S from ImageNet-1K, 3x; in VMamba's table: 47.9 box AP, 42.9 mask AP.

VMamba's settings for ConvNeXt were not published: lr and layer decay here are those of the paper's Mask R-CNN row, the
drop path rate is that of its Cascade Mask R-CNN, both this project's choice.
"""

_base_ = ['../_base_/mask_rcnn_3x.py', '../_base_/coco.py']

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.6,
        init_cfg=dict(type='Pretrained', checkpoint='convnext_small_1k_224'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.95))
