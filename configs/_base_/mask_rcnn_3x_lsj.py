"""Mask R-CNN, 3x, as ConvNeXt V2 trained it with large scale jittering, tested with soft-NMS (its appendix A.3).

The chosen layer decay (0.9 or 0.95) and drop path rate (0.2 to 0.5) were not published; 0.95 and 0.4 are those of
mmdet's reproduction of V2-B (projects/ConvNeXt-V2: 52.9 box AP, 46.4 mask AP), for other sizes this project's choice.
"""

_base_ = 'mask_rcnn_3x.py'

model = dict(
    backbone=dict(drop_path_rate=0.4),
    test_cfg=dict(rcnn=dict(nms=dict(type='soft_nms'))),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.95))
