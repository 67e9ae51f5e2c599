#!/usr/bin/env python
"""What the health checks of training cost per iteration.

Trains a backbone under a plain loss with `health_check=True` and `False`, in turns, and measures the parts alone: the
norms of all gradients, the copy of all buffers, and the exchange of four integers between two ranks (gloo).
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from torch import nn

from convnext_dense import ConvNeXt
from convnext_dense.engine.runner import ResumableRunner
from convnext_dense.mmengine_internals import gradient_norms

WARMUP = 3  # iterations that are not counted


@MODELS.register_module()
class BackboneWithLoss(BaseModel):
    """A backbone and a batch norm, whose buffers are checked, under a mean over all pixels."""

    def __init__(self, arch: str):
        super().__init__()
        self.backbone = ConvNeXt(arch)
        self.norm = nn.BatchNorm2d(self.backbone.out_channels[-1])

    def forward(self, inputs, data_samples=None, mode='loss'):
        """Compute the loss of a list of images (C, H, W)."""
        return dict(loss=self.norm(self.backbone(torch.stack(inputs))[-1]).square().mean())


@DATASETS.register_module()
class RandomImages(BaseDataset):
    """One random image, again and again."""

    def __init__(self, length: int, size: int):
        self.length, self.image = length, torch.rand(3, size, size)
        super().__init__(pipeline=[lambda info: dict(inputs=self.image)])

    def load_data_list(self) -> list[dict]:
        """List the samples."""
        return [dict(img_path='random.png') for _ in range(self.length)]


class IterationTimer(Hook):
    """Measures the time from the beginning of an iteration to that of the next."""

    priority = 'HIGHEST'

    def __init__(self):
        self.begins = []

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Note the time."""
        self.begins.append(time.perf_counter())

    @property
    def times(self) -> list[float]:
        """Seconds of each iteration after the warmup."""
        return [b - a for a, b in zip(self.begins, self.begins[1:])][WARMUP:]


def train(args: argparse.Namespace, health_check: bool) -> tuple[list[float], nn.Module]:
    """Train for `args.iters` iterations; returns the seconds of each, and the model."""
    timer = IterationTimer()
    with tempfile.TemporaryDirectory() as work_dir:
        runner = ResumableRunner(
            model=dict(type='BackboneWithLoss', arch=args.arch),
            work_dir=work_dir,
            train_dataloader=dict(
                batch_size=args.batch,
                num_workers=0,
                dataset=dict(type='RandomImages', length=args.batch, size=args.size),
                sampler=dict(type='InfiniteSampler'),
            ),
            train_cfg=dict(by_epoch=False, max_iters=args.iters + WARMUP + 1),
            optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-4)),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=-1, save_last=False, by_epoch=False)),
            custom_hooks=[timer],
            log_level='ERROR',
            randomness=dict(seed=0),
            experiment_name=os.path.basename(work_dir),
            cfg=dict(health_check=health_check),
        )
        runner.train()
    return timer.times, runner.model


def median_time(function: Callable[[], object], repeats: int = 50) -> float:
    """The median of the seconds that a call takes."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def time_all_reduce(rank: int, folder: str) -> None:
    """Exchange four integers with another rank; rank 0 leaves the median of the seconds in a file."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    seconds = median_time(lambda: torch.distributed.all_reduce(torch.zeros(4, dtype=torch.int64)), 500)
    if rank == 0:
        torch.save(seconds, f'{folder}/seconds')
    torch.distributed.destroy_process_group()


def time_parts(model: nn.Module) -> dict[str, float]:
    """The seconds that each part of the checks takes, for the parameters and buffers of a model."""
    grads = [torch.ones_like(p) for p in model.parameters()]
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(time_all_reduce, (folder,), nprocs=2)
        all_reduce = torch.load(f'{folder}/seconds')
    return {
        f'norms of {sum(g.numel() for g in grads) / 1e6:.1f} M gradients': median_time(
            lambda: bool(gradient_norms(grads).isfinite().all())
        ),
        f'copy of {sum(b.numel() for b in buffers):,} buffer values': median_time(lambda: [b.clone() for b in buffers]),
        'exchange of 4 integers between 2 ranks': all_reduce,
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='tiny', help='architecture of the backbone (default: tiny)')
    parser.add_argument('--batch', type=int, default=2, help='images per iteration')
    parser.add_argument('--size', type=int, default=224, help='height and width of the images')
    parser.add_argument('--iters', type=int, default=20, help='iterations per round')
    parser.add_argument('--rounds', type=int, default=3, help='rounds, each with and without checks')
    parser.add_argument('--threads', type=int, default=1, help='threads of torch')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    times = {False: [], True: []}
    for _ in range(args.rounds):
        for health_check in times:
            seconds, model = train(args, health_check)
            times[health_check] += seconds
    off, on = (statistics.median(times[health_check]) for health_check in (False, True))
    rows = {'iteration, health_check=False': off, 'iteration, health_check=True': on, **time_parts(model)}
    print(f'\n{args.arch}, {args.batch} images of {args.size} x {args.size}, {args.threads} thread(s)')
    for name, seconds in rows.items():
        print(f'{name:<42} {1000 * seconds:>10.3f} ms {100 * seconds / off:>8.3f} %')


if __name__ == '__main__':
    main()
