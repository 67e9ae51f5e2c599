"""Files that are written atomically: completely or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

TMP_SUFFIX = '.part'
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(OSError):
    """A file did not fit on its disk. The message says how much space is missing."""


def write_atomic(path: str | Path, content: bytes) -> None:
    """Write a file so that at any time either its old or its new content is completely on disk.

    Args:
        path: Path of the file. Its folder has to exist.
        content: New content of the file.

    Raises:
        DiskFullError: If the disk or the quota is full; the old file is unchanged.
    """
    path = Path(path)
    tmp_path = path.with_name(path.name + TMP_SUFFIX)
    try:
        with open(tmp_path, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp_path, path)
        folder = os.open(path.parent, os.O_RDONLY)  # syncing the folder puts the new name on disk
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        tmp_path.unlink(missing_ok=True)
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        free = shutil.disk_usage(path.parent).free
        missing = len(content) - free
        need = f'needs {_format_mb(missing)} more' if missing > 0 else f'needs {_format_mb(len(content))}'
        reason = '' if missing > 0 else f' ({error.strerror})'  # a quota, which the free space does not show
        raise DiskFullError(f'Disk full: {path} {need}{reason}') from error


def _format_mb(size: int) -> str:
    return f'{max(size / 2**20, 0.1):.1f} MB'


class AtomicLocalBackend(LocalBackend):
    """mmengine's backend for local files with atomic writes, and with deletions that wait for `flush_deletes`.

    Attributes:
        pending_deletes (list[str]): Files to delete once their replacements are written.
    """

    def __init__(self):
        self.pending_deletes: list[str] = []

    def put(self, obj: bytes, filepath) -> None:
        """Write a file atomically; missing folders are created."""
        os.makedirs(os.path.dirname(filepath) or '.', exist_ok=True)
        write_atomic(filepath, obj)

    def remove(self, filepath) -> None:
        """Schedule a file for deletion by the next `flush_deletes`."""
        self.pending_deletes.append(str(filepath))

    def flush_deletes(self) -> None:
        """Delete all scheduled files."""
        while self.pending_deletes:
            Path(self.pending_deletes.pop()).unlink(missing_ok=True)


ATOMIC_BACKEND = 'convnext_dense.atomic'  # its name in `backend_args`
register_backend(ATOMIC_BACKEND, AtomicLocalBackend, force=True)


@contextmanager
def warn_on_disk_full(runner) -> Iterator[None]:
    """Context manager that turns a disk-full error into a warning: losing a log is better than losing a run."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS and not isinstance(error, DiskFullError):
            raise
        runner.logger.warning(
            f'Disk full: {runner.work_dir} ({error.strerror or error}); metrics for this step were not logged'
        )
