"""VIA, the VGG Image Annotator: a JSON file with the regions of many images, of version 1 or 2, or a project of it.

A region has a shape and attributes, of which one is the class.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ..errors import UsageError
from .annotation_lists import ListedImage
from .coco_values import is_number, only_dicts
from .diagnostics import Report
from .files import read_json, to_one_line
from .geometry import are_numbers, box_annotation, ellipse, shape_annotation
from .request import DatasetRequest

MARKS_RE = re.compile(r'"(regions|_via_img_metadata)"\s*:')
NAME_WITHOUT_ATTRIBUTE = 'object'
# What the values of a shape are called.
NUMBERS = {
    'rect': ('x', 'y', 'width', 'height'),
    'circle': ('cx', 'cy', 'r'),
    'ellipse': ('cx', 'cy', 'rx', 'ry'),
}
MAX_ATTRIBUTES_LISTED = 6
MAX_GAP = 0.1  # of the length of a line, between its ends, if it is an outline


def is_via(start: str) -> bool:
    """Return whether a JSON file is one of VIA, by its start."""
    return MARKS_RE.search(start) is not None and ('"filename"' in start or '"_via_' in start)


def parse_via(file: Path, add: Callable) -> Iterator[ListedImage]:
    """Iterate over the images of a file, as `annotation_lists.read_lists`; `category_id` is a dict of attributes."""
    content = read_json(file)
    if isinstance(content, dict):
        content = content.get('_via_img_metadata', content)
        content = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(content, list):
        raise UsageError(f'{file} is not a file of VIA: it has no images')
    for entry in only_dicts(content):
        name, regions = entry.get('filename'), entry.get('regions')
        name = name if isinstance(name, str) else ''
        regions = list(regions.values()) if isinstance(regions, dict) else regions
        annotations = []
        for number, region in enumerate(only_dicts(regions if isinstance(regions, list) else []), 1):
            shape, attributes = region.get('shape_attributes'), region.get('region_attributes')
            attributes = attributes if isinstance(attributes, dict) else {}
            problem, annotation = _annotation(number, attributes, shape if isinstance(shape, dict) else {})
            if problem:
                add(problem, f'{name}:{number}')
            else:
                annotations.append(annotation)
        yield ListedImage(name, annotations)


def choose_class_attribute(results: Mapping, report: Report, request: DatasetRequest) -> None:
    """Replace the attributes of regions by the names of their classes, in place; others are reported and dropped.

    Raises:
        UsageError: regions have several attributes, or not the one that is asked for.
    """
    annotations = [a for result in results.values() for a in result.coco['annotations']]
    counts = Counter(key for a in annotations for key, value in a['category_id'].items() if _class_names(value))
    key = request.class_attribute
    listed = ', '.join(to_one_line(name, 40) for name, _ in counts.most_common(MAX_ATTRIBUTES_LISTED))
    if key is not None and key not in counts:
        raise UsageError(f"--class-attribute '{key}': regions have {listed or 'no attributes'}")
    if key is None and len(counts) > 1:
        first = counts.most_common(1)[0][0]
        raise UsageError(
            f'{request.root}: regions have the attributes {listed}: say which one is the class, such as '
            f"--class-attribute '{to_one_line(first, 40)}'"
        )
    key = key if counts and key is not None else next(iter(counts), None)
    if key is None and annotations:
        report.add('all', 'class-attribute-missing', f'{len(annotations):,} regions')
    for split, result in results.items():
        named = []
        for annotation in result.coco['annotations']:
            names = [NAME_WITHOUT_ATTRIBUTE] if key is None else _class_names(annotation['category_id'].get(key))
            named += [annotation | dict(category_id=name) for name in names]
            if not names:
                report.add(split, 'label-without-name', annotation['id'])
        result.coco['annotations'] = named


def _class_names(value: object) -> list[str]:
    """Return the names that the value of an attribute stands for: one, or those of the boxes that are ticked."""
    if isinstance(value, dict):
        return [name.strip() for name, is_ticked in value.items() if is_ticked and name.strip()]
    value = str(value) if is_number(value) else value
    return [value.strip()] if isinstance(value, str) and value.strip() else []


def _annotation(number: int, attributes: dict, shape: dict) -> tuple[str | None, dict | None]:
    """Return the code of what is wrong with a region, or its annotation."""
    kind = shape.get('name')
    if kind in NUMBERS:
        values = [shape.get(key) for key in NUMBERS[kind]]
        if not are_numbers(values):
            return 'label-not-numbers', None
        if kind == 'rect':
            return None, box_annotation(number, attributes, values)
        radians = shape.get('theta') if are_numbers([shape.get('theta')]) else 0.0
        polygon = ellipse(*values, values[-1]) if kind == 'circle' else ellipse(*values, math.degrees(radians))
        return None, shape_annotation(number, attributes, [polygon], None)
    if kind not in ('polygon', 'polyline'):
        return 'shape-without-area', None
    x, y = shape.get('all_points_x'), shape.get('all_points_y')
    if not are_numbers(x) or not are_numbers(y) or len(x) != len(y):
        return 'label-not-numbers', None
    points = list(zip(x, y))
    length = sum(map(math.dist, points, points[1:]))
    if kind == 'polyline' and math.dist(points[0], points[-1]) > MAX_GAP * length:
        return 'shape-without-area', None
    polygon = [float(value) for point in points for value in point]
    return None, shape_annotation(number, attributes, [polygon], None)
