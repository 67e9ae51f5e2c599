"""Cascade Mask R-CNN, Swin-B from ImageNet-22K, 3x; in the paper (table 3): 53.0 box AP, 45.8 mask AP.

The paper fine-tuned Swin with the sweep of ConvNeXt (A.3: lr 1e-4 or 2e-4, layer-wise lr decay 0.7 to 0.95, drop path
0.3 to 0.8); neither the chosen values nor weights were ever published. Those here are this project's choice
within it: a rate of 0.9 over 24 blocks, which gives the patch embedding 0.072 of the lr where ConvNeXt-B's stem has
0.055 (0.8 over 12 layers), and the drop path rate of Swin-B from ImageNet-1K.
"""

_base_ = ['../_base_/cascade_mask_rcnn_3x_swin.py', '../_base_/coco.py']

model = dict(
    backbone=dict(
        embed_dims=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='swin_base_patch4_window7_224_22k'),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(
    constructor='LayerDecayOptimWrapperConstructor',
    # Norms of heads and biases decay as without layer decay: the base names what of Swin does not.
    paramwise_cfg=dict(decay_type='layer_wise', decay_rate=0.9, norm_decay_mult=1.0, bias_decay_mult=1.0),
    optimizer=dict(lr=1e-4),
)
