"""Checkpoints that are written atomically and hold all that a run needs to continue."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook

from .atomic_files import TMP_SUFFIX, AtomicLocalBackend, DiskFullError, write_atomic
from .progress import batch_partition, broadcast_from_rank0, gather_partial_grads

INTERRUPTED_CKPT = 'interrupted.pth'  # between the regular checkpoints; goes when the next of these is there
LAST_CKPT_FILE = 'last_checkpoint'  # holds the path of the checkpoint to go on from
CKPT_STATE_KEYS = (
    'keep_ckpt_ids',
    'last_ckpt',
    'best_ckpt_path',
    'best_ckpt_path_dict',
)  # mmengine's books of checkpoints


class AtomicCheckpointHook(CheckpointHook):
    """mmengine's hook with checkpoints that are whole, and from which a run goes on as if it had not stopped: they hold
    what gradients are added up so far, and how the batches were laid out."""

    _gradients, _depth = None, 0

    def before_train(self, runner) -> None:
        super().before_train(runner)
        if type(self.file_backend) is LocalBackend:
            self.backend_args, self.file_backend = dict(backend='whole'), AtomicLocalBackend()
        if is_main_process() and isinstance(self.file_backend, AtomicLocalBackend):
            for part in Path(self.out_dir).glob(f'*.pth{TMP_SUFFIX}'):  # a kill in the middle of writing leaves these
                part.unlink()
            for path in runner.message_hub.runtime_info.get('outdated_ckpts', ()):  # and before removing, these
                Path(path).unlink(missing_ok=True)
            # The list itself: saved with a checkpoint, it says what that one replaces.
            runner.message_hub.update_info('outdated_ckpts', self.file_backend.outdated)
        if getattr(self, 'best_ckpt_path', None):  # beside the others, wherever the work dir was moved or copied
            self.best_ckpt_path = self.file_backend.join_path(self.out_dir, os.path.basename(self.best_ckpt_path))

    def save_interrupted(self, runner, meta: dict) -> str | None:
        """Save the state between regular checkpoints, counted by `meta`; None where the disk is full."""
        with self._or_as_before(runner) as done:
            self._write(runner, INTERRUPTED_CKPT, meta)
            done.append(self.file_backend.join_path(self.out_dir, INTERRUPTED_CKPT))
            self._point_at(runner, done[0])
        return done[0] if done else None

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        checkpoint['meta']['layout'] = batch_partition(runner)
        if self._gradients is not None and 'optimizer' in checkpoint:
            checkpoint['gradients'] = self._gradients

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        """As mmengine's, but what is outdated goes when the new one is there."""
        with self._or_as_before(runner):
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
            self._point_at(runner, path)

    def _save_best_checkpoint(self, runner, metrics: dict) -> None:
        if self.save_best:
            with self._or_as_before(runner):
                super()._save_best_checkpoint(runner, metrics)

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

    def _point_at(self, runner, path: str) -> None:
        if is_main_process():
            write_atomic(os.path.join(runner.work_dir, LAST_CKPT_FILE), str(path).encode())

    def _remove(self, name: str) -> None:
        path = self.file_backend.join_path(self.out_dir, name)
        if is_main_process() and self.file_backend.exists(path):
            self.file_backend.remove(path)

    @contextmanager
    def _or_as_before(self, runner) -> Iterator[list]:
        """Save on the first process; where there is no room, say so and leave all as it was, on every process."""
        done = []
        if self._depth:  # the best checkpoint has the last one saved again
            yield done
            return
        hub = runner.message_hub.runtime_info
        mine = copy.deepcopy({key: vars(self)[key] for key in CKPT_STATE_KEYS if key in vars(self)})
        info = {key: hub[key] for key in hub if _is_managed(key)}
        self._gradients, self._depth, full = gather_partial_grads(runner), 1, None
        try:
            yield done
        except DiskFullError as error:
            full = str(error)
        finally:
            self._gradients, self._depth = None, 0
        full = broadcast_from_rank0(full, runner)
        if full is None:
            if is_main_process() and isinstance(self.file_backend, AtomicLocalBackend):
                self.file_backend.clear()
            return
        done.clear()
        for key in [key for key in hub if _is_managed(key) and key not in info]:
            hub.pop(key)
        hub.update(info)
        vars(self).update(mine)
        if isinstance(self.file_backend, AtomicLocalBackend):
            self.file_backend.outdated.clear()
        last = self.last_ckpt or 'none yet'
        runner.logger.warning(f'{full}; the last checkpoint stays: {last}; training goes on')


def _is_managed(key: str) -> bool:
    return key in ('keep_ckpt_ids', 'last_ckpt') or key.startswith('best_')
