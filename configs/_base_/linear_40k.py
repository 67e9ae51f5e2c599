"""A linear head on the last feature map of a frozen backbone, 40,000 iterations, as Meta evaluated DINOv3 on ADE20K.

facebookresearch/dinov3 (6876159), config-ade20k-linear-training.yaml; that the published rows were trained with
exactly this file is not stated. The feature map has stride 32 and goes through the final norm of the weights. In its
first 1500 iterations the original lowers the lr by up to 3.5 % more; mmengine's schedulers have no such term.
"""

_base_ = 'upernet_160k.py'
custom_imports = dict(imports=['convnext_dense', 'convnext_dense.models.linear_head'])

model = dict(
    backbone=dict(
        drop_path_rate=0.0,
        out_indices=[3],
        frozen_stages=4,
        init_cfg=dict(type='Pretrained', final_norm='reuse'),
    ),
    decode_head=dict(
        _delete_=True,
        type='LinearHead',
        in_channels=768,
        num_classes=150,
        dropout_ratio=0.1,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=None,
)

optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    # Of the backbone only the final norm has gradients; it stays as it is too.
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.0, decay_mult=0.0))),
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-3),
)
train_cfg = dict(max_iters=40000, val_interval=5000)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1501),
    dict(type='CosineAnnealingLR', T_max=40000, eta_min=0.0, by_epoch=False, begin=0, end=40001),
]
default_hooks = dict(checkpoint=dict(interval=5000))
