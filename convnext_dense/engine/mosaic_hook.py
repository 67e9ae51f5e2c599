"""A hook that switches mosaics off in the last epochs."""

from collections.abc import Sequence

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..mmengine_internals import restart_workers


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
