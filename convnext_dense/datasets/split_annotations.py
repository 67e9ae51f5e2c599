"""Annotations of a split that are not COCO json: the COCO dict made of them, and where its images are."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from .check_images import ImageInfo
from .coco_masks import mask_area, mask_to_box
from .files import is_below
from .image_resolver import ImageLocation


class SplitAnnotations(NamedTuple):
    """Annotations of a split as COCO, and where its images are.

    Attributes:
        coco (dict): images, annotations and categories. Ids of annotations may be texts, which reports then name.
        locations (Mapping[str, ImageLocation]): where the image of each file name is.
        folder (Path): of the images, for messages.
        watched_paths (list[Path]): files, folders of images and `folder/*.suffix` that decide what this is.
        is_relative (bool): whether coordinates are fractions of the image's sides; images then have no size, and
            annotations a box or a mask, and no area.
    """

    coco: dict
    locations: Mapping[str, ImageLocation]
    folder: Path
    watched_paths: list[Path]
    is_relative: bool = False


def scale_to_pixels(coco: dict, locations: Mapping, infos: Mapping[str, ImageInfo], apply_exif: bool) -> None:
    """Multiply relative coordinates by the sides of their images, in place; those of unusable images stay.

    Args:
        coco: as of `SplitAnnotations` with `is_relative`; its images get their sizes.
        locations: of the images by file name.
        infos: what the files are, by path.
        apply_exif: whether images are rotated as EXIF says.
    """
    size_by_id = {}
    for image in coco['images']:
        info = infos.get(locations[image['file_name']].path)
        if info and not info.problem:
            image['width'], image['height'] = size_by_id[image['id']] = info.oriented_size(apply_exif)
    for annotation in coco['annotations']:
        width, height = size_by_id.get(annotation['image_id'], (1, 1))
        if 'segmentation' in annotation:
            polygons = [_scale(polygon, width, height) for polygon in annotation['segmentation']]
            box, area = mask_to_box(polygons), mask_area(polygons, (height, width))
            annotation.update(segmentation=polygons, bbox=box, area=area or box[2] * box[3])
        else:
            box = _scale(annotation['bbox'], width, height)
            annotation.update(bbox=box, area=box[2] * box[3])


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
