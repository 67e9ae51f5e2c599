"""UperNet, ConvNeXt-B from ImageNet-22K, 640 x 640; in the paper: 52.6 mIoU single scale (table 7), 53.1 multi (4)."""

_base_ = ['../_base_/upernet_160k_640.py', '../_base_/ade20k_640.py']

model = dict(
    backbone=dict(
        arch='base', drop_path_rate=0.4, init_cfg=dict(type='Pretrained', checkpoint='convnext_base_22k_224')
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.9))
