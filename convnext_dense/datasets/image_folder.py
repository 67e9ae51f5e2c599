"""Hugging Face's ImageFolder: metadata.jsonl or metadata.csv beside the images, with the boxes of each.

Boxes are x, y, width, height, as in the documentation of `datasets`.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path

from ..errors import UsageError
from .coco_values import is_number
from .diagnostics import Report
from .files import MAX_JSON_BYTES, DataError, has_marks, parse_error, read_bytes, to_one_line
from .split_annotations import box_annotation, parse_name, parse_numbers, parse_objects

METADATA_SUFFIXES = ('.jsonl', 'metadata.csv')
BOX_KEYS = ('bbox', 'bboxes', 'boxes', 'box')
CLASS_KEYS = ('categories', 'category', 'labels', 'label', 'classes', 'class', 'category_id', 'name')
is_image_folder = has_marks(rf'\bfile_name\b[\s\S]*"({"|".join(BOX_KEYS)})"')  # in the start of a file


def parse_image_folder(file: Path, add: Callable) -> Iterator[tuple[str, None, list[dict]]]:
    """Iterate over the images of a metadata file, as `annotation_files.read_lists`."""
    for line, row in _rows(file):
        name = row.get('file_name')
        if not isinstance(name, str):
            add('image-without-id-or-name', f'{file.name}:{line}')
            continue
        objects = row.get('objects', row)
        if isinstance(objects, dict):  # a list of boxes, and one of classes
            boxes, names = (_first_value(objects, keys) for keys in (BOX_KEYS, CLASS_KEYS))
            boxes, names = (values if isinstance(values, list) else [] for values in (boxes, names))
            objects = [dict(bbox=box, label=label) for box, label in zip_longest(boxes, names[: len(boxes)])]
        objects = objects if isinstance(objects, list) else [{}]
        yield name, None, parse_objects(objects, f'{file.name}:{line}', add, _parse_box)


def _parse_box(number: int, item: dict) -> dict:
    box, label = parse_numbers(_first_value(item, BOX_KEYS)), _first_value(item, CLASS_KEYS)
    if len(box) != 4:
        raise DataError('label-not-numbers')
    return box_annotation(number, label if isinstance(label, int) else parse_name(label), box)


def name_numbers(results: Mapping, report: Report, _) -> None:
    """Replace numbers of classes by names, in place; nothing in such a folder names them."""
    annotations = [a for result in results.values() for a in result.coco['annotations']]
    numbers = {a['category_id'] for a in annotations if is_number(a['category_id'])}
    width = len(str(max(numbers, default=0)))
    for annotation in annotations:
        if annotation['category_id'] in numbers:
            annotation['category_id'] = f'class {annotation["category_id"]:0{width}}'
    if numbers:
        report.add('all', 'class-names-missing', f'{len(numbers)} classes')


def _rows(file: Path) -> Iterator[tuple[int, dict]]:
    """Iterate over the numbers of lines, and what they hold.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        lines = read_bytes(file, MAX_JSON_BYTES).decode('utf-8-sig').splitlines()
    except OSError as error:
        raise UsageError(f'{file}: {error.strerror}') from error
    except UnicodeDecodeError as error:
        raise UsageError(f'{file} is not UTF-8: write it again') from error
    is_csv = file.suffix.lower() == '.csv'
    number = 0
    try:
        for number, line in enumerate(csv.DictReader(lines) if is_csv else lines, 1):
            if is_csv:
                yield number, line | dict(objects=json.loads(line.get('objects') or '{}'))
            elif line.strip():
                row = json.loads(line)
                yield number, row if isinstance(row, dict) else {}
    except (ValueError, RecursionError, csv.Error) as error:
        reason = to_one_line(parse_error(error), 80)
        raise UsageError(f'{file}: line {number} is not valid ({reason}): download or write it again') from error


def _first_value(item: Mapping, keys: tuple[str, ...]) -> object:
    return next((item[key] for key in keys if item.get(key) is not None), None)
