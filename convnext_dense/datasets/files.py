"""Safe access to files and folders of any origin.

Only regular files of limited size are read, and folders that link to themselves are walked once.
"""

import errno
import json
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO
from unicodedata import category

import yaml

from ..errors import UsageError

LFS_POINTER_PREFIX = b'version https://git-lfs.github.com/spec/'  # start of a file of Git LFS that was not fetched
MAX_POINTER_BYTES = 1024  # as in Git LFS itself
MAX_LIST_BYTES = 16 * 2**20  # largest list of classes or of names
MAX_JSON_BYTES = 8 * 2**30
MAX_YAML_BYTES = 2**20
HEADER_BYTES = 4096  # bytes of a file by which its format is recognized
JSON_WHITESPACE = b' \t\r\n\0\xef\xbb\xbf\xff\xfe'  # bytes before the first character, in any encoding
MAX_FOLDERS = 200  # subfolders in which images are looked for
MAX_VISITS = 8  # to one folder, to which several links may lead
HIDDEN_PREFIXES = ('.', '__MACOSX')  # folders that programs create for themselves
MAX_VALUE_LENGTH = 500  # characters of a value that a report shows
# Some systems lack some flags.
OPEN_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ('O_NONBLOCK', 'O_NOCTTY', 'O_BINARY'))
UNITS = ((2**30, 'GiB'), (2**20, 'MiB'))
FILE_TYPES = {'d': 'a folder', 'p': 'a pipe', 'c': 'a device', 'b': 'a device', 's': 'a socket'}  # as in `ls -l`


class _TextLoader(yaml.BaseLoader):
    """Loads YAML in which all values are texts, and refuses keys that are given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Return the dict of a node, as the base class does."""
        first_lines: dict[str, int] = {}
        for key, _ in node.value:
            first_line = first_lines.setdefault(str(key.value), key.start_mark.line)
            if first_line != key.start_mark.line:
                problem = f"the key '{key.value}' is given in line {first_line + 1} already"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


class UnusableFileError(OSError):
    """A path does not lead to a regular file whose content is there and not too large; `code` is of `RULES`."""

    def __init__(self, code: str, number: int, text: str, path: str | os.PathLike):
        super().__init__(number, text, os.fspath(path))
        self.code = code


class DataError(ValueError):
    """What a file holds cannot be used; `code` is that of the problem in `diagnostics.RULES`."""

    def __init__(self, code: str):
        super().__init__(code)
        self.code = code


def open_regular(path: str | os.PathLike, max_bytes: int) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Nothing else is opened; a pipe or device that takes its place in the meantime neither blocks nor is read.

    Args:
        path: path of the file.
        max_bytes: largest size.

    Raises:
        UnusableFileError: it is not a regular file, larger than `max_bytes`, or a Git LFS pointer to the file.
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
            raise UnusableFileError('git-lfs-pointer', errno.EINVAL, text, path)
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
        path: path of the file, in UTF-8 or the encoding of its byte order mark.
        errors: how invalid UTF-8 is decoded (default: as Python decodes file names).
    """
    data = read_bytes(path, MAX_LIST_BYTES)
    is_utf16 = data.startswith((b'\xff\xfe', b'\xfe\xff'))
    return data.decode('utf-16', 'replace') if is_utf16 else data.decode('utf-8-sig', errors)


def read_lines(path: str | os.PathLike) -> list[str]:
    """Return the lines of a text file that are not empty, without spaces around them.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        lines = [line.strip() for line in read_text(path).split('\n')]
    except OSError as error:
        raise UsageError(f'{path}: {error.strerror}') from error
    return list(filter(None, lines))


def read_json(path: Path) -> object:
    """Read a JSON file of any size and encoding.

    Raises:
        UsageError: it does not exist, is truncated or not valid JSON, or is large and does not hold a list or dict.
    """
    try:
        with open_regular(path, MAX_JSON_BYTES) as file:
            header, size = file.read(HEADER_BYTES), size_of(file)
            file.seek(0)
            first_byte = header.lstrip(JSON_WHITESPACE)[:1]
            content = file.read(size) if first_byte in (b'{', b'[') or size <= HEADER_BYTES else None
    except OSError as error:
        raise UsageError(f'{path}: {error.strerror}') from error
    if content is None:
        raise UsageError(f'{path} is not JSON of a data set: it begins with {to_one_line(header[:20])}')
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = parse_error(error)
        raise UsageError(f'{path} is truncated or not valid JSON ({reason}): download or write it again') from error


def read_yaml(path: Path) -> object:
    """Read a YAML file; all its values are texts, so that a class may be called `no` or `1`.

    Raises:
        UsageError: it cannot be read, is not valid YAML, or has a key twice.
    """
    try:
        return yaml.load(read_bytes(path, MAX_YAML_BYTES), _TextLoader)
    except OSError as error:
        raise UsageError(f'{path}: {error.strerror}') from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, 'problem_mark', None)
        place = f'line {mark.line + 1}: {error.problem}' if mark else parse_error(error)
        raise UsageError(f'{path} is not valid YAML ({to_one_line(place, 100)}): correct it') from error


def read_ends(path: str | os.PathLike, size: int) -> str:
    """Read the first and the last bytes of a regular file as text; empty if it cannot be read."""
    try:
        with open_regular(path, 2**63) as file:
            ends = [file.read(size)]
            if size_of(file) > size:
                file.seek(max(size_of(file) - size, size))
                ends.append(file.read(size))
    except OSError:
        return ''
    return '\n'.join(end.decode('utf-8', 'replace') for end in ends)


def has_marks(*marks: str) -> Callable[[str], bool]:
    """Return whether the start of a file has all of some patterns, as a function of it."""
    return lambda text: all(re.search(mark, text) for mark in marks)


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
    visits, stack = Counter(), [(root, os.path.realpath(root), ())]
    while stack:
        folder, real, parents = stack.pop()
        prefix = os.path.join(real, '')
        if visits[real] == MAX_VISITS or any(path.startswith(prefix) for path in parents):
            continue
        try:
            with os.scandir(folder) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            continue
        visits[real] += 1
        folders = {entry.name: entry for entry in entries if is_folder(entry)}
        yield folder, [entry.name for entry in entries if entry.name not in folders]
        parents = (*parents, prefix)
        for name, entry in reversed(folders.items() if len(parents) != depth else ()):
            if hidden or not name.startswith(HIDDEN_PREFIXES):
                real = os.path.realpath(entry.path) if entry.is_symlink() else prefix + name
                stack.append((entry.path, real, parents))


def files_below(root: str | os.PathLike, hidden: bool = True) -> set[str]:
    """Return the paths of the files in and below a folder, relative to it and with forward slashes."""
    root, paths = os.fspath(root), set()
    for folder, names in walk(root, hidden=hidden):
        at = os.path.relpath(folder, root).replace(os.sep, '/')
        paths.update(names if at == '.' else [f'{at}/{name}' for name in names])
    return paths


def folders_in(folder: str | os.PathLike) -> list[Path]:
    """Return the first folders in a folder, without hidden ones and links to folders that contain them."""
    try:
        with os.scandir(folder) as entries:
            paths = sorted(e.path for e in entries if is_folder(e) and not e.name.startswith(HIDDEN_PREFIXES))
    except OSError:
        return []
    real_folder = os.path.realpath(folder)
    return [Path(path) for path in paths[:MAX_FOLDERS] if not is_below(real_folder, os.path.realpath(path))]


def is_below(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Return whether a path is a folder or lies in it, by names alone."""
    return os.path.join(os.path.abspath(path), '').startswith(os.path.join(os.path.abspath(folder), ''))


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
        text = f'is {FILE_TYPES.get(stat.filemode(state.st_mode)[0], "something else")}, not a regular file'
        raise UnusableFileError('not-a-regular-file', errno.EINVAL, text, path)
    if state.st_size > max_bytes:
        text = f'has {format_bytes(state.st_size)}, but at most {format_bytes(max_bytes)} of such a file are read'
        raise UnusableFileError('file-too-large', errno.EFBIG, text, path)


def is_folder(entry: os.DirEntry) -> bool:
    """Return whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:
        return False
