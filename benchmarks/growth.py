#!/usr/bin/env python
"""Measure how the time of each check of a custom data set grows with its input, valid or hostile.

Ten times the input should take about ten times as long. Prints one line per check: the size of the smaller input, the
CPU time of both, and their ratio. Writes into a temporary folder, at most half a gigabyte at a time.
`growth.py RLE classes.txt` runs only these checks.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import cv2
import numpy as np

from convnext_dense.datasets.custom import DatasetRequest, read_data
from convnext_dense.errors import UsageError

SIZE, FEW_IMAGES, GROWTH = 64, 3, 10
PIXELS = np.random.RandomState(0).randint(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
MASK = np.repeat(np.arange(2, dtype=np.uint8), SIZE // 2)[:, None].repeat(SIZE, 1)


def write_pngs(folder: Path, n: int, pixels: np.ndarray) -> None:
    """Write the same image n times."""
    folder.mkdir(parents=True)
    content = cv2.imencode('.png', pixels)[1].tobytes()
    for i in range(n):
        (folder / f'{i:07d}.png').write_bytes(content)


def images(n: int, name: str = '{:07d}.png') -> list[dict]:
    return [dict(id=i + 1, file_name=name.format(i), width=SIZE, height=SIZE) for i in range(n)]


def annotation(i: int, **values) -> dict:
    x, y, w, h = i % 50, i // 50 % 50, 10 + i // 2500 % 4, 10 + i // 10000 % 4
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    common = dict(id=i + 1, image_id=i % FEW_IMAGES + 1, category_id=1, bbox=[x, y, w, h], area=w * h, iscrowd=0)
    return {**common, 'segmentation': [polygon], **values}


def boxes(n: int, **values) -> list[dict]:
    return [annotation(i, segmentation=None, **values) for i in range(n)]


def masks(mask: object) -> list[dict]:
    """Return a few annotations, of which the first has this mask and fills its image."""
    full_image = dict(bbox=[0, 0, SIZE, SIZE], area=SIZE * SIZE)
    return [annotation(0, segmentation=mask, **full_image), *map(annotation, range(1, 9))]


def rle(counts: object) -> list[dict]:
    return masks(dict(size=[SIZE, SIZE], counts=counts))


def detection(root: Path, files: int = FEW_IMAGES, **parts) -> None:
    """Write a detection data set; by default with a few images, annotations and categories."""
    write_pngs(root / 'train', files, PIXELS)
    write_pngs(root / 'val', FEW_IMAGES, PIXELS)
    small_content = dict(
        images=images(FEW_IMAGES), annotations=[annotation(i) for i in range(9)], categories=categories(1)
    )
    (root / 'annotations').mkdir()
    for split, content in (('train', {**small_content, **parts}), ('val', small_content)):
        (root / f'annotations/instances_{split}.json').write_text(json.dumps(content))


def segmentation(root: Path, files: int = FEW_IMAGES, classes: Iterable[str] = 'ab') -> None:
    for split, n in (('train', files), ('val', FEW_IMAGES)):
        write_pngs(root / 'images' / split, n, PIXELS)
        write_pngs(root / 'labels' / split, n, MASK)
    (root / 'classes.txt').write_text('\n'.join(classes))


def categories(n: int, name: str = 'class {}') -> list[dict]:
    return [dict(id=i + 1, name=name.format(i)) for i in range(n)]


# The smaller input of each check, and what writes a data set with so much of it.
CHECKS: dict[str, tuple[int, Callable[[Path, int], None]]] = {
    'annotations, boxes': (50_000, lambda root, n: detection(root, annotations=boxes(n))),
    'annotations, polygons': (30_000, lambda root, n: detection(root, annotations=list(map(annotation, range(n))))),
    'annotations, all the same': (50_000, lambda root, n: detection(root, annotations=boxes(n, bbox=[1, 1, 9, 9]))),
    'orphan annotations': (100_000, lambda root, n: detection(root, annotations=boxes(n, image_id='none'))),
    'annotations of no category': (100_000, lambda root, n: detection(root, annotations=boxes(n, category_id=[]))),
    'categories': (50_000, lambda root, n: detection(root, categories=categories(n))),
    'categories of one name': (50_000, lambda root, n: detection(root, categories=categories(n, 'same'))),
    'images': (500, lambda root, n: detection(root, files=n, images=images(n))),
    'missing images': (50_000, lambda root, n: detection(root, images=images(n))),
    'image paths of another machine': (
        20_000,
        lambda root, n: detection(root, images=images(n, '/home/me/a/{:07d}.png')),
    ),
    'images of one file': (20_000, lambda root, n: detection(root, images=images(n, '/home/{}/0000000.png'))),
    'a file name of many parts': (
        10**6,
        lambda root, n: detection(root, images=[*images(FEW_IMAGES), *images(1, 'a/' * n)]),
    ),
    'RLE': (10**6, lambda root, n: detection(root, annotations=rle('0' * n))),
    'RLE of one endless run': (2 * 10**7, lambda root, n: detection(root, annotations=rle('o' * n))),
    'RLE as a list': (10**6, lambda root, n: detection(root, annotations=rle([0] * n + [SIZE * SIZE]))),
    'points of a polygon': (
        30_000,
        lambda root, n: detection(root, annotations=masks([[0, 0, 64, 0, 64, 64, 0, 64] * n])),
    ),
    'polygons of a mask': (
        30_000,
        lambda root, n: detection(root, annotations=masks([[0, 0, 64, 0, 64, 64, 0, 64]] * n)),
    ),
    'segmentation masks': (500, lambda root, n: segmentation(root, n)),
    'classes.txt: names': (100_000, lambda root, n: segmentation(root, classes=(f'class {i}' for i in range(n)))),
    'classes.txt: inner spaces': (5_000, lambda root, n: segmentation(root, classes=['a' + ' ' * 290 + 'b'] * n)),
    'classes.txt: numbers': (5_000, lambda root, n: segmentation(root, classes=['1 ' * 149 + 'x'] * n)),
}


def check_time(write: Callable[[Path, int], None], n: int) -> float:
    """Return the CPU time of the checks of a data set in seconds, without that of writing it."""
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(StringIO()):
        root = Path(folder)
        write(root, n)
        task = 'detection' if (root / 'annotations').exists() else 'segmentation'
        start = time.process_time()
        try:
            read_data(DatasetRequest(folder), task, ('train', 'val'))
        except UsageError as error:  # some hostile inputs are errors
            assert len(str(error)) < 10_000
        end = time.process_time()
        shutil.rmtree(root)
        root.mkdir()
    return end - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checks', nargs='*', help='parts of names of checks (default: all)')
    names = parser.parse_args().checks
    for name, (n, write) in CHECKS.items():
        if not names or any(part in name for part in names):
            small, large = check_time(write, n), check_time(write, GROWTH * n)
            print(f'{name:30} {n:>10,}  {small:6.2f} s  {large:6.2f} s  {large / small:5.1f} x', flush=True)


if __name__ == '__main__':
    main()
