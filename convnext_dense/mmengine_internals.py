"""Everything that this package uses of mmengine, and of torch's optimizer tools, beyond their public interfaces.

Each function says why there is no public way. A new version of either then breaks this file alone.
"""

from collections.abc import Sequence

import torch
from mmengine.hooks import CheckpointHook
from mmengine.registry import DefaultScope
from mmengine.runner import CheckpointLoader
from mmengine.visualization import WandbVisBackend


def is_resuming(runner) -> bool:
    """Whether a runner resumes a checkpoint; mmengine keeps its argument `resume` to itself."""
    return bool(runner._resume)


def checkpoint_to_load(runner) -> str | None:
    """The checkpoint that a runner resumes or starts from; mmengine keeps its argument `load_from` to itself."""
    return runner._load_from


def configured_seed(runner) -> int | None:
    """The seed in a runner's `randomness`, None if it is to draw one; `runner.seed` is always a number."""
    return runner._randomness_cfg.get('seed')


def set_seed(runner, seed: int) -> None:
    """Seed a runner anew. `Runner.set_randomness` is public, but forgets the other settings in `randomness`."""
    runner._randomness_cfg.update(seed=seed)
    runner.set_randomness(**runner._randomness_cfg)


def train_dataloader_cfg(runner) -> object:
    """The config of the training DataLoader that is not built yet; `runner.train_dataloader` would build it."""
    return runner._train_dataloader


def set_train_dataloader_cfg(runner, cfg: dict) -> None:
    """Replace the config of the training DataLoader before it is built; there is no setter."""
    runner._train_dataloader = cfg


def accumulation_steps(optim_wrapper) -> int:
    """Iterations per optimizer step; an optimizer wrapper keeps its argument `accumulative_counts` to itself."""
    return getattr(optim_wrapper, '_accumulative_counts', 1)


def restart_workers(loader) -> None:
    """Have a DataLoader start its persistent workers anew, which keep the data set as it was; it has no way to."""
    loader._iterator = None


def update_val_interval(loop) -> None:
    """Have `loop.val_interval` follow `dynamic_intervals`, which loops do only after an epoch or an iteration."""
    loop._decide_current_val_interval()


def advance_epoch(loop) -> None:
    """Count an epoch as finished; `loop.epoch` has no setter."""
    loop._epoch += 1


def checkpoint_schemes() -> list[str]:
    """What paths of checkpoints start with, for all of mmengine's loaders; they can be registered, but not listed."""
    return list(CheckpointLoader._schemes)


def default_scopes() -> list[str]:
    """The names of all default scopes in the order of their creation; `get_current_instance` tells the latest alone."""
    return [scope.scope_name for scope in DefaultScope._instance_dict.values()]


def gradient_norms(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of each gradient, in a few kernels for all; `torch.nn.utils.get_total_norm` is new in torch 2.6."""
    return torch.stack([norm.float() for norm in torch._foreach_norm(grads)])


class OverridableCheckpointHook(CheckpointHook):
    """mmengine's hook, whose ways to write a checkpoint are methods with names of their own.

    mmengine has no public method between "a checkpoint is due" and the file.
    """

    def write_regular(self, runner, step: int, meta: dict) -> None:
        """Write the regular checkpoint `step` and delete those beyond `max_keep_ckpts`."""
        super()._save_checkpoint_with_step(runner, step, meta)

    def write_best(self, runner, metrics: dict) -> None:
        """Write the best checkpoint if the metrics are better than before, and the last regular one once more."""
        super()._save_best_checkpoint(runner, metrics)

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        self.write_regular(runner, step, meta)

    def _save_best_checkpoint(self, runner, metrics: dict) -> None:
        self.write_best(runner, metrics)


class OverridableWandbVisBackend(WandbVisBackend):
    """mmengine's W&B backend, whose start is a method with a name of its own.

    mmengine starts W&B behind every public method, and only the private one can be wrapped.
    """

    def start(self) -> None:
        """Import wandb and start its run."""
        super()._init_env()

    def _init_env(self) -> None:
        self.start()
