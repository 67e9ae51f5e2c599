"""One-line messages to the user: notices, and errors that end a tool."""

import logging
import os
import re
import sysconfig
import traceback
from types import FrameType
from typing import NamedTuple


class Notice(NamedTuple):
    """One line for the user, with its level as in `logging`."""

    message: str
    level: int = logging.INFO


def count(n: int, noun: str, plural: str = '') -> str:
    """Return a number with its noun, such as '1 image' or '1,200 images'."""
    return f'{n:,} {noun if n == 1 else plural or f"{noun}s"}'


class UsageError(ValueError):
    """Bad input. The message is one line: what is wrong and how to fix it. The tools print it and exit with code 2."""


class TrainingError(RuntimeError):
    """A run that cannot continue.

    The message is one line: cause, what was saved and how to continue. The tools print it and exit with `exit_code`.
    """

    exit_code = 1


class RunInterrupted(TrainingError):
    """A run that was stopped by a signal.

    Args:
        message: One line for the user.
        signum: Number of the signal; the exit code is 128 + signum, as in shells.
    """

    def __init__(self, message: str, signum: int = 15):
        super().__init__(message)
        self.exit_code = 128 + signum


class UnreadableImageError(TrainingError):
    """An image or segmentation mask that cannot be read. The message is the reason, with the path if it is known."""


# Packages whose errors are caused by their input, wherever they are installed.
LIBRARY_PACKAGES = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'torch', 'convnext_dense', '__main__'}
INSTALL_PREFIXES = tuple(
    os.path.realpath(path) + os.sep
    for path in {sysconfig.get_path(n) for n in ('stdlib', 'platstdlib', 'purelib', 'platlib')}
)


def is_user_code_error(error: BaseException, config: str = '') -> bool:
    """Whether an error comes from the user's own code, such as a module that a config imports.

    Args:
        error: The error, with its traceback.
        config: Path of the config file, which counts as input, not as code.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        file = os.path.realpath(frame.f_code.co_filename)
        is_library = (
            package_of_frame(frame) in LIBRARY_PACKAGES
            or file.startswith(INSTALL_PREFIXES)
            or file == os.path.realpath(config)
        )
        if not is_library and os.path.isfile(file):
            return True
    return False


def package_of_frame(frame: FrameType) -> str:
    """Return the top-level package of the code of a frame, or the module if it is in no package."""
    return (frame.f_globals.get('__name__') or '').split('.')[0]


def one_line(error: BaseException) -> str:
    """Return the message of an error as one line, also if a DataLoader worker raised it."""
    return re.sub(r'^[\w.]*(Error|Image): ', '', str(error).strip().splitlines()[-1]) or type(error).__name__


def root_message(error: BaseException) -> str:
    """Return the first line of the root cause of an error, because mmengine wraps failed imports in a long text."""
    while error.__cause__ or (isinstance(error, ImportError) and isinstance(error.__context__, ImportError)):
        error = error.__cause__ or error.__context__
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__
