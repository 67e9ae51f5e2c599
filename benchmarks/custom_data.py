#!/usr/bin/env python
"""Measure how fast custom data sets are checked: images per minute, with polygons as COCO and YOLO, and with masks.

Draws 200 different JPEGs of 640 x 480 pixels and about 130 KB into a temporary folder and links them to as many names
as given; they are in the page cache. Prints one line per format. `taskset -c 0,1` measures on two cores.
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

WIDTH, HEIGHT = 640, 480
NUM_DIFFERENT_IMAGES, OBJECTS_PER_IMAGE = 200, 7


def draw(folder: Path, num_images: int) -> None:
    """Draw a data set for both tasks, with polygons in both formats."""
    rng = np.random.RandomState(0)
    folders = [folder / name for name in ('images/train', 'labels/train', 'annotations')]
    for path in folders:
        path.mkdir(parents=True)
    images, annotations = [], []
    for i in range(num_images):
        image, mask = (path / f'{i:06d}{suffix}' for path, suffix in zip(folders, ('.jpg', '.png')))
        if i < NUM_DIFFERENT_IMAGES:
            pixels = cv2.resize(rng.randint(0, 256, (60, 80, 3), np.uint8), (WIDTH, HEIGHT)).astype(int)
            pixels = np.clip(pixels + rng.randint(-12, 13, pixels.shape), 0, 255).astype(np.uint8)
            cv2.imwrite(str(image), pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
            blobs = cv2.resize(rng.randint(0, 150, (6, 8), np.uint8), (WIDTH, HEIGHT), interpolation=cv2.INTER_NEAREST)
            cv2.imwrite(str(mask), blobs)
        else:
            for path in (image, mask):
                os.link(path.with_stem(f'{i % NUM_DIFFERENT_IMAGES:06d}'), path)
        images.append(dict(id=i, file_name=image.name, width=WIDTH, height=HEIGHT))
        lines = []
        for _ in range(OBJECTS_PER_IMAGE):
            x, y, w, h = (int(v) for v in rng.randint(1, 200, 4))
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h] * 5
            annotation = dict(id=len(annotations), image_id=i, category_id=1, bbox=[x, y, w, h], area=w * h, iscrowd=0)
            annotations.append({**annotation, 'segmentation': [polygon]})
            lines.append(' '.join(['0', *(f'{v / side:.6f}' for v, side in zip(polygon, [WIDTH, HEIGHT] * 20))]))
        mask.with_suffix('.txt').write_text('\n'.join(lines))
    coco = dict(images=images, annotations=annotations, categories=[dict(id=1, name='thing')])
    (folders[2] / 'instances_train.json').write_text(json.dumps(coco))
    (folder / 'classes.txt').write_text('\n'.join(f'class {i}' for i in range(150)))


def main():
    """Run as a command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--images', type=int, default=5000, help='number of names (default: 5000)')
    n = parser.parse_args().images
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), n)
        (Path(folder) / 'data.yaml').write_text('train: images/train\nnames: [thing]\n')
        for task, path in (('detection', folder), ('detection', f'{folder}/data.yaml'), ('segmentation', folder)):
            start = time.perf_counter()
            report = read_data(DatasetRequest(path), task, ('train', 'val')).report
            seconds = time.perf_counter() - start
            assert not report.problems
            rate = 60 * n / seconds
            name = report.facts[0].split(': ')[1].split(',')[0]
            print(f'{name}: {n:,} images in {seconds:.1f} s, {rate:,.0f} per minute with {n_threads()} threads')


if __name__ == '__main__':
    main()
