"""Processes that read data: which signals end them."""

import multiprocessing
import os
import signal
import threading
import time

PARENT_POLL_S = 1  # seconds between two looks whether the run is still there


def worker_init(init_fn, worker_id: int) -> None:
    """Begin a process that reads data: it leaves when the run itself ends it or is gone, and signals to all the
    processes of the run (of launchers, terminals, schedulers) are the run's to answer."""
    run = multiprocessing.parent_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS: there a signal to all ends a run without a save
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_exit_on_parent_sigterm, args=(run.pid,), daemon=True).start()
    # After the mask: a thread without it would end the process at a signal to all.
    threading.Thread(target=_exit_without_parent, args=(run,), daemon=True).start()
    if init_fn:
        init_fn(worker_id)


def _exit_without_parent(run) -> None:
    """End with the run, of which a kill tells its workers nothing: they would wait in a queue of which they hold both
    ends, and keep the connections of the run open, so that its other processes would wait for it too. Their pipe to it
    is not enough: workers that were forked later hold its other end as well."""
    direct = os.getppid() == run.pid  # not where a fork server stands between them
    while run.is_alive() and (os.getppid() == run.pid or not direct):
        time.sleep(PARENT_POLL_S)
    os._exit(1)


def _exit_on_parent_sigterm(run: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != run:
        pass
    os._exit(0)
