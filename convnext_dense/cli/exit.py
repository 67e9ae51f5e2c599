"""How tools exit: bad input with one line and code 2, a failed run with its own code, a bug with a traceback."""

import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from ..engine.atomic_files import DISK_FULL_ERRNOS
from ..engine.console import detach_stdout, warn_once
from ..errors import RunInterrupted, TrainingError, UsageError, is_user_code_error, one_line

MAX_MESSAGE_CHARS = 2000  # names in a file can be of any length
DEBUG_VARIABLE = 'CONVNEXT_DENSE_DEBUG'  # 1 has the same effect as --debug
TOOLS_WITH_WORK_DIR = ('train.py', 'test.py')


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Context manager that turns errors into one line and an exit code.

    Bad input exits with code 2, a training that cannot continue with the code of its error. A bug, in this package or
    in a module of the user's, keeps its traceback; with `--debug` or CONVNEXT_DENSE_DEBUG=1 all errors show it.
    """
    _open_streams()
    try:
        yield
    except BrokenPipeError:  # as after `| head`
        detach_stdout()
        sys.exit(141)
    except (Exception, KeyboardInterrupt) as error:
        message_and_code = _message_and_code(error)
        if message_and_code is None:
            raise
        message, code = message_and_code
        if '--debug' in sys.argv or os.environ.get(DEBUG_VARIABLE, '0') not in ('', '0'):
            traceback.print_exc()
        print(printable(message), file=sys.stderr)
        sys.exit(code)


def _message_and_code(error: BaseException) -> tuple[str, int] | None:
    """Return the message and the exit code of an error; None for a bug."""
    if isinstance(error, UsageError):
        return f'error: {error}', 2
    if isinstance(error, RunInterrupted):
        return str(error), error.exit_code
    if isinstance(error, TrainingError):
        return f'error: {one_line(error)}', error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 'interrupted; saved checkpoints are kept', 130
    if _is_config_argument_error(error):
        return f'error: the config cannot be built: {one_line(error)}', 2
    if isinstance(error, OSError) and not is_user_code_error(error):
        if error.errno in DISK_FULL_ERRNOS:
            path = f'{error.filename}: ' if error.filename else ''
            other_dir = ', or choose another --work-dir' if Path(sys.argv[0]).name in TOOLS_WITH_WORK_DIR else ''
            return f'error: {path}{error.strerror}: free some space{other_dir}', 1
        if error.filename:
            return f'error: {error.filename}: {error.strerror}', 2
    return None


def _is_config_argument_error(error: BaseException) -> bool:
    """Whether a config passes a wrong argument to a class, or lacks a required one; some objects are built late."""
    if not re.search(r'__init__\(\) (got an unexpected|missing \d+ required)', str(error)) or is_user_code_error(error):
        return False
    calls = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    calls = list(takewhile('build_from_cfg'.__ne__, reversed(calls))) if 'build_from_cfg' in calls else ['another']
    return set(calls) <= {'__init__'}  # of the class and its base classes


def printable(text: str) -> str:
    """Return text that is safe for a terminal: control characters and lone surrogates escaped, long text truncated."""
    text = ''.join(c if c.isprintable() or c == '\n' else c.encode('unicode_escape').decode() for c in text)
    return text if len(text) <= MAX_MESSAGE_CHARS else f'{text[: MAX_MESSAGE_CHARS - 200]} ... {text[-190:]}'


def _open_streams() -> None:
    """Make the output streams accept everything: closed streams drop it, unknown characters are escaped."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115
        elif hasattr(getattr(sys, name), 'reconfigure'):
            getattr(sys, name).reconfigure(errors='backslashreplace')
    logging.StreamHandler.handleError = warn_once
