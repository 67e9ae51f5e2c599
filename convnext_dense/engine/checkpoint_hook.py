"""Checkpoints that are written atomically, at the end of an optimizer step, with everything needed to resume."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend
from mmengine.runner import EpochBasedTrainLoop

from ..mmengine_internals import OverridableCheckpointHook
from .atomic_files import ATOMIC_BACKEND, TMP_SUFFIX, AtomicLocalBackend, DiskFullError, write_atomic
from .progress import PARTITION_KEY, batch_partition, broadcast_from_rank0, is_step_end, next_step_end

INTERRUPTED_CKPT = 'interrupted.pth'  # between regular checkpoints; deleted once the next regular one is written
LAST_CKPT_FILE = 'last_checkpoint'  # in the work dir: the path of the checkpoint to resume
PENDING_DELETES_KEY = 'outdated_ckpts'  # in the message hub, and therefore in checkpoints
CKPT_STATE_KEYS = ('keep_ckpt_ids', 'last_ckpt', 'best_ckpt_path', 'best_ckpt_path_dict')  # attributes of the hook


class AtomicCheckpointHook(OverridableCheckpointHook):
    """mmengine's hook with checkpoints from which a run continues as if it had not stopped.

    Every file is complete or absent. When the disk is full, existing files are kept and training continues. Under
    gradient accumulation, checkpoints are written at the end of an optimizer step, so that they never need partial
    gradients: one that is due between two steps is written at the end of the first. Its weights are those that the
    evaluation after it sees, because only gradients change in between.
    """

    _is_writing = False
    saved_iter = -1  # finished iterations in the latest regular or interrupted checkpoint

    def before_train(self, runner) -> None:
        """Remove leftovers of a killed run, and find the best checkpoint in a work dir that was moved."""
        super().before_train(runner)
        if type(self.file_backend) is LocalBackend:
            self.backend_args, self.file_backend = dict(backend=ATOMIC_BACKEND), AtomicLocalBackend()
        if is_main_process() and isinstance(self.file_backend, AtomicLocalBackend):
            for path in Path(self.out_dir).glob(f'*.pth{TMP_SUFFIX}'):  # from a kill while writing
                path.unlink()
            for path in runner.message_hub.runtime_info.get(PENDING_DELETES_KEY, ()):  # from a kill before deleting
                Path(path).unlink(missing_ok=True)
            # The list object itself, so that every checkpoint contains the files that it makes obsolete.
            runner.message_hub.update_info(PENDING_DELETES_KEY, self.file_backend.pending_deletes)
        if getattr(self, 'best_ckpt_path', None):
            self.best_ckpt_path = self.file_backend.join_path(self.out_dir, os.path.basename(self.best_ckpt_path))

    def after_train_epoch(self, runner) -> None:
        """Write the checkpoint of an epoch, unless `after_train_iter` has written it at the last optimizer step."""
        if is_step_end(runner):
            super().after_train_epoch(runner)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """At the end of an optimizer step, write a checkpoint that is due now or before the next step ends."""
        if not is_step_end(runner):
            return
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        iters = runner.iter + 1
        step = self._step_due_early(runner, iters)
        if step is not None and self.saved_iter != iters:
            runner.logger.info(
                f'Saving checkpoint {self.filename_tmpl.format(step)} at iteration {iters}, where its last complete '
                'optimizer step ends'
            )
            self.write_regular(runner, step, dict(epoch=runner.epoch, iter=iters))

    def _step_due_early(self, runner, iters: int) -> int | None:
        """Return the number of the checkpoint due before the next optimizer step ends; None if there is none."""
        upcoming = range(iters + 1, next_step_end(runner, iters))
        if not self.by_epoch:
            return iters if any(map(self._is_due, upcoming)) else None
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            return None
        length = len(runner.train_dataloader)
        return max((i // length for i in upcoming if i % length == 0 and self._is_due(i // length)), default=None)

    def _is_due(self, count: int) -> bool:
        passed = count - self.save_begin
        return self.interval > 0 and passed >= 0 and passed % self.interval == 0

    def write_interrupted(self, runner, iters: int) -> str | None:
        """Write a checkpoint between regular ones.

        Args:
            runner: The runner, at the end of an optimizer step.
            iters: Finished iterations.

        Returns:
            Its path; None if the disk is full.
        """
        path = self.file_backend.join_path(self.out_dir, INTERRUPTED_CKPT)
        with self._transaction(runner) as transaction:
            self._write(runner, INTERRUPTED_CKPT, dict(epoch=runner.epoch, iter=iters))
            self._write_last_checkpoint(runner, path)
        if transaction['ok']:
            self.saved_iter = iters
        return path if transaction['ok'] else None

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Add the batch partition."""
        checkpoint['meta'][PARTITION_KEY] = asdict(batch_partition(runner))

    def write_regular(self, runner, step: int, meta: dict) -> None:
        """Write a regular checkpoint as mmengine does, but delete files only once the new one is written."""
        if not is_step_end(runner):
            return  # after an evaluation between two steps: resuming repeats it, with the best checkpoint
        with self._transaction(runner) as transaction:
            if self.max_keep_ckpts > 0 and not (self.keep_ckpt_ids and self.keep_ckpt_ids[-1] == step):
                if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                    self._remove(self.filename_tmpl.format(self.keep_ckpt_ids.popleft()))
                self.keep_ckpt_ids.append(step)
                runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
            name = self.filename_tmpl.format(step)
            path = self.file_backend.join_path(self.out_dir, name)
            runner.message_hub.update_info('last_ckpt', path)
            self._write(runner, name, meta)
            self.last_ckpt = path
            self._remove(INTERRUPTED_CKPT)
            self._write_last_checkpoint(runner, path)
        if transaction['ok']:
            self.saved_iter = meta['iter']

    def write_best(self, runner, metrics: dict) -> None:
        """Write the best checkpoint as mmengine does, but completely or not at all."""
        if self.save_best:
            with self._transaction(runner):
                super().write_best(runner, metrics)

    def _write(self, runner, name: str, meta: dict) -> None:
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )

    def _write_last_checkpoint(self, runner, path: str) -> None:
        if is_main_process():
            write_atomic(os.path.join(runner.work_dir, LAST_CKPT_FILE), str(path).encode())

    def _remove(self, name: str) -> None:
        path = self.file_backend.join_path(self.out_dir, name)
        if is_main_process() and self.file_backend.exists(path):
            self.file_backend.remove(path)

    @contextmanager
    def _transaction(self, runner) -> Iterator[dict]:
        """Write files on rank 0; if the disk is full, warn and restore the previous state on all ranks.

        Yields:
            A dict whose 'ok' is True afterwards if all files were written.
        """
        transaction = dict(ok=True)
        if self._is_writing:  # writing the best checkpoint writes the last one again
            yield transaction
            return
        hub = runner.message_hub.runtime_info
        hook_state = copy.deepcopy({key: vars(self)[key] for key in CKPT_STATE_KEYS if key in vars(self)})
        hub_state = {key: hub[key] for key in hub if _is_managed(key)}
        self._is_writing, failure = True, None
        try:
            yield transaction
        except DiskFullError as error:
            failure = str(error)
        finally:
            self._is_writing = False
        failure = broadcast_from_rank0(failure, runner)
        if failure is None:
            if is_main_process() and isinstance(self.file_backend, AtomicLocalBackend):
                self.file_backend.flush_deletes()
            return
        transaction['ok'] = False
        for key in [key for key in hub if _is_managed(key) and key not in hub_state]:
            hub.pop(key)
        hub.update(hub_state)
        vars(self).update(hook_state)
        if isinstance(self.file_backend, AtomicLocalBackend):
            self.file_backend.pending_deletes.clear()
        runner.logger.warning(f'{failure}. Keeping {self.last_ckpt or "no checkpoint yet"} and continuing')


def _is_managed(key: str) -> bool:
    """Whether a key of the message hub describes checkpoints."""
    return key in ('keep_ckpt_ids', 'last_ckpt') or key.startswith('best_')
