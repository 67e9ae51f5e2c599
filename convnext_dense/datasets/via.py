"""VIA, the VGG Image Annotator: a JSON file with the regions of many images, of version 1 or 2, or a project of it.

A region has a shape and attributes, of which one is the class.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ..errors import UsageError
from .coco_values import as_dict, as_dicts, is_number
from .diagnostics import Report
from .files import DataError, has_marks, read_json, to_one_line
from .geometry import ellipse
from .request import DatasetRequest
from .split_annotations import box_annotation, parse_numbers, parse_objects, shape_annotation

is_via = has_marks(r'"(regions|_via_img_metadata)"\s*:', '"filename"|"_via_')  # in the start of a file
NAME_WITHOUT_ATTRIBUTE = 'object'
# Keys of the values of each shape.
SHAPE_KEYS = {
    'rect': ('x', 'y', 'width', 'height'),
    'circle': ('cx', 'cy', 'r'),
    'ellipse': ('cx', 'cy', 'rx', 'ry'),
}
MAX_ATTRIBUTES_LISTED = 6
MAX_GAP = 0.1  # largest gap between the ends of a line that is an outline, as a fraction of its length


def parse_via(file: Path, add: Callable) -> Iterator[tuple[str, None, list[dict]]]:
    """Iterate over the images of a file, as `annotation_files.read_lists`; `category_id` is a dict of attributes."""
    content = read_json(file)
    if isinstance(content, dict):
        content = _without_keys(content.get('_via_img_metadata', content))
    if not isinstance(content, list):
        raise UsageError(f'{file} is not a file of VIA: it has no images')
    for entry in as_dicts(content):
        name = entry['filename'] if isinstance(entry.get('filename'), str) else ''
        yield name, None, parse_objects(_without_keys(entry.get('regions')), name, add, _parse_region)


def _without_keys(items: object) -> object:
    """Return the values of a dict, which stands for a list in version 1."""
    return list(items.values()) if isinstance(items, dict) else items


def choose_class_attribute(results: Mapping, report: Report, request: DatasetRequest) -> None:
    """Replace the attributes of regions by the names of their classes, in place; others are reported and dropped.

    Raises:
        UsageError: regions have several attributes, or not the one that is asked for.
    """
    annotations = [a for result in results.values() for a in result.coco['annotations']]
    names_by_key: dict[str, set[str]] = {}
    for attributes in (a['category_id'] for a in annotations):
        for key, value in attributes.items():
            if names := _class_names(value):
                names_by_key.setdefault(key, set()).update(names)
    attribute_names = ', '.join(to_one_line(name, 40) for name in [*names_by_key][:MAX_ATTRIBUTES_LISTED])
    keys = [*names_by_key] if request.class_attribute is None else [request.class_attribute]
    if request.class_attribute not in (None, *names_by_key):
        raise UsageError(f"--class-attribute '{keys[0]}': regions have {attribute_names or 'no attributes'}")
    if len(keys) > 1 and not _are_one_attribute(names_by_key, annotations):
        raise UsageError(
            f'{request.root}: regions have the attributes {attribute_names}: say which one is the class, such as '
            f"--class-attribute '{to_one_line(keys[0], 40)}'"
        )
    if not keys and annotations:
        report.add('all', 'class-attribute-missing', f'{len(annotations):,} regions')
    for split, result in results.items():
        named_annotations = []
        for annotation in result.coco['annotations']:
            names = [name for key in keys for name in _class_names(annotation['category_id'].get(key))]
            names = names if keys else [NAME_WITHOUT_ATTRIBUTE]
            named_annotations += [annotation | dict(category_id=name) for name in names]
            if not names:
                report.add(split, 'label-without-name', annotation['id'])
        result.coco['annotations'] = named_annotations


def _are_one_attribute(names_by_key: Mapping[str, set[str]], annotations: Sequence[dict]) -> bool:
    """Return whether several attributes are spellings of one: no region has two, and their values are the same."""
    first_names, *other_names = names_by_key.values()
    counts = (sum(bool(_class_names(value)) for value in a['category_id'].values()) for a in annotations)
    return all(count < 2 for count in counts) and all(first_names & names for names in other_names)


def _class_names(value: object) -> list[str]:
    """Return the names that the value of an attribute stands for: one, or those of the boxes that are ticked."""
    if isinstance(value, dict):
        return [name.strip() for name, is_ticked in value.items() if is_ticked and name.strip()]
    value = str(value) if is_number(value) else value
    return [value.strip()] if isinstance(value, str) and value.strip() else []


def _parse_region(number: int, region: dict) -> dict:
    """Return the annotation of a region, whose class is a dict of attributes."""
    shape, attributes = as_dict(region.get('shape_attributes')), as_dict(region.get('region_attributes'))
    kind = shape.get('name')
    if kind in (*SHAPE_KEYS,):
        values = parse_numbers([shape.get(key) for key in SHAPE_KEYS[kind]])
        if kind == 'rect':
            return box_annotation(number, attributes, values)
        radians = shape['theta'] if is_number(shape.get('theta')) and math.isfinite(shape['theta']) else 0.0
        polygon = ellipse(*values, values[-1]) if kind == 'circle' else ellipse(*values, math.degrees(radians))
        return shape_annotation(number, attributes, [polygon], None)
    if kind not in ('polygon', 'polyline'):
        raise DataError('shape-without-area')
    x, y = (parse_numbers(shape.get(key)) for key in ('all_points_x', 'all_points_y'))
    if len(x) != len(y):
        raise DataError('label-not-numbers')
    points = list(zip(x, y))
    length = sum(map(math.dist, points, points[1:]))
    if kind == 'polyline' and math.dist(points[0], points[-1]) > MAX_GAP * length:
        raise DataError('shape-without-area')
    return shape_annotation(number, attributes, [[float(value) for point in points for value in point]], None)
