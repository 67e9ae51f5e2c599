#!/usr/bin/env python
"""How fast data are checked: images a minute, of JPEGs with boxes and polygons, and of JPEGs with label maps.

Draws 640 x 480 images of about 130 KB into a temporary folder, a few hundred different ones, and links them to as many
names as asked for; they are in the page cache. Prints one line a task. `taskset -c 0,1` shows it on two cores.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from convnext_dense.datasets.check_images import n_threads
from convnext_dense.datasets.custom import DatasetRequest, read_data

WIDTH, HEIGHT, DIFFERENT, OBJECTS = 640, 480, 200, 7


def draw(folder: Path, n: int) -> None:
    rng = np.random.RandomState(0)
    places = [folder / name for name in ('images/train', 'labels/train', 'annotations')]
    for place in places:
        place.mkdir(parents=True)
    images, annotations = [], []
    for i in range(n):
        image, labels = (place / f'{i:06d}{ending}' for place, ending in zip(places, ('.jpg', '.png')))
        if i < DIFFERENT:
            pixels = cv2.resize(rng.randint(0, 256, (60, 80, 3), np.uint8), (WIDTH, HEIGHT)).astype(int)
            pixels = np.clip(pixels + rng.randint(-12, 13, pixels.shape), 0, 255).astype(np.uint8)
            cv2.imwrite(str(image), pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
            blobs = cv2.resize(rng.randint(0, 150, (6, 8), np.uint8), (WIDTH, HEIGHT), interpolation=cv2.INTER_NEAREST)
            cv2.imwrite(str(labels), blobs)
        else:
            for path in (image, labels):
                os.link(path.with_stem(f'{i % DIFFERENT:06d}'), path)
        images.append(dict(id=i, file_name=image.name, width=WIDTH, height=HEIGHT))
        for _ in range(OBJECTS):
            x, y, w, h = (int(v) for v in rng.randint(1, 200, 4))
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h] * 5
            annotation = dict(id=len(annotations), image_id=i, category_id=1, bbox=[x, y, w, h], area=w * h, iscrowd=0)
            annotations.append({**annotation, 'segmentation': [polygon]})
    coco = dict(images=images, annotations=annotations, categories=[dict(id=1, name='thing')])
    (places[2] / 'instances_train.json').write_text(json.dumps(coco))
    (folder / 'classes.txt').write_text('\n'.join(f'class {i}' for i in range(150)))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--images', type=int, default=5000)
    n = parser.parse_args().images
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), n)
        for task in ('detection', 'segmentation'):
            start = time.perf_counter()
            report = read_data(DatasetRequest(folder), task, ('train', 'val')).report
            seconds = time.perf_counter() - start
            assert not report.problems
            print(
                f'{task}: {n:,} images in {seconds:.1f} s, {60 * n / seconds:,.0f} a minute with {n_threads()} threads'
            )


if __name__ == '__main__':
    main()
