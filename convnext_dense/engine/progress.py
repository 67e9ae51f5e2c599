"""Progress of a run in epochs, iterations and optimizer steps, and its partition of the data into batches."""

from collections.abc import Mapping
from dataclasses import dataclass

from mmengine.dist import broadcast_object_list, get_world_size
from mmengine.runner import EpochBasedTrainLoop

from ..mmengine_internals import accumulation_steps
from .datasets import count_images
from .samplers import order_digest

PARTITION_KEY = 'batch_partition'  # key in the meta of a checkpoint
OLD_PARTITION_KEY = 'layout'  # its name until version 0.1, with the old names of its fields below
OLD_NAMES = dict(processes='world_size', images='batch_size', accumulation='accumulation_steps')
OLD_NAMES |= dict(batches='iters_per_epoch', samples='num_images', order='order_digest')


@dataclass(frozen=True)
class BatchSizes:
    """How many images a run takes at a time; checkpoints and `run.json` have these names.

    Attributes:
        world_size: Number of ranks.
        batch_size: Images per rank and iteration.
        accumulation_steps: Iterations per optimizer step.
        iters_per_epoch: Iterations per epoch.
    """

    world_size: int
    batch_size: int
    accumulation_steps: int
    iters_per_epoch: int

    @property
    def global_batch(self) -> int:
        """Images per iteration over all ranks."""
        return self.world_size * self.batch_size

    @property
    def total_batch(self) -> int:
        """Images per optimizer step."""
        return self.global_batch * self.accumulation_steps


@dataclass(frozen=True)
class BatchPartition(BatchSizes):
    """How a run divides its data into batches, which gives its iteration counter a meaning.

    Attributes:
        num_images: Images in the data set.
        order_digest: Digest of `samplers.order_digest`; '' if it is unknown.
    """

    num_images: int
    order_digest: str = ''


def batch_sizes(runner) -> dict[str, int]:
    """Return the values of `BatchSizes` of a runner that trains, by name."""
    loader = runner.train_loop.dataloader
    return dict(
        world_size=get_world_size(),
        batch_size=getattr(loader.batch_sampler, 'batch_size', None) or loader.batch_size,
        accumulation_steps=accumulation_steps(runner.optim_wrapper),
        iters_per_epoch=len(loader),
    )


def batch_partition(runner) -> BatchPartition:
    """Return the batch partition of a runner that trains."""
    dataset = runner.train_loop.dataloader.dataset
    if not hasattr(runner, 'order_digest'):  # computed once per run, from the names of all images
        runner.order_digest = order_digest(dataset)
    return BatchPartition(**batch_sizes(runner), num_images=count_images(dataset), order_digest=runner.order_digest)


def load_partition(meta: Mapping) -> BatchPartition | None:
    """Return the batch partition in the meta of a checkpoint; None if another tool wrote it."""
    if PARTITION_KEY in meta:
        return BatchPartition(**meta[PARTITION_KEY])
    old = meta.get(OLD_PARTITION_KEY)
    return BatchPartition(**{OLD_NAMES[key]: value for key, value in old.items()}) if old is not None else None


def is_step_end(runner) -> bool:
    """Whether the last iteration ended with an optimizer step."""
    wrapper = runner.optim_wrapper
    return not hasattr(wrapper, 'inner_count') or wrapper.should_update()


def next_step_end(runner, iters: int) -> int:
    """Return the number of iterations, more than `iters`, after which the next optimizer step ends."""
    steps = accumulation_steps(runner.optim_wrapper)
    return min((iters // steps + 1) * steps, runner.max_iters)


def progress_of(runner) -> int:
    """Return the progress of a run in epochs, or in optimizer steps if its loop is iteration-based."""
    by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
    return runner.epoch if by_epoch else runner.iter // accumulation_steps(runner.optim_wrapper)


def broadcast_from_rank0(value, runner):
    """Return the value of rank 0, which may be any picklable object, on all ranks."""
    box = [value]
    broadcast_object_list(box, group=runner.cpu_group)
    return box[0]
