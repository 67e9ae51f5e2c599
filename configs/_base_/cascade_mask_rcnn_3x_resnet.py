"""Cascade Mask R-CNN with a ResNet or ResNeXt backbone, 3x, trained with AdamW as in the Swin paper's table 9.

No config was published. The settings are those of the Swin paper, 4.2 and A2.2: AdamW, lr 1e-4, weight decay 0.05, the
same images and schedule; that the heads are the same follows from its FLOPs. What it does not say is this project's
choice: batch norms with fixed statistics and a frozen stem and first stage, as mmdet does by default; weight decay on
every parameter; crops among the augmentations; mixed precision.
"""

_base_ = 'cascade_mask_rcnn_3x.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=True,
        style='pytorch',
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
optim_wrapper = dict(
    _delete_=True,
    type='AmpOptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
