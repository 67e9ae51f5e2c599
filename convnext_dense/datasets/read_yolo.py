"""Labels of YOLO, one text file per image: a line per object with its class, and a box or a polygon in fractions.

A line is `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`. Both may stand in one file: five numbers are always a box.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

from ..errors import UsageError
from .diagnostics import Report
from .files import is_below, read_ends, read_lines, read_text, to_one_line
from .find_yolo import NAMES_FILES, YoloSplit
from .image_resolver import ImageLocation, ImageResolver
from .layouts import IMAGE_DIR_NAMES, are_of_masks, is_image, list_images
from .request import DatasetRequest, relative_to_root
from .split_annotations import SplitAnnotations, add_image, outermost

MAX_OVERSHOOT = 0.01  # beyond 0 and 1, as Ultralytics has it: an object that the border cuts off
LABEL_DIR_NAMES = ('labels', 'label', 'Labels', 'annotations')
COMMA_SEPARATES_RE = re.compile(r',\s|\.|^\S+$')  # in a line with commas; else they are decimal points
LIST_HINT = 'correct the paths, which are relative to the folder of the data set'


def read_yolo(
    root: Path, splits: Mapping[str, YoloSplit], report: Report, request: DatasetRequest
) -> dict[str, SplitAnnotations]:
    """Read the labels of YOLO of each split, as COCO with relative coordinates; arguments as `BoxFormat.read`.

    Raises:
        UsageError: a list names no image that exists.
    """
    results, labels_of = {}, {}
    if not any(source.images for source in splits.values()):
        missing = ', '.join(f'{split}: {to_one_line(source.missing, 60)}' for split, source in splits.items())
        raise UsageError(f'{root}: none of its images is there ({missing}): {LIST_HINT}')
    for split, source in splits.items():
        add = partial(report.add, split)
        if source.missing:
            add('missing-split', source.missing)
        if source.images:
            results[split], labels_of[split] = _read_split(root, split, source, add)
    names = next((source.names for source in splits.values()), None)
    if names is None:
        num_classes = next((source.num_classes for source in splits.values()), None)
        used_indices = {a['category_id'] for result in results.values() for a in result.coco['annotations']}
        names = {i: f'class {i}' for i in range(num_classes or max(used_indices, default=-1) + 1)}
        report.add('all', 'class-names-missing', f'{len(names)} classes')
    elif source.num_classes not in (None, len(names)):
        report.add('all', 'class-count-mismatch', f'nc is {source.num_classes}, names has {len(names)}')
    categories = [dict(id=index, name=name) for index, name in names.items()]
    for result in results.values():
        result.coco['categories'] = categories
    _report_unmatched_labels(root, splits, labels_of, report)
    if not request.data_yaml:
        for folder in dict.fromkeys(path for source in splits.values() for path in source.images):
            if not is_below(folder, root):
                report.add('all', 'images-outside-folder', folder)
    return results


def _read_split(
    root: Path, split: str, source: YoloSplit, add: Callable
) -> tuple[SplitAnnotations, dict[str, set[str]]]:
    """Return the annotations of a split, and the names of the labels of its images by folder, relative to the root."""
    coco, locations, labels = dict(images=[], annotations=[], categories=[]), {}, {}
    label_folders_of = cache(partial(label_folders, root=root))
    given_folders = [relative_to_root(folder, root) for folder in source.labels]
    for location in _locate_images(root, split, source):
        name = location.path or location.example
        if name in locations:
            continue  # folders of a list may overlap
        locations[name] = location
        parent, image_name = os.path.split(name)
        label_name, label, annotations = f'{os.path.splitext(image_name)[0]}.txt', '', []
        for folder in (given_folders or label_folders_of(parent)) if location.path else ():
            names = labels.setdefault(folder, set())
            if os.path.isfile(file := os.path.join(root, folder, label_name)):
                names.add(label_name)
                label = os.path.join(folder, label_name)
                annotations = _read_label(file, label, source, add)
                break
        add_image(coco, name, None, annotations, label)
    watched = [*outermost([*source.files, *source.images]), *(root / folder / '*.txt' for folder in labels)]
    return SplitAnnotations(coco, locations, source.images[0], watched, is_relative=True, has_sizes=False), labels


def _locate_images(root: Path, split: str, source: YoloSplit) -> list[ImageLocation]:
    """Return where the images of a split are, in its folders and its lists."""
    result = []
    for path in source.images:
        if path.is_dir():
            images = list_images(path)
            photos = [image for image in images if not are_of_masks(image.parent.relative_to(path).parts)]
            result += [ImageLocation(relative_to_root(image, root)) for image in photos or images]
        elif is_image(path):
            result.append(ImageLocation(relative_to_root(path, root)))
        else:
            names = read_lines(path)
            resolver = ImageResolver(path, root, names, split=split, hint=LIST_HINT)
            result += [resolver.locations[name] for name in names]
    return result


def label_folders(folder: str, root: Path) -> list[str]:
    """Return the folders in which the labels of the images in a folder may be, the likeliest first.

    The last `images` in its path becomes `labels`; or they are beside the images; or in `labels` next to their folder
    or in it; or in `labels` of the data set, in folders as those of the images. They are relative to the root if the
    folder is.
    """
    parts, candidates = folder.split('/'), []
    at = next((i for i in range(len(parts) - 1, -1, -1) if parts[i].lower() in IMAGE_DIR_NAMES), None)
    if at is not None:
        candidates += ['/'.join([*parts[:at], name, *parts[at + 1 :]]) for name in LABEL_DIR_NAMES]
    candidates.append(folder)
    candidates += [os.path.join(os.path.dirname(folder), name) for name in LABEL_DIR_NAMES]
    candidates += [os.path.join(name, folder) for name in LABEL_DIR_NAMES]
    candidates += [os.path.join(folder, name) for name in LABEL_DIR_NAMES]
    return [path for path in dict.fromkeys(candidates) if os.path.isdir(os.path.join(root, path))]


def _read_label(file: str, label: str, source: YoloSplit, add: Callable) -> list[dict]:
    """Return the annotations of a label with relative coordinates, as `add_image`; `label` is its path in reports."""
    try:
        text = read_text(file, errors='replace')
    except OSError as error:
        add('unreadable-label', f'{label}: {error.strerror}')
        return []
    annotations = []
    for number, line in enumerate(text.split('\n'), 1):
        if ',' in line:
            add('label-with-commas', f'{label}:{number}')
            line = line.replace(',', ' ' if COMMA_SEPARATES_RE.search(line.strip()) else '.')
        values = line.split()
        if not values:
            continue
        problem, fields = _parse_line(values, source)
        if problem:
            add(problem, f'{label}:{number}: {to_one_line(line.strip(), 60)}')
        if fields:
            annotations.append(dict(number=number, **fields))
    if len({'bbox' in annotation for annotation in annotations}) > 1:
        add('boxes-and-polygons', label)
    return annotations


def _parse_line(values: list[str], source: YoloSplit) -> tuple[str | None, dict | None]:
    """Return the code of a problem of a line, and class and box or mask if it can be used."""
    try:
        index, *numbers = map(float, values)
    except ValueError:
        return 'label-not-numbers', None
    if not index.is_integer() or index < 0 or not all(map(math.isfinite, numbers)):
        return 'label-not-numbers', None
    if len(numbers) < 4:
        return 'label-too-short', None
    problem = None
    if source.keypoints:
        problem, numbers = ('keypoints-ignored' if len(numbers) > 4 else None), numbers[:4]
    elif len(numbers) == 5:
        problem, numbers = 'label-sixth-number', numbers[:4]
    elif len(numbers) % 2:
        return 'label-odd-polygon', None
    if source.names is not None and int(index) not in source.names:
        return 'class-index-out-of-range', None
    if min(numbers) < -MAX_OVERSHOOT or max(numbers) > 1 + MAX_OVERSHOOT:
        return 'coordinates-beyond-one', None
    fields = dict(category_id=int(index), iscrowd=0)
    if len(numbers) == 4:
        x, y, w, h = numbers
        return problem, fields | dict(bbox=[x - w / 2, y - h / 2, w, h])
    return problem, fields | dict(segmentation=[numbers])


def _report_unmatched_labels(root: Path, splits: Mapping, labels_of: Mapping, report: Report) -> None:
    """Report labels next to those that were read, whose images do not exist; with lists, other files may be meant."""
    if any(path.is_file() for source in splits.values() for path in source.images):
        return
    for split, labels in labels_of.items():
        for folder, names in labels.items():
            other_names = (by_folder.get(folder, set()) for by_folder in labels_of.values() if by_folder is not labels)
            for name in sorted({*os.listdir(os.path.join(root, folder))} - names.union(*other_names)):
                path = os.path.join(folder, name)
                if not name.endswith('.txt') or name in NAMES_FILES:
                    continue
                first_character = read_ends(root / path, 100).strip()[:1]
                if not first_character or first_character.isdigit():  # others are about the data set
                    report.add(split, 'unmatched-label', path)
