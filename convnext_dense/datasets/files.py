"""Safe access to files and folders of any origin.

Only regular files of limited size are read, and folders that link to themselves are walked once.
"""

import errno
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO
from unicodedata import category

LFS_POINTER_PREFIX = (
    b'version https://git-lfs.github.com/spec/'  # what a file of Git LFS begins with that was not fetched
)
MAX_POINTER_BYTES = 1024  # as in Git LFS itself
MAX_LIST_BYTES = 16 * 2**20  # of a list of classes or of names
MAX_VISITS = 8  # of one folder, to which several links may lead
HIDDEN_PREFIXES = ('.', '__MACOSX')  # of folders that programs make for themselves
MAX_VALUE_LENGTH = 500  # characters of a value in a report
OPEN_FLAGS = os.O_RDONLY
for _name in ('O_NONBLOCK', 'O_NOCTTY', 'O_BINARY'):  # not all systems have them
    OPEN_FLAGS |= getattr(os, _name, 0)
UNITS = ((2**30, 'GiB'), (2**20, 'MiB'))
BOMS = {b'\xef\xbb\xbf': 'utf-8', b'\xff\xfe': 'utf-16-le', b'\xfe\xff': 'utf-16-be'}
FILE_TYPES = {
    stat.S_ISDIR: 'a folder',
    stat.S_ISFIFO: 'a pipe',
    stat.S_ISCHR: 'a device',
    stat.S_ISBLK: 'a device',
    stat.S_ISSOCK: 'a socket',
}


class NotRegularError(OSError):
    """A path leads to a folder, a device, a pipe or a socket instead of a file."""


class TooLargeError(OSError):
    """A file is larger than the caller reads."""


class LfsPointerError(OSError):
    """A file is a Git LFS pointer whose content was not fetched."""


def open_regular(path: str | os.PathLike, max_bytes: int) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Nothing else is opened; a pipe or device that takes its place in the meantime neither blocks nor is read.

    Args:
        path: of the file.
        max_bytes: largest size.

    Raises:
        NotRegularError: it is not a regular file.
        TooLargeError: it is larger than `max_bytes`.
        LfsPointerError: it is a Git LFS pointer to the file.
        OSError: it cannot be opened.
    """
    try:
        _check_regular(os.stat(path), path, max_bytes)
        file = os.fdopen(os.open(path, OPEN_FLAGS), 'rb')
    except ValueError as error:  # a NUL, or a character that no name can hold
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
    try:
        _check_regular(os.fstat(file.fileno()), path, max_bytes)
        if size_of(file) < MAX_POINTER_BYTES and file.peek(len(LFS_POINTER_PREFIX)).startswith(LFS_POINTER_PREFIX):
            text = 'is a Git LFS pointer, whose content was not fetched: run git lfs pull in the repository it is from'
            raise LfsPointerError(errno.EINVAL, text, os.fspath(path))
    except OSError:
        file.close()
        raise
    return file


def read_bytes(path: str | os.PathLike, max_bytes: int) -> bytes:
    """Read a regular file; errors as of `open_regular`."""
    with open_regular(path, max_bytes) as file:
        return file.read(size_of(file))


def read_text(path: str | os.PathLike, errors: str = 'surrogateescape') -> str:
    """Read the text of a regular file; errors as of `open_regular`.

    Args:
        path: of the file, in UTF-8 or the encoding of its byte order mark.
        errors: how invalid UTF-8 is decoded (default: as Python decodes file names).
    """
    data = read_bytes(path, MAX_LIST_BYTES)
    mark = next((mark for mark in BOMS if data.startswith(mark)), b'')
    encoding = BOMS.get(mark, 'utf-8')
    return data[len(mark) :].decode(encoding, errors if encoding == 'utf-8' else 'replace')


def read_start(path: str | os.PathLike, size: int) -> str:
    """Read the first bytes of a regular file as text; empty if it cannot be read."""
    try:
        with open_regular(path, 2**63) as file:
            return file.read(size).decode('utf-8', 'replace')
    except OSError:
        return ''


def size_of(file: BinaryIO) -> int:
    """Return the size of an open file in bytes; callers read no more of one that grows."""
    return os.fstat(file.fileno()).st_size


def format_bytes(size: int) -> str:
    """Return a number of bytes with a unit."""
    unit, name = next(((unit, name) for unit, name in UNITS if size >= unit), (1, 'bytes'))
    return f'{size / unit:,.4g} {name}'


def walk(root: str | os.PathLike, depth: int | None = None, hidden: bool = True) -> Iterator[tuple[str, list[str]]]:
    """Walk a folder and those below it in the order of names, parents first.

    Links are followed, except to a folder that contains the link; a folder to which many links lead is visited at most
    `MAX_VISITS` times.

    Args:
        root: folder to begin with.
        depth: levels of folders, the first included; None for all.
        hidden: whether to enter folders whose names begin as `HIDDEN_PREFIXES`.

    Yields:
        Each folder and the names of its files.
    """
    root = os.fspath(root)
    visits, waiting = Counter(), [(root, 1, _ancestors(root))]
    while waiting:
        folder, level, above = waiting.pop()
        try:
            own = _identity(folder)
            if own in above or visits[own] == MAX_VISITS:
                continue
            with os.scandir(folder) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            continue
        visits[own] += 1
        folders = [entry for entry in entries if _is_folder(entry)]
        inner = {entry.name for entry in folders}
        yield folder, [entry.name for entry in entries if entry.name not in inner]
        if depth is not None and level >= depth:
            continue
        above = above | {own}
        for entry in reversed(folders):
            if hidden or not entry.name.startswith(HIDDEN_PREFIXES):
                linked = above | _ancestors(entry.path) if entry.is_symlink() else above
                waiting.append((entry.path, level + 1, linked))


def files_below(root: str | os.PathLike, hidden: bool = True) -> set[str]:
    """Return the paths of the files in and below a folder, relative to it and with forward slashes."""
    root, found = os.fspath(root), set()
    for folder, names in walk(root, hidden=hidden):
        at = os.path.relpath(folder, root).replace(os.sep, '/')
        found.update(names if at == '.' else [f'{at}/{name}' for name in names])
    return found


def folders_in(folder: str | os.PathLike, limit: int) -> list[str]:
    """Return the first `limit` folders in a folder, without hidden ones and links to folders that contain them."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(e.path for e in entries if _is_folder(e) and not e.name.startswith(HIDDEN_PREFIXES))[:limit]
        above = _ancestors(folder) | {_identity(folder)}
        return [path for path in found if not (os.path.islink(path) and _identity(path) in above)]
    except OSError:
        return []


def is_text(text: str) -> bool:
    """Return whether a text has no control characters and can be written to a file."""
    return not any(category(c) in ('Cc', 'Cs') for c in text)


def to_one_line(value: object, max_length: int = MAX_VALUE_LENGTH) -> str:
    """Return a value of any origin as printable text of limited length, for a message."""
    try:
        text = str(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits
        return f'a {type(value).__name__}'
    text = text if len(text) <= max_length else f'{text[:max_length]}...'
    return text if text.isprintable() else repr(text)[1:-1]


def parse_error(error: Exception) -> str:
    """Return what an error of a parser of JSON or another text says, for a message."""
    if isinstance(error, RecursionError):
        return 'it is nested too deeply'
    if isinstance(error, UnicodeDecodeError):
        return 'it is not UTF-8'
    if 'integer string conversion' in str(error):
        return f'a number of more than {sys.get_int_max_str_digits():,} digits'
    return to_one_line(error)


def _check_regular(state: os.stat_result, path: str | os.PathLike, max_bytes: int) -> None:
    if not stat.S_ISREG(state.st_mode):
        what = next((what for is_one, what in FILE_TYPES.items() if is_one(state.st_mode)), 'something else')
        raise NotRegularError(errno.EINVAL, f'is {what}, not a regular file', os.fspath(path))
    if state.st_size > max_bytes:
        text = f'has {format_bytes(state.st_size)}, but at most {format_bytes(max_bytes)} of such a file are read'
        raise TooLargeError(errno.EFBIG, text, os.fspath(path))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _identity(folder: str | os.PathLike) -> tuple[int, int]:
    state = os.stat(folder)
    return state.st_dev, state.st_ino


def _ancestors(folder: str | os.PathLike) -> frozenset[tuple[int, int]]:
    """Return the identities of the folders that contain the folder to which a path leads."""
    found, at = set(), os.path.realpath(folder)
    while (parent := os.path.dirname(at)) != at:
        at = parent
        try:
            found.add(_identity(at))
        except OSError:
            continue
    return frozenset(found)
