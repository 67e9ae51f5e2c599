"""Training samples that follow from the seed alone: their order, and what each is augmented with.

A run that is resumed, in the middle of an epoch too, then sees what it would have seen; workers play no part in it."""

import hashlib
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.dist import get_rank, get_world_size
from mmengine.fileio import get as read_bytes
from mmengine.registry import DATA_SAMPLERS, DATASETS
from torch.utils.data import BatchSampler, Sampler

from ..datasets.check_images import ENDINGS
from ..errors import UnreadableImage, UsageError

READS = ('img_path', 'seg_map_path')  # the files of a sample
NO_BATCH = 'the training data hold no whole batch: give a smaller train_dataloader.batch_size, or drop_last=False'
ALONE = 1  # seconds between two looks whether the run is still there
TRIES = 20  # unreadable images in a row that a sample gets over


class Draw(int):
    """An index into a data set, with the numbers that seed its augmentations."""

    def __new__(cls, index: int, key: tuple[int, ...]):
        draw = super().__new__(cls, index)
        draw.key = key
        return draw

    def __getnewargs__(self):
        return int(self), self.key


def seed_all(*key: int) -> None:
    """Seed Python's, numpy's and torch's random numbers by some whole numbers, as independent for neighbours as for
    others."""
    state = np.random.SeedSequence(key).generate_state(8)
    random.seed(int(state[0]) << 32 | int(state[1]))
    np.random.seed(state[2:6])
    torch.manual_seed(int(state[6]) << 32 | int(state[7]))


class DrawSampler(Sampler):
    """The order of another sampler; its places in it, counted over all processes, seed the samples."""

    def __init__(self, dataset, sampler: dict, seed: int | None = None):
        self.dataset = dataset
        self.sampler = DATA_SAMPLERS.build(sampler, default_args=dict(dataset=dataset, seed=seed))
        self.seed = getattr(self.sampler, 'seed', seed) or 0
        self.epoch = 0

    def __iter__(self) -> Iterator[Draw]:
        rank, processes = get_rank(), get_world_size()
        for n, index in enumerate(self.sampler):
            yield Draw(index, (self.seed, self.epoch, rank + n * processes))

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.sampler, 'set_epoch'):
            self.sampler.set_epoch(epoch)


class SkippingBatchSampler(Sampler):
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
                    raise UsageError(NO_BATCH)
                passes += 1
                self.sampler.set_epoch(passes)
                self._next = iter(self.batches)
        return passes

    def __iter__(self) -> Iterator[list[Draw]]:
        if not self.opened:
            return
        # A generator: torch's loader asks for two iterators and uses the second.
        begun, self._next = self._next, None
        yield from iter(self.batches) if begun is None else begun

    def __len__(self) -> int:
        return len(self.batches)


class DrawnDataset:
    """Another data set, whose samples are seeded by the `Draw` that asks for them. An image that cannot be read is
    replaced by another, and the sample's metainfo `replaced` says so."""

    def __init__(self, dataset: dict):
        self.dataset = DATASETS.build(dataset)

    def __getattr__(self, name):
        if name == 'dataset':  # asked for while unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name, value):  # mmdet's hooks set a pipeline, or what follows the epoch
        if name == 'dataset':
            super().__setattr__(name, value)
        else:
            setattr(self.dataset, name, NamingPipeline(value) if name == 'pipeline' else value)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> dict:
        seed_all(*draw.key)
        index, replaced = int(draw), []
        for _ in range(TRIES):
            try:
                sample = self.dataset[index]
            except UnreadableImage as error:
                replaced.append(str(error))
                index = np.random.randint(len(self))
                continue
            if replaced:
                sample['data_samples'].set_metainfo(dict(replaced=replaced))
            return sample
        raise UnreadableImage(f'{TRIES} images in a row cannot be read, the last is {replaced[-1]}')


class NamingPipeline:
    """The pipeline of a data set; where it fails on a file that cannot be read, the error names the file."""

    def __init__(self, pipeline):
        self.pipeline = pipeline

    def __getattr__(self, name):
        if name == 'pipeline':
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def __call__(self, info: dict):
        paths = [info[key] for key in READS if isinstance(info.get(key), str)]
        try:
            return self.pipeline(info)
        except Exception as error:
            for path in paths:
                reason = unreadable(path)
                if reason:
                    raise UnreadableImage(f'{path}: {reason}') from error
            raise


def unreadable(path: str) -> str | None:
    """Why an image cannot be read; None where it can."""
    import mmcv  # beside the backbone nothing needs mmcv at import

    try:
        content = read_bytes(path)
        if not content:
            return 'an empty file'
        if not path.lower().endswith(ENDINGS):
            return None  # read by a pipeline of its own
        return None if mmcv.imfrombytes(content, flag='unchanged') is not None else 'not an image, or a broken one'
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # decoders raise what they like
        return f'{type(error).__name__}: {str(error).strip().splitlines()[0]}'


def images_in(dataset) -> int:
    """How many images a data set holds, however often it repeats them."""
    parts = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    return sum(map(images_in, parts)) if parts[0] is not None else len(dataset)


def order_of(dataset) -> str:
    """A digest of the names of a data set's images in their order; empty where it does not say them."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _leaves(dataset):
        if not isinstance(part, BaseDataset):
            return ''
        for i in range(len(part)):
            digest.update(
                os.path.basename(str(part.get_data_info(i).get('img_path'))).encode('utf-8', 'surrogateescape')
            )
            digest.update(b'\n')
    return digest.hexdigest()


def _leaves(dataset) -> Iterator:
    """The data sets that read images, within those that repeat, join or draw them."""
    parts = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if parts[0] is None:
        yield dataset
    for part in parts if parts[0] is not None else ():
        yield from _leaves(part)


def name_images(dataset) -> None:
    """Have the pipelines of a data set, and of those it is made of, name the files that they cannot read."""
    for inner in [getattr(dataset, 'dataset', None), *getattr(dataset, 'datasets', [])]:
        if inner is not None:
            name_images(inner)
    if isinstance(dataset, BaseDataset) and not isinstance(dataset.pipeline, NamingPipeline):
        dataset.pipeline = NamingPipeline(dataset.pipeline)


def apart(init_fn, worker_id: int) -> None:
    """Begin a process that reads data: it leaves when the run itself ends it or is gone, and signals to all the
    processes of the run (of launchers, terminals, schedulers) are the run's to answer."""
    run = multiprocessing.parent_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS: there a signal to all ends a run without a save
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_leave_when_told, args=(run.pid,), daemon=True).start()
    # After the mask: a thread without it would end the process at a signal to all.
    threading.Thread(target=_leave_when_alone, args=(run,), daemon=True).start()
    if init_fn:
        init_fn(worker_id)


def _leave_when_alone(run) -> None:
    """End with the run, of which a kill tells its workers nothing: they would wait in a queue of which they hold both
    ends, and keep the connections of the run open, so that its other processes would wait for it too. Their pipe to it
    is not enough: workers that were forked later hold its other end as well."""
    direct = os.getppid() == run.pid  # not where a fork server stands between them
    while run.is_alive() and (os.getppid() == run.pid or not direct):
        time.sleep(ALONE)
    os._exit(1)


def _leave_when_told(run: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != run:
        pass
    os._exit(0)


def drawn(dataloader: dict, opened: bool) -> dict:
    """The config of a data loader for training whose batches follow from the seed, and can be skipped unread."""
    loader = ConfigDict(dataloader)
    loader.dataset = dict(type=DrawnDataset, dataset=loader.dataset)
    loader.sampler = dict(type=DrawSampler, sampler=loader.sampler)
    loader.batch_sampler = dict(
        type=SkippingBatchSampler,
        batch_sampler=loader.get('batch_sampler'),
        drop_last=loader.pop('drop_last', False),
        opened=opened,
    )
    return loader
