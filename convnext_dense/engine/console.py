"""Console output that may end, or have no room, without ending a training."""

import logging
import os
import sys
from functools import partial

# How mmengine's messages for the file alone begin: the environment, the full config, the order of the hooks.
FILE_ONLY = ('\n' + '-' * 60 + '\nSystem environment:', 'Config:\n', 'Hooks will be executed in the following order:')


class UnbrokenStream:
    """Standard output that drops what nobody reads any more, or has no room for, instead of ending a run."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self._patiently('write', text) or len(text)

    def flush(self) -> None:
        self._patiently('flush')

    def _patiently(self, method: str, *args):
        try:
            return getattr(self.stream, method)(*args)
        except OSError as error:
            detach_stdout()
            print(f'standard output is gone ({error.strerror}): the log goes on in its file', file=sys.stderr)


def survive_closed_stdout() -> None:
    """Have a long run go on when its standard output ends."""
    if not isinstance(sys.stdout, UnbrokenStream):
        sys.stdout = UnbrokenStream(sys.stdout)


def silence_disk_full(logger: logging.Logger) -> None:
    """Have a log file on a full disk, and output that nobody reads any more, say so once instead of with a traceback
    for each line."""
    for handler in logger.handlers:
        handler.handleError = partial(warn_once, handler)


def log_details_to_file_only(logger: logging.Logger) -> None:
    """Keep hundreds of lines that are for looking up (environment, config, hooks) off the console.

    Args:
        logger (logging.Logger): mmengine's logger of a run. Without a log file it is left as it is.
    """
    files = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
    for handler in logger.handlers if files else []:
        if handler not in files:
            handler.addFilter(lambda record: not str(record.msg).startswith(FILE_ONLY))
    if files:
        logger.info(f'Environment and full config: {files[0].baseFilename}')


def warn_once(handler: logging.Handler, record: logging.LogRecord) -> None:
    """Say that a handler cannot write, the first time."""
    error, file = sys.exc_info()[1], getattr(handler, 'baseFilename', None)
    if file is None and isinstance(error, OSError):  # `| head`: what else is printed must not end the run
        detach_stdout()
    if not getattr(handler, 'said', False):
        handler.said = True
        there = (
            f'{file} cannot be written ({error}): the log is on the screen' if file else 'the log goes on in its file'
        )
        print(there, file=sys.stderr)


def detach_stdout() -> None:
    """Let standard output go nowhere once nobody reads it: it is written to again when Python ends."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.close(sink)
