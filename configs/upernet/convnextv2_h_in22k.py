"""UperNet, ConvNeXt V2-H from FCMAE and ImageNet-22K, 640 x 640; in ConvNeXt V2's table 7: 57.0 mIoU multi-scale.

Which of its weights at 384 and 512 it begins from, drop path rate and the multi-scale test at 640 are not published:
this project's choice, the last as at 512.
"""

_base_ = ['../_base_/upernet_160k_640.py', '../_base_/ade20k_640.py']

multiscale_factors = (0.75, 0.875, 1.0, 1.125, 1.25)
model = dict(
    backbone=dict(
        arch='huge',
        use_grn=True,
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint='convnextv2_huge_22k_384_ema'),
    ),
    decode_head=dict(in_channels=[352, 704, 1408, 2816]),
    auxiliary_head=dict(in_channels=1408),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.9))
