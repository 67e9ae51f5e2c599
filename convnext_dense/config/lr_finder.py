"""A config for a sweep over learning rates."""

import math

from mmengine.config import Config

from ..engine.lr_finder import NUM_STEPS
from ..errors import UsageError
from .recipe import accumulative_counts, counts_epochs
from .training_set import count_training_images


def set_lr_find(config: Config, enabled: bool, world_size: int) -> None:
    """Make a training a sweep over learning rates: no schedule, no evaluation, no checkpoints, and as long as needed.

    Values that are not finite are not checked: they are where the sweep ends.

    Args:
        config: changed in place, after gradients are accumulated.
        enabled: False for no change.
        world_size: number of processes, one per GPU.

    Raises:
        UsageError: the config has no optimizer whose lr can be set.
    """
    if not enabled:
        return
    if not (config.optim_wrapper.get('optimizer') or {}).get('lr'):
        raise UsageError('--lr-find needs a single optimizer with an lr: optim_wrapper.optimizer.lr')
    for key in ('param_scheduler', 'val_cfg', 'val_dataloader', 'val_evaluator'):
        config[key] = None
    if not config.get('default_hooks'):
        config.default_hooks = {}
    config.default_hooks['checkpoint'] = None
    config.health_check = False
    iters = NUM_STEPS * accumulative_counts(config)
    if counts_epochs(config):
        per_iter = world_size * config.train_dataloader.batch_size
        images = count_training_images(config) or per_iter  # what is wrong with them, the building of the runner says
        config.train_cfg.max_epochs = math.ceil(iters / max(images // per_iter, 1))
    else:
        config.train_cfg.max_iters = iters
