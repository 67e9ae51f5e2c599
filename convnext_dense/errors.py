"""What ends a tool in one line: input that cannot be used, and a run that cannot go on."""

import os
import re
import sysconfig
import traceback
from types import FrameType


class UsageError(ValueError):
    """Bad input: one line that names the thing and the way out. The tools print it and leave with exit code 2."""


class TrainingError(RuntimeError):
    """A run that cannot go on: one line with the cause, what was saved and the way out. The tools print it and leave
    with its exit code."""

    exit_code = 1


class RunInterrupted(TrainingError):
    """A run that was asked to stop, by a signal."""

    def __init__(self, line: str, signal: int = 15):
        super().__init__(line)
        self.exit_code = 128 + signal


class UnreadableImageError(TrainingError):
    """An image or label map that cannot be read: its path and why."""


# Packages whose errors are about what they were given, wherever they are installed.
LIBRARY_PACKAGES = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'torch', 'convnext_dense', '__main__'}
INSTALL_PREFIXES = tuple(
    os.path.realpath(path) + os.sep
    for path in {sysconfig.get_path(n) for n in ('stdlib', 'platstdlib', 'purelib', 'platlib')}
)


def is_user_code_error(error: BaseException, config: str = '') -> bool:
    """Whether an error comes out of code that belongs to no library and not to this project, such as a module that a
    config imports; the `config` itself is input."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        file = os.path.realpath(frame.f_code.co_filename)
        own = (
            package_of_frame(frame) in LIBRARY_PACKAGES
            or file.startswith(INSTALL_PREFIXES)
            or file == os.path.realpath(config)
        )
        if not own and os.path.isfile(file):
            return True
    return False


def package_of_frame(frame: FrameType) -> str:
    """The package, or the module outside of one, whose code a frame runs."""
    return (frame.f_globals.get('__name__') or '').split('.')[0]


def one_line(error: BaseException) -> str:
    """The one line of an error, also of one that comes out of a process that reads data."""
    return re.sub(r'^[\w.]*(Error|Image): ', '', str(error).strip().splitlines()[-1]) or type(error).__name__


def root_message(error: BaseException) -> str:
    """The first line of the error that began it all: mmengine wraps a failed import in a long text of its own."""
    while error.__cause__ or (isinstance(error, ImportError) and isinstance(error.__context__, ImportError)):
        error = error.__cause__ or error.__context__
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__
