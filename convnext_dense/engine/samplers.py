"""Samplers whose order and augmentation seeds depend on the seed, the epoch and the position in it alone.

A resumed run, also one that stopped in the middle of an epoch, therefore sees the samples that it would have seen,
whatever the number of DataLoader workers.
"""

import hashlib
import os
from collections.abc import Iterator
from itertools import islice

from mmengine.config import ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.dist import get_rank, get_world_size
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import BatchSampler, Sampler

from ..errors import UsageError
from .datasets import SeededDataset, leaf_datasets
from .seeding import SeededIndex

EMPTY_LOADER_MESSAGE = (
    'the training set is smaller than one batch: use a smaller train_dataloader.batch_size, or drop_last=False'
)


class SeededSampler(Sampler):
    """Wraps a sampler: yields its indices in its order, each with a seed key (seed, epoch, global position).

    Args:
        dataset: Data set.
        sampler: Config of the sampler.
        seed: Seed of the run; a seed of the sampler itself overrides it.
    """

    def __init__(self, dataset, sampler: dict, seed: int | None = None):
        self.dataset = dataset
        self.sampler = DATA_SAMPLERS.build(sampler, default_args=dict(dataset=dataset, seed=seed))
        self.seed = getattr(self.sampler, 'seed', seed) or 0
        self.epoch = 0

    def __iter__(self) -> Iterator[SeededIndex]:
        rank, world_size = get_rank(), get_world_size()
        for i, index in enumerate(self.sampler):
            yield SeededIndex(index, (self.seed, self.epoch, rank + i * world_size))

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Use the order of this epoch when the next iterator is created."""
        self.epoch = epoch
        if hasattr(self.sampler, 'set_epoch'):
            self.sampler.set_epoch(epoch)


class ResumableBatchSampler(Sampler):
    """Wraps a batch sampler so that a resumed run can skip the batches it has seen without reading them.

    Args:
        sampler: Sampler of the indices.
        batch_size: Images per batch.
        batch_sampler: Config of the batch sampler; torch's `BatchSampler` by default.
        drop_last: Whether a last, smaller batch is dropped; only used by torch's `BatchSampler`.
        started: If False, there are no batches before `skip` is called, because mmengine 0.10.7 starts the workers of a
            loader before it resumes.
    """

    def __init__(
        self, sampler, batch_size: int, batch_sampler: dict | None = None, drop_last: bool = False, started: bool = True
    ):
        self.sampler, self.batch_size = sampler, batch_size
        args = dict(sampler=sampler, batch_size=batch_size)
        default = dict(type=BatchSampler, drop_last=drop_last)
        self.batches = DATA_SAMPLERS.build(batch_sampler or default, default_args=args)
        self.drop_last, self.started = self.batches.drop_last, started
        self._next = None

    def skip(self, n: int) -> int:
        """Start the next iteration after `n` batches.

        Args:
            n: Number of batches to skip; may be more than one pass over the data set has.

        Returns:
            The number of complete passes that were skipped.

        Raises:
            UsageError: If the data set has less than one batch.
        """
        passes, self._next, self.started = 0, iter(self.batches), True
        while n:
            skipped = sum(1 for _ in islice(self._next, n))
            n -= skipped
            if n:
                if not skipped:
                    raise UsageError(EMPTY_LOADER_MESSAGE)
                passes += 1
                self.sampler.set_epoch(passes)
                self._next = iter(self.batches)
        return passes

    def __iter__(self) -> Iterator[list[SeededIndex]]:
        if not self.started:
            return
        # Not started before it is used: torch's loader creates two iterators and uses the second.
        batches, self._next = self._next, None
        yield from iter(self.batches) if batches is None else batches

    def __len__(self) -> int:
        return len(self.batches)


def order_digest(dataset) -> str:
    """Return a digest of the image names of a data set in their order, to detect that a resumed run sees other data.

    Args:
        dataset: A data set, or a wrapper of others.

    Returns:
        The digest in hexadecimal; '' if a data set does not expose its image paths.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in leaf_datasets(dataset):
        if not isinstance(part, BaseDataset):
            return ''
        for i in range(len(part)):
            name = os.path.basename(str(part.get_data_info(i).get('img_path')))
            digest.update(f'{name}\n'.encode('utf-8', 'surrogateescape'))
    return digest.hexdigest()


def make_resumable_dataloader_cfg(dataloader: dict, started: bool) -> dict:
    """Wrap data set, sampler and batch sampler in the config of a training DataLoader.

    Args:
        dataloader: Config for mmengine.
        started: See `ResumableBatchSampler`.

    Returns:
        A new config.
    """
    loader = ConfigDict(dataloader)
    loader.dataset = dict(type=SeededDataset, dataset=loader.dataset)
    loader.sampler = dict(type=SeededSampler, sampler=loader.sampler)
    loader.batch_sampler = dict(
        type=ResumableBatchSampler,
        batch_sampler=loader.get('batch_sampler'),
        drop_last=loader.pop('drop_last', False),
        started=started,
    )
    return loader
