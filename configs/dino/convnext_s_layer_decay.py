"""DINO-4scale, ConvNeXt-S from ImageNet-1K, with layer decay and drop path; untrained: no result was published.

Both values are cascade/convnext_s.py's. The lr of a layer decays from 1e-4, instead of 1e-5 for all, and biases
and norms have no weight decay, as in the paper's recipes; all else is convnext_s.py's.
"""

_base_ = 'convnext_s.py'

model = dict(backbone=dict(drop_path_rate=0.6))
optim_wrapper = dict(
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(_delete_=True, decay_type='layer_wise', decay_rate=0.7),
)
