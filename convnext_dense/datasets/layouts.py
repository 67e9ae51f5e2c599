"""Supported layouts of data sets: which files and folders are the annotations and images of each split."""

import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from ..channel_files import ARRAY_SUFFIX
from ..engine.datasets import IMAGE_SUFFIXES
from ..errors import UsageError
from . import SPLITS
from .file_names import NameMatches, match_names, normalize_spelling, split_machine_prefix
from .files import is_folder, read_ends, read_lines, walk

# COCO json by layout and split, as lower-case patterns below the root; 'all' is one file for all splits.
ANNOTATION_PATTERNS = {
    'COCO': {split: f'annotations/instances_{split}*.json' for split in SPLITS},
    'Roboflow': {s: f'{name}/_annotations.coco.json' for s, name in zip(SPLITS, ('train', 'val*', 'test'))},
    'CVAT': {'all': 'annotations/instances_default.json'},
    'Label Studio': {'all': 'result.json'},
    'SPLIT.json': {split: f'{split}*.json' for split in SPLITS},
    'annotations/SPLIT.json': {split: f'annotations/*{split}*.json' for split in SPLITS},
    'SPLIT/*.json': {split: f'{split}*/*.json' for split in SPLITS},
    'one JSON file': {'all': '*.json'},
    'one JSON file in annotations/': {'all': 'annotations/*.json'},
}
# Names of folders in lower case.
IMAGE_DIR_NAMES = ('images', 'image', 'imgs', 'img', 'img_dir', 'jpegimages', 'leftimg8bit')
MASK_DIR_NAMES = ('labels', 'label', 'annotations', 'masks', 'mask', 'ann_dir', 'gtfine', 'segmentationclass', 'gt')
SPLIT_DIR_NAMES = {
    'train': ('train', 'training', 'train_data', 'training_data'),
    'val': ('val', 'valid', 'validation', 'val_data', 'validation_data'),
    'test': ('test', 'testing', 'test_data'),
}
SPLIT_OF_NAME = {name: split for split, names in SPLIT_DIR_NAMES.items() for name in names}
WORD_RE = re.compile('[a-z]+')  # in the name of a file or folder
# What follows the image's name in the name of its mask, before the file suffix; and what follows it in its own.
MASK_SUFFIXES = ('', '_gtFine_labelTrainIds', '_gtFine_labelIds', '_mask', '_label', '_labels', '_seg')
MASK_SUFFIXES += ('_gtFine_instanceIds', '_gtFine_color')
IMAGE_NAME_SUFFIXES = ('_leftImg8bit', '_sat')
MASK_FILE_SUFFIXES = (*IMAGE_SUFFIXES, '.gif', ARRAY_SUFFIX)
MAX_SUFFIXES = 5  # masks of an image whose suffixes are compared
HEADER_BYTES = 2**16  # of a file, by which its format is recognized
OTHER_KEYS_RE = re.compile(r'"(shapes|regions|caption|keypoints|result|classTitle|coordinates)"\s*:')  # not of COCO
MAX_DEPTH = 4  # levels of folders in which annotations are searched
MAX_FOLDERS_SEARCHED = 2000
MAX_FILES_SAMPLED = 20  # annotation files in one folder, of which some may be of other programs or empty


class FolderTree:
    """The folders in and below the root of a data set, which is walked once for all formats; of a file, none."""

    def __init__(self, root: Path):
        self.root = root

    @cached_property
    def folders(self) -> list[tuple[Path, list[str]]]:
        """The first folders, and the names of their files."""
        folders = islice(walk(self.root, MAX_DEPTH, hidden=False), MAX_FOLDERS_SEARCHED)
        return [(Path(folder), names) for folder, names in folders]

    def files_like(self, suffixes: tuple[str, ...], is_like: Callable[[str], bool]) -> Iterator[Iterator[Path]]:
        """Iterate over the folders that have files of a format; of each, over these among its first files.

        They have one of the suffixes, in lower case, and are of the format by their first and last `HEADER_BYTES`.
        """
        for folder, names in self.folders:
            files = [folder / name for name in names if name.lower().endswith(suffixes)][:MAX_FILES_SAMPLED]
            matching_files = (file for file in files if is_like(read_ends(file, HEADER_BYTES)))
            first_file = next(matching_files, None)
            if first_file:
                yield chain([first_file], matching_files)

    def folders_like(self, suffix: str, is_like: Callable[[str], bool]) -> Iterator[Path]:
        """Iterate over the folders that have files of a format, as `files_like`."""
        return (next(files).parent for files in self.files_like((suffix,), is_like))


def split_of_folders(parts: Sequence[str]) -> tuple[str, int] | None:
    """Return the split after which one of some folders is named, and its index; None if none is."""
    splits = ((SPLIT_OF_NAME.get(part.lower()), i) for i, part in enumerate(parts))
    return next((pair for pair in splits if pair[0]), None)


class SplitDirs(NamedTuple):
    """Folders of the images and the segmentation masks of a split, and the stems of its images (None for all)."""

    images: Path
    labels: Path
    names: list[str] | None = None


class Pairing(NamedTuple):
    """Images of a split and their segmentation masks.

    Attributes:
        pairs (list[tuple[Path, Path]]): an image and its mask.
        problems (list[tuple[str, str]]): a code of `diagnostics.RULES` and an example, of names that do not match.
        mask_suffix (str): what follows the image's name in the name of its mask.
    """

    pairs: list[tuple[Path, Path]]
    problems: list[tuple[str, str]]
    mask_suffix: str


def find_annotations(root: Path, given_splits: Collection[str] = ()) -> tuple[str, dict[str, Path]] | None:
    """Find the COCO json of each split. Files named after a split take precedence over one file for all.

    Args:
        root: folder of the data set.
        given_splits: splits whose files are known; these are not searched.

    Returns:
        The layout and the file of each split ('train', 'val', 'test' or 'all'); None if there is no COCO json.

    Raises:
        UsageError: several files could be a split's.
    """
    fallback, files = None, [file for file in iter_files(root, 2) if file.name.lower().endswith('.json')]
    parts_of = {file: file.relative_to(root).as_posix().lower().split('/') for file in files}
    for layout, patterns in ANNOTATION_PATTERNS.items():
        file_by_split = {}
        for split, pattern in patterns.items():
            if split in given_splits or (given_splits and split == 'all'):
                continue
            *folder, name = pattern.split('/')
            candidates = [
                file
                for file, parts in parts_of.items()
                if len(parts) == len(folder) + 1 and all(map(fnmatch, parts, (*folder, name)))
                if file.name != 'shapes.json' and _may_be_coco(file, is_named=name != '*.json')
            ]
            if len(candidates) > 1:
                names = f'{candidates[0].name} and {candidates[1].name} are both candidates for the {split} split'
                raise UsageError(f'{root}: {names}: choose one with --train-ann and --val-ann')
            file_by_split |= {split: candidates[0]} if candidates else {}
        if 'train' in file_by_split or ('all' in file_by_split and not fallback):
            return layout, file_by_split
        fallback = fallback or ((layout, file_by_split) if file_by_split else None)
    return fallback


def find_folders(root: Path) -> tuple[str, dict[str, SplitDirs]] | None:
    """Find the folders of images and segmentation masks of each split.

    Returns:
        The layout and the folders of each split ('train', 'val', 'test' or 'all'); None if there are no masks.
    """
    lists, images, masks = root / 'ImageSets/Segmentation', find_dir(root, IMAGE_DIR_NAMES), _find_mask_dir(root)
    if images and masks and lists.is_dir():
        files = {split: lists / f'{split}.txt' for split in SPLITS}
        dirs = {split: SplitDirs(images, masks, read_lines(file)) for split, file in files.items() if file.exists()}
        if dirs:
            return 'VOC', dirs
    parents = (root, images, masks)
    by_split = {split: [find_dir(parent, names) for parent in parents] for split, names in SPLIT_DIR_NAMES.items()}
    for layout, select in {
        'images/SPLIT, labels/SPLIT': lambda top, images, masks: (images, masks),
        'SPLIT/images, SPLIT/labels': lambda top, *_: (find_dir(top, IMAGE_DIR_NAMES), _find_mask_dir(top)),
        'SPLIT, labels/SPLIT': lambda top, images, masks: (top, masks),
    }.items():
        selected = {split: select(*folders) for split, folders in by_split.items()}
        dirs = {split: SplitDirs(*folders) for split, folders in selected.items() if all(folders)}
        if 'train' in dirs or 'val' in dirs:
            return layout, dirs
    roboflow = {split: SplitDirs(top, top) for split, (top, *_) in by_split.items() if top}
    if 'train' in roboflow and any(path.stem.endswith('_mask') for path in list_images(roboflow['train'].images)):
        return 'Roboflow', roboflow
    if images and masks:
        return 'images, labels', {'all': SplitDirs(images, masks)}
    return None


def pair_files(dirs: SplitDirs, mask_suffix: str | None = None) -> Pairing:
    """Pair the images of a split with their segmentation masks, by name; their suffix is found out if it is None."""
    images, duplicates, listed_matches = {}, [], NameMatches()
    for path in list_images(dirs.images):
        stem = strip_image_suffix(stem_in(path, dirs.images))
        duplicates += [path] if images.setdefault(stem, path) is not path else []
    masks = {stem_in(path, dirs.labels): path for path in list_images(dirs.labels, MASK_FILE_SUFFIXES)}
    if dirs.images == dirs.labels:
        images = {stem: path for stem, path in images.items() if not stem.endswith('_mask')}
        masks = {stem: path for stem, path in masks.items() if stem.endswith('_mask')}
    if mask_suffix is None:
        mask_suffix = infer_mask_suffix([normalize_spelling(stem) for stem in images], masks)[0]
    if dirs.names is not None:
        names = [_listed_stem(line, dirs.images, images) for line in dirs.names]
        listed_matches = match_names(names, images)
        images = {name: images.get(listed_matches.matches.get(name), dirs.images / f'{name}.jpg') for name in names}
    images = {stem: path for stem, path in sorted(images.items()) if stem not in listed_matches.ambiguous}
    matched = match_names([stem + mask_suffix for stem in images], masks)
    pairs, problems = [], []
    for stem, path in images.items():
        if stem + mask_suffix in matched.matches:
            pairs.append((path, masks[matched.matches[stem + mask_suffix]]))
        elif stem + mask_suffix not in matched.ambiguous:
            problems.append(('unmatched-image', path.name))
    if dirs.names is None:  # else masks of other splits lie in the same folder
        paired = {*matched.matches.values(), *chain(*matched.ambiguous.values())}
        unmatched = [path for stem, path in sorted(masks.items()) if stem not in paired and stem.endswith(mask_suffix)]
        problems += [('unmatched-mask', path.name) for path in unmatched]
    problems += [('duplicate-stem', path.name) for path in duplicates]
    for names in (listed_matches, matched):
        respelled = [f'{name} is {match}' for name, match in names.matches.items() if name != match]
        ambiguous = [f'{name} may be {" or ".join(files[:2])}' for name, files in names.ambiguous.items()]
        problems += [('name-spelling-mismatch', text) for text in respelled]
        problems += [('ambiguous-name', text) for text in ambiguous]
    return Pairing(pairs, problems, mask_suffix)


def infer_mask_suffix(stems: Collection[str], masks: Iterable[str]) -> tuple[str, int]:
    """Return what follows the name of an image in that of its mask, and how many images have one.

    It is the best of `MASK_SUFFIXES`; if no image has a mask of such a name, the most frequent other ending. Stems of
    images are normalized (`normalize_spelling`).
    """
    spelled = {normalize_spelling(mask): mask for mask in masks}
    counts = Counter({suffix: sum(stem + suffix.lower() in spelled for stem in stems) for suffix in MASK_SUFFIXES})
    if stems and not any(counts.values()):
        ordered = sorted(spelled)
        for stem in stems:
            for mask in islice(ordered, at := bisect_left(ordered, stem), at + MAX_SUFFIXES):
                if mask.startswith(stem) and not mask[len(stem)].isalnum():
                    counts[spelled[mask][len(stem) - len(mask) :]] += 1
    return max(counts.items(), key=lambda item: item[1])


def list_images(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[Path]:
    """Return all image files in and below a folder, by their suffixes; arrays (.npy) only where nothing else is."""
    files = [path for path in iter_files(folder, None) if not path.name.startswith('.')]
    images = [path for path in files if path.name.lower().endswith(suffixes) and not is_array(path)]
    return sorted(images or filter(is_array, files))


def is_array(path: Path) -> bool:
    """Return whether a file has the suffix of an array, which may be an image or a mask."""
    return path.suffix.lower() == ARRAY_SUFFIX


def strip_image_suffix(stem: str) -> str:
    """Return the stem of an image without what its mask has not, such as Cityscapes' _leftImg8bit."""
    lower = stem.lower()
    return next((stem[: -len(end)] for end in IMAGE_NAME_SUFFIXES if lower.endswith(end.lower())), stem)


def is_image(path: Path) -> bool:
    """Return whether a file has the suffix of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def are_of_masks(folders: Iterable[str]) -> bool:
    """Return whether one of some folders is named as those of masks or labels are, and none as those of images."""
    names = {folder.lower() for folder in folders}
    return not names.isdisjoint(MASK_DIR_NAMES) and names.isdisjoint(IMAGE_DIR_NAMES)


def find_dir(folder: Path | None, names: tuple[str, ...]) -> Path | None:
    """Return the first folder in a folder that has one of the names, in any case."""
    if folder is None:
        return None
    with os.scandir(folder) as entries:
        children = {name.lower(): name for name in sorted(entry.name for entry in entries if is_folder(entry))}
    return next((folder / children[name] for name in names if name in children), None)


def _find_mask_dir(folder: Path | None) -> Path | None:
    """Return the folder of masks in a folder; other folders may have such names, too."""
    for child in filter(None, (find_dir(folder, (name,)) for name in MASK_DIR_NAMES)):
        if any(path.name.lower().endswith(MASK_FILE_SUFFIXES) for path in iter_files(child)):
            return child
    return None


def _may_be_coco(path: Path, is_named: bool) -> bool:
    """Return whether a file may be COCO json by its first bytes.

    If the file's name says so (`is_named`), it may be broken: only keys of another format speak against it.
    """
    start = read_ends(path, HEADER_BYTES)
    if '"segments_info"' in start or (OTHER_KEYS_RE.search(start) and '"bbox"' not in start):
        return False
    keys = {*re.findall(r'"(images|annotations|categories)"\s*:', start)}
    if keys == {'categories'} and len(start) < HEADER_BYTES:  # such as Label Studio's notes.json
        keys = {}
    return is_named or (bool(keys) and start.lstrip().startswith('{'))


def _listed_stem(line: str, folder: Path, images: Collection[str]) -> str:
    """Return the stem, relative to the folder of images, that a line of a list names.

    The line may hold a path to it, a file suffix, and more columns.
    """

    def stem_of(text: str) -> str:
        path = split_machine_prefix(text)[0]
        start = f'/{path.lower()}'.rfind(f'/{folder.name.lower()}/')
        path = path[start + len(folder.name) + 1 :] if start >= 0 else path
        return path[: path.rfind('.')] if path.lower().endswith(IMAGE_SUFFIXES) else path

    stem = stem_of(line)
    return stem if stem in images else stem_of(line.split()[0])


def stem_in(path: Path, folder: Path) -> str:
    """Return the path of a file below a folder, without the suffix."""
    return path.relative_to(folder).with_suffix('').as_posix()


def iter_files(root: Path, depth: int | None = MAX_DEPTH) -> Iterator[Path]:
    """Iterate over the files in and below a folder, those further up first."""
    yield from (Path(folder, name) for folder, names in walk(root, depth, hidden=False) for name in names)
