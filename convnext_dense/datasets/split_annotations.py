"""Annotations of other programs as COCO: the values that all readers check, and the COCO dict of a split."""

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from .check_images import ImageInfo
from .coco_masks import mask_area, mask_to_box
from .coco_values import as_dicts, is_finite, is_number, is_positive
from .files import DataError, is_below
from .geometry import rectangle
from .image_resolver import ImageLocation


class SplitAnnotations(NamedTuple):
    """Annotations of a split as COCO, and where its images are.

    Attributes:
        coco (dict): images, annotations and categories. Ids of annotations may be texts, which reports then name.
        locations (Mapping[str, ImageLocation]): where the image of each file name is.
        folder (Path): folder of the images, for messages.
        watched_paths (list[Path]): files, folders of images and `folder/*.suffix` that decide what this is.
        is_relative (bool): whether coordinates are fractions of the image's sides; annotations then have a box or a
            mask, and no area.
        has_sizes (bool): whether annotations say the sizes of images, which otherwise are those of the files.
    """

    coco: dict
    locations: Mapping[str, ImageLocation]
    folder: Path
    watched_paths: list[Path]
    is_relative: bool = False
    has_sizes: bool = True


def parse_objects(items: object, owner: str, add: Callable, parse: Callable[[int, dict], object]) -> list:
    """Parse the objects of an image in a list of dicts, and report those that cannot be used.

    `parse(number, item)` raises DataError for such an object, whose number counts from 1; reports are of
    `owner:number`. Anything but a list holds no objects.
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
    """Return the annotation of a shape (polygons or RLE), as `add_image` takes it.

    `name` is that of its class, or what stands for it. The size (width, height) of the image may be unknown if the mask
    is no RLE. A mask that `is_rectangle` says no more than the box.
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


def add_image(coco: dict, name: str, size: tuple[int, int] | None, annotations: Iterable[dict], owner: str) -> None:
    """Add an image and its objects to a COCO dict, in place.

    Args:
        coco: lists of images and annotations.
        name: name of the image.
        size: its width and height; None if they are not given.
        annotations: annotations as those of COCO, without `id` and `image_id`; `category_id` is the name of the class,
            and `number` that of the object in its file.
        owner: what precedes the numbers of the objects in their ids.
    """
    image = dict(id=len(coco['images']) + 1, file_name=name)
    coco['images'].append(image | (dict(zip(('width', 'height'), size)) if size else {}))
    for annotation in annotations:
        number = annotation.pop('number')
        coco['annotations'].append(annotation | dict(id=f'{owner}:{number}', image_id=image['id']))


def fill_sizes(coco: dict, locations: Mapping, infos: Mapping[str, ImageInfo], apply_exif: bool) -> None:
    """Set the sizes of images without one to those of their files (`infos` by path), in place."""
    for image in coco['images']:
        info = infos.get(locations[image['file_name']].path)
        if 'width' not in image and info and not info.problem:
            image['width'], image['height'] = info.oriented_size(apply_exif)


def scale_to_pixels(coco: dict) -> None:
    """Multiply relative coordinates by the sides of their images, in place; those of unusable images stay."""
    sizes = {image['id']: (image['width'], image['height']) for image in coco['images'] if 'width' in image}
    for annotation in coco['annotations']:
        width, height = sizes.get(annotation['image_id'], (1, 1))
        if 'segmentation' in annotation:
            polygons = [_scale(polygon, width, height) for polygon in annotation['segmentation']]
            box, area = mask_to_box(polygons), mask_area(polygons, (height, width))
            annotation.update(segmentation=polygons, bbox=box, area=area or box[2] * box[3])
        else:
            box = _scale(annotation['bbox'], width, height)
            annotation.update(bbox=box, area=box[2] * box[3])


def number_categories(results: Mapping[str, SplitAnnotations]) -> None:
    """Replace the names of categories in the annotations of all splits by ids, in place: from 1 in their order."""
    annotations = [a for result in results.values() for a in result.coco['annotations']]
    index = {name: i for i, name in enumerate(sorted({a['category_id'] for a in annotations}), 1)}
    for annotation in annotations:
        annotation['category_id'] = index[annotation['category_id']]
    for result in results.values():
        result.coco['categories'] = [dict(id=i, name=name) for name, i in index.items()]


def parse_size(width: object, height: object) -> tuple[int, int] | None:
    """Return the size of an image; None if one of its sides is no positive number."""
    is_size = all(is_positive(side) and is_finite(side) and side >= 1 for side in (width, height))
    return (int(width), int(height)) if is_size else None


def outermost(paths: Iterable[Path]) -> list[Path]:
    """Return the paths that lie in none of the others."""
    result: list[Path] = []
    for path in sorted({*paths}):
        if not result or not is_below(path, result[-1]):
            result.append(path)
    return result


def _scale(values: list[float], width: int, height: int) -> list[float]:
    """Multiply x, y, x, y, ... by width and height in turn."""
    scaled = list(values)
    scaled[::2], scaled[1::2] = [v * width for v in values[::2]], [v * height for v in values[1::2]]
    return scaled
