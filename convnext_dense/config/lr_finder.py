"""Turn a training config into a learning rate range test."""

import math

from mmengine.config import Config

from ..engine.lr_finder import NUM_STEPS
from ..errors import UsageError
from .recipe import accumulative_counts, counts_epochs
from .training_set import count_training_images


def set_lr_find(config: Config, world_size: int) -> None:
    """Turn a training into a learning rate range test: no schedule, no evaluation, no checkpoints.

    The health checks of values are switched off, because the test ends where the loss diverges.

    Args:
        config: Config with its gradient accumulation; it is changed in place.
        world_size: Number of processes, one per GPU.

    Raises:
        UsageError: If the config has no optimizer with an lr.
    """
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
        images = count_training_images(config) or per_iter  # building the runner reports what is wrong
        config.train_cfg.max_epochs = math.ceil(iters / max(images // per_iter, 1))
    else:
        config.train_cfg.max_iters = iters
