"""UperNet with a Swin backbone in float32, tested on whole images, as Swin's authors trained and tested it.

SwinTransformer/Swin-Transformer-Semantic-Segmentation, whose three configs have a drop path rate of 0.3; the Swin paper
(A2.3) says 0.2.
"""

_base_ = 'upernet_160k.py'
custom_imports = dict(imports=['convnext_dense', 'convnext_dense.models.swin_segmentation'])

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
        drop_path_rate=0.3,
        out_indices=(0, 1, 2, 3),
    ),
    test_cfg=dict(_delete_=True, mode='whole'),
)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    # As the original: biases and the norms of the heads decay; norms of the backbone and position tables do not.
    paramwise_cfg=dict(
        custom_keys={
            'absolute_pos_embed': dict(decay_mult=0.0),
            'relative_position_bias_table': dict(decay_mult=0.0),
            'norm': dict(decay_mult=0.0),
        }
    ),
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
)
