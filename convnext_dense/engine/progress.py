"""How far a run is, in epochs, iterations and optimizer steps, and how its batches are partitioned."""

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.runner import EpochBasedTrainLoop

from .datasets import count_images
from .samplers import order_digest


def batch_partition(runner) -> dict:
    """How a run's batches are laid out: what its count of iterations means."""
    loader = runner.train_loop.dataloader
    if not hasattr(runner, 'order'):  # of all images: asked for once
        runner.order = order_digest(loader.dataset)
    return dict(
        processes=get_world_size(),
        images=getattr(loader.batch_sampler, 'batch_size', None) or loader.batch_size,
        accumulation=accumulation_steps(runner),
        batches=len(loader),
        samples=count_images(loader.dataset),
        order=runner.order,
    )


def accumulation_steps(runner) -> int:
    """Batches that are added up for an update."""
    return getattr(runner.optim_wrapper, '_accumulative_counts', 1)


def is_update_step(runner) -> bool:
    """Whether the last iteration ended with an update."""
    wrapper = runner.optim_wrapper
    return not hasattr(wrapper, '_inner_count') or wrapper.should_update()


def gather_partial_grads(runner) -> list[dict[str, torch.Tensor]] | None:
    """The gradients that each process has added up since the last update, by parameter; None right after an update, and
    on processes other than the first."""
    if is_update_step(runner):
        return None
    own = {
        name.removeprefix('module.'): p.grad.cpu() for name, p in runner.model.named_parameters() if p.grad is not None
    }
    if get_world_size() == 1:
        return [own]
    every = [None] * get_world_size() if get_rank() == 0 else None
    torch.distributed.gather_object(own, every, group=runner.cpu_group)
    return every


def broadcast_from_rank0(value, runner):
    """What the first process has for a value."""
    if get_world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, 0, group=runner.cpu_group)
    return box[0]


def progress_of(runner) -> int:
    """How far a run has come, in epochs, or in updates where it counts iterations: on any number of processes."""
    by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
    return runner.epoch if by_epoch else runner.iter // accumulation_steps(runner)
