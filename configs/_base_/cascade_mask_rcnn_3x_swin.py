"""Cascade Mask R-CNN with a Swin backbone, 3x, as in SwinTransformer/Swin-Transformer-Object-Detection."""

_base_ = 'cascade_mask_rcnn_3x.py'
custom_imports = dict(
    imports=['convnext_dense', 'convnext_dense.models.fp32_heads', 'convnext_dense.models.swin_detection']
)

model = dict(
    backbone=dict(
        _delete_=True,
        type='StrictSwinTransformer',
        embed_dims=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        mlp_ratio=4,
        qkv_bias=True,
        patch_norm=True,
        drop_path_rate=0.2,
        out_indices=(0, 1, 2, 3),
    ),
)
optim_wrapper = dict(
    _delete_=True,
    type='AmpOptimWrapper',
    # As the original: biases and the norms of the heads decay; norms of the backbone and position tables do not.
    paramwise_cfg=dict(
        custom_keys={
            'absolute_pos_embed': dict(decay_mult=0.0),
            'relative_position_bias_table': dict(decay_mult=0.0),
            'norm': dict(decay_mult=0.0),
        }
    ),
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
