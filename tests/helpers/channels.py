"""Data sets of images that are not RGB."""

import json
import warnings

import numpy as np
import rasterio
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning

SIDE = 64
MEANS, STDS = np.arange(1, 6) * 1000.0, np.arange(1, 6) * 150.0


def made_image(seed, side=SIDE, corner=(8, 20), channels=5):
    """Return an image of 16 bits with a square that all channels but the second show, and its mask."""
    rng, mask = np.random.RandomState(seed), np.zeros((side, side), np.uint8)
    mask[corner[0] : corner[0] + 28, corner[1] : corner[1] + 28] = 1
    pixels = rng.normal(size=(side, side, channels)) * STDS[:channels] + MEANS[:channels]
    pixels[..., [i for i in range(channels) if i != 1]] += 700.0 * mask[..., None]
    return pixels.clip(0, 65535).astype(np.uint16), mask


def save_tiff(path, pixels, **profile):
    """Write an image (H, W, C)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, count = pixels.shape
    profile |= dict(driver='GTiff', height=height, width=width, count=count, dtype=pixels.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', NotGeoreferencedWarning)
        with rasterio.open(path, 'w', **profile) as file:
            file.write(np.moveaxis(pixels, -1, 0))


def write_channels(root, n_train=4, n_val=2, channels=5):
    """Write images of five channels with masks and boxes; return the pixels of the training images."""
    train = []
    for split, n in (('train', n_train), ('val', n_val)):
        images, annotations = [], []
        for i in range(n):
            corner = (4 + 3 * i, 20 - 3 * i)
            pixels, mask = made_image(i + 50 * (split == 'val'), corner=corner, channels=channels)
            train += [pixels] if split == 'train' else []
            save_tiff(root / f'images/{split}/{i}.tif', pixels)
            (root / 'masks' / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(root / f'masks/{split}/{i}.png')
            images.append(dict(id=i, file_name=f'{i}.tif', width=SIDE, height=SIDE))
            y, x = corner
            polygon = [x, y, x + 28, y, x + 28, y + 28, x, y + 28]
            fields = dict(bbox=[x, y, 28, 28], area=784, iscrowd=0, segmentation=[polygon])
            annotations.append(dict(id=i, image_id=i, category_id=1, **fields))
        (root / 'annotations').mkdir(exist_ok=True)
        content = dict(images=images, annotations=annotations, categories=[dict(id=1, name='field')])
        (root / f'annotations/instances_{split}.json').write_text(json.dumps(content))
    (root / 'classes.txt').write_text('soil\nfield')
    return np.stack(train)
