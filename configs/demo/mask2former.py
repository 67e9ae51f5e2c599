"""The Mask2Former recipe, small: random weights, the embedded data set, minutes on two CPU cores."""

_base_ = ['../_base_/mask2former.py', '../_base_/shapes_segmentation.py']

attention = dict(embed_dims=64, num_heads=4)
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(arch='atto', drop_path_rate=0.0),
    decode_head=dict(
        in_channels=[40, 80, 160, 320],
        feat_channels=64,
        out_channels=64,
        num_classes=5,
        num_queries=20,
        pixel_decoder=dict(
            encoder=dict(
                num_layers=1,
                layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=dict(embed_dims=64, feedforward_channels=128)),
            ),
            positional_encoding=dict(num_feats=32),
        ),
        positional_encoding=dict(num_feats=32),
        transformer_decoder=dict(
            num_layers=3,
            layer_cfg=dict(
                self_attn_cfg=attention,
                cross_attn_cfg=attention,
                ffn_cfg=dict(embed_dims=64, feedforward_channels=256),
            ),
        ),
        loss_cls=dict(class_weight=[1.0] * 5 + [0.1]),
        train_cfg=dict(num_points=1024),
    ),
)

train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=1e-3), paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=1.0))))
train_cfg = dict(max_iters=400, val_interval=400)
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=401)]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=400))
randomness = dict(seed=0)
