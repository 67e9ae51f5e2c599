"""The Cascade Mask R-CNN recipe, small: random weights, the embedded data set, minutes on two CPU cores."""

_base_ = ['../_base_/cascade_mask_rcnn_3x.py', '../_base_/shapes_detection.py']

small = dict(num_shared_convs=1, in_channels=64, conv_out_channels=64, fc_out_channels=256, num_classes=4)
model = dict(
    backbone=dict(arch='atto', drop_path_rate=0.0),
    neck=dict(in_channels=[40, 80, 160, 320], out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=[{**head, **small} for head in _base_.model.roi_head.bbox_head],
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(in_channels=64, conv_out_channels=64, num_classes=4),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=[{**stage, 'sampler': {**stage.sampler, 'num': 64}} for stage in _base_.model.train_cfg.rcnn],
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)

optim_wrapper = dict(type='OptimWrapper', optimizer=dict(lr=3e-4), paramwise_cfg=dict(decay_rate=0.95))
train_cfg = dict(max_epochs=4, val_interval=4)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=101),
    dict(type='MultiStepLR', by_epoch=True, milestones=[3], gamma=0.1, begin=0, end=4),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=4))
randomness = dict(seed=0)
