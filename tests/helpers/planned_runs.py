"""Short runs of a tiny model whose losses follow a plan."""

from pathlib import Path

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.structures import BaseDataElement
from torch import nn

from convnext_dense.engine.runner import ResumableRunner


@MODELS.register_module()
class LossByPlan(BaseModel):
    """A batch norm and a weight; the loss is multiplied by the sample's factor."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, inputs, data_samples=None, mode='loss'):
        if mode == 'predict':
            return data_samples
        factor = torch.stack([sample.factor for sample in data_samples])[:, None]
        loss = (self.norm(torch.stack(inputs) * factor) * self.weight).square().sum()
        return dict(
            loss=loss + (self.weight.square().sum() * factor.min()).sqrt()
        )  # with 0 the loss is finite, its gradient is not


@MODELS.register_module()
class Scaled(LossByPlan):
    """The loss is a multiple of the sample's factor; with 0, loss and gradients are 0."""

    def forward(self, inputs, data_samples=None, mode='loss'):
        factor = torch.stack([sample.factor for sample in data_samples])
        return dict(loss=(factor.sum() * self.weight).square().sum())


@DATASETS.register_module()
class Planned(BaseDataset):
    """Samples in order, each with the factor that the plan has for it."""

    def __init__(self, plan):
        self.plan = plan
        super().__init__(pipeline=[self.sample])

    def load_data_list(self):
        return [dict(img_path=f'image_{n}.png', factor=f) for n, f in enumerate(self.plan)]

    @staticmethod
    def sample(info):
        sample = BaseDataElement(metainfo=dict(img_path=info['img_path']))
        sample.factor = torch.tensor(info['factor'])
        return dict(inputs=torch.tensor(np.random.rand(2), dtype=torch.float32), data_samples=sample)


@METRICS.register_module()
class SampleCount(BaseMetric):
    """The number of samples."""

    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return dict(count=len(results))


def planned_run(
    plan,
    folder,
    hooks=(),
    train_cfg=None,
    loader=None,
    seed=0,
    load_from=None,
    model='LossByPlan',
    checkpoint=None,
    evaluates=False,
    cfg=None,
    param_scheduler=None,
    metric='SampleCount',
    default_scope=None,
    **optim_wrapper,
):
    """A runner of the plan.

    Args:
        checkpoint: Arguments of the CheckpointHook.
        evaluates: Whether it evaluates, on two batches.
        cfg: Keys of the config that are no arguments of the runner.
        metric: Type of the evaluator's metric.
        **optim_wrapper: Arguments of the optimizer wrapper.
    """
    val = dict(batch_size=1, num_workers=0, dataset=dict(type='Planned', plan=[1.0] * 2))
    val |= dict(sampler=dict(type='DefaultSampler', shuffle=False))
    return ResumableRunner(
        **(dict(val_dataloader=val, val_cfg={}, val_evaluator=dict(type=metric)) if evaluates else {}),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', **(checkpoint or {}))),
        resume=load_from is not None,
        load_from=load_from,
        default_scope=default_scope,
        custom_hooks=list(hooks),
        model=dict(type=model),
        work_dir=str(folder),
        train_dataloader=dict(
            batch_size=2,
            sampler=dict(type='DefaultSampler', shuffle=False),
            **{'num_workers': 0, 'dataset': dict(type='Planned', plan=plan), **(loader or {})},
        ),
        train_cfg=train_cfg or dict(by_epoch=True, max_epochs=1),
        param_scheduler=param_scheduler,
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.01), **optim_wrapper),
        randomness=dict(seed=seed),
        experiment_name=Path(folder).name,
        cfg=dict(model_wrapper_cfg=None, **(cfg or {})),
    )
