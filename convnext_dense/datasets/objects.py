"""Objects of an image in the files of other programs: the values that all readers check, and annotations of them."""

import sys
from collections.abc import Callable, Mapping

from .coco_masks import mask_area, mask_to_box
from .coco_values import as_dicts, is_number
from .files import DataError
from .geometry import rectangle


def parse_objects(items: object, owner: str, add: Callable, parse: Callable[[int, dict], object]) -> list:
    """Parse the objects of an image, and report those that cannot be used.

    Args:
        items: list of dicts; anything else holds no objects.
        owner: the image or its file, for reports.
        add: reports a problem by its code and an example.
        parse: called with the number of an object, from 1, and its dict; raises DataError.
    """
    results = []
    for number, item in enumerate(as_dicts(items), 1):
        try:
            results.append(parse(number, item))
        except DataError as error:
            add(error.code, f'{owner}:{number}')
    return results


def parse_name(value: object) -> str:
    """Return the name of a class; DataError if the value is none."""
    if not isinstance(value, str) or not value.strip():
        raise DataError('label-without-name')
    return value.strip()


def parse_numbers(values: object) -> list[float]:
    """Return a list of finite numbers, at least one; DataError if the value is anything else."""
    if isinstance(values, list) and values and all(is_number(v) and abs(v) <= sys.float_info.max for v in values):
        return values
    raise DataError('label-not-numbers')


def parse_points(points: object) -> list[float]:
    """Return x, y, x, y, ... of a list of pairs; DataError if the value is anything else."""
    if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
        raise DataError('label-not-numbers')
    return list(map(float, parse_numbers([value for point in points for value in point])))


def box_annotation(number: object, name: object, box: list[float]) -> dict:
    """Return the annotation of a box (x, y, width, height), as `shape_annotation`."""
    fields = dict(number=number, category_id=name, bbox=box, area=box[2] * box[3], iscrowd=0)
    return fields | dict(segmentation=[rectangle(*box)], is_rectangle=True)


def shape_annotation(
    number: object, name: object, mask: list | dict, size: tuple[int, int] | None, is_rectangle: bool = False
) -> dict:
    """Return the annotation of a shape, as of `label_files.Label`.

    Args:
        number: number of the shape in its file.
        name: name of its class, or what stands for it.
        mask: polygons or RLE.
        size: width and height of the image; None if they are not known, and then the mask is no RLE.
        is_rectangle: whether the mask says no more than the box.
    """
    box = mask_to_box(mask)
    area = mask_area(mask, size[::-1] if size else (0, 0)) or box[2] * box[3]
    fields = dict(number=number, category_id=name, bbox=box, area=area, iscrowd=0, segmentation=mask)
    return fields | dict(is_rectangle=is_rectangle)


def drop_masks_of_boxes(results: Mapping, *_) -> None:
    """Remove the masks, in place, if all annotations of the splits are rectangles along the sides of their images."""
    annotations = [a for result in results.values() for a in result.coco['annotations']]
    if all(annotation['is_rectangle'] for annotation in annotations):
        for annotation in annotations:
            del annotation['segmentation']
