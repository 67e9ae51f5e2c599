"""COCO panoptic: JSON with the segments of each image, and PNGs in which a pixel is the id of its segment."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UsageError
from .annotation_lists import ListSplit, find_lists
from .check_images import MAX_BYTES, MAX_PIXELS, inspect_all
from .coco_values import only_dicts, parse_id
from .diagnostics import Report
from .files import open_regular, read_json, to_one_line, walk
from .geometry import encode
from .image_resolver import ImageResolver
from .layouts import MAX_DEPTH, FolderTree
from .request import DatasetRequest
from .split_annotations import SplitAnnotations

KEYS = ('images', 'annotations', 'categories')
ID_WEIGHTS = np.array([1, 256, 65536])  # of red, green and blue


def find_panoptic(tree: FolderTree) -> tuple[str, dict[str, ListSplit]] | None:
    """Find the JSON of each split, as `find_lists`."""
    return find_lists(tree, ('.json',), is_panoptic)


def is_panoptic(start: str) -> bool:
    """Return whether a JSON file is of panoptic segmentation, by its start."""
    return '"segments_info"' in start


def read_panoptic(
    root: Path, splits: Mapping[str, ListSplit], report: Report, request: DatasetRequest
) -> dict[str, SplitAnnotations]:
    """Read the segments of each split that are of things, as COCO with RLEs.

    Args:
        root: folder of the data set.
        splits: as of `find_panoptic`.
        report: to add to.
        request: of the user.

    Raises:
        UsageError: a file is not of panoptic segmentation, or its PNGs or images are not there.
    """
    return {split: _read_split(root, split, source, partial(report.add, split)) for split, source in splits.items()}


def _read_split(root: Path, split: str, source: ListSplit, add) -> SplitAnnotations:
    content = read_json(source.file)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in KEYS):
        raise UsageError(f'{source.file} is not of panoptic segmentation: it needs {", ".join(KEYS)}')
    images, annotations, categories = (only_dicts(content[key]) for key in KEYS)
    things = [c for c in categories if c.get('isthing', 1)]
    thing_ids = {parse_id(c.get('id')) for c in things}
    annotations = [a for a in annotations if isinstance(a.get('file_name'), str)]
    folder = _png_folder(source.file, root, annotations)
    images = [image for image in images if isinstance(image.get('file_name'), str)]
    names = [image['file_name'] for image in images]
    resolver = ImageResolver(source.file, root, names, source.images, split, excluded=folder)
    segments = {a['file_name']: (a.get('image_id'), _segments(a, thing_ids)) for a in annotations}
    decode = partial(_decode, folder=folder, segments=segments)
    objects = []
    for name, (problem, found) in inspect_all(decode, segments, 'PNGs of segments').items():
        if problem:
            add(problem, name)
        for segment_id in set(segments[name][1]) - {each['id'] for each in found} if not problem else ():
            add('segment-without-pixels', f'{name}: {segment_id}')
        objects += [each | dict(id=f'{name}: {each["id"]}') for each in found]
    coco, watched = dict(images=images, annotations=objects, categories=things), [source.file, folder / '*.png']
    return SplitAnnotations(coco, resolver.locations, resolver.folder, [*watched, *resolver.searched_folders])


def _segments(annotation: dict, thing_ids: set) -> dict[int, dict]:
    """Return the segments of an image that are of things, by id."""
    values = annotation.get('segments_info')
    segments = only_dicts(values if isinstance(values, list) else [])
    things = (s for s in segments if parse_id(s.get('category_id')) in thing_ids)
    return {segment_id: s for s in things if isinstance(segment_id := parse_id(s.get('id')), int)}


def _decode(name: str, folder: Path, segments: Mapping) -> tuple[str | None, list[dict]]:
    """Return the code of what is wrong with a PNG, and the annotations of its segments."""
    image_id, infos = segments[name]
    ids = _read_ids(folder / name)
    if isinstance(ids, str):
        return ids, []
    existing, annotations = set(np.unique(ids).tolist()), []
    for segment_id, info in infos.items():
        if segment_id not in existing:
            continue
        rows, columns = np.nonzero((ids == segment_id).any(1))[0], np.nonzero((ids == segment_id).any(0))[0]
        y, x, h, w = (int(v) for v in (rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1))
        pixels = np.asfortranarray(ids == segment_id, np.uint8)
        annotations.append(
            dict(
                id=segment_id, image_id=image_id, category_id=info.get('category_id'), segmentation=encode(pixels),
                bbox=[x, y, w, h], area=int(pixels.sum()), iscrowd=info.get('iscrowd', 0),
            )
        )  # fmt: skip
    return None, annotations


def _read_ids(file: Path) -> np.ndarray | str:
    """Return the ids of the segments of a PNG, (H, W), or the code of what is wrong with it."""
    try:
        with open_regular(file, MAX_BYTES) as opened, Image.open(opened, formats=('PNG',)) as image:
            if image.width * image.height > MAX_PIXELS:
                return 'mask-too-large'
            return np.asarray(image.convert('RGB')) @ ID_WEIGHTS
    except Exception:  # a broken file can fail in any way
        return 'unreadable-mask'


def _png_folder(file: Path, root: Path, annotations: list[dict]) -> Path:
    """Return the folder of the PNGs of a file: that of its name, or another one whose first PNG has the right ids."""
    own = file.with_suffix('')
    if not annotations or own.is_dir():
        return own
    name, infos = annotations[0]['file_name'], annotations[0].get('segments_info')
    expected = {parse_id(info.get('id')) for info in only_dicts(infos if isinstance(infos, list) else [])}
    for folder in (Path(folder) for folder, _ in walk(root, MAX_DEPTH + 1, hidden=False)):
        ids = _read_ids(folder / name) if os.path.isfile(folder / name) else ''
        if not isinstance(ids, str) and expected & set(np.unique(ids).tolist()):
            return folder
    raise UsageError(f'{file}: its PNGs (such as {to_one_line(name)}) are not in {root}: put them into {own}')
