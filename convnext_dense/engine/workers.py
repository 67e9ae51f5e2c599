"""Signal handling and exit of DataLoader workers."""

import multiprocessing
import os
import signal
import threading
import time

PARENT_POLL_S = 1  # seconds between two checks that the main process is alive


def worker_init(init_fn, worker_id: int) -> None:
    """`worker_init_fn` for DataLoader workers.

    Ignores SIGINT and reacts to SIGTERM only if it was sent by the parent, so that a signal to the whole process group
    (from launchers, terminals, schedulers) is handled by the main process. A worker also exits when its parent dies.

    Args:
        init_fn: `worker_init_fn` of the config, which is called last; None if there is none.
        worker_id: Index of the worker.
    """
    parent = multiprocessing.parent_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS: there, a signal to the group ends a run without a checkpoint
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_exit_on_parent_sigterm, args=(parent.pid,), daemon=True).start()
    # Started after the mask is set: a thread without the mask would end the process on a signal to the group.
    threading.Thread(target=_exit_without_parent, args=(parent,), daemon=True).start()
    if init_fn:
        init_fn(worker_id)


def _exit_without_parent(parent) -> None:
    """Exit when the parent process has ended.

    Workers do not notice that it was killed: they would wait for a queue whose both ends they hold, and keep the
    parent's sockets open, so that other ranks would wait too. Watching the pipe to the parent is not enough, because
    workers that were forked later hold its other end as well.
    """
    is_child = os.getppid() == parent.pid  # False with a fork server in between
    while parent.is_alive() and (os.getppid() == parent.pid or not is_child):
        time.sleep(PARENT_POLL_S)
    os._exit(1)


def _exit_on_parent_sigterm(parent_pid: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent_pid:
        pass
    os._exit(0)
