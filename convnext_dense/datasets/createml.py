"""CreateML: a JSON list of images with boxes, each by its center and its size in pixels."""

from collections.abc import Callable, Iterator
from pathlib import Path

from .coco_values import as_dict, as_dicts
from .files import has_marks, read_json
from .split_annotations import box_annotation, parse_name, parse_numbers, parse_objects

NAME_KEYS = ('image', 'imagefilename', 'imageFilename')
SIDES = ('x', 'y', 'width', 'height')
# In the start of a file.
is_createml = has_marks(r'\A[\ufeff \t\r\n]*\[', r'"coordinates"\s*:\s*\{[^}]*"(x|y|width|height)"')


def parse_createml(file: Path, add: Callable) -> Iterator[tuple[str, None, list[dict]]]:
    """Iterate over the images of a file, as `annotation_files.read_lists`."""
    for entry in as_dicts(read_json(file)):
        name = next((entry[key] for key in NAME_KEYS if isinstance(entry.get(key), str)), '')
        boxes = entry.get('annotations', entry.get('annotation'))
        yield name, None, parse_objects(boxes, name, add, _parse_box)


def _parse_box(number: int, item: dict) -> dict:
    name, box = parse_name(item.get('label')), as_dict(item.get('coordinates'))
    x, y, w, h = parse_numbers([box.get(side) for side in SIDES])
    return box_annotation(number, name, [x - w / 2, y - h / 2, w, h])
