"""Mask2Former for instances: the same head as mmdet's, for 50 epochs of COCO, as its authors trained it with Swin-B.

facebookresearch/Mask2Former (9b0651c), maskformer2_swin_base_IN21k_384_bs16_50ep.yaml, but for the layer decay.
"""

_base_ = 'mask2former.py'
default_scope = 'mmdet'

semantic_keys = ('num_classes', 'align_corners', 'train_cfg')
head = {key: value for key, value in _base_.model.decode_head.items() if key not in semantic_keys}
model = dict(
    _delete_=True,
    type='Mask2Former',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
        pad_mask=True,
        mask_pad_value=0,
        pad_seg=False,
        batch_augments=[
            dict(
                type='BatchFixedSizePad',
                size=(1024, 1024),
                img_pad_value=0,
                pad_mask=True,
                mask_pad_value=0,
                pad_seg=False,
            )
        ],
    ),
    backbone=_base_.model.backbone,
    panoptic_head=dict(
        head,
        num_things_classes=80,
        num_stuff_classes=0,
        loss_cls=dict(head['loss_cls'], class_weight=[1.0] * 80 + [0.1]),
    ),
    panoptic_fusion_head=dict(
        type='MaskFormerFusionHead', num_things_classes=80, num_stuff_classes=0, loss_panoptic=None
    ),
    train_cfg=_base_.model.decode_head.train_cfg,
    test_cfg=dict(
        panoptic_on=False,
        semantic_on=False,
        instance_on=True,
        max_per_image=100,
        iou_thr=0.8,
        filter_low_score=True,
    ),
)
del semantic_keys, head

optim_wrapper = dict(
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        _delete_=True,
        decay_type='layer_wise',
        decay_rate=0.8,
        custom_keys={k: v for k, v in _base_.optim_wrapper.paramwise_cfg.custom_keys.items() if k != 'backbone'},
    ),
)
train_cfg = dict(max_iters=368750, val_interval=5000)
param_scheduler = [
    dict(type='MultiStepLR', by_epoch=False, milestones=[327778, 355092], gamma=0.1, begin=0, end=368750)
]
default_hooks = dict(checkpoint=dict(interval=5000), visualization=dict(type='DetVisualizationHook'))
visualizer = dict(type='DetLocalVisualizer')
