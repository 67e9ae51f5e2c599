"""Early stopping that a resumed run does where the run would have stopped by itself."""

import json
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import EarlyStoppingHook
from mmengine.runner import EpochBasedTrainLoop

from .atomic_files import warn_on_disk_full, write_atomic
from .checkpoint_hook import AtomicCheckpointHook
from .progress import broadcast_from_rank0, progress_of

SCORES_FILE = 'early_stopping.json'  # in the work dir: [progress, score] of each evaluation


class ResumableEarlyStoppingHook(EarlyStoppingHook):
    """mmengine's hook, which counts the evaluations of the run before it was resumed too.

    A checkpoint is written before the evaluation that belongs to it. So scores are kept in a file of the work dir, and
    those up to the checkpoint are counted anew on resuming. The run is saved where it stops.
    """

    def before_train(self, runner) -> None:
        """Count the scores up to the progress of the run; a run that had stopped does not go on."""
        scores = broadcast_from_rank0(_read_scores(runner) if is_main_process() else None, runner)
        self.scores = {progress: score for progress, score in scores if progress <= progress_of(runner)}
        for score in self.scores.values():
            stops, message = self._check_stop_condition(score)
            if stops:
                runner.logger.info(f'This run has stopped early: {message}')
                runner.train_loop.stop_training = True

    def after_val_epoch(self, runner, metrics: dict) -> None:
        """Count the score of an evaluation, once, and stop the training where it is the last of too many."""
        progress = progress_of(runner)
        if self.monitor in metrics and progress not in self.scores:
            self.scores[progress] = float(metrics[self.monitor])
            self._write_scores(runner)
            super().after_val_epoch(runner, metrics)
        if runner.train_loop.stop_training:
            _save(runner)

    def _write_scores(self, runner) -> None:
        if is_main_process():
            with warn_on_disk_full(runner):
                scores = [[progress, str(score)] for progress, score in self.scores.items()]  # NaN is no JSON
                write_atomic(Path(runner.work_dir, SCORES_FILE), json.dumps(scores).encode())


def _read_scores(runner) -> list[tuple[int, float]]:
    """The scores that a resumed run has in its work dir; none if they are damaged, or the run is new."""
    try:
        scores = json.loads(Path(runner.work_dir, SCORES_FILE).read_text()) if progress_of(runner) else []
        return sorted((int(progress), float(score)) for progress, score in scores)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError):
        runner.logger.warning(f'{SCORES_FILE} is damaged: early stopping counts evaluations from here on')
        return []


def _save(runner) -> None:
    """Write a regular checkpoint, unless this iteration has one."""
    by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
    for hook in runner.hooks:
        if isinstance(hook, AtomicCheckpointHook) and hook.saved_iter != runner.iter and hook.interval > 0:
            step = runner.epoch if by_epoch == hook.by_epoch and by_epoch else runner.iter
            hook.write_regular(runner, step, dict(epoch=runner.epoch, iter=runner.iter))
