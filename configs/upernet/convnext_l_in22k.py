"""UperNet, ConvNeXt-L from ImageNet-22K, 640 x 640; in the paper: 53.2 mIoU single scale (table 7), 53.7 multi (4)."""

_base_ = ['../_base_/upernet_160k_640.py', '../_base_/ade20k_640.py']

model = dict(
    backbone=dict(
        arch='large', drop_path_rate=0.4, init_cfg=dict(type='Pretrained', checkpoint='convnext_large_22k_224')
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.9))
