"""A progress bar for tests that take long per image."""

import sys

from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.utils import ProgressBar


@HOOKS.register_module()
class ProgressBarHook(Hook):
    """Shows the number of tested images over all ranks."""

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
