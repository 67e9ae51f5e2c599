"""Formats with one annotation file for many images, found by what is in the files."""

import filecmp
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError
from .check_coco import image_names
from .diagnostics import Report
from .files import is_below, to_one_line
from .image_resolver import ImageResolver
from .layouts import WORD_RE, FolderTree, split_of_folders
from .request import DatasetRequest, relative_to_root
from .split_annotations import SplitAnnotations, add_image, drop_masks_of_boxes, number_categories


class ListSplit(NamedTuple):
    """The annotation file of a split, and the folder of its images if that is known."""

    file: Path
    images: str | None = None


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
