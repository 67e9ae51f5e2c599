"""Files and folders that others wrote: only regular files of at most a stated size are read, folders that hold links to
themselves are walked once, and names that differ only in how they are written are recognized."""

import errno
import os
import posixpath
import re
import stat
import sys
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import takewhile
from typing import BinaryIO, NamedTuple
from unicodedata import category, normalize
from urllib.parse import unquote

POINTER = b'version https://git-lfs.github.com/spec/'  # what a file of Git LFS begins with that was not fetched
MAX_POINTER_BYTES = 1024  # which is what Git LFS itself takes for a pointer
MAX_LIST_BYTES = 16 * 2**20  # of a list of classes or of names
MAX_VISITS = 8  # of one folder, which links may show under several names
HIDDEN = ('.', '__MACOSX')  # how names of folders begin that programs make for themselves
FEW = 50  # files that are looked at for one name
ADDRESS = re.compile(
    r'[a-z][a-z0-9+.-]+://[^/]*/?|[a-z]:/|/', re.IGNORECASE
)  # what a name of a whole machine begins with
UNDECODED = re.compile('[\udc80-\udcff]+')  # Python's bytes in names of files
MAX_SHOWN = 500  # characters of a value in a report
FLAGS = os.O_RDONLY
for _name in ('O_NONBLOCK', 'O_NOCTTY', 'O_BINARY'):  # not all systems have them
    FLAGS |= getattr(os, _name, 0)
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
    """A folder, a device, a pipe or a socket in the place of a file."""


class TooLargeError(OSError):
    """A file beyond the size that is read."""


class PointerError(OSError):
    """A pointer of Git LFS in the place of a file, which was not fetched."""


def open_regular(path: str | os.PathLike, max_bytes: int) -> BinaryIO:
    """Open a regular file, or a link to one. Nothing else is opened, and what takes its place in the meantime neither
    blocks nor is read.

    Raises:
        NotRegularError, TooLargeError: it is none, or larger than `max_bytes`.
        PointerError: it is a pointer of Git LFS to the file.
        OSError: it cannot be opened.
    """
    try:
        _check(os.stat(path), path, max_bytes)
        file = os.fdopen(os.open(path, FLAGS), 'rb')
    except ValueError as error:  # a NUL, or a character that no name can hold
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
    try:
        _check(os.fstat(file.fileno()), path, max_bytes)
        if size_of(file) < MAX_POINTER_BYTES and file.peek(len(POINTER)).startswith(POINTER):
            text = 'is a pointer of Git LFS, its content was not fetched: run git lfs pull where it is from'
            raise PointerError(errno.EINVAL, text, os.fspath(path))
    except OSError:
        file.close()
        raise
    return file


def read_bytes(path: str | os.PathLike, max_bytes: int) -> bytes:
    """The content of a regular file; errors as of `open_regular`."""
    with open_regular(path, max_bytes) as file:
        return file.read(size_of(file))


def read_text(path: str | os.PathLike, errors: str = 'surrogateescape') -> str:
    """The text of a list in a regular file: UTF-8, or as its byte order mark says; other bytes become what Python makes
    of them in names of files, or as `errors` says. Errors as of `open_regular`."""
    data = read_bytes(path, MAX_LIST_BYTES)
    mark = next((mark for mark in BOMS if data.startswith(mark)), b'')
    encoding = BOMS.get(mark, 'utf-8')
    return data[len(mark) :].decode(encoding, errors if encoding == 'utf-8' else 'replace')


def read_start(path: str | os.PathLike, size: int) -> str:
    """The first bytes of a regular file as text; nothing of what is none."""
    try:
        with open_regular(path, 2**63) as file:
            return file.read(size).decode('utf-8', 'replace')
    except OSError:
        return ''


def size_of(file: BinaryIO) -> int:
    """The bytes of an open file now; of one that grows no more are read."""
    return os.fstat(file.fileno()).st_size


def in_bytes(size: int) -> str:
    """A number of bytes in words."""
    unit, name = next(((unit, name) for unit, name in UNITS if size >= unit), (1, 'bytes'))
    return f'{size / unit:,.4g} {name}'


def walk(root: str | os.PathLike, depth: int | None = None, hidden: bool = True) -> Iterator[tuple[str, list[str]]]:
    """A folder and those in and below it, each with the names of its files, in the order of names, those further up
    first. Links are followed, but never to a folder that holds the link; a folder that many links lead to is visited a
    few times.

    Args:
        depth: levels of folders, the first included.
        hidden: whether folders whose names begin with a dot, and macOS's of archives, are entered.
    """
    root = os.fspath(root)
    visits, waiting = Counter(), [(root, 1, _parents(root))]
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
            if hidden or not entry.name.startswith(HIDDEN):
                linked = above | _parents(entry.path) if entry.is_symlink() else above
                waiting.append((entry.path, level + 1, linked))


def files_below(root: str | os.PathLike, hidden: bool = True) -> set[str]:
    """The files in and below a folder, relative to it, with forward slashes."""
    root, found = os.fspath(root), set()
    for folder, names in walk(root, hidden=hidden):
        at = os.path.relpath(folder, root).replace(os.sep, '/')
        found.update(names if at == '.' else [f'{at}/{name}' for name in names])
    return found


def folders_in(folder: str | os.PathLike, most: int) -> list[str]:
    """The first `most` folders in a folder, without hidden ones and links to folders that hold them."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(e.path for e in entries if _is_folder(e) and not e.name.startswith(HIDDEN))[:most]
        above = _parents(folder) | {_identity(folder)}
        return [path for path in found if not (os.path.islink(path) and _identity(path) in above)]
    except OSError:
        return []


class Files:
    """Paths of files (`exact`), found by other spellings and by the endings of names."""

    def __init__(self, paths: Iterable[str]):
        self.exact = set(paths)

    @cached_property
    def _backwards(self) -> tuple[list[str], list[str]]:
        """Paths from their last part to the first, in order, and as they are."""
        pairs = sorted((_backwards(path), path) for path in self.exact)
        return [key for key, _ in pairs], [path for _, path in pairs]

    def alike(self, path: str) -> list[str]:
        """The first few that are a path but for how they are written."""
        return self._between(_backwards(path), '')

    def ending(self, path: str) -> tuple[int, list[str]]:
        """The first few that have the longest ending in common with a path, and how many parts of it that is."""
        keys, key = self._backwards[0], _backwards(path)
        at = bisect_left(keys, key)
        n = max((_common(key, near) for near in keys[max(at - 1, 0) : at + 1]), default=0)
        common = '\0'.join([*key.split('\0')[:n], ''])
        return n, self._between(common, chr(sys.maxunicode)) if n else []

    def _between(self, key: str, beyond: str) -> list[str]:
        keys, paths = self._backwards
        first = bisect_left(keys, key)
        return paths[first : min(bisect_right(keys, key + beyond), first + FEW)]


class Match(NamedTuple):
    """For names the one that is there of each, and for others the several that it may be."""

    found: Mapping[str, str] = {}
    ambiguous: Mapping[str, list[str]] = {}


def match(names: Iterable[str], there: Collection[str]) -> Match:
    """Find names among those that are there: themselves, or else the one that differs only in how it is written."""
    names, found, ambiguous = dict.fromkeys(names), {}, {}
    found.update((name, name) for name in names if name in there)
    rest, free = defaultdict(list), defaultdict(list)
    for name in names:
        if name not in found:
            rest[spelled(name)].append(name)
    for name in there if rest else ():
        if name not in found:
            free[spelled(name)].append(name)
    for key, alike in rest.items():
        if len(alike) == len(free[key]) == 1:
            found[alike[0]] = free[key][0]
        elif free[key]:
            ambiguous.update((name, free[key]) for name in alike)
    return Match(found, ambiguous)


def path_in(name: str) -> tuple[str, str]:
    """The path in a name of a file, with forward slashes alone, and what is before its first folder: the root of a
    machine, or the beginning of an address."""
    path = name.replace('\\', '/')
    if '?d=' in path:  # Label Studio's local files
        return posixpath.normpath(path.split('?d=')[-1].lstrip('/')), ''
    begin = ADDRESS.match(path)
    if not begin:
        return posixpath.normpath(path), ''
    path = path[begin.end() :].split('?')[0].split('#')[0]
    return posixpath.normpath(f'/{path}').lstrip('/'), begin[0].lower()


def spelled(path: str) -> str:
    """A path without what may be written in another way: percent escapes, slashes, case, how letters with marks are
    made, and bytes that Python could not decode as it was told the encoding of names."""
    if '%' in path:
        path = unquote(path, errors='surrogateescape')
    path = path.replace('\\', '/')
    return path.lower() if path.isascii() else normalize('NFC', UNDECODED.sub(_decoded, path).lower())


def as_bytes(name: str) -> bytes:
    """A name of a file as it is on the disk, whatever the locale; of what can be none, something that is its own."""
    try:
        return name.encode('utf-8', 'surrogateescape')
    except UnicodeEncodeError:
        return name.encode('utf-8', 'surrogatepass')


def is_text(text: str) -> bool:
    """Whether a text has no control characters and can be written to a file."""
    return not any(category(c) in ('Cc', 'Cs') for c in text)


def shown(value: object, most: int = MAX_SHOWN) -> str:
    """A value of the user's as a part of one line."""
    try:
        text = str(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits
        return f'a {type(value).__name__}'
    text = text if len(text) <= most else f'{text[:most]}...'
    return text if text.isprintable() else repr(text)[1:-1]


def why(error: Exception) -> str:
    """What an error of JSON or another text says, as a part of one line."""
    if isinstance(error, RecursionError):
        return 'it is nested too deeply'
    if isinstance(error, UnicodeDecodeError):
        return 'it is not UTF-8'
    if 'integer string conversion' in str(error):
        return f'a number of more than {sys.get_int_max_str_digits():,} digits'
    return shown(error)


def _decoded(undecoded: re.Match) -> str:
    """Bytes in a name: UTF-8 where the locale is of ASCII alone, or Latin-1 of an older machine."""
    data = undecoded[0].encode('utf-8', 'surrogateescape')
    try:
        return data.decode('utf-8')
    except UnicodeDecodeError:
        return data.decode('latin-1')


def _backwards(path: str) -> str:
    """A path's spelling from its last part to the first, each with an end that comes before all characters."""
    return ''.join(f'{part}\0' for part in reversed(spelled(path).split('/')))


def _common(first: str, second: str) -> int:
    """In how many parts two paths from their last to their first are the same."""
    parts = zip(first.split('\0')[:-1], second.split('\0')[:-1])
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], parts))


def _check(state: os.stat_result, path: str | os.PathLike, max_bytes: int) -> None:
    if not stat.S_ISREG(state.st_mode):
        what = next((what for is_one, what in FILE_TYPES.items() if is_one(state.st_mode)), 'something else')
        raise NotRegularError(errno.EINVAL, f'is {what}, not a regular file', os.fspath(path))
    if state.st_size > max_bytes:
        text = f'has {in_bytes(state.st_size)}, of such a file at most {in_bytes(max_bytes)} are read'
        raise TooLargeError(errno.EFBIG, text, os.fspath(path))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _identity(folder: str | os.PathLike) -> tuple[int, int]:
    state = os.stat(folder)
    return state.st_dev, state.st_ino


def _parents(folder: str | os.PathLike) -> frozenset[tuple[int, int]]:
    """The folders that hold the folder that a path leads to."""
    found, at = set(), os.path.realpath(folder)
    while (parent := os.path.dirname(at)) != at:
        at = parent
        try:
            found.add(_identity(at))
        except OSError:
            continue
    return frozenset(found)
