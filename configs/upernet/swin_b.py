"""UperNet, Swin-B from ImageNet-1K, 512 x 512; in the paper (table 4): 49.7 mIoU multi-scale.

Single scale 48.13 mIoU by the README of Swin's authors.
"""

_base_ = ['../_base_/upernet_160k_swin.py', '../_base_/ade20k.py']

model = dict(
    backbone=dict(
        embed_dims=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='swin_base_patch4_window7_224'),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
