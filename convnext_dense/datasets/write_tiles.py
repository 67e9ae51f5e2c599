"""Writing a checked data set in tiles, as a data set of its own."""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ..errors import UnreadableImageError, UsageError
from .check_images import IGNORE_INDEX, MAX_BYTES
from .files import read_bytes
from .mask_encoding import MaskEncoding, decode_mask
from .request import CheckedDataset
from .tiles import Window, clip_annotations, tile_windows

JPEG_SUFFIXES = ('.jpg', '.jpeg')
JPEG_QUALITY = 95


def check_tile_options(tile: int, overlap: float, out: str | None) -> None:
    """Raise UsageError if tiles cannot be cut so, or if `out` is not a new or empty folder."""
    if tile < 1:
        raise UsageError(f'--tile {tile}: give the side of a tile in pixels')
    if not 0 <= overlap < 1:
        raise UsageError(f'--overlap {overlap}: give a fraction of the tile from 0 to below 1, such as 0.25')
    if not out:
        raise UsageError('--tile needs --out FOLDER, for the data set in tiles')
    check_output_folder('--out', out)


def check_output_folder(option: str, out: str) -> None:
    """Raise UsageError if the folder of an option is not a new or empty one."""
    if os.path.isfile(out) or (os.path.isdir(out) and os.listdir(out)):
        raise UsageError(f"{option} '{out}' already exists: choose another path")


def write_tiles(data: CheckedDataset, tile: int, overlap: float, out: str) -> list[str]:
    """Write a checked data set in tiles.

    Args:
        data: The data set, of one task.
        tile: Side of a tile in pixels.
        overlap: Fraction of a tile's side that it has in common with the next one.
        out: Folder of the new data set.

    Returns:
        What was written, one line for each split.

    Raises:
        UnreadableImageError: An image can no longer be read.
        UsageError: Images are not RGB.
    """
    if data.channels:
        raise UsageError('--tile writes images of 8 bits and three channels, and these have others: cut them by GDAL')
    write = _write_coco if data.task == 'detection' else _write_masks
    windows_of = partial(tile_windows, tile=tile, overlap=overlap)
    if data.task == 'segmentation':
        write_class_names(data, out)
    return [f'{out}: {split}: {write(data, split, windows_of, Path(out))}' for split in data.splits]


def write_class_names(data: CheckedDataset, out: str) -> None:
    """Write `classes.txt`, one name per line, or JSON where a name has lines."""
    Path(out).mkdir(parents=True, exist_ok=True)
    names = json.dumps(data.classes) if any('\n' in name for name in data.classes) else '\n'.join(data.classes)
    Path(out, 'classes.txt').write_text(names + '\n', encoding='utf-8')


def write_coco(out: Path, split: str, images: list[dict], annotations: list[dict], categories: list[dict]) -> None:
    """Write the COCO json of a split."""
    (out / 'annotations').mkdir(parents=True, exist_ok=True)
    content = dict(images=images, annotations=annotations, categories=categories)
    (out / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))


def write_image(pixels: np.ndarray, folder: Path, stem: str, suffix: str) -> str:
    """Write an image as JPEG if its source has the suffix of one, else as PNG; return the name of the file."""
    name = f'{stem}{".jpg" if suffix.lower() in JPEG_SUFFIXES else ".png"}'
    content = cv2.imencode(Path(name).suffix, pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    (folder / name).write_bytes(content.tobytes())
    return name


def _write_coco(data: CheckedDataset, split: str, windows_of: Callable, out: Path) -> str:
    coco, names, by_image = data.splits[split], UniqueNames(), defaultdict(list)
    for annotation in coco['annotations']:
        by_image[annotation['image_id']].append(annotation)
    images, annotations = [], []
    for image in coco['images']:
        size = image['height'], image['width']
        for window, name in _write_parts(data, image['file_name'], size, windows_of, out / split, names):
            new = dict(id=len(images) + 1, file_name=name, width=window[2] - window[0], height=window[3] - window[1])
            for part in clip_annotations(by_image[image['id']], window, size):
                annotations.append({**part, 'id': len(annotations) + 1, 'image_id': new['id']})
            images.append(new)
    write_coco(out, split, images, annotations, coco['categories'])
    return f'{len(images):,} tiles of {len(coco["images"]):,} images, {len(annotations):,} annotations'


def _write_masks(data: CheckedDataset, split: str, windows_of: Callable, out: Path) -> str:
    names, n_tiles = UniqueNames(), 0
    (out / 'masks' / split).mkdir(parents=True, exist_ok=True)
    for image, mask in data.splits[split]:
        labels = read_class_indices(data, mask)
        for window, name in _write_parts(data, image, labels.shape, windows_of, out / 'images' / split, names):
            left, top, right, bottom = window
            path = out / 'masks' / split / f'{Path(name).stem}.png'
            Image.fromarray(np.ascontiguousarray(labels[top:bottom, left:right])).save(path)
            n_tiles += 1
    return f'{n_tiles:,} tiles of {len(data.splits[split]):,} images with segmentation masks'


def read_class_indices(data: CheckedDataset, mask: str) -> np.ndarray:
    """Read a segmentation mask of a data set as class indices (H, W), 255 where it is ignored."""
    encoding = MaskEncoding(**data.mask_encoding or {})
    return class_table(data)[decode_mask(os.path.join(data.root, mask), encoding)[0]]


def class_table(data: CheckedDataset) -> np.ndarray:
    """Return the class index of each label (256,) of a segmentation data set, 255 for those that are ignored."""
    table = np.arange(256)
    if data.dataset_kwargs.get('reduce_zero_label'):  # as mmseg does it
        table = np.where((table == 0) | (table == IGNORE_INDEX), IGNORE_INDEX, table - 1)
    mapped = table.copy()
    for label, index in data.dataset_kwargs.get('label_map') or ():
        mapped[table == label] = index
    return mapped.astype(np.uint8)


def _write_parts(
    data: CheckedDataset, file_name: str, size: tuple[int, int], windows_of: Callable, folder: Path, new_name: Callable
) -> Iterator[tuple[Window, str]]:
    """Write the tiles of an image; each window and the name of its file in `folder`."""
    path = os.path.join(data.root, file_name)
    pixels = read_image(path, data.apply_exif)
    if pixels.shape[:2] != size:
        raise UnreadableImageError(f'{path} has changed: check the data set again')
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix = os.path.splitext(file_name)
    stem = new_name(stem.strip('/').replace('/', '_').replace(os.sep, '_'))
    for window in windows_of(size):
        left, top, right, bottom = window
        yield window, write_image(pixels[top:bottom, left:right], folder, f'{stem}_{left}_{top}', suffix)


def read_image(path: str, apply_exif: bool) -> np.ndarray:
    """Read an image as training reads it."""
    from mmcv import imfrombytes

    flag = 'color' if apply_exif else 'color_ignore_orientation'
    pixels = imfrombytes(read_bytes(path, MAX_BYTES), flag=flag)
    if pixels is None:
        raise UnreadableImageError(f'{path} cannot be read')
    return pixels


class UniqueNames:
    """Gives each image a name of its own: images of different folders may share one."""

    def __init__(self):
        self.used: set[str] = set()

    def __call__(self, stem: str) -> str:
        """Return a name that was not given before: the stem, with a number if need be."""
        name, n = stem, 1
        while name.lower() in self.used:
            name, n = f'{stem}-{n}', n + 1
        self.used.add(name.lower())
        return name
