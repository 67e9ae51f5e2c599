"""A lock that keeps two trainings out of one work dir."""

import errno
import os
import socket
from pathlib import Path

from ..errors import UsageError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None
LOCK_FILE = '.lock'  # in a work dir, of the process that trains there


_held_locks = []  # locks of this process, which it gives up when it ends


def lock_work_dir(work_dir: str | Path) -> None:
    """Keep a work dir for this process until that ends.

    Raises:
        UsageError: another one has it.
    """
    if fcntl is None:
        return
    os.makedirs(work_dir, exist_ok=True)
    file = open(os.path.join(work_dir, LOCK_FILE), 'a+')  # noqa: SIM115 - open as long as the process is there
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
    _held_locks.append(file)
