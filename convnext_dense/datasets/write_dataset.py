"""Writing a checked data set as one of its own, in a layout that other tools read: what can be used of it, or tiles."""

import json
import os
import shutil
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
EXIF_ORIENTATION = 0x0112


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
    write_parts = partial(_write_tiles, windows_of=partial(tile_windows, tile=tile, overlap=overlap))
    return _write_splits(data, Path(out), _cut_coco, write_parts)


def write_clean(data: CheckedDataset, out: str) -> list[str]:
    """Write a checked data set without what is dropped and with what is fixed.

    Images are copied, byte for byte; those that EXIF data rotate are written as training reads them. Boxes become COCO
    JSON; segmentation masks become PNGs in which a pixel is the index of its class, 255 where it is ignored. The result
    and errors are as of `write_tiles`.
    """
    return _write_splits(data, Path(out), _copy_coco, _copy_image)


def _write_splits(data: CheckedDataset, out: Path, write_coco: Callable, write_parts: Callable) -> list[str]:
    """Write all splits; `write_parts` writes an image and iterates over the windows and the files of its parts."""
    write_split = _write_masks if data.task == 'segmentation' else write_coco
    out.mkdir(parents=True, exist_ok=True)
    if data.task == 'segmentation':
        names = json.dumps(data.classes) if any('\n' in name for name in data.classes) else '\n'.join(data.classes)
        Path(out, 'classes.txt').write_text(names + '\n', encoding='utf-8')
    return [f'{out}: {split}: {write_split(data, split, out, write_parts)}' for split in data.splits]


def write_image(pixels: np.ndarray, folder: Path, stem: str, suffix: str) -> str:
    """Write an image as JPEG if its source has the suffix of one, else as PNG; return the name of the file."""
    name = f'{stem}{".jpg" if suffix.lower() in JPEG_SUFFIXES else ".png"}'
    content = cv2.imencode(Path(name).suffix, pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    (folder / name).write_bytes(content.tobytes())
    return name


def _copy_coco(data: CheckedDataset, split: str, out: Path, write_parts: Callable) -> str:
    coco, new_name, images = data.splits[split], UniqueNames(), []
    for image in coco['images']:
        name, size = image['file_name'], (image['height'], image['width'])
        images += [{**image, 'file_name': new} for _, new in write_parts(data, name, size, out / split, new_name)]
    _write_json(out, split, {**coco, 'images': images})
    return f'{len(images):,} images, {len(coco["annotations"]):,} annotations'


def _cut_coco(data: CheckedDataset, split: str, out: Path, write_parts: Callable) -> str:
    coco, new_name, by_image = data.splits[split], UniqueNames(), defaultdict(list)
    for annotation in coco['annotations']:
        by_image[annotation['image_id']].append(annotation)
    images, annotations = [], []
    for image in coco['images']:
        size = image['height'], image['width']
        for window, name in write_parts(data, image['file_name'], size, out / split, new_name):
            new = dict(id=len(images) + 1, file_name=name, width=window[2] - window[0], height=window[3] - window[1])
            for part in clip_annotations(by_image[image['id']], window, size):
                annotations.append({**part, 'id': len(annotations) + 1, 'image_id': new['id']})
            images.append(new)
    _write_json(out, split, {**coco, 'images': images, 'annotations': annotations})
    return f'{len(images):,} tiles of {len(coco["images"]):,} images, {len(annotations):,} annotations'


def _write_json(out: Path, split: str, coco: dict) -> None:
    (out / 'annotations').mkdir(exist_ok=True)
    (out / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))


def _write_masks(data: CheckedDataset, split: str, out: Path, write_parts: Callable) -> str:
    new_name, num_parts, folder = UniqueNames(), 0, out / 'images' / split
    (out / 'masks' / split).mkdir(parents=True, exist_ok=True)
    for image, mask in data.splits[split]:
        labels = read_class_indices(data, mask)
        for (left, top, right, bottom), name in write_parts(data, image, labels.shape, folder, new_name):
            path = out / 'masks' / split / f'{Path(name).stem}.png'
            Image.fromarray(np.ascontiguousarray(labels[top:bottom, left:right])).save(path)
            num_parts += 1
    tiles = '' if write_parts is _copy_image else f'{num_parts:,} tiles of '
    return f'{tiles}{len(data.splits[split]):,} images with segmentation masks'


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


def _write_tiles(
    data: CheckedDataset, file_name: str, size: tuple[int, int], folder: Path, new_name: Callable, windows_of: Callable
) -> Iterator[tuple[Window, str]]:
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


def _copy_image(
    data: CheckedDataset, file_name: str, size: tuple[int, int], folder: Path, new_name: Callable
) -> Iterator[tuple[Window, str]]:
    """Copy an image as the only part of it, without its rotation by EXIF data."""
    folder.mkdir(parents=True, exist_ok=True)
    path, (stem, suffix) = os.path.join(data.root, file_name), os.path.splitext(os.path.basename(file_name))
    name = f'{new_name(stem)}{suffix}'
    if _has_exif_rotation(path):
        name = write_image(read_image(path, data.apply_exif), folder, Path(name).stem, suffix)
    else:
        shutil.copyfile(path, folder / name)
    yield (0, 0, size[1], size[0]), name


def _has_exif_rotation(path: str) -> bool:
    try:
        with Image.open(path) as image:
            return image.getexif().get(EXIF_ORIENTATION, 1) != 1
    except (OSError, ValueError):  # Pillow does not know the format
        return False


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
