"""Console and log output that cannot end a training."""

import logging
import os
import sys
from functools import partial

# Beginnings of mmengine's messages that only go to the file: environment, full config, order of the hooks.
FILE_ONLY = ('\n' + '-' * 60 + '\nSystem environment:', 'Config:\n', 'Hooks will be executed in the following order:')


class UnbrokenStream:
    """Standard output that drops text that cannot be written (closed pipe, full disk) instead of raising an error."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text, or drop it; return its length as streams do."""
        return self._call_or_detach('write', text) or len(text)

    def flush(self) -> None:
        """Flush the stream if it can be written."""
        self._call_or_detach('flush')

    def _call_or_detach(self, method: str, *args):
        try:
            return getattr(self.stream, method)(*args)
        except OSError as error:
            detach_stdout()
            print(f'Cannot write to standard output ({error.strerror}); logging to the log file only', file=sys.stderr)


def survive_closed_stdout() -> None:
    """Let a training continue when its standard output is closed."""
    if not isinstance(sys.stdout, UnbrokenStream):
        sys.stdout = UnbrokenStream(sys.stdout)


def silence_disk_full(logger: logging.Logger) -> None:
    """Have handlers that cannot write (full disk, closed pipe) warn once instead of printing a traceback per line."""
    for handler in logger.handlers:
        handler.handleError = partial(warn_once, handler)


def log_details_to_file_only(logger: logging.Logger) -> None:
    """Keep hundreds of lines for reference (environment, config, hooks) off the console if there is a log file."""
    files = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
    for handler in logger.handlers if files else []:
        if handler not in files:
            handler.addFilter(lambda record: not str(record.msg).startswith(FILE_ONLY))
    if files:
        logger.info(f'Environment and full config: {files[0].baseFilename}')


def warn_once(handler: logging.Handler, record: logging.LogRecord) -> None:
    """Print that a handler cannot write, the first time it fails; called while its error is handled."""
    error, file = sys.exc_info()[1], getattr(handler, 'baseFilename', None)
    if file is None and isinstance(error, OSError):  # as after `| head`; later output must not end the run
        detach_stdout()
    if not getattr(handler, 'has_warned', False):
        handler.has_warned = True
        message = (
            f'Cannot write {file} ({error}); logging to the console only' if file else 'logging to the log file only'
        )
        print(message, file=sys.stderr)


def detach_stdout() -> None:
    """Redirect standard output to the null device: Python flushes it once more when it exits."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.close(sink)
