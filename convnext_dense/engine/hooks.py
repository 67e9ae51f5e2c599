"""Small hooks: schedules under gradient accumulation, logs on a full disk, mosaics, a progress bar."""

import sys
from collections.abc import Sequence

from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook, LoggerHook, ParamSchedulerHook
from mmengine.registry import HOOKS
from mmengine.utils import ProgressBar

from ..mmengine_internals import restart_workers
from .atomic_files import warn_on_disk_full


@HOOKS.register_module()
class UpdateParamSchedulerHook(ParamSchedulerHook):
    """Steps parameter schedulers once per optimizer step instead of once per iteration.

    Without gradient accumulation both are the same. Epoch-based schedulers are stepped as usual.
    """

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Step iteration-based schedulers if the iteration ended with an optimizer step."""
        if runner.optim_wrapper.should_update():
            super().after_train_iter(runner, batch_idx, data_batch, outputs)


class DiskFullTolerantLoggerHook(LoggerHook):
    """mmengine's hook; a full disk costs the metrics of a step, not the run."""

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        """Log training metrics."""
        with warn_on_disk_full(runner):
            super().after_train_iter(runner, *args, **kwargs)

    def after_val_epoch(self, runner, *args, **kwargs) -> None:
        """Log evaluation metrics."""
        with warn_on_disk_full(runner):
            super().after_val_epoch(runner, *args, **kwargs)


@HOOKS.register_module()
class MosaicOffHook(Hook):
    """Skips transforms of a `MultiImageMixDataset` in the last epochs, as mmdet's `YOLOXModeSwitchHook` does.

    mmdet's hook also switches a loss of YOLOX's head; this one works with every detector.

    Args:
        num_last_epochs: Number of epochs at the end of the training.
        skip_type_keys: Types of the transforms to skip.
    """

    def __init__(self, num_last_epochs: int, skip_type_keys: Sequence[str] = ('Mosaic', 'RandomAffine')):
        self.num_last_epochs, self.skip_type_keys = num_last_epochs, list(skip_type_keys)
        self._is_off = False

    def before_train_epoch(self, runner) -> None:
        """Skip the transforms from the first of the last epochs on, also if the run was resumed there."""
        if self._is_off or runner.epoch < runner.max_epochs - self.num_last_epochs:
            return
        self._is_off = True
        runner.train_dataloader.dataset.update_skip_type_keys(self.skip_type_keys)
        restart_workers(runner.train_dataloader)
        runner.logger.info(f'From here on without {" and ".join(self.skip_type_keys)}')


@HOOKS.register_module()
class ProgressBarHook(Hook):
    """Shows the number of tested images over all ranks, in tests that take long per image."""

    def before_test(self, runner) -> None:
        """Show an empty bar."""
        if is_main_process():
            self.bar = ProgressBar(len(runner.test_dataloader.dataset), file=sys.stderr)

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Advance by the images of the batch on all ranks."""
        if is_main_process():
            remaining = self.bar.task_num - self.bar.completed  # the last round may be padded with repeated images
            self.bar.update(max(min(len(outputs) * get_world_size(), remaining), 1))

    def after_test(self, runner) -> None:
        """End the line of the bar."""
        if is_main_process():
            print(file=sys.stderr)
