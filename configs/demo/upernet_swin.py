"""The UperNet recipe with a Swin backbone, small: random weights, the embedded data set, minutes on two CPU cores."""

_base_ = ['../_base_/upernet_160k_swin.py', '../_base_/shapes_segmentation.py']

model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(embed_dims=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], drop_path_rate=0.0),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=64, num_classes=5),
    auxiliary_head=dict(in_channels=128, channels=32, num_classes=5),
)

optim_wrapper = dict(optimizer=dict(lr=1e-3))
train_cfg = dict(max_iters=400, val_interval=400)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=51),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=401),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=400))
randomness = dict(seed=0)
