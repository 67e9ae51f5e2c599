"""Mask2Former for instances, ConvNeXt-B from ImageNet-22K and 1K at 384, 50 epochs; untrained: no result is published.

Layer decay and drop path are those of cascade/convnext_b_in22k.py, this project's choice.
"""

_base_ = ['../_base_/mask2former_instance.py', '../_base_/coco_mask2former.py']

model = dict(backbone=dict(drop_path_rate=0.6, init_cfg=dict(type='Pretrained', checkpoint='convnext_base_22k_1k_384')))
