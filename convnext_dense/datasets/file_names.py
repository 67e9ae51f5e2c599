"""File names in annotations: matching them with files whose paths are written differently."""

import posixpath
import re
import sys
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from os.path import commonprefix
from typing import NamedTuple
from unicodedata import normalize
from urllib.parse import unquote

MAX_CANDIDATES = 50  # files that are returned for one name
ADDRESS_RE = re.compile(r'[a-z][a-z0-9+.-]+://[^/]*/?|[a-z]:/|/', re.IGNORECASE)  # a URL, a drive, or a root
UNDECODED_RE = re.compile('[\udc80-\udcff]+')  # bytes that Python decoded by surrogateescape


class FileIndex:
    """An index of file paths (`exact`) by spelling and by suffix; lookups take logarithmic time."""

    def __init__(self, paths: Iterable[str]):
        self.exact = set(paths)

    @cached_property
    def _sorted(self) -> tuple[list[str], list[str]]:
        """Sorted keys of the reversed paths, and the paths in this order."""
        pairs = sorted((_reversed_parts(path), path) for path in self.exact)
        return [key for key, _ in pairs], [path for _, path in pairs]

    def find_respelled(self, path: str) -> list[str]:
        """Return the first few paths that differ from a path only in spelling."""
        return self._between(_reversed_parts(path), '')

    def find_by_suffix(self, path: str) -> tuple[int, list[str]]:
        """Return the number of parts of the longest common suffix with a path, and the first few paths that have it."""
        keys, key = self._sorted[0], _reversed_parts(path)
        position = bisect_left(keys, key)
        neighbors = keys[max(position - 1, 0) : position + 1]
        parts = [neighbor.split('\0')[:-1] for neighbor in neighbors]
        n = max((len(commonprefix([key.split('\0'), neighbor])) for neighbor in parts), default=0)  # noqa: RUF071, of lists
        common = '\0'.join([*key.split('\0')[:n], ''])
        return n, self._between(common, chr(sys.maxunicode)) if n else []

    def _between(self, key: str, end: str) -> list[str]:
        keys, paths = self._sorted
        start = bisect_left(keys, key)
        return paths[start : min(bisect_right(keys, key + end), start + MAX_CANDIDATES)]


class NameMatches(NamedTuple):
    """The existing name of each name (`matches`), and those that others may mean (`ambiguous`)."""

    matches: Mapping[str, str] = {}
    ambiguous: Mapping[str, list[str]] = {}


def match_names(names: Iterable[str], existing_names: Collection[str]) -> NameMatches:
    """Match names with existing ones: exactly, or else with the only one that differs just in spelling."""
    names, matches, ambiguous = dict.fromkeys(names), {}, {}
    matches.update((name, name) for name in names if name in existing_names)
    unmatched, free_names = defaultdict(list), defaultdict(list)
    for name in names:
        if name not in matches:
            unmatched[normalize_spelling(name)].append(name)
    for name in existing_names if unmatched else ():
        if name not in matches:
            free_names[normalize_spelling(name)].append(name)
    for key, similar_names in unmatched.items():
        if len(similar_names) == len(free_names[key]) == 1:
            matches[similar_names[0]] = free_names[key][0]
        elif free_names[key]:
            ambiguous.update((name, free_names[key]) for name in similar_names)
    return NameMatches(matches, ambiguous)


def split_machine_prefix(name: str) -> tuple[str, str]:
    """Split a file name into a path and what precedes it on another machine.

    Returns:
        The path, normalized and with forward slashes; and the root, drive or start of a URL, empty for a relative path.
    """
    path = name.replace('\\', '/')
    if '?d=' in path:  # Label Studio's local files
        return posixpath.normpath(path.split('?d=')[-1].lstrip('/')), ''
    prefix = ADDRESS_RE.match(path)
    if not prefix:
        return posixpath.normpath(path), ''
    path = path[prefix.end() :].split('?')[0].split('#')[0]
    return posixpath.normpath(f'/{path}').lstrip('/'), prefix[0].lower()


def normalize_spelling(path: str) -> str:
    """Return a path that compares equal to others of the same meaning.

    Percent escapes are decoded, slashes and case unified, Unicode is NFC, and bytes that Python could not decode are
    read as UTF-8 or Latin-1.
    """
    if '%' in path:
        path = unquote(path, errors='surrogateescape')
    path = path.replace('\\', '/')
    return path.lower() if path.isascii() else normalize('NFC', UNDECODED_RE.sub(_decode, path).lower())


def encode_name(name: str) -> bytes:
    """Return the bytes of a file name on the disk, in any locale; unique bytes for what cannot be one."""
    try:
        return name.encode('utf-8', 'surrogateescape')
    except UnicodeEncodeError:
        return name.encode('utf-8', 'surrogatepass')


def _decode(undecoded: re.Match) -> str:
    """Decode bytes in a name: UTF-8 if the locale is ASCII, or Latin-1 of an older machine."""
    data = undecoded[0].encode('utf-8', 'surrogateescape')
    try:
        return data.decode('utf-8')
    except UnicodeDecodeError:
        return data.decode('latin-1')


def _reversed_parts(path: str) -> str:
    """Return the normalized parts of a path from the last to the first, each followed by NUL, for sorting."""
    return ''.join(f'{part}\0' for part in reversed(normalize_spelling(path).split('/')))
