"""Write detections as COCO JSON image by image, so that runs can be interrupted and memory does not grow."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask

from ..errors import UsageError

FORMATS = ('coco', 'results')
# Category ids of COCO's 80 classes.
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def category_ids(classes: Sequence[str]) -> list[int]:
    """Return the category id of each class: counted from 1, but COCO's own ids for COCO's classes."""
    from mmdet.datasets import CocoDataset

    return COCO_IDS if tuple(classes) == CocoDataset.METAINFO['classes'] else list(range(1, len(classes) + 1))


def to_annotations(instances: InstanceData, ids: Sequence[int]) -> list[dict]:
    """Convert detections to COCO annotations without ids.

    Args:
        instances: Detections with `bboxes` (N, 4) xyxy, `scores` (N,), `labels` (N,) and optionally `masks`, (N, H, W)
            or N COCO RLEs.
        ids: Category id of each class.

    Returns:
        One dict per detection: category_id, bbox (x, y, width, height) in pixels, score, area, iscrowd, and
            segmentation (COCO RLE).
    """
    boxes, scores = instances.bboxes.double().tolist(), instances.scores.double().tolist()
    rles = encode_masks(instances.masks) if 'masks' in instances else [None] * len(scores)
    annotations = []
    for (x1, y1, x2, y2), score, label, rle in zip(boxes, scores, instances.labels.tolist(), rles):
        annotation = dict(category_id=ids[label], bbox=[x1, y1, x2 - x1, y2 - y1], score=score)
        annotation['area'] = float(coco_mask.area(rle)) if rle else (x2 - x1) * (y2 - y1)
        annotation['iscrowd'] = 0
        if rle:
            counts = rle['counts']
            annotation['segmentation'] = {**rle, 'counts': counts.decode() if isinstance(counts, bytes) else counts}
        annotations.append(annotation)
    return annotations


def encode_masks(masks: torch.Tensor | np.ndarray | Sequence[dict]) -> list[dict]:
    """Encode instance masks (N, H, W) as COCO RLEs; COCO RLEs are returned unchanged."""
    if isinstance(masks, (list, tuple)) and all(isinstance(mask, dict) for mask in masks):
        return list(masks)
    return [
        coco_mask.encode(np.asfortranarray(mask.numpy() if isinstance(mask, torch.Tensor) else mask).view(np.uint8))
        for mask in masks
    ]


class CocoWriter:
    """Writer of `predictions.json`.

    Each finished image is appended to `predictions.jsonl` as one line; `finish` writes the JSON file from these lines.

    Args:
        folder: Folder of both files.
        classes: Names of the classes.
        name: Name of the files without suffix.
        format: 'coco' for a data set (images, categories, annotations), 'results' for a list of COCO results.
        description: Description of the data set.

    Attributes:
        path (Path): Path of the JSON file.
        done (dict[str, int]): Image id by file name of the images that an earlier run has written.
    """

    def __init__(self, folder: Path, classes: Sequence[str], name='predictions', format='coco', description=''):
        self.path, self.lines_path = folder / f'{name}.json', folder / f'{name}.jsonl'
        self.format, self.description = format, description
        self.category_ids = category_ids(classes)
        self.categories = [dict(id=i, name=name) for i, name in zip(self.category_ids, classes)]
        _cut_off_partial_line(self.lines_path)
        self.done = {image['file_name']: image['id'] for image, _ in self.iter_lines()}
        self._next_id = max(self.done.values(), default=0) + 1
        self._ids: dict[str, int] = {}

    def use_numbers_of(self, file_names: Iterable[str]) -> None:
        """Use the numbers in the file names as image ids, as in COCO (000000000139.jpg), if every name is a number."""
        stems = {name: os.path.splitext(os.path.basename(name))[0] for name in (*self.done, *file_names)}
        numbers = {name: int(stem) for name, stem in stems.items() if stem.isascii() and stem.isdigit()}
        is_kept = all(numbers.get(name) == i for name, i in self.done.items())
        if len(numbers) == len(stems) == len(set(numbers.values())) and is_kept:
            self._ids = numbers

    def add(self, file_name: str, size: tuple[int, int], annotations: list[dict], **fields) -> None:
        """Append an image of size (H, W), with annotations from `to_annotations` and additional fields."""
        image = dict(id=self._ids.get(file_name, self._next_id), file_name=file_name, height=size[0], width=size[1])
        self._next_id = max(self._next_id, image['id']) + 1
        with open(self.lines_path, 'a', encoding='ascii') as file:
            file.write(json.dumps([{**image, **fields}, annotations]) + '\n')

    def finish(self) -> None:
        """Write the JSON file; an old one is kept until the new one is complete."""
        tmp_path = self.path.with_name(f'{self.path.name}.part')
        with open(tmp_path, 'w', encoding='ascii') as file:
            file.writelines(self._iter_results() if self.format == 'results' else self._iter_dataset())
        os.replace(tmp_path, self.path)

    def _iter_dataset(self) -> Iterator[str]:
        yield f'{{"info": {json.dumps(dict(description=self.description))}, "licenses": [],\n"images": ['
        yield from _joined(json.dumps(image) for image, _ in self.iter_lines())
        yield '],\n"annotations": ['
        yield from _joined(json.dumps({'id': i + 1, **a}) for i, a in enumerate(self._iter_annotations()))
        yield f'],\n"categories": {json.dumps(self.categories)}}}\n'

    def _iter_results(self) -> Iterator[str]:
        yield '['
        keys = ('image_id', 'category_id', 'bbox', 'score', 'segmentation')
        yield from _joined(json.dumps({k: a[k] for k in keys if k in a}) for a in self._iter_annotations())
        yield ']\n'

    def _iter_annotations(self) -> Iterator[dict]:
        for image, annotations in self.iter_lines():
            for annotation in annotations:
                yield {'image_id': image['id'], **annotation}

    def iter_lines(self) -> Iterator[tuple[dict, list[dict]]]:
        """Iterate over the written images, each with its annotations."""
        if not self.lines_path.exists():
            return
        with open(self.lines_path, encoding='ascii') as file:
            for n, line in enumerate(file, 1):
                try:
                    yield tuple(json.loads(line))
                except ValueError as error:
                    raise UsageError(f'{self.lines_path}: line {n} is damaged: choose another --out') from error


def _cut_off_partial_line(path: Path) -> None:
    """Remove the incomplete last line that a killed run may have left."""
    if path.exists():
        with open(path, 'rb') as file:
            size = sum(len(line) for line in file if line.endswith(b'\n'))
        os.truncate(path, size)


def _joined(items: Iterable[str]) -> Iterator[str]:
    for i, item in enumerate(items):
        yield f',\n{item}' if i else item
