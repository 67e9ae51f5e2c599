"""COCO panoptic: JSON with the segments of each image, and PNGs in which a pixel is the id of its segment."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from ..errors import UsageError
from .annotation_files import ListSplit, find_lists
from .check_images import IGNORE_INDEX, inspect_all, mask_problem, open_mask
from .class_names import MAX_CLASSES
from .coco_files import COCO_KEYS
from .coco_masks import mask_fields
from .coco_values import category_name, only_dicts, parse_id
from .diagnostics import Report
from .files import has_marks, read_ends, read_json, to_one_line, walk
from .image_resolver import ImageResolver
from .layouts import HEADER_BYTES, MAX_DEPTH, FolderTree, SplitDirs
from .request import DatasetRequest
from .split_annotations import SplitAnnotations

PANOPTIC = 'COCO panoptic'
is_panoptic = has_marks('"segments_info"')  # in the start of a file
find_panoptic = partial(find_lists, suffixes=('.json',), is_list=is_panoptic)
FILE_NAME_RE = re.compile(r'"file_name"\s*:\s*"([^"]+)"')
ID_WEIGHTS = np.array([1, 256, 65536])  # weights of red, green and blue in an id


def read_panoptic(
    root: Path, splits: Mapping[str, ListSplit], report: Report, request: DatasetRequest
) -> dict[str, SplitAnnotations]:
    """Read the segments of each split that are of things, as COCO with RLEs; arguments as `BoxFormat.read`.

    Raises:
        UsageError: a file is not of panoptic segmentation, or its PNGs or images are not there.
    """
    results = {}
    for split, source in splits.items():
        content, add = _read_lists(source.file), partial(report.add, split)
        things = [c for c in only_dicts(content['categories']) if c.get('isthing', 1)]
        thing_ids = {parse_id(c.get('id')) for c in things}
        images, annotations = _with_names(content['images']), _with_names(content['annotations'])
        folder = _png_folder(source.file, root, annotations)
        resolver = _find_images(root, split, source, [image['file_name'] for image in images], folder)
        segments = {a['file_name']: (a.get('image_id'), _segments(a, thing_ids)) for a in annotations}
        decode, objects = partial(_decode, folder=folder, segments=segments), []
        for name, (problem, segments_of_png) in inspect_all(decode, segments, 'PNGs of segments').items():
            if problem:
                add(problem, name)
                continue
            for segment_id in set(segments[name][1]) - {info['id'] for info in segments_of_png}:
                add('segment-without-pixels', f'{name}: {segment_id}')
            objects += [info | dict(id=f'{name}: {info["id"]}') for info in segments_of_png]
        coco = dict(images=images, annotations=objects, categories=things)
        watched = [source.file, folder / '*.png', *resolver.searched_folders]
        results[split] = SplitAnnotations(coco, resolver.locations, resolver.folder, watched)
    return results


def find_panoptic_masks(tree: FolderTree) -> tuple[str, dict[str, SplitDirs]] | None:
    """Find the images and the PNGs of each split, as `layouts.find_folders`.

    The JSON, which may be large, is read only if the PNGs are in no folder of its name.

    Raises:
        UsageError: several files could be a split's, or its PNGs or images are not there.
    """
    sources, dirs = find_panoptic(tree), {}
    for split, source in sources[1].items() if sources else ():
        names = FILE_NAME_RE.findall(read_ends(source.file, HEADER_BYTES))
        is_usual = source.file.with_suffix('').is_dir()
        annotations = [] if is_usual else _with_names(_read_lists(source.file)['annotations'])
        folder = _png_folder(source.file, tree.root, annotations)
        images = _find_images(tree.root, split, source, names[:1], folder)
        dirs[split] = SplitDirs(images.folder, folder)
    return (PANOPTIC, dirs) if dirs else None


def panoptic_json_files(root: Path, dirs: Mapping[str, SplitDirs]) -> dict[str, str]:
    """Return the JSON of each folder of PNGs, of splits as of `find_panoptic_masks`."""
    splits = find_panoptic(FolderTree(root))[1]
    return {os.path.abspath(dirs[split].labels): os.path.abspath(source.file) for split, source in splits.items()}


def class_table(file: str) -> tuple[list[str], list[list[int]]]:
    """Return names and RGB colors of the categories, things and stuff, in the order of the file.

    Raises:
        UsageError: it cannot be read, or a name occurs twice.
    """
    categories = only_dicts(_read_lists(Path(file))['categories'])
    names = [category_name(c) or f'class {number}' for number, c in enumerate(categories)]
    if len(names) > MAX_CLASSES or len({*names}) < len(names):
        raise UsageError(f'{file}: segmentation needs up to {MAX_CLASSES} categories of different names')
    colors = (c.get('color') for c in categories)
    colors = [c if isinstance(c, list) and len(c) == 3 and {*map(type, c)} == {int} else None for c in colors]
    return names, [c or [37 * i % 256, 91 * i % 256, 151 * i % 256] for i, c in enumerate(colors)]


def decode_segments(path: str | os.PathLike, files: Mapping[str, str]) -> np.ndarray:
    """Return the labels of a PNG (H, W) of uint8, 255 where there is no segment, by `panoptic_json_files`.

    Raises:
        DataError: the PNG is too large.
        Exception: it cannot be read; Pillow raises what it likes.
    """
    ids = _read_ids(path)
    folder, name = os.path.split(os.path.abspath(path))
    labels = _segment_labels(files[folder]).get(name, {})
    existing_ids, inverse = np.unique(ids, return_inverse=True)
    return np.array([labels.get(i, IGNORE_INDEX) for i in existing_ids.tolist()], np.uint8)[inverse].reshape(ids.shape)


@lru_cache(maxsize=4)
def _segment_labels(file: str) -> dict[str, dict[int, int]]:
    """Return the label of each segment id by the names of PNGs."""
    content = _read_lists(Path(file))
    label_of = {parse_id(c.get('id')): label for label, c in enumerate(only_dicts(content['categories']))}
    labels = {}
    for annotation in only_dicts(content['annotations']):
        infos = only_dicts(annotation.get('segments_info'))
        ids = {parse_id(s.get('id')): label_of.get(parse_id(s.get('category_id'))) for s in infos}
        labels[annotation.get('file_name')] = {i: label for i, label in ids.items() if label is not None}
    return labels


def _read_lists(file: Path) -> dict:
    """Return the content of a file of panoptic segmentation; UsageError if it is none."""
    content = read_json(file)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in COCO_KEYS):
        raise UsageError(f'{file} is not of panoptic segmentation: it needs {", ".join(COCO_KEYS)}')
    return content


def _with_names(items: list) -> list[dict]:
    """Return those of some images or annotations that have the name of a file."""
    return [item for item in only_dicts(items) if isinstance(item.get('file_name'), str)]


def _segments(annotation: dict, thing_ids: set) -> dict[int, dict]:
    """Return the segments of an image that are of things, by id."""
    segments = only_dicts(annotation.get('segments_info'))
    of_things = (s for s in segments if parse_id(s.get('category_id')) in thing_ids)
    return {segment_id: s for s in of_things if isinstance(segment_id := parse_id(s.get('id')), int)}


def _decode(name: str, folder: Path, segments: Mapping) -> tuple[str | None, list[dict]]:
    """Return the code of what is wrong with a PNG, and the annotations of its segments."""
    image_id, infos = segments[name]
    try:
        ids = _read_ids(folder / name)
    except Exception as error:  # a broken file can fail in any way
        return mask_problem(error), []
    existing_ids, annotations = set(np.unique(ids).tolist()), []
    for segment_id, info in infos.items():
        if segment_id in existing_ids:
            fields = dict(id=segment_id, image_id=image_id, category_id=info.get('category_id'))
            annotations.append(fields | dict(iscrowd=info.get('iscrowd', 0)) | mask_fields(ids == segment_id))
    return None, annotations


def _read_ids(file: str | os.PathLike) -> np.ndarray:
    """Return the ids of the segments of a PNG, (H, W)."""
    with open_mask(file, formats=('PNG',)) as image:
        return np.asarray(image.convert('RGB')) @ ID_WEIGHTS


def _find_images(root: Path, split: str, source: ListSplit, names: list[str], pngs: Path) -> ImageResolver:
    """Find images, whose names PNGs may have as well: of segments, and segmentation masks that were made of them."""

    def is_of_labels(folder: Path) -> bool:
        return folder == pngs or ('panoptic' in folder.name.lower() and folder != root)

    return ImageResolver(source.file, root, names, source.images, split, is_excluded=is_of_labels)


def _png_folder(file: Path, root: Path, annotations: list[dict]) -> Path:
    """Return the folder of the PNGs of a file: that of its name, or another one whose first PNG has the right ids."""
    usual = file.with_suffix('')
    if not annotations or usual.is_dir():
        return usual
    name = annotations[0]['file_name']
    expected = {parse_id(info.get('id')) for info in only_dicts(annotations[0].get('segments_info'))}
    for folder in (Path(folder) for folder, _ in walk(root, MAX_DEPTH + 1, hidden=False)):
        with suppress(Exception):  # a broken file can fail in any way, and there may be none
            if expected & set(np.unique(_read_ids(folder / name)).tolist()):
                return folder
    raise UsageError(f'{file}: its PNGs (such as {to_one_line(name)}) are not in {root}: put them into {usual}')
