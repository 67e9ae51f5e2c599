"""Files of COCO json: where those of a data set are, and what they hold."""

from collections.abc import Mapping
from pathlib import Path

from ..errors import UsageError
from .check_coco import image_names
from .coco_values import only_dicts
from .diagnostics import Report
from .files import read_json
from .image_resolver import ImageResolver
from .request import DatasetRequest
from .split_annotations import SplitAnnotations

COCO_KEYS = ('images', 'annotations', 'categories')


def read_coco(path: Path, split: str = 'train') -> dict:
    """Read a COCO json file; that of a test split may have no annotations.

    Raises:
        UsageError: it is not valid JSON, or not COCO.
    """
    content = read_json(path)
    if split == 'test' and isinstance(content, dict):
        content.setdefault('annotations', [])
    if not isinstance(content, dict):
        raise UsageError(f'{path} is not COCO: it holds a list, COCO a dict of {", ".join(COCO_KEYS)}')
    annotations = content.get('annotations')
    if isinstance(annotations, list) and any('segments_info' in a for a in only_dicts(annotations)):
        text = 'is panoptic JSON (its annotations have segments_info): use instances_*.json, or --format panoptic'
        raise UsageError(f'{path} {text}')
    missing = [key for key in COCO_KEYS if not isinstance(content.get(key), list)]
    if missing:
        keys = ', '.join(map(str, list(content)[:5])) or 'nothing'
        raise UsageError(f'{path} is not COCO: no list of {" and ".join(missing)} (it has {keys})')
    return {**content, 'images': [i if isinstance(i, dict) else {} for i in content['images']]}


def read_coco_files(
    root: Path, files: Mapping[str, Path], report: Report, request: DatasetRequest
) -> dict[str, SplitAnnotations]:
    """Read COCO json and find its images; arguments as `BoxFormat.read`.

    Raises:
        UsageError: a file is no COCO json, or none of its images is there.
    """
    parts = {}
    for split, file in files.items():
        coco = read_coco(file, split)
        if split == 'test' and not coco['annotations']:
            continue
        resolver = ImageResolver(file, root, image_names(coco), request.image_dirs.get(split), split)
        watched = [file, *resolver.searched_folders]
        parts[split] = SplitAnnotations(coco, resolver.locations, resolver.folder, watched)
    return parts
