"""Mask R-CNN, 1x: 12 epochs with steps at 8 and 11."""

_base_ = 'mask_rcnn_3x.py'

train_cfg = dict(max_epochs=12)
# As the 3x: 501 makes 500 steps.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=501),
    dict(type='MultiStepLR', by_epoch=True, milestones=[8, 11], gamma=0.1, begin=0, end=12),
]
