"""Find the images and videos that a user names: files, folders, patterns, lists of paths."""

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO

from ..channel_files import ARRAY_SUFFIX
from ..datasets.files import read_text, walk
from ..engine.datasets import IMAGE_SUFFIXES
from ..errors import UsageError

# Suffixes of images; some are not supported in data sets.
SUFFIXES = (*IMAGE_SUFFIXES, '.gif', '.avif', '.jfif', '.dib', '.tga', '.pcx', '.pnm')
VIDEO_SUFFIXES = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg', '.wmv')
LIST_SUFFIX = '.txt'
STDIN = '-'
Candidate = tuple[str, int]  # a path, and the number of its last parts that make up the file name


class InputFile(NamedTuple):
    """An image or a video.

    Attributes:
        path (str): Path of the file.
        file_name (str): Name in the results: the path relative to the input folder, unique among all inputs.
        stem (str): Name of its output files without suffix, also unique.
    """

    path: str
    file_name: str
    stem: str


@dataclass
class Inputs:
    """Images and videos to predict, and lines to show to the user.

    They are in the order of the inputs, the images of a folder sorted by name.
    """

    images: list[InputFile] = field(default_factory=list)
    videos: list[InputFile] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def find_inputs(inputs: Sequence[str], exclude: str | Path | None = None, stdin: TextIO | None = None) -> Inputs:
    """Find the images and videos that a user names.

    Args:
        inputs: Images, folders (searched recursively for images), patterns, text files of paths (.txt, one per line),
            videos, or '-' for paths on standard input.
        exclude: Folder whose files are ignored: the output folder.
        stdin: Stream for '-'. Defaults to `sys.stdin`.

    Returns:
        The images and videos, without duplicates.

    Raises:
        UsageError: If an input does not exist, or if there is no image in any of them.
    """
    candidates, notices = [], []
    for name in inputs:
        candidates += _expand(name, notices, stdin or sys.stdin)
    outside = os.path.join(os.path.realpath(exclude), '') if exclude else None
    unique = {}
    for path, n_parts in candidates:
        real = os.path.join(os.path.realpath(os.path.dirname(path) or '.'), os.path.basename(path))
        if not (outside and real.startswith(outside)):
            unique.setdefault(real, (path, n_parts))
    if not unique:
        raise UsageError(f'no images in {", ".join(map(repr, inputs))}: give files ending in {", ".join(SUFFIXES[:6])}')
    files = _name_files(list(unique.values()))
    is_video = [file.path.lower().endswith(VIDEO_SUFFIXES) for file in files]
    return Inputs(
        [file for file, video in zip(files, is_video) if not video],
        [file for file, video in zip(files, is_video) if video],
        notices,
    )


def _expand(name: str, notices: list[str], stdin: TextIO) -> Iterator[Candidate]:
    if name == STDIN:
        yield from ((line, 1) for line in _lines(stdin.read()))
    elif os.path.isdir(name):
        yield from _images_below(name, notices)
    elif os.path.isfile(name) and name.lower().endswith(LIST_SUFFIX):
        for line in _lines(read_text(name)):
            beside = os.path.join(os.path.dirname(name), line)
            yield beside if not os.path.exists(line) and os.path.exists(beside) else line, 1
    elif os.path.lexists(name):
        yield name, 1
    elif glob.has_magic(name):
        matches = sorted(glob.glob(name, recursive=True))
        if not matches:
            raise UsageError(f"no file matches '{name}'")
        for match in matches:
            yield from _images_below(match, notices) if os.path.isdir(match) else [(match, 1)]
    else:
        raise UsageError(f"no image or folder '{name}'")


def _lines(text: str) -> list[str]:
    return [line.strip('\r\n') for line in text.split('\n') if line.strip()]


def _images_below(folder: str, notices: list[str]) -> Iterator[Candidate]:
    n_videos, n_images, arrays = 0, 0, []
    for parent, names in walk(folder, hidden=False):
        n_parts = 1 + (0 if os.path.samefile(parent, folder) else len(Path(os.path.relpath(parent, folder)).parts))
        for file_name in sorted(names):
            n_videos += file_name.lower().endswith(VIDEO_SUFFIXES)
            if file_name.lower().endswith(SUFFIXES):
                n_images += 1
                yield os.path.join(parent, file_name), n_parts
            elif file_name.lower().endswith(ARRAY_SUFFIX):
                arrays.append((os.path.join(parent, file_name), n_parts))
    if not n_images:  # next to images, arrays are rather features or labels
        yield from arrays
    if n_videos:
        notices.append(f'{folder}: {n_videos} videos are left out: name them one by one')


def _name_files(candidates: list[Candidate]) -> list[InputFile]:
    """Give each file a unique name, with as many of its parent folders as necessary."""
    paths, n_parts = zip(*candidates)
    parts = [Path(os.path.abspath(path)).parts[1:] for path in paths]
    while True:
        names = ['/'.join(p[-n:]) for p, n in zip(parts, n_parts)]
        counts = Counter(names)
        longer = tuple(n + 1 if counts[name] > 1 and n < len(p) else n for name, n, p in zip(names, n_parts, parts))
        if longer == n_parts:
            break
        n_parts = longer
    stems = [os.path.splitext(name)[0] for name in names]
    shared = {stem for stem, count in Counter(stems).items() if count > 1}
    stems = [name if stem in shared else stem for name, stem in zip(names, stems)]
    return list(map(InputFile, paths, names, stems))
