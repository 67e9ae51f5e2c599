"""Cascade Mask R-CNN, Swin-L from ImageNet-22K, 3x, fp32; in the paper (table 3): 53.9 box AP, 46.7 mask AP.

The paper fine-tuned Swin with the sweep of ConvNeXt (A.3: lr 1e-4 or 2e-4, layer-wise lr decay 0.7 to 0.95, drop path
0.3 to 0.8); neither the chosen values nor weights were ever published. Those here are this project's choice
within it: the layer decay of Swin-B, the drop path rate of ViTDet's Swin-L, float32 as ConvNeXt-L.
"""

_base_ = ['../_base_/cascade_mask_rcnn_3x_swin.py', '../_base_/coco.py']

model = dict(
    backbone=dict(
        embed_dims=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint='swin_large_patch4_window7_224_22k'),
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='LayerDecayOptimWrapperConstructor',
    # Norms of heads and biases decay as without layer decay: the base names what of Swin does not.
    paramwise_cfg=dict(decay_type='layer_wise', decay_rate=0.9, norm_decay_mult=1.0, bias_decay_mult=1.0),
    optimizer=dict(lr=1e-4),
)
