"""mmengine's runner with runs that can be killed at any instant and resumed as the same run."""

import copy
from functools import partial
from pathlib import Path

import torch
from mmengine.dist import get_world_size
from mmengine.registry import HOOKS, LOOPS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ..checkpoints.io import load_checkpoint
from ..errors import TrainingError
from ..type_names import class_of
from .checkpoint_hook import AtomicCheckpointHook
from .console import log_details_to_file_only, silence_disk_full
from .datasets import wrap_pipelines
from .failures import diagnose
from .health_hook import HealthActionHook, HealthCheckHook
from .logger_hook import DiskFullTolerantLoggerHook
from .loops import LOOP_OVERRIDES, ResumableIterLoop
from .rank_errors import collect_rank_errors
from .resume import OVERRIDE_KEY, ResumeHook
from .run_info import RunInfoHook
from .samplers import make_resumable_dataloader_cfg
from .workers import worker_init

HOOK_OVERRIDES = {'CheckpointHook': AtomicCheckpointHook, 'LoggerHook': DiskFullTolerantLoggerHook}


class ResumableRunner(Runner):
    """mmengine's runner with training batches that follow from the seed, whole checkpoints, and a guard over the run.

    The config stays as it is; parts of the user's own (loops, data loaders, hooks) are kept, and then owe these
    promises themselves.
    """

    def train(self):
        if self._resume and self._load_from:
            seed = load_checkpoint(self._load_from).get('meta', {}).get('seed')
            own = self.cfg.get(OVERRIDE_KEY) and self._randomness_cfg.get('seed') is not None
            if seed is not None and not own:  # before the data are put in order
                self._randomness_cfg.update(seed=seed)
                self.set_randomness(**self._randomness_cfg)
        # Beside the GPUs' own group: it does not wait for them, and notices at once who is gone.
        self.cpu_group = torch.distributed.new_group(backend='gloo') if get_world_size() > 1 else None
        guard = HealthCheckHook(self.cfg.get('max_unreadable', 0.001))
        self.register_hook(guard)
        self.register_hook(HealthActionHook(guard))
        self.register_hook(ResumeHook())
        self.register_hook(RunInfoHook())
        try:
            with guard:
                return super().train()
        except Exception as error:
            line = diagnose(error, self.model, guard.shape)
            if get_world_size() > 1:
                line = collect_rank_errors(Path(self.log_dir), line, error)
            if line:
                raise TrainingError(line) from error
            raise

    def build_logger(self, *args, **kwargs):
        logger = super().build_logger(*args, **kwargs)
        silence_disk_full(logger)
        log_details_to_file_only(logger)
        return logger

    def build_train_loop(self, loop):
        if isinstance(self._train_dataloader, dict):
            if isinstance(loop, dict):
                loop = copy.deepcopy(loop)
                by_epoch = loop.pop('by_epoch', None)
                kind = loop.get('type') or ('EpochBasedTrainLoop' if by_epoch else 'IterBasedTrainLoop')
                loop['type'] = LOOP_OVERRIDES.get(_mmengine_class_name(kind), kind)
            ours = isinstance(loop, dict) and loop['type'] is ResumableIterLoop
            self._train_dataloader = make_resumable_dataloader_cfg(self._train_dataloader, opened=not ours)
        return super().build_train_loop(loop)

    def scale_lr(self, optim_wrapper, auto_scale_lr=None):
        """mmengine's, which takes one batch for all images of an update; here it is one of those that are added up."""
        n = getattr(optim_wrapper, '_accumulative_counts', 1)
        if auto_scale_lr and auto_scale_lr.get('enable') and n > 1:
            base = auto_scale_lr['base_batch_size']
            self.logger.info(
                f'auto_scale_lr: {n} batches are added up, so base_batch_size {base} is {base / n:g} a batch'
            )
            auto_scale_lr = {**auto_scale_lr, 'base_batch_size': base / n}
        return super().scale_lr(optim_wrapper, auto_scale_lr)

    @staticmethod
    def build_dataloader(dataloader, *args, **kwargs) -> DataLoader:
        loader = Runner.build_dataloader(dataloader, *args, **kwargs)
        wrap_pipelines(loader.dataset)
        loader.worker_init_fn = partial(worker_init, loader.worker_init_fn)
        return loader

    def call_hook(self, fn_name: str, **kwargs) -> None:
        """mmengine's, without the try that leaves out of a TypeError where in the hook it was raised."""
        for hook in self._hooks:
            if hasattr(hook, fn_name):
                getattr(hook, fn_name)(self, **kwargs)

    def register_hook(self, hook, priority=None) -> None:
        if isinstance(hook, dict):
            hook = {**hook, 'type': HOOK_OVERRIDES.get(_mmengine_class_name(hook.get('type')), hook.get('type'))}
        super().register_hook(hook, priority)


def _mmengine_class_name(kind) -> str | None:
    """The name of one of mmengine's own classes, which a config may give with a scope, by its path or as itself."""
    found = class_of(kind, LOOPS, HOOKS)
    return found.__name__ if found is not None and found.__module__.startswith('mmengine.') else None
