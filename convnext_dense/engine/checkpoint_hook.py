"""Checkpoints of which a whole one is always there: written aside and moved into place, older ones removed after that,
and a full disk costs a checkpoint, not the run."""

import copy
import errno
import logging
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from mmengine.dist import get_rank, get_world_size, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, LoggerHook

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

from ..errors import UsageError
from .samplers import images_in, order_of

INTERRUPTED = 'interrupted.pth'  # between the regular checkpoints; goes when the next of these is there
LAST = 'last_checkpoint'  # holds the path of the checkpoint to go on from
PART = '.part'
LOCK = '.lock'  # in a work dir, of the process that trains there
COUNTED = ('keep_ckpt_ids', 'last_ckpt', 'best_ckpt_path', 'best_ckpt_path_dict')  # mmengine's books of checkpoints
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


_held = []  # locks of this process, which it gives up when it ends


class NoRoom(OSError):
    """A file did not fit on its disk; the message says what is missing."""


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file so that at any instant the old one or the new one is there, on the disk itself.

    Raises:
        NoRoom: the disk, or the quota on it, is full; what was there is untouched.
    """
    path = Path(path)
    part = path.with_name(path.name + PART)
    try:
        with open(part, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)  # the new name is safe when the folder is
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(path.parent).free
        missing = len(content) - free
        said = f'{_mb(missing)} MB are missing' if missing > 0 else f'{error.strerror}, of {_mb(len(content))} MB'
        raise NoRoom(f'no room for {path}: {said}') from error


def _mb(size: int) -> str:
    return f'{max(size / 2**20, 0.1):.1f}'


class WholeFiles(LocalBackend):
    """mmengine's files on disks, written whole or not at all; what is to be removed waits for `clear`."""

    def __init__(self):
        self.outdated = []

    def put(self, obj: bytes, filepath) -> None:
        os.makedirs(os.path.dirname(filepath) or '.', exist_ok=True)
        write_whole(filepath, obj)

    def remove(self, filepath) -> None:
        self.outdated.append(str(filepath))

    def clear(self) -> None:
        while self.outdated:
            Path(self.outdated.pop()).unlink(missing_ok=True)


register_backend('whole', WholeFiles, force=True)


class WholeCheckpointHook(CheckpointHook):
    """mmengine's hook with checkpoints that are whole, and from which a run goes on as if it had not stopped: they hold
    what gradients are added up so far, and how the batches were laid out."""

    _gradients, _depth = None, 0

    def before_train(self, runner) -> None:
        super().before_train(runner)
        if type(self.file_backend) is LocalBackend:
            self.backend_args, self.file_backend = dict(backend='whole'), WholeFiles()
        if is_main_process() and isinstance(self.file_backend, WholeFiles):
            for part in Path(self.out_dir).glob(f'*.pth{PART}'):  # a kill in the middle of writing leaves these
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
            self._write(runner, INTERRUPTED, meta)
            done.append(self.file_backend.join_path(self.out_dir, INTERRUPTED))
            self._point_at(runner, done[0])
        return done[0] if done else None

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        checkpoint['meta']['layout'] = layout_of(runner)
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
            self._remove(INTERRUPTED)
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
            write_whole(os.path.join(runner.work_dir, LAST), str(path).encode())

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
        mine = copy.deepcopy({key: vars(self)[key] for key in COUNTED if key in vars(self)})
        info = {key: hub[key] for key in hub if _is_counted(key)}
        self._gradients, self._depth, full = gathered_gradients(runner), 1, None
        try:
            yield done
        except NoRoom as error:
            full = str(error)
        finally:
            self._gradients, self._depth = None, 0
        full = from_first(full, runner)
        if full is None:
            if is_main_process() and isinstance(self.file_backend, WholeFiles):
                self.file_backend.clear()
            return
        done.clear()
        for key in [key for key in hub if _is_counted(key) and key not in info]:
            hub.pop(key)
        hub.update(info)
        vars(self).update(mine)
        if isinstance(self.file_backend, WholeFiles):
            self.file_backend.outdated.clear()
        last = self.last_ckpt or 'none yet'
        runner.logger.warning(f'{full}; the last checkpoint stays: {last}; training goes on')


def _is_counted(key: str) -> bool:
    return key in ('keep_ckpt_ids', 'last_ckpt') or key.startswith('best_')


class PatientLoggerHook(LoggerHook):
    """mmengine's hook; where the disk is full, what it would log is lost, not the run."""

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        with full_disk_said(runner):
            super().after_train_iter(runner, *args, **kwargs)

    def after_val_epoch(self, runner, *args, **kwargs) -> None:
        with full_disk_said(runner):
            super().after_val_epoch(runner, *args, **kwargs)


@contextmanager
def full_disk_said(runner) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL and not isinstance(error, NoRoom):
            raise
        runner.logger.warning(
            f'no room in {runner.work_dir} ({error.strerror or error}): figures are not logged; training goes on'
        )


def hold(work_dir: str | Path) -> None:
    """Keep a work dir for this process until that ends.

    Raises:
        UsageError: another one has it.
    """
    if fcntl is None:
        return
    os.makedirs(work_dir, exist_ok=True)
    file = open(os.path.join(work_dir, LOCK), 'a+')  # noqa: SIM115 - open as long as the process is there
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks
        file.seek(0)
        raise UsageError(
            f'{work_dir} is in use by a run ({file.read().strip() or "of another process"}): wait until it ends, or '
            'give another --work-dir'
        ) from error
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    _held.append(file)


def quiet_when_full(logger: logging.Logger) -> None:
    """Have a log file on a full disk, and output that nobody reads any more, say so once instead of with a traceback
    for each line."""
    for handler in logger.handlers:
        handler.handleError = partial(say_once, handler)


def say_once(handler: logging.Handler, record: logging.LogRecord) -> None:
    """Say that a handler cannot write, the first time."""
    error, file = sys.exc_info()[1], getattr(handler, 'baseFilename', None)
    if file is None and isinstance(error, OSError):  # `| head`: what else is printed must not end the run
        close_output()
    if not getattr(handler, 'said', False):
        handler.said = True
        there = (
            f'{file} cannot be written ({error}): the log is on the screen' if file else 'the log goes on in its file'
        )
        print(there, file=sys.stderr)


def close_output() -> None:
    """Let standard output go nowhere once nobody reads it: it is written to again when Python ends."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.close(sink)


def layout_of(runner) -> dict:
    """How a run's batches are laid out: what its count of iterations means."""
    loader = runner.train_loop.dataloader
    if not hasattr(runner, 'order'):  # of all images: asked for once
        runner.order = order_of(loader.dataset)
    return dict(
        processes=get_world_size(),
        images=getattr(loader.batch_sampler, 'batch_size', None) or loader.batch_size,
        accumulation=accumulation_of(runner),
        batches=len(loader),
        samples=images_in(loader.dataset),
        order=runner.order,
    )


def accumulation_of(runner) -> int:
    """Batches that are added up for an update."""
    return getattr(runner.optim_wrapper, '_accumulative_counts', 1)


def updates_now(runner) -> bool:
    """Whether the last iteration ended with an update."""
    wrapper = runner.optim_wrapper
    return not hasattr(wrapper, '_inner_count') or wrapper.should_update()


def gathered_gradients(runner) -> list[dict[str, torch.Tensor]] | None:
    """The gradients that each process has added up since the last update, by parameter; None right after an update, and
    on processes other than the first."""
    if updates_now(runner):
        return None
    own = {
        name.removeprefix('module.'): p.grad.cpu() for name, p in runner.model.named_parameters() if p.grad is not None
    }
    if get_world_size() == 1:
        return [own]
    every = [None] * get_world_size() if get_rank() == 0 else None
    torch.distributed.gather_object(own, every, group=runner.cpu_group)
    return every


def from_first(value, runner):
    """What the first process has for a value."""
    if get_world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, 0, group=runner.cpu_group)
    return box[0]
