"""What mmengine's resuming lacks: other batch partitions, interrupted evaluations, overriding settings."""

import warnings
from dataclasses import replace
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop

from ..errors import UsageError
from ..mmengine_internals import accumulation_steps, checkpoint_to_load, is_resuming, update_val_interval
from .atomic_files import warn_on_disk_full, write_atomic
from .hooks import UpdateParamSchedulerHook
from .progress import BatchPartition, batch_partition, load_partition, progress_of

OVERRIDE_KEY = 'override_resumed'  # config key: whether its settings replace those of the checkpoint
LAST_EVAL_FILE = 'last_evaluation'  # in the work dir: the progress of the run at the last finished evaluation


def _use_config_settings(optim_wrapper: OptimWrapper, checkpoint: dict) -> None:
    """Replace the optimizer settings in a checkpoint by those of a newly built optimizer, in place.

    The schedules in it are dropped; `_replay_schedules` advances those of the config.
    """
    current, saved = optim_wrapper.state_dict(), checkpoint['optimizer']
    sizes = [[len(group['params']) for group in state.get('param_groups', ())] for state in (current, saved)]
    if sizes[0] != sizes[1] or not sizes[0]:
        raise UsageError('--override: the checkpoint has other parameter groups; start a run from its weights instead')
    groups = [{**c, 'params': s['params']} for c, s in zip(current['param_groups'], saved['param_groups'])]
    checkpoint['optimizer'] = {**saved, 'param_groups': groups}
    if 'base_param_settings' in current:
        checkpoint['optimizer']['base_param_settings'] = current['base_param_settings']
    checkpoint.pop('param_schedulers', None)


def _replay_schedules(runner) -> None:
    """Step the parameter schedulers of a new runner until they match its progress."""
    by_step = any(isinstance(hook, UpdateParamSchedulerHook) for hook in runner.hooks)
    interval = accumulation_steps(runner.optim_wrapper) if by_step else 1
    by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
    iters_per_epoch = len(runner.train_dataloader) if by_epoch else runner.iter + 1
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # schedulers expect an optimizer step before each of theirs
        for iteration in range(1, runner.iter + 1):
            for scheduler in runner.param_schedulers or ():
                if iteration % (iters_per_epoch if scheduler.by_epoch else interval) == 0:
                    scheduler.step()


class ResumeHook(Hook):
    """Completes mmengine's resuming.

    It converts the iteration counter to another batch partition, lets the config's settings override the checkpoint's
    if asked to, and repeats an interrupted evaluation.
    """

    priority = 'LOWEST'
    _replays_schedules = False

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Adapt a checkpoint before mmengine takes the state of the run from it."""
        if not is_resuming(runner):
            return
        if checkpoint.get('gradients'):
            path = checkpoint_to_load(runner)
            raise UsageError(
                f'{path} was saved by an earlier version between two optimizer steps and cannot be resumed: resume a '
                'regular checkpoint (epoch_*.pth, iter_*.pth), or start a run from its weights with --cfg-options '
                f'load_from={path}'
            )
        self._replays_schedules = bool(runner.cfg.get(OVERRIDE_KEY))
        if self._replays_schedules:
            runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
            _use_config_settings(runner.optim_wrapper, checkpoint)
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        meta, new = checkpoint.get('meta', {}), batch_partition(runner)
        old = load_partition(meta)
        if old is not None:
            meta['iter'], note = convert_progress(meta['epoch'], meta['iter'], old, new, by_epoch)
            if note:
                runner.logger.warning(note)
        elif by_epoch:  # written by another tool, which saves at the end of an epoch
            meta['iter'] = meta['epoch'] * new.iters_per_epoch

    def before_train(self, runner) -> None:
        """Replay schedules and repeat an interrupted evaluation."""
        self.last_eval_file = Path(runner.work_dir, LAST_EVAL_FILE)
        if self._replays_schedules:
            _replay_schedules(runner)
        if is_resuming(runner) and runner.val_loop is not None and is_eval_due(runner.train_loop):
            evaluated = int(self.last_eval_file.read_text()) if self.last_eval_file.exists() else 0
            if evaluated < progress_of(runner):
                runner.logger.info('The evaluation after this checkpoint was interrupted; running it now')
                runner.val_loop.run()

    def after_val_epoch(self, runner, metrics=None) -> None:
        """Record that the evaluation at this progress is finished."""
        if is_main_process():
            with warn_on_disk_full(runner):
                write_atomic(self.last_eval_file, str(progress_of(runner)).encode())


def convert_progress(
    epoch: int, iteration: int, old: BatchPartition, new: BatchPartition, by_epoch: bool
) -> tuple[int, str | None]:
    """Convert the iteration counter of a checkpoint to the batch partition with which its run resumes.

    With an unchanged total batch, each optimizer step sees the same images as before.

    Args:
        epoch: Finished epochs.
        iteration: Finished iterations.
        old: Batch partition of the checkpoint.
        new: Batch partition of the resumed run.
        by_epoch: Whether the loop is epoch-based.

    Returns:
        The iteration in the new partition, and a warning (or None).

    Raises:
        UsageError: If the data set has another size, or no batch of the new partition begins at that image.
    """
    note = None
    if old.order_digest and new.order_digest and old.order_digest != new.order_digest:
        note = 'The training images have another order or other names than before: batches will differ'
    if replace(old, order_digest='') == replace(new, order_digest=''):
        return iteration, note
    if old.num_images != new.num_images:
        raise UsageError(
            f'the training set has {new.num_images} images, but {old.num_images} when the run stopped: use the same '
            'data, or start a run from its weights with --cfg-options load_from=CHECKPOINT'
        )
    is_same_batch = (old.world_size, old.batch_size) == (new.world_size, new.batch_size)
    if is_same_batch and old.iters_per_epoch != new.iters_per_epoch:
        raise UsageError(
            f'an epoch has {new.iters_per_epoch} iterations, but had {old.iters_per_epoch} when the run stopped: '
            'repeat images as then (--balance, RepeatDataset), or start a run from its weights with --cfg-options '
            'load_from=CHECKPOINT'
        )
    sizes = f'{new.world_size} x {new.batch_size} (was {old.world_size} x {old.batch_size}) images per iteration'
    iters_in_past_epochs = epoch * old.iters_per_epoch if by_epoch else 0
    if old.total_batch == new.total_batch:
        iters_done, message = _convert_iters(iteration - iters_in_past_epochs, old, new, by_epoch, sizes)
    elif old.accumulation_steps != new.accumulation_steps or (by_epoch and iteration != iters_in_past_epochs):
        raise UsageError(
            f'cannot resume with {sizes}, {new.accumulation_steps} (was {old.accumulation_steps}) gradient '
            f'accumulation steps: the total batch was {old.total_batch}, now it is '
            f'{new.total_batch}; resume with the previous one'
        )
    else:
        iters_done = 0 if by_epoch else iteration
        message = f'Resumed with {sizes}; the total batch changed from {old.total_batch} to {new.total_batch}'
    converted = (epoch * new.iters_per_epoch if by_epoch else 0) + iters_done
    return converted, f'{message}. {note}' if note else message


def _convert_iters(
    iters_done: int, old: BatchPartition, new: BatchPartition, by_epoch: bool, sizes: str
) -> tuple[int, str]:
    """Convert the iterations of the current epoch (of the run, in an iteration-based loop) at the same total batch."""
    message = f'Resumed with {sizes}; total batch unchanged'
    images = iters_done * old.global_batch
    steps_fill_epochs = old.num_images % old.total_batch == 0
    if images % new.global_batch and (not by_epoch or steps_fill_epochs):
        raise UsageError(
            f'cannot resume with {sizes}: the checkpoint is not at a batch boundary of the new batch size; resume with '
            'the previous batch size'
        )
    if not by_epoch or steps_fill_epochs:
        message += ', each optimizer step sees the same images unless they are grouped by aspect ratio'
    else:  # the images of a step across two epochs depend on the number of ranks
        message += '; optimizer steps at the end of an epoch see other images than before'
    return images // new.global_batch, message


def is_eval_due(loop) -> bool:
    """Whether a training loop evaluates at its current progress."""
    update_val_interval(loop)
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    if by_epoch and loop.iter != loop.epoch * len(loop.dataloader):
        return False
    count, end = (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)
    return count >= max(loop.val_begin, 1) and (count % loop.val_interval == 0 or count == end)
