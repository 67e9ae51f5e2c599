"""What mmengine's resuming leaves out: another batch partition, partial gradients, an interrupted evaluation."""

import warnings
from pathlib import Path

import torch
from mmengine.dist import get_rank, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop

from ..errors import UsageError
from .atomic_files import warn_on_disk_full, write_atomic
from .param_scheduler_hook import UpdateParamSchedulerHook
from .progress import batch_partition, progress_of

OVERRIDE_KEY = 'override_resumed'  # key of a config whose own settings take the place of the checkpoint's


# ---- taking the config's settings ---------------------------------------------------------------------------------


def use_config_settings(optim_wrapper: OptimWrapper, checkpoint: dict) -> None:
    """Put the settings of a freshly built optimizer into the state that it is about to load, and leave out the state of
    the schedules, which `replay` brings to where the run is.

    Raises:
        UsageError: the state has other groups of parameters.
    """
    fresh, saved = optim_wrapper.state_dict(), checkpoint['optimizer']
    groups = [[len(group['params']) for group in state.get('param_groups', ())] for state in (fresh, saved)]
    if groups[0] != groups[1] or not groups[0]:
        raise UsageError('--override: the checkpoint groups its parameters otherwise: start a run from its weights')
    own = [{**f, 'params': s['params']} for f, s in zip(fresh['param_groups'], saved['param_groups'])]
    checkpoint['optimizer'] = {**saved, 'param_groups': own}
    if 'base_param_settings' in fresh:
        checkpoint['optimizer']['base_param_settings'] = fresh['base_param_settings']
    checkpoint.pop('param_schedulers', None)


def replay_schedules(runner) -> None:
    """Step the schedules of a run as often as it has stepped."""
    by_update = any(isinstance(hook, UpdateParamSchedulerHook) for hook in runner.hooks)
    interval = runner.optim_wrapper._accumulative_counts if by_update else 1
    by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
    epoch_length = len(runner.train_dataloader) if by_epoch else runner.iter + 1
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # schedules expect a step of the optimizer before each of theirs
        for iteration in range(1, runner.iter + 1):
            for scheduler in runner.param_schedulers or ():
                if iteration % (epoch_length if scheduler.by_epoch else interval) == 0:
                    scheduler.step()


LAST_EVAL_FILE = 'last_evaluation'  # holds how far the run was at the last evaluation that was finished


class ResumeHook(Hook):
    """Fills in what mmengine's resuming leaves out: counts for another layout of the batches, gradients that were being
    added up, and an evaluation that was cut off."""

    priority = 'LOWEST'
    _replays = False

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        meta, now = checkpoint.get('meta', {}), batch_partition(runner) if runner._resume else None
        self._replays = bool(runner._resume and runner.cfg.get(OVERRIDE_KEY))
        if self._replays:
            runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
            use_config_settings(runner.optim_wrapper, checkpoint)
        by_epoch = isinstance(runner._train_loop, EpochBasedTrainLoop)
        if now is None or 'layout' not in meta:
            if now and by_epoch:  # of another tool, which saves where epochs end
                meta['iter'] = meta['epoch'] * now['batches']
            return
        meta['iter'], note = convert_progress(meta['epoch'], meta['iter'], meta['layout'], now, by_epoch)
        if note:
            runner.logger.warning(note)
        if checkpoint.get('gradients'):
            _set_partial_grads(runner.model, checkpoint['gradients'])
            # mmengine warns that they are lost.
            runner.logger.addFilter(lambda record: 'Resumed iteration number is not div' not in record.getMessage())

    def before_train(self, runner) -> None:
        self.evaluated = Path(runner.work_dir, LAST_EVAL_FILE)
        if self._replays:
            replay_schedules(runner)
        if runner._resume and runner.val_loop is not None and is_eval_due(runner.train_loop):
            done = int(self.evaluated.read_text()) if self.evaluated.exists() else 0
            if done < progress_of(runner):
                runner.logger.info('the evaluation that belongs to this checkpoint was not finished: evaluating')
                runner.val_loop.run()

    def after_val_epoch(self, runner, metrics=None) -> None:
        if is_main_process():
            with warn_on_disk_full(runner):
                write_atomic(self.evaluated, str(progress_of(runner)).encode())


def convert_progress(epoch: int, iteration: int, before: dict, now: dict, by_epoch: bool) -> tuple[int, str | None]:
    """The count of iterations of a run that goes on with another layout of its batches (`saving.layout_of`), and what
    is to be said of it. With the same total batch an update sees the same images as before, and the order goes on.

    Raises:
        UsageError: the data are others, or the place is within a batch of the new layout.
    """
    orders = before.get('order'), now.get('order')
    note = None
    if all(orders) and orders[0] != orders[1]:
        note = 'the training data are in another order than when the run stopped, or have other names: other batches'
    before, now = ({key: value for key, value in layout.items() if key != 'order'} for layout in (before, now))
    if before == now:
        return iteration, note
    if before['samples'] != now['samples']:
        raise UsageError(
            f'the training data hold {now["samples"]} images, {before["samples"]} when the run stopped: give it the '
            'same data, or start a run from its weights with --cfg-options load_from=CHECKPOINT'
        )
    at_once = [layout['processes'] * layout['images'] for layout in (before, now)]
    line = f'resumed on {now["processes"]} x {now["images"]} images, before {before["processes"]} x {before["images"]}'
    passed = epoch * before['batches'] if by_epoch else 0
    if at_once[0] * before['accumulation'] != at_once[1] * now['accumulation']:
        if before['accumulation'] != now['accumulation'] or (by_epoch and iteration != passed):
            raise UsageError(
                f'{line}, and the total batch was {at_once[0] * before["accumulation"]}, now '
                f'{at_once[1] * now["accumulation"]}: resume with the total batch of before'
            )
        done = 0 if by_epoch else iteration
        line += ': the total batch is another one, and so is the order of the data'
    else:
        images = (iteration - passed) * at_once[0]
        if images % at_once[1]:
            raise UsageError(f'{line}: the run stopped within a batch of now; resume with the images of before')
        done = images // at_once[1]
        line += ': the same total batch'
        if not by_epoch or before['samples'] % (at_once[0] * before['accumulation']) == 0:
            line += ', the same images in each update unless they are grouped by shape'
        else:
            line += '; the last update of an epoch and the first of the next take other images together'
    return (epoch * now['batches'] if by_epoch else 0) + done, f'{line}; {note}' if note else line


def _set_partial_grads(model: torch.nn.Module, gradients: list[dict]) -> None:
    """Give the parameters the gradients added up by this process; by all, where their number is another now."""
    chosen = [gradients[get_rank()]] if len(gradients) == get_world_size() else gradients
    for name, parameter in model.named_parameters():
        name = name.removeprefix('module.')
        found = [each[name] for each in chosen if name in each]
        if found:
            parameter.grad = (sum(found) / len(chosen)).to(parameter)


def is_eval_due(loop) -> bool:
    """Whether an evaluation belongs to where a training loop stands."""
    loop._decide_current_val_interval()
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    if by_epoch and loop.iter != loop.epoch * len(loop.dataloader):
        return False
    count, end = (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)
    return count >= max(loop.val_begin, 1) and (count % loop.val_interval == 0 or count == end)
