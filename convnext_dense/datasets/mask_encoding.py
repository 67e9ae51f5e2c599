"""Segmentation masks that are not 8-bit index images: how their values become labels, and their conversion.

Color-coded masks, 16-bit instance maps, masks in .npy, and masks whose gray values are thresholded.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..channel_files import ARRAY_SUFFIX
from .check_images import (
    IGNORE_INDEX,
    MAX_BYTES,
    MAX_PIXELS,
    MaskInfo,
    count_values,
    inspect_all,
    mask_problem,
    open_mask,
)
from .files import DataError, open_regular
from .panoptic import decode_segments
from .request import CheckedDataset

MAX_GRAY_SPREAD = 16  # difference of the channels of a gray pixel; gray images can be slightly tinted
INSTANCE_FACTOR = 1000  # factor of the class in an instance id, as in Cityscapes
MASKS_DIR = 'masks'  # folder of converted masks, below `data` of the work dir
# Problems of a mask as mmseg would read it, and what is reported where it is decoded instead.
DECODED_CODES = {
    'mask-in-color': 'mask-gray-as-color',
    'mask-not-8-bit': 'mask-instance-ids',
    'unreadable-mask': 'mask-array',
    'mask-lossy-format': 'mask-thresholded',
}


class MaskEncoding(NamedTuple):
    """How the values of mask files become labels.

    Attributes:
        colors (Sequence[Sequence[int]] | None): RGB color of each label; None where no table is known.
        ignores_other_colors (bool): whether colors that are not among them are ignored.
        threshold (int | None): gray value from which on a pixel is label 1, others are 0.
        panoptic (Mapping[str, str] | None): files from `panoptic.panoptic_json_files`, if values are ids of segments.
    """

    colors: Sequence[Sequence[int]] | None = None
    ignores_other_colors: bool = False
    threshold: int | None = None
    panoptic: Mapping[str, str] | None = None


def is_decodable(path: str | os.PathLike, info: MaskInfo, encoding: MaskEncoding) -> bool:
    """Return whether a mask that mmseg cannot read can be decoded, or is to be thresholded."""
    if encoding.panoptic:
        return True
    if encoding.threshold is not None:
        return info.problem is None or info.problem in DECODED_CODES
    is_array = os.fspath(path).lower().endswith(ARRAY_SUFFIX)
    return info.problem in ('mask-in-color', 'mask-not-8-bit') or (is_array and info.problem == 'unreadable-mask')


def inspect_encoded(path: str | os.PathLike, encoding: MaskEncoding) -> MaskInfo:
    """Decode a mask, and count its labels and the colors that are in no table."""
    try:
        labels, other_colors = decode_mask(path, encoding)
    except Exception as error:  # a broken file can fail in any way
        return MaskInfo(problem=mask_problem(error))
    if 1 in labels.shape:
        return MaskInfo(problem='mask-single-row')
    other_colors = {} if encoding.ignores_other_colors else other_colors
    return MaskInfo(labels.shape[1], labels.shape[0], count_values(labels), other_colors=other_colors)


def decode_mask(path: str | os.PathLike, encoding: MaskEncoding) -> tuple[np.ndarray, dict[tuple, int]]:
    """Read a mask of any encoding.

    Args:
        path: path of the file.
        encoding: encoding of its values.

    Returns:
        Labels (H, W) of uint8, and the number of pixels of each color that is not in the table; these are 255.

    Raises:
        DataError: the values cannot become labels.
        OSError: the file cannot be read.
    """
    if encoding.panoptic:
        return decode_segments(path, encoding.panoptic), {}
    values = read_values(path, allow_lossy=encoding.threshold is not None)
    if encoding.threshold is not None:
        if values.ndim == 3 and np.ptp(values, axis=2).max(initial=0) > MAX_GRAY_SPREAD:
            raise DataError('mask-not-gray')
        gray = values if values.ndim == 2 else values.mean(2)
        return (gray >= encoding.threshold).astype(np.uint8), {}
    if values.ndim == 2:
        return _fold_instance_ids(values), {}
    if encoding.colors is not None:
        return _match_colors(values, encoding.colors)
    if (values == values[..., :1]).all():
        return _fold_instance_ids(values[..., 0]), {}
    raise DataError('mask-in-color')


def read_values(path: str | os.PathLike, allow_lossy: bool = False) -> np.ndarray:
    """Read a mask as it is stored.

    Args:
        path: path of the file.
        allow_lossy: whether it may be compressed with loss.

    Returns:
        (H, W) of integers, or (H, W, 3) RGB.

    Raises:
        DataError: it is too large, lossy, or of fractions.
        OSError: it cannot be read.
    """
    if os.fspath(path).lower().endswith(ARRAY_SUFFIX):
        with open_regular(path, MAX_BYTES) as file:
            values = _as_image(np.load(file, allow_pickle=False))
    else:
        with open_mask(path, allow_lossy) as image:
            is_color = image.mode not in ('1', 'L', 'P') and not image.mode.startswith(('I', 'F'))
            values = np.asarray(image.convert('RGB') if is_color else image)
    if values.shape[0] * values.shape[1] > MAX_PIXELS:
        raise DataError('mask-too-large')
    if not np.issubdtype(values.dtype, np.integer):
        if values.dtype != bool and not (values == np.rint(values)).all():
            raise DataError('mask-not-8-bit')
        values = values.astype(np.int64)
    return values


def _as_image(array: np.ndarray) -> np.ndarray:
    """Return an array as (H, W) or (H, W, 3)."""
    array = array.squeeze() if array.ndim > 2 else array
    if array.ndim == 3 and array.shape[0] == 3 != array.shape[2]:
        array = np.moveaxis(array, 0, 2)
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] != 3):
        raise DataError('unreadable-mask')
    return array


def _fold_instance_ids(values: np.ndarray) -> np.ndarray:
    """Return labels of at most 255: of class * 1000 + number the class; -1 is ignored, as in Cityscapes."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if low < 0:
        values = np.where(values == -1, IGNORE_INDEX, values)
    if high > IGNORE_INDEX:
        values = np.where(values >= INSTANCE_FACTOR, values // INSTANCE_FACTOR, values)
    if values.size and not 0 <= values.min() <= values.max() <= IGNORE_INDEX:
        raise DataError('mask-not-8-bit')
    return values.astype(np.uint8)


def _match_colors(pixels: np.ndarray, colors: Sequence) -> tuple[np.ndarray, dict[tuple, int]]:
    """Return the label of each color (H, W), and the pixels of those without one."""
    shifts = np.array([2**16, 2**8, 1])
    table, codes = np.array(colors, np.int64) @ shifts, pixels.astype(np.int64) @ shifts
    order = np.argsort(table)
    nearest = order[np.searchsorted(table, codes, sorter=order).clip(max=len(table) - 1)]
    has_label = table[nearest] == codes
    other_codes, counts = np.unique(codes[~has_label], return_counts=True)
    other_colors = {(c >> 16, c >> 8 & 255, c & 255): n for c, n in zip(other_codes.tolist(), counts.tolist())}
    return np.where(has_label, nearest, IGNORE_INDEX).astype(np.uint8), other_colors


def convert_masks(data: CheckedDataset, folder: str | os.PathLike) -> None:
    """Write masks that mmseg cannot read as index PNGs below a folder, which then take their place in the splits."""
    if data.mask_encoding is None:
        return
    top = Path(folder, MASKS_DIR).absolute()
    shutil.rmtree(top, ignore_errors=True)
    targets = {}
    for split, pairs in data.splits.items():
        for number, pair in enumerate(pairs):
            target = top / split / f'{number:06d}_{Path(pair[1]).stem}.png'
            targets[os.path.join(data.root, pair[1]), target] = pair
        (top / split).mkdir(parents=True)
    encoding = MaskEncoding(**data.mask_encoding)

    def convert(paths: tuple[str, Path]) -> None:
        Image.fromarray(decode_mask(paths[0], encoding)[0]).save(paths[1])

    inspect_all(convert, targets, 'segmentation masks, to convert them')
    for (_, target), pair in targets.items():
        pair[1] = str(target)
    data.watched_paths.append(str(top))
