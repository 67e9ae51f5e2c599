"""Writing the usable part of a checked data set as a clean one of its own, in a layout that other tools read."""

import os
import shutil
from pathlib import Path

from PIL import Image

from .request import CheckedDataset
from .write_tiles import UniqueNames, read_class_indices, read_image, write_class_names, write_coco, write_image

EXIF_ORIENTATION = 0x0112


def write_clean(data: CheckedDataset, out: str) -> list[str]:
    """Write a checked data set without what is dropped and with what is fixed.

    Images are copied, byte for byte; those that EXIF data rotate are written as training reads them. Boxes become COCO
    JSON; segmentation masks become PNGs in which a pixel is the index of its class, 255 where it is ignored.

    Args:
        data: the data set, of one task.
        out: folder of the new data set.

    Returns:
        What was written, one line for each split.

    Raises:
        UnreadableImageError: an image can no longer be read.
    """
    write = _write_coco if data.task == 'detection' else _write_masks
    if data.task == 'segmentation':
        write_class_names(data, out)
    return [f'{out}: {split}: {write(data, split, Path(out))}' for split in data.splits]


def _write_coco(data: CheckedDataset, split: str, out: Path) -> str:
    coco, new_name = data.splits[split], UniqueNames()
    images = [
        {**image, 'file_name': _copy_image(data, image['file_name'], out / split, new_name)} for image in coco['images']
    ]
    write_coco(out, split, images, coco['annotations'], coco['categories'])
    return f'{len(images):,} images, {len(coco["annotations"]):,} annotations'


def _write_masks(data: CheckedDataset, split: str, out: Path) -> str:
    new_name = UniqueNames()
    (out / 'masks' / split).mkdir(parents=True, exist_ok=True)
    for image, mask in data.splits[split]:
        name = _copy_image(data, image, out / 'images' / split, new_name)
        Image.fromarray(read_class_indices(data, mask)).save(out / 'masks' / split / f'{Path(name).stem}.png')
    return f'{len(data.splits[split]):,} images with segmentation masks'


def _copy_image(data: CheckedDataset, file_name: str, folder: Path, new_name: UniqueNames) -> str:
    """Copy an image into a folder, without its rotation by EXIF data; return its name there."""
    folder.mkdir(parents=True, exist_ok=True)
    path, (stem, suffix) = os.path.join(data.root, file_name), os.path.splitext(os.path.basename(file_name))
    stem = new_name(stem)
    if not _has_exif_rotation(path):
        shutil.copyfile(path, folder / f'{stem}{suffix}')
        return f'{stem}{suffix}'
    return write_image(read_image(path, data.apply_exif), folder, stem, suffix)


def _has_exif_rotation(path: str) -> bool:
    try:
        with Image.open(path) as image:
            return image.getexif().get(EXIF_ORIENTATION, 1) != 1
    except (OSError, ValueError):  # Pillow does not know the format
        return False
