"""Annotations of a split that are not COCO json: the COCO dict made of them, and where its images are."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from .check_images import ImageInfo
from .coco_masks import mask_area, mask_to_box
from .coco_values import is_finite, is_positive
from .files import is_below
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


def add_image(coco: dict, name: str, size: tuple[int, int] | None, annotations: Iterable[dict], owner: str) -> None:
    """Add an image and its objects to a COCO dict, in place.

    Args:
        coco: lists of images and annotations.
        name: name of the image.
        size: its width and height; None if they are not given.
        annotations: annotations as those of `label_files.Label`.
        owner: what precedes the numbers of the objects in their ids.
    """
    image = dict(id=len(coco['images']) + 1, file_name=name)
    coco['images'].append(image | (dict(zip(('width', 'height'), size)) if size else {}))
    for annotation in annotations:
        number = annotation.pop('number')
        coco['annotations'].append(annotation | dict(id=f'{owner}:{number}', image_id=image['id']))


def fill_sizes(coco: dict, locations: Mapping, infos: Mapping[str, ImageInfo], apply_exif: bool) -> None:
    """Set the sizes of images without one to those of their files, in place.

    Args:
        coco: COCO dict of `SplitAnnotations`.
        locations: locations of the images by file name.
        infos: what the files are, by path.
        apply_exif: whether images are rotated as EXIF says.
    """
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
    """Replace the names of categories in annotations by their ids, in place: numbers from 1 in the order of the names.

    Args:
        results: annotations by split.
    """
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
