#!/usr/bin/env python
"""How the time of each check grows with its input: ten times as much, sound or hostile, should take about ten times as
long. Prints a line a check: how much the smaller input is, the processor's time of both, and their ratio.

Writes into a temporary folder, at most half a gigabyte at a time. `growth.py RLE classes.txt` runs those alone.
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

SIZE, FEW, TIMES = 64, 3, 10
PICTURE = np.random.RandomState(0).randint(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
LABELS = np.repeat(np.arange(2, dtype=np.uint8), SIZE // 2)[:, None].repeat(SIZE, 1)


def put(folder: Path, n: int, pixels: np.ndarray) -> None:
    folder.mkdir(parents=True)
    content = cv2.imencode('.png', pixels)[1].tobytes()
    for i in range(n):
        (folder / f'{i:07d}.png').write_bytes(content)


def images(n: int, name: str = '{:07d}.png') -> list[dict]:
    return [dict(id=i + 1, file_name=name.format(i), width=SIZE, height=SIZE) for i in range(n)]


def annotation(i: int, **values) -> dict:
    x, y, w, h = i % 50, i // 50 % 50, 10 + i // 2500 % 4, 10 + i // 10000 % 4
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    common = dict(id=i + 1, image_id=i % FEW + 1, category_id=1, bbox=[x, y, w, h], area=w * h, iscrowd=0)
    return {**common, 'segmentation': [polygon], **values}


def boxes(n: int, **values) -> list[dict]:
    return [annotation(i, segmentation=None, **values) for i in range(n)]


def masks(mask: object) -> list[dict]:
    """A few annotations, of which the first has this mask and takes all of its image."""
    whole = dict(bbox=[0, 0, SIZE, SIZE], area=SIZE * SIZE)
    return [annotation(0, segmentation=mask, **whole), *map(annotation, range(1, 9))]


def rle(counts: object) -> list[dict]:
    return masks(dict(size=[SIZE, SIZE], counts=counts))


def coco(root: Path, files: int = FEW, **parts) -> None:
    """COCO json with other parts than a few images, annotations and categories."""
    put(root / 'train', files, PICTURE)
    put(root / 'val', FEW, PICTURE)
    few = dict(images=images(FEW), annotations=[annotation(i) for i in range(9)], categories=categories(1))
    (root / 'annotations').mkdir()
    for split, content in (('train', {**few, **parts}), ('val', few)):
        (root / f'annotations/instances_{split}.json').write_text(json.dumps(content))


def label_maps(root: Path, files: int = FEW, classes: Iterable[str] = 'ab') -> None:
    for split, n in (('train', files), ('val', FEW)):
        put(root / 'images' / split, n, PICTURE)
        put(root / 'labels' / split, n, LABELS)
    (root / 'classes.txt').write_text('\n'.join(classes))


def categories(n: int, name: str = 'class {}') -> list[dict]:
    return [dict(id=i + 1, name=name.format(i)) for i in range(n)]


# What is read: how much at first, and what makes a folder with so much of it. Label maps are checked in some.
CHECKS: dict[str, tuple[int, Callable[[Path, int], None]]] = {
    'annotations, boxes': (50_000, lambda root, n: coco(root, annotations=boxes(n))),
    'annotations, polygons': (30_000, lambda root, n: coco(root, annotations=list(map(annotation, range(n))))),
    'annotations, all the same': (50_000, lambda root, n: coco(root, annotations=boxes(n, bbox=[1, 1, 9, 9]))),
    'annotations of no image': (100_000, lambda root, n: coco(root, annotations=boxes(n, image_id='none'))),
    'annotations of no category': (100_000, lambda root, n: coco(root, annotations=boxes(n, category_id=[]))),
    'categories': (50_000, lambda root, n: coco(root, categories=categories(n))),
    'categories of one name': (50_000, lambda root, n: coco(root, categories=categories(n, 'same'))),
    'images': (500, lambda root, n: coco(root, files=n, images=images(n))),
    'images that are missing': (50_000, lambda root, n: coco(root, images=images(n))),
    'images of another machine': (20_000, lambda root, n: coco(root, images=images(n, '/home/me/a/{:07d}.png'))),
    'images of one file': (20_000, lambda root, n: coco(root, images=images(n, '/home/{}/0000000.png'))),
    'a name of many parts': (10**6, lambda root, n: coco(root, images=[*images(FEW), *images(1, 'a/' * n)])),
    'RLE': (10**6, lambda root, n: coco(root, annotations=rle('0' * n))),
    'RLE of one run without an end': (2 * 10**7, lambda root, n: coco(root, annotations=rle('o' * n))),
    'RLE as a list': (10**6, lambda root, n: coco(root, annotations=rle([0] * n + [SIZE * SIZE]))),
    'points of a polygon': (30_000, lambda root, n: coco(root, annotations=masks([[0, 0, 64, 0, 64, 64, 0, 64] * n]))),
    'polygons of a mask': (30_000, lambda root, n: coco(root, annotations=masks([[0, 0, 64, 0, 64, 64, 0, 64]] * n))),
    'files of label maps': (500, lambda root, n: label_maps(root, n)),
    'classes.txt: names': (100_000, lambda root, n: label_maps(root, classes=(f'class {i}' for i in range(n)))),
    'classes.txt: inner spaces': (5_000, lambda root, n: label_maps(root, classes=['a' + ' ' * 290 + 'b'] * n)),
    'classes.txt: numbers': (5_000, lambda root, n: label_maps(root, classes=['1 ' * 149 + 'x'] * n)),
}


def seconds(make: Callable[[Path, int], None], n: int) -> float:
    """The time of the checks of all that is in a folder, without that of making it."""
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(StringIO()):
        root = Path(folder)
        make(root, n)
        task = 'detection' if (root / 'annotations').exists() else 'segmentation'
        start = time.process_time()
        try:
            read_data(DatasetRequest(folder), task, ('train', 'val'))
        except UsageError as error:  # some of the hostile ones are refused
            assert len(str(error)) < 10_000
        end = time.process_time()
        shutil.rmtree(root)
        root.mkdir()
    return end - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checks', nargs='*', help='parts of names of checks (default: all)')
    wanted = parser.parse_args().checks
    for name, (n, make) in CHECKS.items():
        if not wanted or any(part in name for part in wanted):
            first, then = seconds(make, n), seconds(make, TIMES * n)
            print(f'{name:30} {n:>10,}  {first:6.2f} s  {then:6.2f} s  {then / first:5.1f} x', flush=True)


if __name__ == '__main__':
    main()
