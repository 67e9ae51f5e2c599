"""Pascal VOC: an XML file per image with its boxes, in `Annotations/` or beside the images, and lists of names.

Objects marked as difficult are not trained on and ignored in the evaluation, as by mmdet's XMLDataset: they become
crowds of COCO. `truncated`, `occluded`, `pose` and parts of objects are not read.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from ..errors import UsageError
from . import SPLITS
from .diagnostics import Report
from .file_names import normalize_spelling
from .files import MAX_LIST_BYTES, read_bytes, read_start, read_text, to_one_line, walk
from .image_resolver import ImageLocation
from .layouts import IMAGE_DIR_NAMES, MAX_DEPTH, SPLIT_DIR_NAMES, is_image
from .request import relative_to_root
from .split_annotations import SplitAnnotations, outermost

MAX_FOLDERS_SEARCHED = 2000
MAX_FILES_SAMPLED = 20  # XML files in one folder, of which some may be of other programs
LIST_DIRS = ('ImageSets/Main', 'ImageSets')
LIST_NAMES = {'train': ('train', 'trainval'), 'val': ('val', 'valid'), 'test': ('test',)}
CORNERS = ('xmin', 'ymin', 'xmax', 'ymax')


class VocSplit(NamedTuple):
    """Where the annotations of a split are.

    Attributes:
        labels (tuple[Path, ...]): folders of XML files.
        images (Path): folder in and below which the images are.
        list_file (Path | None): with the names of the images of the split; None for all.
    """

    labels: tuple[Path, ...]
    images: Path
    list_file: Path | None = None


def find_voc(path: Path) -> tuple[str, dict[str, VocSplit]] | None:
    """Find the XML files of each split.

    Args:
        path: folder of the data set.

    Returns:
        The layout, and where the annotations of each split ('train', 'val', 'test' or 'all') are; None if there are
        no XML files of Pascal VOC.
    """
    folders = tuple(_annotated_folders(path)) if path.is_dir() else ()
    if not folders:
        return None
    lists = {split: _find_list(path, folders, split) for split in SPLITS}
    if lists['train']:
        return 'ImageSets', {split: VocSplit(folders, path, file) for split, file in lists.items() if file}
    split_of = {name: split for split, names in SPLIT_DIR_NAMES.items() for name in names}
    by_split: dict[str, VocSplit] = {}
    for folder in folders:
        parts = folder.relative_to(path).parts
        named = next((i for i, part in enumerate(parts) if part.lower() in split_of), None)
        if named is not None:
            # Of train/annotations the images are in train as well, of annotations/train elsewhere.
            split, images = split_of[parts[named].lower()], path / parts[0] if named == 0 else path
            source = by_split.get(split, VocSplit((), images))
            by_split[split] = source._replace(labels=(*source.labels, folder))
    if 'train' in by_split:
        return 'folders by split', by_split
    return 'XML files', {'all': VocSplit(folders, path)}


def read_voc(root: Path, splits: Mapping[str, VocSplit], report: Report) -> dict[str, SplitAnnotations]:
    """Read the XML files of each split as COCO.

    Coordinates count pixels from 1 and include the last one, as in Pascal VOC; if any is 0 or no integer, they are
    those of points, and are used as they are.

    Args:
        root: folder of the data set.
        splits: as of `find_voc`.
        report: to add to.

    Raises:
        UsageError: a list cannot be read.
    """
    images_in = cache(_images_by_stem)
    results = {
        split: _read_split(root, source, images_in(source.images), partial(report.add, split))
        for split, source in splits.items()
    }
    if not any(source.list_file for source in splits.values()):
        _report_missing_labels(root, splits, results, images_in, report)
    annotations = [a for result in results.values() for a in result.coco['annotations']]
    corners = [a['bbox'] for a in annotations]
    counts_from_one = all(box[0] >= 1 and box[1] >= 1 and all(map(float.is_integer, box)) for box in corners)
    if counts_from_one and corners:
        report.add('all', 'pixels-from-one', f'{len(corners):,} boxes')
    first = int(counts_from_one)
    names = sorted({a['category_id'] for a in annotations})
    index = {name: i for i, name in enumerate(names, 1)}
    for annotation in annotations:
        x1, y1, x2, y2 = annotation['bbox']
        w, h = x2 - x1 + first, y2 - y1 + first
        annotation.update(bbox=[x1 - first, y1 - first, w, h], area=w * h)
        annotation['category_id'] = index[annotation['category_id']]
    for result in results.values():
        result.coco['categories'] = [dict(id=i, name=name) for name, i in index.items()]
    return results


def _read_split(root: Path, source: VocSplit, photos: Mapping[str, list[str]], add: Callable) -> SplitAnnotations:
    """Return the annotations of a split, whose boxes are corners and whose categories are names."""
    labels = _labels_by_name(source.labels)
    names = list(labels) if source.list_file is None else _read_list(source.list_file)
    images, annotations, locations = [], [], {}
    for name in names:
        label = labels.get(name)
        image = label and _image_of(label, photos.get(os.path.basename(name), ()))
        if label is None or image is None:
            code, name = ('unmatched-label', relative_to_root(label, root)) if label else ('missing-label', name)
            add(code, name)
            continue
        where, file_name = relative_to_root(label, root), relative_to_root(image, root)
        tree = _parse(label, where, add)
        if tree is None:
            continue
        size = [_number(tree.findtext(f'size/{side}')) for side in ('width', 'height')]
        image = dict(id=len(images) + 1, file_name=file_name)
        image |= dict(zip(('width', 'height'), map(int, size))) if all(side and side >= 1 for side in size) else {}
        images.append(image)
        locations[file_name] = ImageLocation(file_name)
        annotations += _objects(tree, image['id'], where, add)
    watched = outermost([*source.labels, source.images, *([source.list_file] if source.list_file else [])])
    return SplitAnnotations(dict(images=images, annotations=annotations), locations, source.images, watched)


def _report_missing_labels(
    root: Path, splits: Mapping[str, VocSplit], results: Mapping, images_in: Callable, report: Report
) -> None:
    """Report images without an XML file, which need not be without objects, in the folders of those that have one."""
    stems = {os.path.basename(name) for source in splits.values() for name in _labels_by_name(source.labels)}
    used = {os.path.dirname(name) for result in results.values() for name in result.locations}
    for folder in outermost(source.images for source in splits.values()):
        for stem, files in images_in(folder).items():
            names = [relative_to_root(file, root) for file in files] if stem not in stems else []
            for name in names:
                if os.path.dirname(name) in used:
                    report.add('all', 'missing-label', name)


def _parse(file: str, where: str, add: Callable) -> ElementTree.Element | None:
    """Return the root of an XML file, None if it cannot be read or is not one of Pascal VOC."""
    try:
        data = read_bytes(file, MAX_LIST_BYTES)
        if b'<!' in data and (b'<!DOCTYPE' in data or b'<!ENTITY' in data):  # which may expand without end
            problem = 'it declares a document type'
        else:
            tree = ElementTree.fromstring(data)
            if tree.tag == 'annotation':
                return tree
            problem = f'it is <{to_one_line(tree.tag, 20)}>, not <annotation>'
    except OSError as error:
        problem = error.strerror
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        problem = f'not valid XML, {to_one_line(error, 60)}'
    add('unreadable-label', f'{where}: {problem}')
    return None


def _objects(tree: ElementTree.Element, image_id: int, where: str, add: Callable) -> Iterator[dict]:
    """Iterate over the objects of an image; those without a name or a box are reported."""
    for number, element in enumerate(tree.findall('object'), 1):
        name = (element.findtext('name') or '').strip()
        corners = [_number(element.findtext(f'bndbox/{key}')) for key in CORNERS]
        if not name or None in corners:
            problem = 'label-without-name' if not name else 'label-not-numbers'
            add(problem, f'{where}:{number}')
            continue
        annotation = dict(id=f'{where}:{number}', image_id=image_id, category_id=name, bbox=corners, iscrowd=0)
        if _number(element.findtext('difficult')):
            annotation |= dict(ignore=1, difficult=1)
        yield annotation


def _number(text: str | None) -> float | None:
    """Return a finite number, None for anything else."""
    try:
        number = float(text or '')
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _labels_by_name(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return the XML files in some folders by their names without suffix.

    Of files with the same name in different folders, the name has the folder in front.
    """
    by_stem: dict[str, list[str]] = {}
    for folder in folders:
        for name in sorted(os.listdir(folder)):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() == '.xml':
                by_stem.setdefault(stem, []).append(os.path.join(folder, name))
    names = {}
    for stem, files in by_stem.items():
        names |= {stem: files[0]} if len(files) == 1 else {os.path.splitext(file)[0]: file for file in files}
    return names


def _images_by_stem(folder: Path) -> dict[str, list[str]]:
    """Return the images in and below a folder by their names without folder and suffix."""
    images: dict[str, list[str]] = {}
    for parent, names in walk(folder, hidden=False):
        for name in names:
            if is_image(Path(name)) and not name.startswith('.'):
                images.setdefault(os.path.splitext(name)[0], []).append(os.path.join(parent, name))
    return images


def _image_of(label: str, images: Sequence[str]) -> str | None:
    """Return the image of an XML file among those of its name, of which others are masks or of another split."""
    own = set(normalize_spelling(os.path.dirname(label)).split('/'))

    def score(image: str) -> tuple[bool, bool, int]:
        folders = {*normalize_spelling(os.path.dirname(image)).split('/')}
        is_beside = os.path.dirname(image) == os.path.dirname(label)
        return bool(folders & {*IMAGE_DIR_NAMES}), is_beside, len(own & folders)

    return images[0] if len(images) == 1 else max(images, key=score, default=None)


def _read_list(file: Path) -> list[str]:
    """Return the names in a list; a line may hold more columns, such as 1 or -1 of one class."""
    try:
        lines = [line.split() for line in read_text(file).splitlines()]
    except OSError as error:
        raise UsageError(f'{file}: {error.strerror}') from error
    names = (line[0] for line in lines if line and line[1:2] != ['-1'])
    return list(dict.fromkeys(os.path.splitext(name)[0] if is_image(Path(name)) else name for name in names))


def _find_list(root: Path, folders: Sequence[Path], split: str) -> Path | None:
    """Return the list of a split in the root, or next to the one folder of XML files that has one."""
    for name in LIST_NAMES[split]:
        tops = dict.fromkeys([root, *(folder.parent for folder in folders)])
        by_top = {top: file for top in tops for place in LIST_DIRS if (file := top / place / f'{name}.txt').is_file()}
        if len(by_top) > 1 and root not in by_top:
            names = ' and '.join(to_one_line(top.name) for top in [*by_top][:2])
            raise UsageError(f'{root} holds several data sets, such as {names}: give the folder of one')
        if by_top:
            return by_top.get(root) or next(iter(by_top.values()))
    return None


def _annotated_folders(root: Path) -> Iterator[Path]:
    """Iterate over the folders that hold XML files of Pascal VOC."""
    for folder, names in islice(walk(root, MAX_DEPTH, hidden=False), MAX_FOLDERS_SEARCHED):
        xmls = [name for name in names if name.lower().endswith('.xml')][:MAX_FILES_SAMPLED]
        if any('<annotation' in read_start(Path(folder, name), 2**12) for name in xmls):
            yield Path(folder)
