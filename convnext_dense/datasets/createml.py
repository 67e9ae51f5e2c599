"""CreateML: a JSON list of images with boxes, each by its center and its size in pixels."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import UsageError
from .annotation_lists import ListedImage
from .coco_values import as_dicts
from .files import read_json
from .geometry import are_numbers, box_annotation

NAME_KEYS = ('image', 'imagefilename', 'imageFilename')
SIDES = ('x', 'y', 'width', 'height')
MARKS_RE = re.compile(r'"coordinates"\s*:\s*\{[^}]*"(x|y|width|height)"')


def is_createml(start: str) -> bool:
    """Return whether a JSON file is CreateML's, by its start."""
    return start.lstrip('\ufeff \t\r\n').startswith('[') and MARKS_RE.search(start) is not None


def parse_createml(file: Path, add: Callable) -> Iterator[ListedImage]:
    """Iterate over the images of a file, as `annotation_lists.read_lists`."""
    content = read_json(file)
    if not isinstance(content, list):
        raise UsageError(f'{file} is not CreateML: it holds no list of images')
    for entry in as_dicts(content):
        name = next((entry[key] for key in NAME_KEYS if isinstance(entry.get(key), str)), '')
        objects = entry.get('annotations', entry.get('annotation'))
        annotations = []
        for number, item in enumerate(as_dicts(objects if isinstance(objects, list) else []), 1):
            label, box = item.get('label'), item.get('coordinates')
            box = [box.get(side) for side in SIDES] if isinstance(box, dict) else None
            if not isinstance(label, str) or not label.strip():
                add('label-without-name', f'{name}:{number}')
            elif not are_numbers(box):
                add('label-not-numbers', f'{name}:{number}')
            else:
                x, y, w, h = box
                annotations.append(box_annotation(number, label.strip(), [x - w / 2, y - h / 2, w, h]))
        yield ListedImage(name, annotations)
