"""UperNet, ConvNeXt-B from ImageNet-1K, 512 x 512; in the paper: 49.1 mIoU single scale (table 7), 49.9 multi (4)."""

_base_ = ['../_base_/upernet_160k.py', '../_base_/ade20k.py']

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.4, init_cfg=dict(type='Pretrained', checkpoint='convnext_base_1k_224')),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.9))
