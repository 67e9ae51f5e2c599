"""UperNet with a Swin backbone in float32, tested on whole images, as Swin's authors trained and tested it.

SwinTransformer/Swin-Transformer-Semantic-Segmentation, whose three configs have a drop path rate of 0.3; the Swin paper
(A2.3) says 0.2.
"""

_base_ = ['upernet_160k.py', 'swin.py']
custom_imports = dict(imports=['convnext_dense', 'convnext_dense.models.swin_segmentation'])

model = dict(
    backbone=dict(_base_.swin, _delete_=True, drop_path_rate=0.3),
    test_cfg=dict(_delete_=True, mode='whole'),
)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    paramwise_cfg=_base_.swin_decay,
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
)
