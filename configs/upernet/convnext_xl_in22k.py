"""UperNet, ConvNeXt-XL from ImageNet-22K, 640 x 640; in the paper: 53.6 mIoU single scale (table 7), 54.0 multi (4)."""

_base_ = ['../_base_/upernet_160k_640.py', '../_base_/ade20k_640.py']

model = dict(
    backbone=dict(
        arch='xlarge', drop_path_rate=0.4, init_cfg=dict(type='Pretrained', checkpoint='convnext_xlarge_22k_224')
    ),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(lr=8e-5), paramwise_cfg=dict(decay_rate=0.9))
