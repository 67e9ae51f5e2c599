"""UperNet, ConvNeXt-S from ImageNet-1K, 512 x 512; in the paper: 48.7 mIoU single scale (table 7), 49.6 multi (4)."""

_base_ = ['../_base_/upernet_160k.py', '../_base_/ade20k.py']

model = dict(
    backbone=dict(
        arch='small', drop_path_rate=0.3, init_cfg=dict(type='Pretrained', checkpoint='convnext_small_1k_224')
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.9))
