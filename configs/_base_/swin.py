"""A Swin backbone and its parameters without weight decay, for the bases with a Swin."""

swin = dict(
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
)
# As the original: biases and the norms of the heads decay; norms of the backbone and position tables do not.
swin_decay = dict(
    custom_keys={
        'absolute_pos_embed': dict(decay_mult=0.0),
        'relative_position_bias_table': dict(decay_mult=0.0),
        'norm': dict(decay_mult=0.0),
    }
)
