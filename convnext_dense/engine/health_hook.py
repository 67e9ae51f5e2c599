"""Training health checks: signals, unreadable images, losses and gradients that are not finite."""

import math
import os
import signal
import threading

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import EMAHook, Hook

from ..errors import RunInterrupted, TrainingError
from .checkpoint_hook import AtomicCheckpointHook
from .datasets import count_images
from .progress import is_update_step
from .seeding import seed_everything

SIGNALS = (signal.SIGTERM, signal.SIGINT)
MAX_CONSECUTIVE_NONFINITE = 3  # updates in a row that losses or gradients that are no numbers may cost
MAX_ZERO_LOSS_STEPS = 50  # optimizer steps in a row of a loss of 0 that are no chance
ZERO_LOSS_CAUSES = (
    'all labels are ignored (255, or 0 with reduce_zero_label), there is a single class, or boxes are all filtered out '
    '(filter_cfg, crowds): tools/check_data.py --data PATH says what is there'
)
NONFINITE_CAUSES = (
    'a learning rate that is too high (now {lr:.3g}), half precision (--amp-dtype bfloat16 or float32), '
    'broken boxes or labels (tools/check_data.py)'
)


class HealthCheckHook(Hook):
    """Watches every iteration, in all processes at once. It looks before other hooks do, so that none keeps what is
    wrong; `ActHook` has it act when all of them are done.

    Args:
        max_bad_images: images that may turn out unreadable, as a share of the training data (below 1) or their number.
    """

    priority = 'VERY_HIGH'

    def __init__(self, max_bad_images: float | int = 0.001):
        self.max_bad_images = max_bad_images
        self.signal, self.shape, self.launcher = None, None, None
        self.bad_images = {}  # path: why, of all processes
        self.wrong_updates, self.wrong, self.wrong_images = 0, False, []
        self._skipped, self._stop = False, 0
        self.zero_steps, self._nonzero, self._zero_said = 0, False, False
        self._before, self._group, self._handle = {}, None, None

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._handle:
            self._handle.remove()

    def before_train(self, runner) -> None:
        self.launcher = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else None
        self._group = runner.cpu_group
        self.allowed = self.max_bad_images
        if self.max_bad_images < 1:
            self.allowed = math.ceil(self.max_bad_images * count_images(runner.train_dataloader.dataset))
        self._saver = next((hook for hook in runner.hooks if isinstance(hook, AtomicCheckpointHook)), None)
        self._buffers = [b for b in runner.model.buffers() if b.is_floating_point()]
        optimizer = getattr(runner.optim_wrapper, 'optimizer', None)
        if optimizer is not None:
            self._handle = optimizer.register_step_pre_hook(self._before_step)
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._receive)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        seed_everything(runner.seed, runner.iter, get_rank(), 1)  # drop path, dropout, samplers: not what went before
        self._kept = [b.clone() for b in self._buffers]
        self.shape = _batch_shape(data_batch)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        loss = float(torch.as_tensor((outputs or {}).get('loss', 1.0)).detach().float().abs().sum())
        wrong = not math.isfinite(loss)
        replaced = [line for s in _data_samples(data_batch) for line in s.metainfo.get('replaced', ())]
        self._new = dict(line.rsplit(': ', 1) for line in replaced)
        self._new = {path: why for path, why in self._new.items() if path not in self.bad_images}
        self._stop, any_wrong, self._any_new, nonzero = self._of_all(
            self._asked(), wrong or self._skipped, len(self._new), loss != 0
        )
        self._nonzero = self._nonzero or bool(nonzero)
        if wrong:
            self.wrong_images += [
                s.metainfo.get('img_path', 'an image without a path') for s in _data_samples(data_batch)
            ]
        if any_wrong:
            for buffer, kept in zip(self._buffers, self._kept):
                buffer.copy_(kept)
        self.wrong = self.wrong or bool(any_wrong)

    def act(self, runner) -> None:
        """Count images and updates, and stop the run where it must."""
        if self._any_new:
            self._count(runner, self._new)
        if is_update_step(runner):
            self._judge(runner)
            self._count_zeros(runner)
        if self._stop:
            self._leave(runner, runner.iter + 1)

    def before_val_epoch(self, runner) -> None:
        self._shared = min(self._together(len(runner.val_dataloader)))  # processes may have one batch more or less

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if batch_idx < self._shared and self._of_all(self._asked())[0]:
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):  # it lends the model its averages while that is evaluated
                    hook.after_val_epoch(runner)
            self._leave(runner, runner.iter)

    def _receive(self, number, frame) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt  # asked twice: at once
        self.signal = number

    def _asked(self) -> int:
        """The signal that asks this process to stop, 0 without one; as of its terminal where torchrun itself is gone,
        which would have ended its processes with it."""
        gone = self.launcher is not None and os.getppid() != self.launcher
        return self.signal or (signal.SIGHUP if gone else 0)

    def _before_step(self, optimizer, args, kwargs) -> None:
        """Leave out an update by gradients that are no numbers: they are the same in all processes."""
        if getattr(optimizer, 'found_inf', None) is not None:
            return  # a fused optimizer does so itself, and gradients still have the scale of mixed precision
        gradients = [p.grad for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        self._skipped = bool(gradients) and not bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())
        if self._skipped:
            optimizer.zero_grad(set_to_none=True)

    def _of_all(self, *numbers: int) -> list[int]:
        """The sums of whole numbers over all processes."""
        if self._group is None:
            return [int(number) for number in numbers]
        sums = torch.tensor([int(number) for number in numbers])
        torch.distributed.all_reduce(sums, group=self._group)
        return sums.tolist()

    def _together(self, own) -> list:
        if self._group is None:
            return [own]
        every = [None] * get_world_size()
        torch.distributed.all_gather_object(every, own, group=self._group)
        return every

    def _count(self, runner, new: dict) -> None:
        for found in self._together(new):
            for path, why in found.items():
                if path not in self.bad_images:
                    self.bad_images[path] = why
                    count = f'{len(self.bad_images)} of at most {self.allowed}'
                    runner.logger.warning(f'{path}: {why}: another image takes its place ({count})')
        if len(self.bad_images) > self.allowed:
            path, why = list(self.bad_images.items())[-1]
            saved = self._save(runner, runner.iter + 1)
            raise TrainingError(
                f'{len(self.bad_images)} images cannot be read, the last is {path}: {why}; at most {self.allowed} may '
                f'be replaced by others (--max-unreadable); {saved}'
            )

    def _judge(self, runner) -> None:
        """Count updates left out in a row; the weights stayed as they were."""
        images = [name for names in self._together(self.wrong_images) for name in names] if self.wrong else []
        self.wrong_updates = self.wrong_updates + 1 if self.wrong else 0
        if self.wrong:
            of = f' of {", ".join(images[:4])}' if images else ''
            then = ': this update is left out' if self._skipped else ''
            runner.logger.warning(f'the loss or a gradient{of} is NaN or Inf{then}')
        if self.wrong_updates >= MAX_CONSECUTIVE_NONFINITE:
            lr = max(lr for lrs in runner.optim_wrapper.get_lr().values() for lr in lrs)
            saved = self._save(runner, runner.iter + 1)
            of = f', the last of {", ".join(images[:4])}' if images else ''
            raise TrainingError(
                f'the loss or a gradient was NaN or Inf in {MAX_CONSECUTIVE_NONFINITE} updates in a row{of}; likely '
                f'causes: {NONFINITE_CAUSES.format(lr=lr)}; {saved}'
            )
        self.wrong, self.wrong_images, self._skipped = False, [], False

    def _count_zeros(self, runner) -> None:
        """Warn, once, of a loss that is exactly 0 for long, in all processes: nothing is learned."""
        self.zero_steps = 0 if self._nonzero else self.zero_steps + 1
        self._nonzero = False
        if self.zero_steps == MAX_ZERO_LOSS_STEPS and not self._zero_said:
            self._zero_said = True
            runner.logger.warning(
                f'the loss was exactly 0 in {MAX_ZERO_LOSS_STEPS} optimizer steps in a row: nothing is learned; likely '
                f'causes: {ZERO_LOSS_CAUSES}'
            )

    def _leave(self, runner, iteration: int) -> None:
        number = self._asked() or signal.SIGTERM  # the first of another process
        name = signal.Signals(number).name
        raise RunInterrupted(f'stopped by {name}: {self._save(runner, iteration)}', number)

    def _save(self, runner, iteration: int) -> str:
        if self._saver is None:
            return 'nothing was saved, as the config has no CheckpointHook of mmengine'
        path = self._saver.save_interrupted(runner, dict(epoch=runner.epoch, iter=iteration))
        self._of_all(0)  # none leaves before the first process has written: launchers end all when one does
        last = path or self._saver.last_ckpt
        return f'{last} holds the run, --resume goes on with it' if last else 'there was no room to save'


class HealthActionHook(Hook):
    """Has the guard act after all other hooks: what it saves is then as they left it."""

    priority = 'LOWEST'

    def __init__(self, guard: HealthCheckHook):
        self.guard = guard

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.guard.act(runner)


def _data_samples(data_batch) -> list:
    """The data samples of a batch, whose metainfo says where they come from."""
    samples = data_batch.get('data_samples', ()) if isinstance(data_batch, dict) else ()
    return [sample for sample in samples if hasattr(sample, 'metainfo')]


def _batch_shape(data_batch) -> tuple | None:
    """N x C x H x W of the images of a batch, padded to the largest."""
    images = data_batch.get('inputs') if isinstance(data_batch, dict) else None
    if images is None or not len(images) or not all(hasattr(image, 'shape') for image in images):
        return None
    return (len(images), *(max(sizes) for sizes in zip(*(image.shape for image in images))))
