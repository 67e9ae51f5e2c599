"""Early stopping at the same evaluation, whether a run was resumed or not."""

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
    """mmengine's hook, which also counts evaluations before the run was resumed.

    Scores are kept in a file in the work dir, because a checkpoint is written before the evaluation that belongs to it.
    On resuming, those up to the checkpoint are counted again. A checkpoint is written where the run stops.
    """

    def before_train(self, runner) -> None:
        """Count the scores up to the progress of the run; a run that had stopped early stays stopped."""
        scores = broadcast_from_rank0(_read_scores(runner) if is_main_process() else None, runner)
        self.scores = {progress: score for progress, score in scores if progress <= progress_of(runner)}
        for score in self.scores.values():
            stops, message = self._check_stop_condition(score)
            if stops:
                runner.logger.info(f'This run has stopped early: {message}')
                runner.train_loop.stop_training = True

    def after_val_epoch(self, runner, metrics: dict) -> None:
        """Count the score of an evaluation once, and stop the training if the patience is exhausted."""
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
    """Return (progress, score) of earlier evaluations of a resumed run; [] if the file is damaged or the run is new."""
    try:
        scores = json.loads(Path(runner.work_dir, SCORES_FILE).read_text()) if progress_of(runner) else []
        return sorted((int(progress), float(score)) for progress, score in scores)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError):
        runner.logger.warning(f'{SCORES_FILE} is damaged: early stopping counts evaluations from here on')
        return []


def _save(runner) -> None:
    """Write a regular checkpoint unless there is one of this iteration."""
    by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
    for hook in runner.hooks:
        if isinstance(hook, AtomicCheckpointHook) and hook.saved_iter != runner.iter and hook.interval > 0:
            step = runner.epoch if by_epoch == hook.by_epoch and by_epoch else runner.iter
            hook.write_regular(runner, step, dict(epoch=runner.epoch, iter=runner.iter))
