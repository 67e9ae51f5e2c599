"""Training loops that resume in the middle of an epoch."""

import torch
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from ..errors import UsageError
from .samplers import EMPTY_LOADER_MESSAGE


class ResumableEpochLoop(EpochBasedTrainLoop):
    """mmengine's loop; a run that stopped in the middle of an epoch goes on there."""

    def run(self) -> torch.nn.Module:
        self._done = self._iter - self._epoch * len(self.dataloader)
        return super().run()

    def run_epoch(self) -> None:
        done, self._done = self._done, 0  # of the first epoch alone
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        self.dataloader.batch_sampler.skip(done)
        for idx, data_batch in enumerate(self.dataloader, done):
            self.run_iter(idx, data_batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1


class ResumableIterLoop(IterBasedTrainLoop):
    """mmengine's loop; a run that is resumed skips what it has seen without reading it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dataloader_iterator = ResumableBatchIterator(self)
        self.fast_forward_on_resume = False  # as it costs nothing here


LOOP_OVERRIDES = {'EpochBasedTrainLoop': ResumableEpochLoop, 'IterBasedTrainLoop': ResumableIterLoop}


class ResumableBatchIterator:
    """Batches without end, from the one on at which a loop that counts iterations begins."""

    def __init__(self, loop: ResumableIterLoop):
        self.loop, self.loader = loop, loop.dataloader
        self.skipped, self.epoch, self.batches = 0, 0, None

    def skip_iter(self, n: int) -> None:
        """mmengine from 0.10.12 on asks for batches to be skipped; before, it takes as many and drops them."""
        self.skipped = n

    def __iter__(self):
        return self

    def __next__(self):
        if self.batches is None:
            if self.skipped < self.loop.iter:
                self.skipped += 1
                return None
            self.epoch = self.loader.batch_sampler.skip(self.skipped)
            self.batches = iter(self.loader)
        batch = next(self.batches, None)
        if batch is None:
            self.epoch += 1
            self.loader.batch_sampler.sampler.set_epoch(self.epoch)
            self.batches = iter(self.loader)
            batch = next(self.batches, None)
        if batch is None:
            raise UsageError(EMPTY_LOADER_MESSAGE)
        return batch
