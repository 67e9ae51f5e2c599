"""UperNet, Swin-B from ImageNet-22K, 640 x 640; in the paper (table 4): 51.7 mIoU multi-scale.

Swin's authors published neither a config nor weights of this row; the settings are those of their smaller rows, on the
larger crops that their table names.

The published 1841 GFLOPs are not what this model counts: 1840, where the other rows are met.
"""

_base_ = ['../_base_/upernet_160k_640_swin.py', '../_base_/ade20k_640.py']

model = dict(
    backbone=dict(
        embed_dims=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='swin_base_patch4_window7_224_22k'),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
