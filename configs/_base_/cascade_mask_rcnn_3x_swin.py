"""Cascade Mask R-CNN with a Swin backbone, 3x, as in SwinTransformer/Swin-Transformer-Object-Detection."""

_base_ = ['cascade_mask_rcnn_3x.py', 'swin.py']
custom_imports = dict(
    imports=['convnext_dense', 'convnext_dense.models.fp32_heads', 'convnext_dense.models.swin_detection']
)

model = dict(backbone=dict(_base_.swin, _delete_=True))
optim_wrapper = dict(
    _delete_=True,
    type='AmpOptimWrapper',
    paramwise_cfg=_base_.swin_decay,
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
