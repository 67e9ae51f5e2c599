"""UperNet, Swin-S from ImageNet-1K, 512 x 512; in the paper (table 4): 49.5 mIoU multi-scale.

Single scale 47.64 mIoU by the README of Swin's authors.
"""

_base_ = ['../_base_/upernet_160k_swin.py', '../_base_/ade20k.py']

model = dict(
    backbone=dict(
        embed_dims=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='swin_small_patch4_window7_224'),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
