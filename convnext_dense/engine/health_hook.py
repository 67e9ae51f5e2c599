"""Training health checks.

Save a checkpoint on SIGTERM and SIGINT, replace unreadable images up to a limit, and skip optimizer steps whose loss or
gradients are not finite.
"""

import math
import os
import signal
import threading

import torch
from mmengine.dist import all_gather_object, all_reduce, get_rank
from mmengine.hooks import EMAHook, Hook

from ..errors import RunInterrupted, TrainingError
from ..mmengine_internals import accumulation_steps, gradient_norms
from .checkpoint_hook import AtomicCheckpointHook
from .datasets import count_images
from .progress import is_step_end
from .seeding import seed_everything

SIGNALS = (signal.SIGTERM, signal.SIGINT)
MAX_CONSECUTIVE_NONFINITE = 3  # optimizer steps in a row that may be skipped
MAX_ZERO_LOSS_STEPS = 50  # optimizer steps in a row with a loss of 0, which is no coincidence
MAX_LISTED_IMAGES = 4  # images that a message names
ZERO_LOSS_CAUSES = (
    'all labels are ignored (255, or 0 with reduce_zero_label), there is a single class, or all boxes are filtered out '
    '(filter_cfg, crowds); check the data with tools/check_data.py --data PATH'
)
NONFINITE_CAUSES = (
    'a learning rate that is too high (now {lr:.3g}), half precision (--amp-dtype bfloat16 or float32), '
    'broken boxes or labels (tools/check_data.py)'
)


class HealthCheckHook(Hook):
    """Checks every training iteration, on all ranks together.

    It checks before other hooks run, so that none of them uses a bad value; `HealthActionHook` makes it act after all
    other hooks. It is a context manager around the training, which restores the signal handlers.

    Args:
        max_unreadable: Maximum number of unreadable images, or a fraction of the training set if below 1.
        check_values: Whether to check losses, gradients and buffers. If False, non-finite values reach the weights;
            signals and unreadable images are still handled.
    """

    priority = 'VERY_HIGH'

    def __init__(self, max_unreadable: float | int = 0.001, check_values: bool = True):
        self.max_unreadable, self.check_values = max_unreadable, check_values
        self.signum: int | None = None  # of the signal that this rank received
        self.input_shape: tuple | None = None  # (N, C, H, W) of the latest batch
        self.unreadable: dict[str, str] = {}  # reason by path, of all ranks
        self.nonfinite_steps = 0  # skipped in a row
        self.zero_steps = 0  # with a loss of 0, in a row
        self._nonfinite, self._nonfinite_images, self._skipped_step = False, [], False  # since the last step
        self._nonzero_loss, self._zero_warned, self._wait_announced = False, False, False
        self._stop_requested, self._new_unreadable, self._any_new_unreadable = False, {}, False
        self._buffers, self._buffer_copies = [], []
        self._handlers, self._step_hook_handle, self._group, self._launcher_pid = {}, None, None, None

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        if self._step_hook_handle:
            self._step_hook_handle.remove()

    def before_train(self, runner) -> None:
        """Install signal handlers and the check of gradients."""
        self._launcher_pid = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else None
        self._group = runner.cpu_group
        self._max_unreadable_count = self.max_unreadable
        if self.max_unreadable < 1:
            self._max_unreadable_count = math.ceil(self.max_unreadable * count_images(runner.train_dataloader.dataset))
        self._checkpoint_hook = next((hook for hook in runner.hooks if isinstance(hook, AtomicCheckpointHook)), None)
        optimizer = getattr(runner.optim_wrapper, 'optimizer', None)
        if self.check_values:
            self._buffers = [b for b in runner.model.buffers() if b.is_floating_point()]
            if optimizer is not None:
                self._step_hook_handle = optimizer.register_step_pre_hook(self._check_gradients)
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                self._handlers[signum] = signal.signal(signum, self._on_signal)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Seed the iteration, and copy the buffers, which a bad batch would change."""
        seed_everything(runner.seed, runner.iter, get_rank(), 1)  # drop path, dropout: whatever ran before
        self._buffer_copies = [b.clone() for b in self._buffers]
        self.input_shape = _input_shape(data_batch)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Check the iteration on all ranks, and restore the buffers after a bad batch."""
        loss = _loss_magnitude(outputs) if self.check_values else 1.0
        replaced = [line for sample in _data_samples(data_batch) for line in sample.metainfo.get('replaced', ())]
        reasons = dict(line.rsplit(': ', 1) for line in replaced)
        self._new_unreadable = {path: reason for path, reason in reasons.items() if path not in self.unreadable}
        self._stop_requested, any_nonfinite, self._any_new_unreadable, any_nonzero = self._all_reduce_sum(
            self._requested_signal(),
            not math.isfinite(loss) or self._skipped_step,
            len(self._new_unreadable),
            loss != 0,
        )
        self._nonzero_loss = self._nonzero_loss or bool(any_nonzero)
        if not math.isfinite(loss):
            self._nonfinite_images += [
                sample.metainfo.get('img_path', 'an image without a path') for sample in _data_samples(data_batch)
            ]
        if any_nonfinite:
            self._nonfinite = True
            for buffer, saved in zip(self._buffers, self._buffer_copies):
                buffer.copy_(saved)

    def apply(self, runner) -> None:
        """Count the findings, and stop the run if necessary, at the end of an optimizer step."""
        if self._any_new_unreadable:
            self._record_unreadable(runner)
        if not is_step_end(runner):
            self._announce_wait(runner)
            return
        self._check_nonfinite(runner)
        self._check_zero_loss(runner)
        self._check_unreadable(runner)
        if self._stop_requested:
            self._stop(runner, runner.iter + 1)

    def before_val_epoch(self, runner) -> None:
        """Determine the number of batches that all ranks have; some may have one more."""
        self._common_batches = min(all_gather_object(len(runner.val_dataloader), self._group))

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Stop during an evaluation if the state of the run can be saved there or is saved already."""
        if batch_idx >= self._common_batches or not self._all_reduce_sum(self._requested_signal())[0]:
            return
        if not is_step_end(runner) and not self._is_last_step_saved(runner):
            self._stop_requested = True
            self._announce_wait(runner)
            return
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):  # it swaps the averaged weights in for the evaluation
                hook.after_val_epoch(runner)
        self._stop(runner, runner.iter)

    def _on_signal(self, signum, frame) -> None:
        if self.signum == signal.SIGINT == signum:
            raise KeyboardInterrupt  # Ctrl-C pressed twice: exit at once
        self.signum = signum

    def _requested_signal(self) -> int:
        """Return the signal that asks this rank to stop, 0 if there is none.

        SIGHUP stands for the death of torchrun, which would have stopped its ranks.
        """
        orphaned = self._launcher_pid is not None and os.getppid() != self._launcher_pid
        return self.signum or (signal.SIGHUP if orphaned else 0)

    def _announce_wait(self, runner) -> None:
        """Log once that a requested stop waits for the end of an optimizer step."""
        if self._stop_requested and not self._wait_announced:
            self._wait_announced = True
            runner.logger.info(
                'Stop requested: the run is saved where the current optimizer step ends; press Ctrl-C twice to exit '
                'at once'
            )

    def _is_last_step_saved(self, runner) -> bool:
        """Whether a checkpoint contains the run at the end of the last optimizer step."""
        last_step_end = runner.iter - runner.iter % accumulation_steps(runner.optim_wrapper)
        return self._checkpoint_hook is not None and self._checkpoint_hook.saved_iter == last_step_end

    def _check_gradients(self, optimizer, args, kwargs) -> None:
        """Skip an optimizer step with non-finite gradients, which are the same on all ranks."""
        if getattr(optimizer, 'found_inf', None) is not None:
            return  # a fused optimizer skips it itself, and its gradients are still scaled for mixed precision
        grads = [p.grad for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        self._skipped_step = bool(grads) and not bool(gradient_norms(grads).isfinite().all())
        if self._skipped_step:
            optimizer.zero_grad(set_to_none=True)

    def _all_reduce_sum(self, *numbers: int) -> list[int]:
        """Return the sum of each number over all ranks."""
        sums = torch.tensor([int(number) for number in numbers])
        all_reduce(sums, group=self._group)
        return sums.tolist()

    def _record_unreadable(self, runner) -> None:
        for reasons in all_gather_object(self._new_unreadable, self._group):
            for path, reason in reasons.items():
                if path not in self.unreadable:
                    self.unreadable[path] = reason
                    count = f'{len(self.unreadable)}/{self._max_unreadable_count} allowed'
                    runner.logger.warning(f'{path}: {reason}; replaced by another sample ({count})')

    def _check_unreadable(self, runner) -> None:
        if len(self.unreadable) > self._max_unreadable_count:
            path, reason = list(self.unreadable.items())[-1]
            saved = self._save(runner, runner.iter + 1)
            raise TrainingError(
                f'{len(self.unreadable)} images cannot be read, the last one is {path}: {reason}; at most '
                f'{self._max_unreadable_count} may be replaced (--max-unreadable). {saved}'
            )

    def _check_nonfinite(self, runner) -> None:
        """Count skipped optimizer steps, which left the weights unchanged."""
        images = []
        if self._nonfinite:
            images = [name for names in all_gather_object(self._nonfinite_images, self._group) for name in names]
            of_images = f' ({", ".join(images[:MAX_LISTED_IMAGES])})' if images else ''
            skipped = ': optimizer step skipped' if self._skipped_step else ''
            runner.logger.warning(f'Non-finite loss or gradient{of_images}{skipped}')
        self.nonfinite_steps = self.nonfinite_steps + 1 if self._nonfinite else 0
        if self.nonfinite_steps >= MAX_CONSECUTIVE_NONFINITE:
            lr = max(lr for lrs in runner.optim_wrapper.get_lr().values() for lr in lrs)
            saved = self._save(runner, runner.iter + 1)
            last_images = f', the last one of {", ".join(images[:MAX_LISTED_IMAGES])}' if images else ''
            raise TrainingError(
                f'non-finite loss or gradient in {MAX_CONSECUTIVE_NONFINITE} optimizer steps in a row{last_images}; '
                f'likely causes: {NONFINITE_CAUSES.format(lr=lr)}. {saved}'
            )
        self._nonfinite, self._nonfinite_images, self._skipped_step = False, [], False

    def _check_zero_loss(self, runner) -> None:
        """Warn, once, if the loss stays exactly 0 on all ranks: nothing is learned."""
        self.zero_steps = 0 if self._nonzero_loss else self.zero_steps + 1
        self._nonzero_loss = False
        if self.zero_steps == MAX_ZERO_LOSS_STEPS and not self._zero_warned:
            self._zero_warned = True
            runner.logger.warning(
                f'The loss was exactly 0 in {MAX_ZERO_LOSS_STEPS} optimizer steps in a row: nothing is learned. Likely '
                f'causes: {ZERO_LOSS_CAUSES}'
            )

    def _stop(self, runner, iters: int) -> None:
        signum = self._requested_signal() or signal.SIGTERM  # another rank received it
        raise RunInterrupted(f'stopped by {signal.Signals(signum).name}. {self._save(runner, iters)}', signum)

    def _save(self, runner, iters: int) -> str:
        """Save the run after `iters` iterations, unless it is saved; returns what to tell the user."""
        hook = self._checkpoint_hook
        if hook is None:
            return "Nothing was saved, as the config has no CheckpointHook of mmengine's"
        path = hook.write_interrupted(runner, iters) if is_step_end(runner) else None
        self._all_reduce_sum(0)  # no rank exits before rank 0 has written: launchers stop all when one does
        path = path or hook.last_ckpt
        return f'Saved {path}; resume with --resume' if path else 'Could not save a checkpoint: disk full'


class HealthActionHook(Hook):
    """Lets the health check act after all other hooks, so that it saves the state as they left it.

    Args:
        health_check: The hook that checked the iteration.
    """

    priority = 'LOWEST'

    def __init__(self, health_check: HealthCheckHook):
        self.health_check = health_check

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Act on the result of the checks."""
        self.health_check.apply(runner)


def _loss_magnitude(outputs: dict | None) -> float:
    return float(torch.as_tensor((outputs or {}).get('loss', 1.0)).detach().float().abs().sum())


def _data_samples(data_batch) -> list:
    """The data samples of a batch, whose metainfo holds the path of their image."""
    samples = data_batch.get('data_samples', ()) if isinstance(data_batch, dict) else ()
    return [sample for sample in samples if hasattr(sample, 'metainfo')]


def _input_shape(data_batch) -> tuple | None:
    """The shape (N, C, H, W) of the images of a batch, padded to the largest; None if it is not known."""
    images = data_batch.get('inputs') if isinstance(data_batch, dict) else None
    if images is None or not len(images) or not all(hasattr(image, 'shape') for image in images):
        return None
    return (len(images), *(max(sizes) for sizes in zip(*(image.shape for image in images))))
