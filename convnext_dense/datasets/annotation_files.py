"""Formats with one annotation file per image, by its name, or with one for many images, found by what is in it."""

import filecmp
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError
from . import SPLITS
from .check_coco import image_names
from .diagnostics import Report
from .file_names import normalize_spelling
from .files import is_below, read_json, read_lines, to_one_line, walk
from .image_resolver import ImageLocation, ImageResolver
from .layouts import IMAGE_DIR_NAMES, WORD_RE, FolderTree, is_image, split_of_folders
from .request import DatasetRequest, relative_to_root
from .split_annotations import SplitAnnotations, add_image, drop_masks_of_boxes, number_categories, outermost

LIST_DIRS = ('ImageSets/Main', 'ImageSets')
LIST_NAMES = {'train': ('train', 'trainval'), 'val': ('val', 'valid'), 'test': ('test',)}


class LabelSplit(NamedTuple):
    """Folders of annotation files, the folder in and below which the images are, and the list of the split, if any."""

    labels: tuple[Path, ...]
    images: Path
    list_file: Path | None = None


class ListSplit(NamedTuple):
    """The annotation file of a split, and the folder of its images if that is known."""

    file: Path
    images: str | None = None


def find_label_files(
    tree: FolderTree, suffix: str, is_label: Callable[[str], bool]
) -> tuple[str, dict[str, LabelSplit]] | None:
    """Find the annotation files of each split, as `BoxFormat.find`, by the suffix and the start of files.

    Raises:
        UsageError: there are several data sets.
    """
    path, folders = tree.root, tuple(tree.folders_like(suffix, is_label))
    if not folders:
        return None
    lists = {split: _find_list(path, folders, split) for split in SPLITS}
    if lists['train']:
        return 'ImageSets', {split: LabelSplit(folders, path, file) for split, file in lists.items() if file}
    by_split: dict[str, LabelSplit] = {}
    for folder in folders:
        parts = folder.relative_to(path).parts
        split_match = split_of_folders(parts)
        if split_match:
            # The images of train/annotations are in train as well, those of annotations/train are elsewhere.
            split, images = split_match[0], path / parts[0] if split_match[1] == 0 else path
            source = by_split.get(split, LabelSplit((), images))
            by_split[split] = source._replace(labels=(*source.labels, folder))
    if 'train' in by_split:
        return 'folders by split', by_split
    return f'{suffix[1:].upper()} files', {'all': LabelSplit(folders, path)}


def label_split(labels: FolderTree, images: Path, suffix: str, is_label: Callable[[str], bool]) -> LabelSplit | None:
    """Return the split of a folder of annotation files and one of images; None if the first holds no such files."""
    folders = tuple(labels.folders_like(suffix, is_label))
    return LabelSplit(folders, images) if folders else None


def read_label_files(
    root: Path,
    splits: Mapping[str, LabelSplit],
    report: Report,
    request: DatasetRequest,
    suffix: str,
    parse: Callable[[str, str, Callable], tuple[tuple[int, int] | None, list[dict]]],
    finish: Callable[[Mapping, Report], None],
) -> dict[str, SplitAnnotations]:
    """Read the annotation files of each split, by their suffix, as COCO; the first four arguments as `BoxFormat.read`.

    `parse(file, label_name, add)` returns what `add_image` takes of a file: the size of its image and its annotations;
    it reports problems by `add(code, example)`, and raises UsageError, with the reason alone, if the file is unusable.
    `finish(results, report)` changes the results, in place, where all files have to be known for that.

    Raises:
        UsageError: a list cannot be read.
    """
    images_in, labels_in = cache(_images_by_stem), cache(partial(_labels_by_name, suffix=suffix))
    results = {}
    for split, source in splits.items():
        add, coco, locations = partial(report.add, split), dict(images=[], annotations=[]), {}
        labels, photos = labels_in(source.labels), images_in(source.images)
        for name in _read_list(source.list_file) if source.list_file else labels:
            file = labels.get(name)
            if file is None:
                add('missing-label', name)
                continue
            label_name, image = relative_to_root(file, root), _image_of(file, photos.get(os.path.basename(name), ()))
            if image is None:
                add('unmatched-label', label_name)
                continue
            try:
                size, annotations = parse(file, label_name, add)
            except UsageError as error:
                add('unreadable-label', f'{label_name}: {error}')
                continue
            file_name = relative_to_root(image, root)
            locations[file_name] = ImageLocation(file_name)
            add_image(coco, file_name, size, annotations, label_name)
        watched = [source.images, *(folder / f'*{suffix}' for folder in source.labels)]
        watched += [source.list_file] if source.list_file else []
        results[split] = SplitAnnotations(coco, locations, source.images, watched)
    if not any(source.list_file for source in splits.values()):
        stems = {os.path.basename(name) for source in splits.values() for name in labels_in(source.labels)}
        _report_missing_labels(root, splits, results, stems, images_in, report)
    finish(results, report)
    number_categories(results)
    return results


def find_lists(
    tree: FolderTree, suffixes: tuple[str, ...], is_list: Callable[[str], bool]
) -> tuple[str, dict[str, ListSplit]] | None:
    """Find the annotation file of each split, as `BoxFormat.find`, by the suffixes and the start of files.

    Raises:
        UsageError: several files could be a split's.
    """
    by_split: dict[str, list[Path]] = {}
    top = os.path.realpath(tree.root)
    for file in chain.from_iterable(tree.files_like(suffixes, is_list)):
        path, real = file.relative_to(tree.root), os.path.realpath(file)
        if is_below(real, top) and real != os.path.join(top, path):
            continue  # a link to another file of the data set, or in a linked folder
        named_split = split_of_folders(path.parts[:-1]) or split_of_folders(WORD_RE.findall(path.stem.lower()))
        by_split.setdefault(named_split[0] if named_split else 'all', []).append(file)
    if 'train' in by_split:
        by_split.pop('all', None)
    for split, (first_file, *duplicates) in by_split.items():
        files = [first_file, *(file for file in duplicates if not filecmp.cmp(first_file, file, shallow=False))]
        if len(files) > 1:
            names = ' and '.join(to_one_line(file.relative_to(tree.root)) for file in files[:2])
            which = 'the annotations' if split == 'all' else f'those of the {split} split'
            hint = f'--{"val" if split == "val" else "train"}-ann {files[0]}'
            raise UsageError(f'{tree.root}: {names} could both be {which}: choose one, such as {hint}')
    if not by_split:
        return None
    splits = {split: ListSplit(files[0]) for split, files in by_split.items()}
    return ', '.join(to_one_line(source.file.relative_to(tree.root), 60) for source in splits.values()), splits


def read_lists(
    root: Path,
    splits: Mapping[str, ListSplit],
    report: Report,
    request: DatasetRequest,
    parse: Callable[[Path, Callable], Iterable[tuple[str, tuple[int, int] | None, list[dict]]]],
    resolve_names: Callable | None = None,
) -> dict[str, SplitAnnotations]:
    """Read the annotation files of each split as COCO; the first four arguments as `BoxFormat.read`.

    `parse(file, add)` returns what `add_image` takes of each image in a file: its name as it is written there, its size
    and its annotations; it reports problems by `add(code, example)`. `resolve_names(results, report, request)` replaces
    what stands for the names of classes in `category_id`, if all files have to be known for that.

    Raises:
        UsageError: a file cannot be read, or none of its images is there.
    """
    results = {}
    for split, source in splits.items():
        ann_name = relative_to_root(source.file, root)
        entries, coco = [*parse(source.file, partial(report.add, split))], dict(images=[], annotations=[])
        for number, (name, size, annotations) in enumerate(entries, 1):
            if name:
                add_image(coco, name, size, annotations, f'{ann_name}: {to_one_line(name, 60)}')
            else:
                report.add(split, 'image-without-id-or-name', f'{ann_name}: entry {number}')
        resolver = ImageResolver(source.file, root, image_names(coco), source.images, split)
        watched, has_sizes = [source.file, *resolver.searched_folders], any(size for name, size, _ in entries if name)
        results[split] = SplitAnnotations(coco, resolver.locations, resolver.folder, watched, has_sizes=has_sizes)
    if resolve_names:
        resolve_names(results, report, request)
    drop_masks_of_boxes(results)
    number_categories(results)
    return results


def read_json_label(file: str, key: str) -> dict:
    """Return the dict of a JSON file that has a list of objects at a key; UsageError, with the reason alone, if not."""
    try:
        content = read_json(Path(file))
    except UsageError as error:
        raise UsageError(to_one_line(error.__cause__ or error, 60)) from error
    if isinstance(content, dict) and isinstance(content.get(key), list):
        return content
    raise UsageError(f'it has no list of {key}')


def _report_missing_labels(
    root: Path, splits: Mapping, results: Mapping, stems: set[str], images_in: Callable, report: Report
) -> None:
    """Report images without an annotation file in the folders of those that have one; they may hold objects."""
    used_folders = {os.path.dirname(name) for result in results.values() for name in result.locations}
    for folder in outermost(source.images for source in splits.values()):
        images = images_in(folder)
        labeled = {file for stem in stems for file in images.get(stem, ())}
        for file in dict.fromkeys(chain(*images.values())):
            name = relative_to_root(file, root)
            if file not in labeled and os.path.dirname(name) in used_folders:
                report.add('all', 'missing-label', name)


def _labels_by_name(folders: tuple[Path, ...], suffix: str) -> dict[str, str]:
    """Return the annotation files in some folders by their names without suffix.

    Of files with the same name in different folders, the name has the folder in front.
    """
    by_stem: dict[str, list[str]] = {}
    for folder in folders:
        for name in sorted(os.listdir(folder)):
            stem, own_suffix = os.path.splitext(name)
            if own_suffix.lower() == suffix:
                by_stem.setdefault(stem, []).append(os.path.join(folder, name))
    names = {}
    for stem, files in by_stem.items():
        names |= {stem: files[0]} if len(files) == 1 else {os.path.splitext(file)[0]: file for file in files}
    return names


def _images_by_stem(folder: Path) -> dict[str, list[str]]:
    """Return the images in and below a folder by their names without folder, with and without their suffix."""
    images: dict[str, list[str]] = {}
    for parent, names in walk(folder, hidden=False):
        for name in names:
            if is_image(Path(name)) and not name.startswith('.'):
                for key in (name, os.path.splitext(name)[0]):
                    images.setdefault(key, []).append(os.path.join(parent, name))
    return images


def _image_of(label: str, images: Sequence[str]) -> str | None:
    """Return the image of an annotation file among those of its name, of which others are masks or of another split."""
    label_folders = set(normalize_spelling(os.path.dirname(label)).split('/'))

    def score(image: str) -> tuple[bool, bool, int]:
        folders = {*normalize_spelling(os.path.dirname(image)).split('/')}
        is_beside = os.path.dirname(image) == os.path.dirname(label)
        return is_beside, bool(folders & {*IMAGE_DIR_NAMES}), len(label_folders & folders)

    return images[0] if len(images) == 1 else max(images, key=score, default=None)


def _read_list(file: Path) -> list[str]:
    """Return the names in a list; a line may hold more columns, such as 1 or -1 of one class."""
    columns = map(str.split, read_lines(file))
    names = (name for name, *values in columns if values[:1] != ['-1'])
    return list(dict.fromkeys(os.path.splitext(name)[0] if is_image(Path(name)) else name for name in names))


def _find_list(root: Path, folders: Sequence[Path], split: str) -> Path | None:
    """Return the list of a split in the root, or next to the one folder of annotation files that has one."""
    for name in LIST_NAMES[split]:
        tops = dict.fromkeys([root, *(folder.parent for folder in folders)])
        by_top = {top: file for top in tops for place in LIST_DIRS if (file := top / place / f'{name}.txt').is_file()}
        if len(by_top) > 1 and root not in by_top:
            names = ' and '.join(to_one_line(top.name) for top in [*by_top][:2])
            raise UsageError(f'{root} holds several data sets, such as {names}: give the folder of one')
        if by_top:
            return by_top.get(root) or next(iter(by_top.values()))
    return None
