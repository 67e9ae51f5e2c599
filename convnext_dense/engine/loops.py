"""Training loops that resume in the middle of an epoch."""

import torch
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from ..errors import UsageError
from ..mmengine_internals import advance_epoch
from .samplers import EMPTY_LOADER_MESSAGE


class ResumableEpochLoop(EpochBasedTrainLoop):
    """mmengine's epoch-based loop, which resumes in the middle of an epoch."""

    _iters_done = 0  # finished iterations of the next epoch

    def run(self) -> torch.nn.Module:
        """Train from the current iteration to the end of the run."""
        self._iters_done = self.iter - self.epoch * len(self.dataloader)
        return super().run()

    def run_epoch(self) -> None:
        """Train one epoch, or the rest of the epoch in which the run stopped."""
        iters_done, self._iters_done = self._iters_done, 0
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        self.dataloader.batch_sampler.skip(iters_done)
        for idx, data_batch in enumerate(self.dataloader, iters_done):
            self.run_iter(idx, data_batch)
        self.runner.call_hook('after_train_epoch')
        advance_epoch(self)


class ResumableIterLoop(IterBasedTrainLoop):
    """mmengine's iteration-based loop, which skips batches without reading them when it resumes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dataloader_iterator = ResumableBatchIterator(self)
        self.fast_forward_on_resume = False  # not needed, skipping costs nothing here


LOOP_OVERRIDES = {'EpochBasedTrainLoop': ResumableEpochLoop, 'IterBasedTrainLoop': ResumableIterLoop}


class ResumableBatchIterator:
    """An endless iterator over batches that starts at the iteration of its loop.

    Args:
        loop: The loop.
    """

    def __init__(self, loop: ResumableIterLoop):
        self.loop, self.loader = loop, loop.dataloader
        self.skipped, self.epoch, self.batches = 0, 0, None

    def skip_iter(self, n: int) -> None:
        """Skip `n` batches. mmengine calls this since 0.10.12; earlier versions request the batches and drop them."""
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
