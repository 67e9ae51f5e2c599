"""Training samples that follow from the seed alone: their order, and the seeds of their augmentations.

A run that is resumed, in the middle of an epoch too, then sees what it would have seen; workers play no part in it."""

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
from .datasets import SeededDataset
from .seeding import SeededIndex

EMPTY_LOADER_MESSAGE = (
    'the training data hold no whole batch: give a smaller train_dataloader.batch_size, or drop_last=False'
)


class SeededSampler(Sampler):
    """The order of another sampler; its places in it, counted over all processes, seed the samples."""

    def __init__(self, dataset, sampler: dict, seed: int | None = None):
        self.dataset = dataset
        self.sampler = DATA_SAMPLERS.build(sampler, default_args=dict(dataset=dataset, seed=seed))
        self.seed = getattr(self.sampler, 'seed', seed) or 0
        self.epoch = 0

    def __iter__(self) -> Iterator[SeededIndex]:
        rank, processes = get_rank(), get_world_size()
        for n, index in enumerate(self.sampler):
            yield SeededIndex(index, (self.seed, self.epoch, rank + n * processes))

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.sampler, 'set_epoch'):
            self.sampler.set_epoch(epoch)


class ResumableBatchSampler(Sampler):
    """The batches of another batch sampler (None: of torch's), of which the first can be skipped unread.

    Args:
        opened: False for none at all until `skip` is called: mmengine 0.10.7 opens a loader before it resumes.
    """

    def __init__(
        self, sampler, batch_size: int, batch_sampler: dict | None = None, drop_last: bool = False, opened: bool = True
    ):
        self.sampler, self.batch_size = sampler, batch_size
        given = dict(sampler=sampler, batch_size=batch_size)
        self.batches = (
            DATA_SAMPLERS.build(batch_sampler, default_args=given)
            if batch_sampler
            else BatchSampler(drop_last=drop_last, **given)
        )
        self.drop_last, self.opened = self.batches.drop_last, opened
        self._next = None

    def skip(self, n: int) -> int:
        """Have the next pass begin after `n` batches, over as many passes as they take. Returns their number."""
        passes, self._next, self.opened = 0, iter(self.batches), True
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
        if not self.opened:
            return
        # A generator: torch's loader asks for two iterators and uses the second.
        begun, self._next = self._next, None
        yield from iter(self.batches) if begun is None else begun

    def __len__(self) -> int:
        return len(self.batches)


def order_digest(dataset) -> str:
    """A digest of the names of a data set's images in their order; empty where it does not say them."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _iter_leaf_datasets(dataset):
        if not isinstance(part, BaseDataset):
            return ''
        for i in range(len(part)):
            digest.update(
                os.path.basename(str(part.get_data_info(i).get('img_path'))).encode('utf-8', 'surrogateescape')
            )
            digest.update(b'\n')
    return digest.hexdigest()


def _iter_leaf_datasets(dataset) -> Iterator:
    """The data sets that read images, within those that repeat, join or draw them."""
    parts = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if parts[0] is None:
        yield dataset
    for part in parts if parts[0] is not None else ():
        yield from _iter_leaf_datasets(part)


def make_resumable_dataloader_cfg(dataloader: dict, opened: bool) -> dict:
    """The config of a data loader for training whose batches follow from the seed, and can be skipped unread."""
    loader = ConfigDict(dataloader)
    loader.dataset = dict(type=SeededDataset, dataset=loader.dataset)
    loader.sampler = dict(type=SeededSampler, sampler=loader.sampler)
    loader.batch_sampler = dict(
        type=ResumableBatchSampler,
        batch_sampler=loader.get('batch_sampler'),
        drop_last=loader.pop('drop_last', False),
        opened=opened,
    )
    return loader
