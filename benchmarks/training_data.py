#!/usr/bin/env python
"""Processor time that a recipe's training pipeline takes for an image, by transform, and the steps that it can feed.

The images are 640 x 480 with seven objects of twenty points, or masks of 150 classes, in the page cache. A step waits
for its images if it is shorter than the time of an image times the batch size over the workers, which is printed.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, init_default_scope

from benchmarks.custom_data import draw

ROOT = Path(__file__).parents[1]
RECIPES = 'mask_rcnn/convnext_t', 'cascade/convnext_t', 'upernet/convnext_t'


def build_dataset(config: Config, folder: Path) -> BaseDataset:
    """Build the recipe's training dataset on the images in a folder."""
    init_default_scope(config.default_scope)
    dataset = config.train_dataloader.dataset
    dataset.data_root = str(folder)
    if config.default_scope == 'mmdet':
        dataset.ann_file, dataset.data_prefix = 'annotations/instances_train.json', dict(img='images/train')
        dataset.metainfo = dict(classes=('thing',))
    else:
        dataset.data_prefix = dict(img_path='images/train', seg_map_path='labels/train')
    return DATASETS.build(dataset)


def time_transforms(dataset: BaseDataset, count: int) -> dict[str, float]:
    """Processor seconds of each transform, by its class, for `count` images."""
    seconds = Counter()
    for i in range(count):
        data = dataset.get_data_info(i % len(dataset))
        for transform in dataset.pipeline.transforms:
            start = time.process_time()
            data = transform(data)
            seconds[type(transform).__name__] += time.process_time() - start
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--recipes', nargs='+', default=RECIPES, metavar='RECIPE', help='configs without their suffix')
    parser.add_argument('--images', type=int, default=300, help='number of images (default: %(default)s)')
    args = parser.parse_args()
    cv2.setNumThreads(0)  # as in the workers of a training
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), args.images)
        for recipe in args.recipes:
            config = Config.fromfile(ROOT / 'configs' / f'{recipe}.py')
            np.random.seed(0)
            seconds = time_transforms(build_dataset(config, Path(folder)), args.images)
            total = sum(seconds.values()) / args.images
            batch, workers = config.train_dataloader.batch_size, config.train_dataloader.num_workers
            print(f'{recipe}: {total * 1e3:.1f} ms an image, {1 / total:.0f} images per second and worker;', end=' ')
            print(f'{workers} workers feed steps of {batch} that take {total * batch / workers * 1e3:.0f} ms or more')
            for name, value in seconds.most_common():
                print(f'  {name:24} {value / args.images * 1e3:6.2f} ms')


if __name__ == '__main__':
    sys.exit(main())
