"""Folders of images and segmentation masks in no known layout: found by what is in them, and by their files' names.

A folder of masks holds files named as those of a folder of images, with few colors each.
"""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from itertools import islice, permutations
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UsageError
from . import SPLITS
from .check_images import open_mask
from .file_names import normalize_spelling
from .files import to_one_line, walk
from .layouts import (
    IMAGE_DIR_NAMES,
    MASK_DIR_NAMES,
    MASK_FILE_SUFFIXES,
    MAX_DEPTH,
    SPLIT_OF_NAME,
    WORD_RE,
    SplitDirs,
    infer_mask_suffix,
    is_array,
    strip_image_suffix,
)

MAX_FOLDERS = 100  # folders with images; more of them are those of a classification
MAX_FILES_SAMPLED = 3  # files of a folder that are opened
MAX_NAMES_SAMPLED = 50  # names of a folder that are compared with those of another one
MIN_MATCHING = 0.5  # fraction of these that have a mask of their name
MAX_COLORS = 64  # colors of a mask; photographs have more
SAMPLE_SIDE = 128  # pixels to which a file is sampled, in order to count its colors
MASK_WORDS = {*MASK_DIR_NAMES, 'annot', 'annots', 'annotation', 'seg', 'segmentation', 'groundtruth', 'segmentations'}
IMAGE_WORDS = {*IMAGE_DIR_NAMES, 'original', 'originals', 'photo', 'photos', 'rgb', 'input', 'inputs', 'data'}
# Words that are written as one, such as trainannot.
JOINED_RE = re.compile(f'({"|".join(sorted(SPLIT_OF_NAME, key=len, reverse=True))})(?=({"|".join(MASK_WORDS)})s?$)')


def find_mask_folders(root: Path) -> tuple[str, dict[str, SplitDirs]] | None:
    """Find folders of images and of segmentation masks whose files have the same names.

    Returns:
        The layout and the folders of each split ('train', 'val', 'test' or 'all'); None if there are none.

    Raises:
        UsageError: several folders could be the images or the masks of a split.
    """
    folders = {}
    for folder, names in islice(walk(root, MAX_DEPTH, hidden=False), MAX_FOLDERS * 20):
        images = [name for name in names if name.lower().endswith(MASK_FILE_SUFFIXES) and not name.startswith('.')]
        if images:
            folders[Path(folder)] = images
    if not 2 <= len(folders) <= MAX_FOLDERS:
        return _masks_beside_images(root, folders)
    stems = {f: {normalize_spelling(os.path.splitext(name)[0]) for name in names} for f, names in folders.items()}
    likeness = cache(lambda folder: _mask_likeness(folder, root, folders[folder]))
    pairs: dict[str, set[tuple[Path, Path]]] = {}
    for images, masks in permutations(folders, 2):
        splits = {split_of(folder, root) for folder in (images, masks)} - {None}
        if len(splits) > 1 or not _match(stems[images], stems[masks]):
            continue
        if likeness(masks) > max(likeness(images), 0):
            pairs.setdefault(next(iter(splits), 'all'), set()).add(_common_tops(images, masks, root))
    if 'train' in pairs:
        pairs.pop('all', None)
    for split, candidates in pairs.items():
        if len(candidates) > 1:
            raise UsageError(f'{root}: {_list_choices(split, sorted(candidates))}')
    dirs = {split: SplitDirs(*next(iter(pairs[split]))) for split in (*SPLITS, 'all') if split in pairs}
    if not dirs:
        return _masks_beside_images(root, folders)
    first_dirs = next(iter(dirs.values()))
    layout = ', '.join(to_one_line(os.path.relpath(folder, root), 60) for folder in first_dirs[:2])
    return layout, dirs


def _list_choices(split: str, candidates: Sequence[tuple[Path, Path]]) -> str:
    """Return the folders that may be meant, as the options that choose each."""
    flag = 'val' if split == 'val' else 'train'
    choices = [f'--{flag}-images {images} --{flag}-masks {masks}' for images, masks in candidates[:3]]
    name = 'images and masks' if split == 'all' else f'the {split} split'
    return f'several folders could be {name}; choose by {" or ".join(choices)}'


def _masks_beside_images(root: Path, folders: dict) -> tuple[str, dict[str, SplitDirs]] | None:
    """Find masks next to their images, with _mask after their names."""
    dirs: dict[str, SplitDirs] = {}
    for folder, names in folders.items():
        stems = {os.path.splitext(name)[0] for name in names}
        if any(stem.endswith('_mask') and stem.removesuffix('_mask') in stems for stem in stems):
            split = split_of(folder, root) or 'all'
            if split in dirs:
                raise UsageError(f'{root}: {_list_choices(split, [dirs[split][:2], (folder, folder)])}')
            dirs[split] = SplitDirs(folder, folder)
    return ('masks next to images', dirs) if dirs else None


def _match(images: Collection[str], masks: Collection[str]) -> bool:
    """Return whether at least half of some images have a mask of their name, with any one of the suffixes."""
    sampled = [strip_image_suffix(stem) for stem in islice(images, MAX_NAMES_SAMPLED)]
    return infer_mask_suffix(sampled, masks)[1] >= MIN_MATCHING * len(sampled)


def _mask_likeness(folder: Path, root: Path, names: Sequence[str]) -> int:
    """Return how much a folder is like one of masks: by the colors of some files, and then by its name."""
    step = max(1, len(names) // MAX_FILES_SAMPLED)
    are_masks = all(_has_few_colors(folder / name) for name in names[::step][:MAX_FILES_SAMPLED])
    words = set(_words(folder, root))
    return 2 * are_masks + bool(words & MASK_WORDS) - bool(words & IMAGE_WORDS)


def _has_few_colors(file: Path) -> bool:
    try:
        if is_array(file):
            array = np.load(file, mmap_mode='r', allow_pickle=False)
            return array.ndim == 2 and len(np.unique(array[::4, ::4])) <= MAX_COLORS
        with open_mask(file) as image:
            pixels = np.asarray(image.resize((SAMPLE_SIDE, SAMPLE_SIDE), Image.Resampling.NEAREST))
    except Exception:  # a broken file can fail in any way; the check reports it
        return False
    if pixels.ndim > 2:  # one number per color
        pixels = pixels.astype(np.int64) @ (256 ** np.arange(pixels.shape[2]))
    return len(np.unique(pixels)) <= MAX_COLORS


def _words(folder: Path, root: Path) -> Iterator[str]:
    """Iterate over the words in the path of a folder, below the root."""
    for part in folder.relative_to(root).parts:
        for word in WORD_RE.findall(part.lower()):
            yield from JOINED_RE.sub(r'\1 ', word).split()
        yield part.lower()


def split_of(folder: Path, root: Path) -> str | None:
    """Return the split that the path of a folder below the root names; None if it names none."""
    return next((SPLIT_OF_NAME[word] for word in _words(folder, root) if word in SPLIT_OF_NAME), None)


def _common_tops(images: Path, masks: Path, root: Path) -> tuple[Path, Path]:
    """Return the folders above two folders from which on they are named alike; one of a split stays."""
    while images.name == masks.name and images.name.lower() not in SPLIT_OF_NAME and root not in (images, masks):
        images, masks = images.parent, masks.parent
    return images, masks
