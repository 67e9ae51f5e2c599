"""Mask2Former, ConvNeXt-B from ImageNet-22K and 1K at 384, 640 x 640; in Mask2Former's PR #34: 55.06 mIoU.

Of that pull request are drop path, weights, total batch, lr, length and evaluations; what it does not say is that of
the repository's Swin-B at 640 (maskformer2_swin_base_IN21k_384_bs16_160k_res640.yaml, 53.9 mIoU), which it copied.
"""

_base_ = ['../_base_/mask2former.py', '../_base_/ade20k_mask2former.py']

model = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='convnext_base_22k_1k_384')))
train_dataloader = dict(batch_size=8)
total_batch = 64
optim_wrapper = dict(optimizer=dict(lr=4e-4))
