"""Cascade Mask R-CNN, X101-64x4d from ImageNet-1K, 3x; in the paper (table 3): 48.3 box AP, 41.7 mask AP."""

_base_ = ['../_base_/cascade_mask_rcnn_3x_resnet.py', '../_base_/coco.py']

model = dict(
    backbone=dict(
        type='ResNeXt',
        depth=101,
        groups=64,
        base_width=4,
        init_cfg=dict(
            type='Pretrained', checkpoint='https://mmassets.onedl.ai/pretrain/third_party/resnext101_64x4d-ee2c6f71.pth'
        ),
    )
)
