"""UperNet, Swin-L from ImageNet-22K, 640 x 640; in the paper (table 4): 53.5 mIoU multi-scale.

Swin's authors published neither a config nor weights of this row; the settings are those of their smaller rows, on the
larger crops that their table names.
"""

_base_ = ['../_base_/upernet_160k_640_swin.py', '../_base_/ade20k_640.py']

model = dict(
    backbone=dict(
        embed_dims=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='swin_large_patch4_window7_224_22k'),
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
