"""Files that are written whole or not at all."""

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
    """A file did not fit on its disk; the message says what is missing."""


def write_atomic(path: str | Path, content: bytes) -> None:
    """Write a file so that at any instant the old one or the new one is there, on the disk itself.

    Raises:
        NoRoom: the disk, or the quota on it, is full; what was there is untouched.
    """
    path = Path(path)
    part = path.with_name(path.name + TMP_SUFFIX)
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
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        free = shutil.disk_usage(path.parent).free
        missing = len(content) - free
        said = f'{_mb(missing)} MB are missing' if missing > 0 else f'{error.strerror}, of {_mb(len(content))} MB'
        raise DiskFullError(f'no room for {path}: {said}') from error


def _mb(size: int) -> str:
    return f'{max(size / 2**20, 0.1):.1f}'


class AtomicLocalBackend(LocalBackend):
    """mmengine's files on disks, written whole or not at all; what is to be removed waits for `clear`."""

    def __init__(self):
        self.outdated = []

    def put(self, obj: bytes, filepath) -> None:
        os.makedirs(os.path.dirname(filepath) or '.', exist_ok=True)
        write_atomic(filepath, obj)

    def remove(self, filepath) -> None:
        self.outdated.append(str(filepath))

    def clear(self) -> None:
        while self.outdated:
            Path(self.outdated.pop()).unlink(missing_ok=True)


register_backend('whole', AtomicLocalBackend, force=True)


@contextmanager
def warn_on_disk_full(runner) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS and not isinstance(error, DiskFullError):
            raise
        runner.logger.warning(
            f'no room in {runner.work_dir} ({error.strerror or error}): figures are not logged; training goes on'
        )
