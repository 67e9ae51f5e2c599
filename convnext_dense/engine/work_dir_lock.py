"""A lock that prevents two trainings from using the same work dir."""

import errno
import os
import socket
from pathlib import Path

from ..errors import UsageError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None
LOCK_FILE = '.lock'  # name of the file in a work dir; it names the process that trains there

_held_locks = []  # open files, which are closed when the process ends


def lock_work_dir(work_dir: str | Path) -> None:
    """Lock a work dir until this process ends; does nothing on Windows and on file systems without locks.

    Args:
        work_dir: The folder; it is created if it does not exist.

    Raises:
        UsageError: If another process holds the lock.
    """
    if fcntl is None:
        return
    os.makedirs(work_dir, exist_ok=True)
    file = open(os.path.join(work_dir, LOCK_FILE), 'a+')  # noqa: SIM115 - stays open as long as the process runs
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # the file system has no locks
        file.seek(0)
        raise UsageError(
            f'{work_dir} is in use by another run ({file.read().strip() or "of an unknown process"}); wait until it '
            'ends or choose another --work-dir'
        ) from error
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    _held_locks.append(file)
