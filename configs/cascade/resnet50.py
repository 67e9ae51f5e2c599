"""Cascade Mask R-CNN, R50 from ImageNet-1K, 3x; in the paper (table 3): 46.3 box AP, 40.1 mask AP."""

_base_ = ['../_base_/cascade_mask_rcnn_3x_resnet.py', '../_base_/coco.py']

model = dict(
    backbone=dict(
        depth=50,
        init_cfg=dict(type='Pretrained', checkpoint='https://download.pytorch.org/models/resnet50-0676ba61.pth'),
    )
)
