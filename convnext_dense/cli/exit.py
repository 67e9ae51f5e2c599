"""What a user of the command line meets: arguments with the nearest name to a misspelt one, and errors in one line."""

import argparse
import difflib
import importlib.util
import logging
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from types import FrameType

from ..engine.checkpoint_hook import FULL, close_output, say_once
from ..errors import RunError, Stopped, UsageError

MAX_LINE = 2000  # characters of a message: names in a file have no end of their own
# Packages whose errors are about what they were given, wherever they are installed.
LIBRARIES = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'torch', 'convnext_dense', '__main__'}
RUN_CONFIGS = ('train.py', 'test.py')
INSTALLED = tuple(
    os.path.realpath(path) + os.sep
    for path in {sysconfig.get_path(n) for n in ('stdlib', 'platstdlib', 'purelib', 'platlib')}
)


class Parser(argparse.ArgumentParser):
    """argparse's, which takes no abbreviations, names the nearest option to one that is not known, and has --debug."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{'allow_abbrev': False, **kwargs})
        self.add_argument('--debug', action='store_true', help='show the traceback behind an error of one line')

    def error(self, message: str):
        unknown = re.match('unrecognized arguments: (--[^ =]+)', message)
        options = [option for action in self._all_actions() for option in action.option_strings]
        near = unknown and difflib.get_close_matches(unknown[1], options, 1, 0.6)
        super().error(f'{printable(message)}: perhaps {near[0]}' if near else printable(message))

    def _all_actions(self) -> Iterator[argparse.Action]:
        for action in self._actions:
            yield action
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._actions


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input ends the process with one line and exit code 2, a run that cannot go on with one line and its own code;
    a bug, of this project or of a module of the user's, keeps its traceback. With --debug all do."""
    _open_streams()
    try:
        yield
    except BrokenPipeError:  # `| head`: who reads the output has enough of it
        close_output()
        sys.exit(141)
    except (Exception, KeyboardInterrupt) as error:
        ending = _ending(error)
        if ending is None:
            raise
        line, code = ending
        if '--debug' in sys.argv:
            traceback.print_exc()
        print(printable(line), file=sys.stderr)
        sys.exit(code)


def _ending(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit code of an error; None of a bug."""
    if isinstance(error, UsageError):
        return f'error: {error}', 2
    if isinstance(error, Stopped):
        return str(error), error.exit_code
    if isinstance(error, RunError):
        return f'error: {last_line(error)}', error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 'interrupted: what was saved is kept', 130
    if _is_wrong_argument(error):
        return f'error: the config cannot be built: {last_line(error)}', 2
    if isinstance(error, OSError) and not is_users_bug(error):
        if error.errno in FULL:
            where = f'{error.filename}: ' if error.filename else ''
            elsewhere = ', or give another --work-dir' if Path(sys.argv[0]).name in RUN_CONFIGS else ''
            return f'error: {where}{error.strerror}: free some space{elsewhere}', 1
        if error.filename:
            return f'error: {error.filename}: {error.strerror}', 2
    return None


def is_users_bug(error: BaseException, config: str = '') -> bool:
    """Whether an error comes out of code that belongs to no library and not to this project, such as a module that a
    config imports; the `config` itself is input."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        file = os.path.realpath(frame.f_code.co_filename)
        own = package_of(frame) in LIBRARIES or file.startswith(INSTALLED) or file == os.path.realpath(config)
        if not own and os.path.isfile(file):
            return True
    return False


def package_of(frame: FrameType) -> str:
    """The package, or the module outside of one, whose code a frame runs."""
    return (frame.f_globals.get('__name__') or '').split('.')[0]


def _is_wrong_argument(error: BaseException) -> bool:
    """Whether a config gives a class what it does not take, or not what it needs; data sets and optimizers are built
    late."""
    if not re.search(r'__init__\(\) (got an unexpected|missing \d+ required)', str(error)) or is_users_bug(error):
        return False
    calls = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    calls = list(takewhile('build_from_cfg'.__ne__, reversed(calls))) if 'build_from_cfg' in calls else ['another']
    return set(calls) <= {'__init__'}  # of the class and those that it is derived from


def last_line(error: BaseException) -> str:
    """The one line of an error, also of one that comes out of a process that reads data."""
    return re.sub(r'^[\w.]*(Error|Image): ', '', str(error).strip().splitlines()[-1]) or type(error).__name__


def printable(text: str) -> str:
    """Text as a terminal may have it: control characters and half characters escaped, and cut where it has no end."""
    text = ''.join(c if c.isprintable() or c == '\n' else c.encode('unicode_escape').decode() for c in text)
    return text if len(text) <= MAX_LINE else f'{text[: MAX_LINE - 200]} ... {text[-190:]}'


class PatientStream:
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
            close_output()
            print(f'standard output is gone ({error.strerror}): the log goes on in its file', file=sys.stderr)


def keep_output() -> None:
    """Have a long run go on when its standard output ends."""
    if not isinstance(sys.stdout, PatientStream):
        sys.stdout = PatientStream(sys.stdout)


def _open_streams() -> None:
    """Output streams that take everything: closed ones drop it, and no character is too strange."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115
        elif hasattr(getattr(sys, name), 'reconfigure'):
            getattr(sys, name).reconfigure(errors='backslashreplace')
    logging.StreamHandler.handleError = say_once


def config_path(name: str) -> str:
    """The file of a config: a path, or PACKAGE::NAME as configs write it in `_base_`.

    Raises:
        UsageError: there is none.
    """
    package, found, rest = name.partition('::')
    path = Path(name)
    if found and package.isidentifier():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UsageError(f"no package '{package}', which the config '{name}' is of: install it")
        path = Path(spec.submodule_search_locations[0], '.mim/configs', rest)
    if not path.is_file():
        raise UsageError(f"no config '{name}': give the path of a .py file, such as configs/cascade/convnext_t.py")
    return str(path)
