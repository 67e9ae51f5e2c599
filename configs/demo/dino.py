"""The DINO recipe, small: random weights, the embedded data set, minutes on two CPU cores."""

_base_ = ['../_base_/dino_12e.py', '../_base_/shapes_detection.py']

attention = dict(embed_dims=64, num_heads=4)
ffn = dict(embed_dims=64, feedforward_channels=256)
model = dict(
    num_queries=50,
    backbone=dict(arch='atto'),
    neck=dict(in_channels=[80, 160, 320], out_channels=64),
    positional_encoding=dict(num_feats=32),
    encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=ffn)),
    decoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=ffn)),
    bbox_head=dict(num_classes=4, embed_dims=64),
    dn_cfg=dict(group_cfg=dict(num_dn_queries=20)),
    test_cfg=dict(max_per_img=100),
)
train_dataloader = dict(batch_size=8, sampler=dict(type='InfiniteSampler'))
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=1e-3), paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=1.0)}))
train_cfg = dict(max_iters=400, val_interval=400)
param_scheduler = [dict(type='MultiStepLR', by_epoch=False, milestones=[350], gamma=0.1, begin=0, end=400)]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=400))
randomness = dict(seed=0)
