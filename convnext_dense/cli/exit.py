"""How a tool ends: bad input in one line with exit code 2, a failed run with its own code, a bug with its traceback."""

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

MAX_MESSAGE_CHARS = 2000  # characters of a message: names in a file have no end of their own
DEBUG_VARIABLE = 'CONVNEXT_DENSE_DEBUG'  # set to 1, it does what --debug does
TOOLS_WITH_WORK_DIR = ('train.py', 'test.py')


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Bad input ends the process with one line and exit code 2, a run that cannot go on with one line and its own code;
    a bug, of this project or of a module of the user's, keeps its traceback. With --debug all do."""
    _open_streams()
    try:
        yield
    except BrokenPipeError:  # `| head`: who reads the output has enough of it
        detach_stdout()
        sys.exit(141)
    except (Exception, KeyboardInterrupt) as error:
        ending = _message_and_code(error)
        if ending is None:
            raise
        line, code = ending
        if is_debug():
            traceback.print_exc()
        print(printable(line), file=sys.stderr)
        sys.exit(code)


def is_debug() -> bool:
    """Whether the user asked for tracebacks, by `--debug` or in the environment."""
    return '--debug' in sys.argv or os.environ.get(DEBUG_VARIABLE, '0') not in ('', '0')


def _message_and_code(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit code of an error; None of a bug."""
    if isinstance(error, UsageError):
        return f'error: {error}', 2
    if isinstance(error, RunInterrupted):
        return str(error), error.exit_code
    if isinstance(error, TrainingError):
        return f'error: {one_line(error)}', error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 'interrupted: what was saved is kept', 130
    if _is_config_argument_error(error):
        return f'error: the config cannot be built: {one_line(error)}', 2
    if isinstance(error, OSError) and not is_user_code_error(error):
        if error.errno in DISK_FULL_ERRNOS:
            where = f'{error.filename}: ' if error.filename else ''
            elsewhere = ', or give another --work-dir' if Path(sys.argv[0]).name in TOOLS_WITH_WORK_DIR else ''
            return f'error: {where}{error.strerror}: free some space{elsewhere}', 1
        if error.filename:
            return f'error: {error.filename}: {error.strerror}', 2
    return None


def _is_config_argument_error(error: BaseException) -> bool:
    """Whether a config gives a class what it does not take, or not what it needs; data sets and optimizers are built
    late."""
    if not re.search(r'__init__\(\) (got an unexpected|missing \d+ required)', str(error)) or is_user_code_error(error):
        return False
    calls = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    calls = list(takewhile('build_from_cfg'.__ne__, reversed(calls))) if 'build_from_cfg' in calls else ['another']
    return set(calls) <= {'__init__'}  # of the class and those that it is derived from


def printable(text: str) -> str:
    """Text as a terminal may have it: control characters and half characters escaped, and cut where it has no end."""
    text = ''.join(c if c.isprintable() or c == '\n' else c.encode('unicode_escape').decode() for c in text)
    return text if len(text) <= MAX_MESSAGE_CHARS else f'{text[: MAX_MESSAGE_CHARS - 200]} ... {text[-190:]}'


def _open_streams() -> None:
    """Output streams that take everything: closed ones drop it, and no character is too strange."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115
        elif hasattr(getattr(sys, name), 'reconfigure'):
            getattr(sys, name).reconfigure(errors='backslashreplace')
    logging.StreamHandler.handleError = warn_once
