"""Configs of short runs, and the model and the data set that they build."""

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS

from convnext_dense.models.convnext import ConvNeXt

N_IMAGES, TOTAL = 16, 4


@MODELS.register_module()
class PixelMeanModel(BaseModel):
    """The backbone under a mean over pixels, in float64, without batch statistics."""

    def __init__(self):
        super().__init__()
        self.backbone = ConvNeXt(dict(depths=(1, 1, 2, 1), channels=(8, 16, 24, 32))).double()

    def forward(self, inputs, mode='tensor'):
        x = torch.stack(inputs)
        return dict(loss=sum((m - 0.5).square().mean() for m in self.backbone(x)))


@DATASETS.register_module()
class NumberedImages(torch.utils.data.Dataset):
    def __len__(self):
        return N_IMAGES

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        return dict(inputs=torch.randn(3, 64, 64, generator=generator, dtype=torch.float64))


def run_config(unit: str, batch_size: int) -> Config:
    epochs = unit == 'epochs'
    decay = (
        dict(type='MultiStepLR', by_epoch=True, milestones=[1, 2], gamma=0.1)
        if epochs
        else dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=8)
    )
    return Config(
        dict(
            model=dict(type='PixelMeanModel'),
            model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None),  # on CPUs
            train_dataloader=dict(
                batch_size=batch_size,
                num_workers=0,
                sampler=dict(type='DefaultSampler' if epochs else 'InfiniteSampler', shuffle=False),
                dataset=dict(type='NumberedImages'),
            ),
            total_batch=TOTAL,
            optim_wrapper=dict(
                constructor='LayerDecayOptimWrapperConstructor',
                optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.05),
                paramwise_cfg=dict(decay_type='layer_wise', decay_rate=0.8),
            ),
            param_scheduler=[dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=6), decay],
            train_cfg=dict(by_epoch=True, max_epochs=3) if epochs else dict(by_epoch=False, max_iters=7),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=epochs, interval=1)),
            log_level='ERROR',
            default_scope='mmengine',
            randomness=dict(seed=0),
        )
    )
