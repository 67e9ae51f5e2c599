"""mmengine's runner for runs that can be killed at any time and resumed without a difference."""

import copy
from functools import partial
from pathlib import Path

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, LOOPS
from mmengine.runner import BaseLoop, Runner
from torch.utils.data import DataLoader

from ..checkpoints.io import load_checkpoint
from ..errors import TrainingError
from ..mmengine_internals import (
    accumulation_steps,
    checkpoint_to_load,
    configured_seed,
    is_resuming,
    set_seed,
    set_train_dataloader_cfg,
    train_dataloader_cfg,
)
from ..type_names import class_of
from .checkpoint_hook import AtomicCheckpointHook
from .console import log_details_to_file_only, silence_disk_full
from .datasets import wrap_pipelines
from .early_stopping_hook import ResumableEarlyStoppingHook
from .failures import collect_rank_errors, diagnose
from .health_hook import HealthActionHook, HealthCheckHook
from .hooks import DiskFullTolerantLoggerHook
from .loops import LOOP_OVERRIDES, ResumableIterLoop
from .resume import OVERRIDE_KEY, ResumeHook
from .run_info import RunInfoHook
from .samplers import make_resumable_dataloader_cfg
from .summary_hook import SummaryHook
from .workers import worker_init

HOOK_OVERRIDES = {
    'CheckpointHook': AtomicCheckpointHook,
    'EarlyStoppingHook': ResumableEarlyStoppingHook,
    'LoggerHook': DiskFullTolerantLoggerHook,
}


class ResumableRunner(Runner):
    """mmengine's runner with seeded training batches, atomic checkpoints and health checks.

    It accepts the configs of mmengine's runner, and three more keys: `max_unreadable` (see `HealthCheckHook`),
    `health_check` (False: losses, gradients and buffers are not checked) and `override_resumed`. mmengine's loops and
    hooks are replaced by those of this package. The user's own are kept, without these guarantees.
    """

    def train(self) -> torch.nn.Module:
        """Train the model, continuing from the checkpoint to resume if there is one.

        Returns:
            The model.

        Raises:
            TrainingError: If the run cannot continue; the message says why and what was saved.
        """
        self._restore_seed()
        # A second group besides that of the GPUs: it does not wait for them, and notices a lost rank at once.
        self.cpu_group = torch.distributed.new_group(backend='gloo') if get_world_size() > 1 else None
        health_check = HealthCheckHook(self.cfg.get('max_unreadable', 0.001), self.cfg.get('health_check', True))
        self.register_hook(health_check)
        self.register_hook(HealthActionHook(health_check))
        self.register_hook(ResumeHook())
        self.register_hook(RunInfoHook())
        try:
            with health_check:
                return super().train()
        except Exception as error:
            try:
                message = self._explain(error, health_check.input_shape)
            except RuntimeError as late_error:  # torch reports a dead DataLoader worker as soon as its signal comes
                message = self._explain(late_error, health_check.input_shape)
            if message:
                raise TrainingError(message) from error
            raise

    def _explain(self, error: Exception, input_shape: tuple | None) -> str | None:
        """Explain the error that ended the run on any rank in one line; None if it has no diagnosis."""
        message = diagnose(error, self.model, input_shape)
        return collect_rank_errors(Path(self.log_dir), message, error) if get_world_size() > 1 else message

    def _restore_seed(self) -> None:
        """Use the seed of the checkpoint to resume, before it determines the order of the data."""
        if not is_resuming(self) or not checkpoint_to_load(self):
            return
        seed = load_checkpoint(checkpoint_to_load(self)).get('meta', {}).get('seed')
        overrides = self.cfg.get(OVERRIDE_KEY) and configured_seed(self) is not None
        if seed is not None and not overrides:
            set_seed(self, seed)

    def build_logger(self, *args, **kwargs) -> MMLogger:
        """Build mmengine's logger, with handlers that survive a full disk and a closed pipe."""
        logger = super().build_logger(*args, **kwargs)
        silence_disk_full(logger)
        log_details_to_file_only(logger)
        return logger

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build a loop that resumes in the middle of an epoch, if it is one of mmengine's types."""
        dataloader = train_dataloader_cfg(self)
        if isinstance(dataloader, dict):
            if isinstance(loop, dict):
                loop = copy.deepcopy(loop)
                by_epoch = loop.pop('by_epoch', None)
                kind = loop.get('type') or ('EpochBasedTrainLoop' if by_epoch else 'IterBasedTrainLoop')
                loop['type'] = LOOP_OVERRIDES.get(_mmengine_class_name(kind), kind)
            starts_late = isinstance(loop, dict) and loop['type'] is ResumableIterLoop
            set_train_dataloader_cfg(self, make_resumable_dataloader_cfg(dataloader, started=not starts_late))
        return super().build_train_loop(loop)

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict | None = None) -> None:
        """Scale learning rates to the total batch.

        mmengine compares `base_batch_size` with the images per iteration, but under gradient accumulation an optimizer
        step sees more images.

        Args:
            optim_wrapper: Optimizer wrapper; it is changed in place.
            auto_scale_lr: `dict(enable=..., base_batch_size=...)` or None.
        """
        steps = accumulation_steps(optim_wrapper)
        if auto_scale_lr and auto_scale_lr.get('enable') and steps > 1:
            base = auto_scale_lr['base_batch_size']
            self.logger.info(
                f'auto_scale_lr: {steps} gradient accumulation steps, so base_batch_size {base} is {base / steps:g} '
                'images per iteration'
            )
            auto_scale_lr = {**auto_scale_lr, 'base_batch_size': base / steps}
        super().scale_lr(optim_wrapper, auto_scale_lr)

    @staticmethod
    def build_dataloader(dataloader, *args, **kwargs) -> DataLoader:
        """Build a DataLoader whose errors name the file and whose workers exit with the run."""
        loader = Runner.build_dataloader(dataloader, *args, **kwargs)
        wrap_pipelines(loader.dataset)
        loader.worker_init_fn = partial(worker_init, loader.worker_init_fn)
        return loader

    def call_hook(self, fn_name: str, **kwargs) -> None:
        """Call a method of all hooks; unlike in mmengine, a TypeError in a hook keeps its traceback."""
        for hook in self.hooks:
            if hasattr(hook, fn_name):
                getattr(hook, fn_name)(self, **kwargs)

    def register_hook(self, hook: Hook | dict, priority: str | int | None = None) -> None:
        """Register a hook; configs of some of mmengine's hooks build those of this package."""
        if isinstance(hook, dict):
            hook = {**hook, 'type': HOOK_OVERRIDES.get(_mmengine_class_name(hook.get('type')), hook.get('type'))}
        super().register_hook(hook, priority)

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Register mmengine's default hooks and `SummaryHook`."""
        super().register_default_hooks(hooks)
        self.register_hook(SummaryHook())


def _mmengine_class_name(kind) -> str | None:
    """Return the name of mmengine's loop or hook class that a config's `type` means; None for other packages."""
    cls = class_of(kind, LOOPS, HOOKS)
    return cls.__name__ if cls is not None and cls.__module__.startswith('mmengine.') else None
