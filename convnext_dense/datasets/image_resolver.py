"""Finding the image file that a name in COCO json means, on a disk that may be laid out differently."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from ..errors import UsageError
from .file_names import FileIndex, normalize_spelling, split_machine_prefix
from .files import files_below, folders_in, is_below, to_one_line
from .layouts import IMAGE_DIR_NAMES, MASK_DIR_NAMES, SPLIT_DIR_NAMES, SPLIT_OF_NAME, WORD_RE, are_of_masks
from .request import relative_to_root

MAX_NAMES_TRIED = 50  # names that are tried to find the folder in which they begin
MAX_NAME_LENGTH = 4096  # characters; no system has longer ones
UPLOAD_RE = re.compile('(?<=/)[0-9a-f]{8}-(?=[^/]+$)')  # before the name of a file that was uploaded to Label Studio
DIGITS_RE = re.compile('[0-9]+')


class ImageLocation(NamedTuple):
    """Where the image of a name is.

    Attributes:
        path (str | None): relative to the data set's root, absolute elsewhere; None if it was not found.
        code (str | None): code of `diagnostics.RULES` that says why it was not found, or how it was.
        example (str): the name, for the report.
    """

    path: str | None
    code: str | None = None
    example: str = ''


class ImageResolver:
    """Finds the image files of a COCO json file.

    Names do not say in which folder they begin, so folders are tried with some of them. Names with paths of another
    machine are matched by the longest ending that they share with a file.

    Args:
        ann_file: the COCO json file.
        root: folder of the data set.
        names: file names of the images.
        image_dir: folder of the images, if it is known.
        split: split of the images; None for all.
        hint: what to do if no image is found.
        is_excluded: whether a folder holds no images, but files with their names.

    Attributes:
        folder (Path): folder in which names begin.
        locations (dict[str, ImageLocation]): where the image of each name is.

    Raises:
        UsageError: no image is found.
    """

    def __init__(
        self,
        ann_file: Path,
        root: Path,
        names: Sequence[str],
        image_dir: str | None = None,
        split: str | None = None,
        hint: str = 'give --train-images and --val-images',
        is_excluded: Callable[[Path], bool] = lambda folder: False,
    ):
        names = list(dict.fromkeys(names))
        self._root, self._split = root, None if image_dir else split
        split_dirs, folders = ([], [Path(image_dir)]) if image_dir else _candidate_folders(ann_file, root)
        self._tops = [Path(image_dir)] if image_dir else _top_folders(ann_file, root)
        sampled_names = names[:: max(1, len(names) // MAX_NAMES_TRIED)]
        # Masks are named as their images. The folder of the annotations only has the name of one of masks.
        candidates = [f for f in folders if f == ann_file.parent or not _is_mask_folder(f, root)]
        split_dirs, candidates = ([f for f in each if not is_excluded(f)] for each in (split_dirs, candidates))
        best = _best_folder(candidates, sampled_names)
        self.folder, self._is_folder_known = best or self._tops[0], best is not None
        self._prefix = self._path_prefix(self.folder)
        self._split_prefixes = tuple(map(self._path_prefix, split_dirs))
        self._starts = [os.path.abspath(folder) for folder in (ann_file.parent, self.folder)]  # of names with ../
        self._inside = tuple(os.path.join(os.path.abspath(top), '') for top in (*self._tops, root))
        exact = {name: self._locate_exactly(name) for name in names}
        self.locations = {**exact, **self._locate_by_suffix(exact)}
        if names and not any(at.path or at.code == 'ambiguous-name' for at in self.locations.values()):
            raise UsageError(
                f'{ann_file}: none of its images (such as {to_one_line(names[0])}) is in {image_dir or root}: {hint}'
            )

    @property
    def searched_folders(self) -> list[Path]:
        """The folders whose files decide where images are."""
        return [self.folder, *(self._tops if '_all_files' in self.__dict__ else [])]

    @cached_property
    def _folder_files(self) -> FileIndex:
        """The files in and below the folder in which names begin."""
        return FileIndex(self._prefix + path for path in files_below(self.folder))

    @cached_property
    def _all_files(self) -> FileIndex:
        """All files of the data set."""
        return FileIndex(self._path_prefix(top) + path for top in self._tops for path in files_below(top, hidden=False))

    @cached_property
    def _split_files(self) -> FileIndex:
        """The files of the folders that are named after the split."""
        prefixes = self._split_prefixes
        return FileIndex(path for path in self._all_files.exact if prefixes and path.startswith(prefixes))

    def _path_prefix(self, folder: str | Path) -> str:
        """Return what precedes the paths of files below a folder."""
        is_root = os.path.abspath(folder) == os.path.abspath(self._root)
        return '' if is_root else f'{relative_to_root(folder, self._root)}/'

    def _locate_exactly(self, name: str) -> ImageLocation | None:
        """Return where an image is by its whole name, or that it cannot exist; None if it is not there."""
        path, machine = split_machine_prefix(name)
        if len(name) > MAX_NAME_LENGTH:
            return ImageLocation(None, 'missing-image', name)
        if machine or path.startswith('../'):
            starts = (os.sep,) if machine else self._starts
            paths = [os.path.normpath(os.path.join(start, path)) for start in starts]
            inner_paths = [path for path in paths if path.startswith(self._inside)]
            existing_path = next(filter(os.path.isfile, inner_paths), None)
            if existing_path:
                return ImageLocation(relative_to_root(existing_path, self._root))
            return None if inner_paths or machine else ImageLocation(None, 'name-outside-root', name)
        if not self._is_folder_known:
            return None
        for exact in (self._prefix + name, self._prefix + path):
            if exact in self._folder_files.exact:
                return ImageLocation(exact)
        files = self._folder_files.find_respelled(self._prefix + path)
        if not files:
            return None
        differs_in_case = files[0].lower() == f'{self._prefix}{path}'.lower()
        return _to_location(name, files, 'name-case-mismatch' if differs_in_case else 'name-spelling-mismatch')

    def _locate_by_suffix(self, exact: Mapping[str, ImageLocation | None]) -> dict[str, ImageLocation]:
        """Locate the other images by the longest ending that their names share with a file.

        A name never matches by less of it than names with the same prefix do.
        """
        names_by_file, prefixes = defaultdict(list), Counter()
        for name, location in exact.items():
            if location and location.path:
                names_by_file[location.path].append(name)
                prefixes['',] += 1
        matches = {name: self._match_suffix(name, bool(prefixes)) for name, at in exact.items() if at is None}
        prefixes.update(prefix for _, num_parts, prefix in matches.values() if num_parts > 1)
        lengths, files_by_name = {len(prefix) for prefix in prefixes}, {}
        for name, (files, num_parts, prefix) in matches.items():
            files_by_name[name] = files = [] if _is_other_file(num_parts, prefix, prefixes, lengths) else files
            if len(files) == 1:
                names_by_file[files[0]].append(name)
        has_machine_names = any(split_machine_prefix(name)[1] for name in chain(*names_by_file.values()))
        locations = {}
        for name, files in files_by_name.items():
            is_outside = split_machine_prefix(name)[1] and not has_machine_names
            locations[name] = ImageLocation(None, 'name-outside-root' if is_outside else 'missing-image', name)
            if files:
                locations[name] = _to_location(name, files, 'name-matched-by-suffix', names_by_file)
        return locations

    def _match_suffix(self, name: str, has_exact_names: bool) -> tuple[list[str], int, tuple[str, ...]]:
        """Return the first files whose paths have the longest ending in common with a name.

        Returns:
            Also the number of parts of the path in that ending, and the parts of the name before it.
        """
        path, machine = split_machine_prefix(name)
        path = re.sub(r'^(\.\./)+', '', path)
        if has_exact_names and '/' not in path:
            return [], 0, ()
        match = self._match_path(path, machine)
        original = UPLOAD_RE.sub('', path)
        return match if match[0] or original == path else self._match_path(original, machine)

    def _match_path(self, path: str, machine: str) -> tuple[list[str], int, tuple[str, ...]]:
        num_parts, files = self._split_files.find_by_suffix(path)
        num_parts_of_all, other_files = self._all_files.find_by_suffix(path)
        if num_parts_of_all > num_parts:
            num_parts, files = num_parts_of_all, other_files
        parts = [machine, *normalize_spelling(path).split('/')]
        prefix = tuple(parts[: len(parts) - num_parts])
        files = [file for file in files if not _is_among_masks(file)] or (files if num_parts > 1 else [])
        if num_parts == 1:
            files = [file for file in files if not _contradicts(prefix[1:], file, self._split)]
        return files, num_parts, prefix


def _to_location(name: str, files: list[str], code: str, names: Mapping = MappingProxyType({})) -> ImageLocation:
    """Return the location of an image that may be one of some files; `names` by file must not claim it as well."""
    if len(files) > 1:
        return ImageLocation(None, 'ambiguous-name', f'{name} may be {" or ".join(files[:2])}')
    other_names = [other_name for other_name in names.get(files[0], ()) if other_name != name]
    if other_names:
        return ImageLocation(None, 'ambiguous-name', f'{name} and {other_names[0]} may both be {files[0]}')
    return ImageLocation(files[0], code, f'{name} is {files[0]}')


def _is_other_file(num_parts: int, prefix: tuple[str, ...], prefixes: Counter, lengths: set[int]) -> bool:
    """Return whether a name means a file that is missing, and not those that it matches.

    `prefixes` counts the names that match more than the last part of a path, by what precedes the match (`lengths` are
    theirs). If most names with the beginning of this one match more of themselves, so would its own file.
    """
    if num_parts < 2:
        return bool(prefixes)
    shorter = (prefix[:n] for n in lengths if 0 < n < len(prefix))
    return any(prefixes[beginning] >= prefixes[prefix] for beginning in shorter)


def _contradicts(folders: Sequence[str], file: str, split: str | None) -> bool:
    """Return whether the folders of a name and of a file are of different splits, or differ by a number."""
    file_folders = normalize_spelling(file).split('/')[:-1]
    name_splits, file_splits = _splits_in(folders) or {split} & {*SPLIT_DIR_NAMES}, _splits_in(file_folders)

    def patterns(a: Sequence[str], b: Sequence[str]) -> set[str]:
        return {DIGITS_RE.sub('#', folder) for folder in a if folder not in b}

    differ_by_number = patterns(folders, file_folders) & patterns(file_folders, folders)
    return bool(name_splits and file_splits and not name_splits & file_splits) or bool(differ_by_number)


def _splits_in(folders: Sequence[str]) -> set[str]:
    words = (word for folder in folders for word in WORD_RE.findall(folder))
    return {SPLIT_OF_NAME[word] for word in words if word in SPLIT_OF_NAME}


def _is_among_masks(file: str) -> bool:
    """Return whether a file lies in a folder that has the name of one of masks."""
    return are_of_masks(normalize_spelling(file).split('/')[:-1])


def _is_mask_folder(folder: Path, root: Path) -> bool:
    return _is_among_masks(f'{os.path.relpath(folder, root)}/')


def _top_folders(ann_file: Path, root: Path) -> list[Path]:
    """Return the folders in and below which the images of a COCO json file are."""
    base = _base_folder(ann_file)
    if is_below(base, root):
        return [root]
    return [base] if is_below(root, base) else [root, base]


def _base_folder(ann_file: Path) -> Path:
    return ann_file.parent.parent if ann_file.parent.name.lower() == 'annotations' else ann_file.parent


def _best_folder(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    """Return the first folder that has half as many of the names as the best one, None if none has any."""
    split_names = map(split_machine_prefix, names)
    paths = [path for path, machine in split_names if not machine and not path.startswith('../')]

    @cache
    def spellings_in(folder: str) -> set[str]:
        try:
            return set(map(normalize_spelling, os.listdir(folder)))
        except (OSError, ValueError):
            return set()

    def exists(folder: Path, path: str) -> bool:
        parent, _, name = f'{folder}/{path}'.rpartition('/')
        # Links may show one folder under many names, and a missing one need not be listed for each name.
        return os.path.isdir(parent) and normalize_spelling(name) in spellings_in(os.path.realpath(parent))

    hits = [sum(exists(folder, path) for path in paths) for folder in folders]
    most = max(hits, default=0)
    return next(folder for folder, n in zip(folders, hits) if 2 * n >= most) if most else None


def _candidate_folders(ann_file: Path, root: Path) -> tuple[list[Path], list[Path]]:
    """Return folders that may hold the images of a COCO json file: next to it, and up to two levels below the root.

    Returns:
        Those named after the split of the file, and all, the likeliest first.
    """
    split = next((s for s, names in SPLIT_DIR_NAMES.items() if any(n in ann_file.stem.lower() for n in names)), None)

    def is_of_split(folder: Path) -> bool:
        return split is not None and any(name in folder.name.lower() for name in SPLIT_DIR_NAMES[split])

    def score(folder: Path) -> tuple[bool, int, bool]:
        names = {path.name.lower() for path in (folder, folder.parent)}
        kind = bool(names & {*IMAGE_DIR_NAMES}) - bool(names & {*MASK_DIR_NAMES})
        return folder.name.lower() == ann_file.stem.lower(), kind, folder.name.lower() in SPLIT_OF_NAME

    near_folders = [ann_file.parent, ann_file.parent / 'images', root / 'images', root]
    folders = [*folders_in(root), *folders_in(_base_folder(ann_file))]
    folders += [inner for folder in folders for inner in folders_in(folder)]
    # Folders of the split come first: file names are often the same in all splits.
    split_dirs = [folder for folder in folders if is_of_split(folder) and not _is_mask_folder(folder, root)]
    split_dirs.sort(key=score, reverse=True)
    # If there are any, images of the same names in the folder of another split are different ones.
    other_dirs = [f for f in folders if not (split_dirs and _splits_in([f.name.lower()]) - {split})]
    split_dirs = [*filter(is_of_split, near_folders[:1]), *split_dirs]
    return split_dirs, list(dict.fromkeys([*split_dirs, *near_folders, *other_dirs]))
