"""Pascal VOC: an XML file per image with its boxes, in `Annotations/` or beside the images, and lists of names.

Objects marked as difficult are not trained on and ignored in the evaluation, as by mmdet's XMLDataset: they become
crowds of COCO. `truncated`, `occluded`, `pose` and parts of objects are not read.
"""

import math
from collections.abc import Callable, Mapping
from xml.etree import ElementTree

from ..errors import UsageError
from .diagnostics import Report
from .files import MAX_LIST_BYTES, has_marks, read_bytes, to_one_line
from .split_annotations import SplitAnnotations, parse_name, parse_numbers, parse_objects, parse_size

is_voc = has_marks('<annotation')  # in the start of a file
CORNERS = ('bndbox/xmin', 'bndbox/ymin', 'bndbox/xmax', 'bndbox/ymax')


def shift_to_zero(results: Mapping[str, SplitAnnotations], report: Report) -> None:
    """Turn the corners in the annotations of all splits into boxes, in place.

    Coordinates count pixels from 1 and include the last one, as in Pascal VOC; if any is 0 or no integer, they are
    those of points, and are used as they are.
    """
    annotations = [a for result in results.values() for a in result.coco['annotations']]
    corners = [a['bbox'] for a in annotations]
    counts_from_one = all(box[0] >= 1 and box[1] >= 1 and all(map(float.is_integer, box)) for box in corners)
    if counts_from_one and corners:
        report.add('all', 'pixels-from-one', f'{len(corners):,} boxes')
    offset = int(counts_from_one)
    for annotation in annotations:
        x1, y1, x2, y2 = annotation['bbox']
        w, h = x2 - x1 + offset, y2 - y1 + offset
        annotation.update(bbox=[x1 - offset, y1 - offset, w, h], area=w * h)


def parse_voc(file: str, label_name: str, add: Callable) -> tuple[tuple[int, int] | None, list[dict]]:
    """Return the boxes of an XML file as corners, as `annotation_files.read_label_files`."""
    tree = _read_xml(file)
    size = parse_size(*(_number(tree.findtext(f'size/{side}')) for side in ('width', 'height')))
    keys = ('name', 'difficult', *CORNERS)
    objects = [{key: element.findtext(key) for key in keys} for element in tree.findall('object')]
    return size, parse_objects(objects, label_name, add, _parse_object)


def _parse_object(number: int, texts: dict) -> dict:
    """Return the annotation of an object, whose box is corners."""
    name, corners = parse_name(texts['name']), parse_numbers([_number(texts[key]) for key in CORNERS])
    annotation = dict(number=number, category_id=name, bbox=corners, iscrowd=0)
    return annotation | (dict(ignore=1, difficult=1) if _number(texts['difficult']) else {})


def _read_xml(file: str) -> ElementTree.Element:
    """Return the root of an XML file; UsageError, with the reason alone, if it is not one of Pascal VOC."""
    try:
        data = read_bytes(file, MAX_LIST_BYTES)
        has_document_type = b'<!' in data and (b'<!DOCTYPE' in data or b'<!ENTITY' in data)  # may expand without end
        tree = None if has_document_type else ElementTree.fromstring(data)
    except OSError as error:
        raise UsageError(error.strerror) from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UsageError(f'not valid XML, {to_one_line(error, 60)}') from error
    if tree is None:
        raise UsageError('it declares a document type')
    if tree.tag != 'annotation':
        raise UsageError(f'it is <{to_one_line(tree.tag, 20)}>, not <annotation>')
    return tree


def _number(text: str | None) -> float | None:
    """Return a finite number, None for anything else."""
    try:
        number = float(text or '')
    except ValueError:
        return None
    return number if math.isfinite(number) else None
