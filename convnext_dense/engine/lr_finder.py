"""Learning rate range test: a short training with an exponentially rising learning rate."""

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook

from .atomic_files import write_atomic
from .dry_run import TrialEnd
from .progress import is_step_end

NUM_STEPS = 100  # optimizer steps
MIN_LR, MAX_LR = 1e-7, 1.0
SMOOTHING = 0.9  # factor of the exponential moving average of the loss
DIVERGED = 4  # the test ends at this multiple of the lowest smoothed loss, as in fastai
SAFETY = 10  # the lr with the lowest loss is divided by this
FILE = 'lr_find'  # name of the .csv and the .png in the work dir


class LRFinderHook(Hook):
    """Raises the learning rate from step to step, records the loss, and ends the run (Smith 2017, section 3.3).

    The ratios between the learning rates of parameter groups, as of layer-wise decay, are preserved.

    Attributes:
        lrs (list[float]): Learning rate of each optimizer step, in terms of `optimizer.lr` of the config.
        losses (list[float]): Mean loss of the iterations of each step, over all ranks.
        smoothed (list[float]): Exponential moving average of `losses`.
    """

    priority = 'LOWEST'

    def __init__(self):
        self.lrs, self.losses, self.smoothed, self._window = [], [], [], []

    def before_train(self, runner) -> None:
        """Store the learning rates of the config."""
        optimizer = runner.optim_wrapper.optimizer
        self.config_lr = optimizer.defaults['lr']
        self._multipliers = [group['lr'] / self.config_lr for group in optimizer.param_groups]

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Set the learning rates of the next iteration."""
        self._lr = MIN_LR * (MAX_LR / MIN_LR) ** (len(self.lrs) / (NUM_STEPS - 1))
        for group, multiplier in zip(runner.optim_wrapper.optimizer.param_groups, self._multipliers):
            group['lr'] = self._lr * multiplier

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Record the loss; end the run after the last step, or if the loss diverges."""
        loss = outputs['loss'].detach().clone()
        all_reduce(loss, 'mean')
        self._window.append(float(loss))
        if not is_step_end(runner):
            return
        mean, self._window = sum(self._window) / len(self._window), []
        if math.isfinite(mean):
            self.lrs.append(self._lr)
            self.losses.append(mean)
            self.smoothed = ema(self.losses, SMOOTHING)
        if not math.isfinite(mean) or len(self.lrs) == NUM_STEPS or self.smoothed[-1] > DIVERGED * min(self.smoothed):
            raise TrialEnd

    def best_lr(self) -> float | None:
        """Return the learning rate with the lowest smoothed loss; None if the loss rises from the start."""
        best = min(range(len(self.lrs)), key=self.smoothed.__getitem__, default=0)
        return self.lrs[best] if best >= NUM_STEPS // 10 else None


def ema(values: Sequence[float], factor: float) -> list[float]:
    """Compute the bias-corrected exponential moving average (as in Adam).

    Args:
        values: Values in order; non-finite ones are kept and do not enter the average.
        factor: Weight of the previous average, in [0, 1).

    Returns:
        The averages, one per value.
    """
    mean, weight, averages = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean, weight = factor * mean + (1 - factor) * value, factor * weight + 1 - factor
            value = mean / weight
        averages.append(value)
    return averages


def find_lr(runner) -> None:
    """Run the test, write its curve, and log a suggestion; no checkpoint is saved."""
    hook = LRFinderHook()
    runner.register_hook(hook)
    with suppress(TrialEnd):
        runner.train()
    if is_main_process():
        path = Path(runner.work_dir, FILE)
        _write_csv(hook, path.with_suffix('.csv'))
        _plot(hook, path.with_suffix('.png'))
        runner.logger.info(f'lr-find: {_suggestion(hook)}; the curve is {path}.png, its numbers {path}.csv')


def _suggestion(hook: LRFinderHook) -> str:
    best = hook.best_lr()
    if best is None:
        return f'no suggestion, as the loss does not fall from lr {MIN_LR:g} on; the lr is {hook.config_lr:g}'
    lr = f'{best / SAFETY:.2g}'
    return (
        f'lr {lr}, a tenth of that with the lowest loss ({best:.2g}), instead of {hook.config_lr:g}: use it with '
        f'--cfg-options optim_wrapper.optimizer.lr={lr}'
    )


def _write_csv(hook: LRFinderHook, path: Path) -> None:
    rows = [('lr', 'loss', 'smoothed_loss'), *zip(hook.lrs, hook.losses, hook.smoothed)]
    write_atomic(path, ''.join(f'{lr},{loss},{smoothed}\n' for lr, loss, smoothed in rows).encode())


def _plot(hook: LRFinderHook, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.subplots()
    axes.plot(hook.lrs, hook.losses, color='#b8c4ce', label='loss')
    axes.plot(hook.lrs, hook.smoothed, color='#0b6fb8', label='smoothed')
    axes.axvline(hook.config_lr, color='#555555', linestyle=':', label=f'of the config: {hook.config_lr:g}')
    best = hook.best_lr()
    if best is not None:
        axes.axvline(best / SAFETY, color='#d1495b', linestyle='--', label=f'suggestion: {best / SAFETY:.2g}')
    if hook.smoothed:  # single losses and the last ones may be far above
        axes.set_ylim(0.9 * min(hook.smoothed), 1.1 * max([hook.smoothed[0], *hook.smoothed[:-3]]))
    axes.set(xscale='log', xlabel='learning rate (optimizer.lr)', ylabel='loss')
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
