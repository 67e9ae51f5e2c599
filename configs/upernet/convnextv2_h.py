"""UperNet, ConvNeXt V2-H from FCMAE, 512 x 512; in ConvNeXt V2's table 7: 55.0 mIoU multi-scale.

Begun from the weights after fine-tuning on ImageNet-1K (A.4). The drop path rate is this project's choice.
"""

_base_ = ['../_base_/upernet_160k_v2.py', '../_base_/ade20k.py']

model = dict(
    backbone=dict(
        arch='huge',
        use_grn=True,
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint='convnextv2_huge_1k_224_ema'),
    ),
    decode_head=dict(in_channels=[352, 704, 1408, 2816]),
    auxiliary_head=dict(in_channels=1408),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.9))
