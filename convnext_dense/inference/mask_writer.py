"""Segmentation as indexed PNG files."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UsageError
from .colors import Color, class_colors

IGNORED = 255  # value of pixels of classes that were not asked for, as mmseg's ignore_index
MAX_CLASSES = 255  # of an 8-bit PNG


def check_num_classes(n: int) -> None:
    """Raise UsageError where classes do not fit into an 8-bit PNG."""
    if n > MAX_CLASSES:
        raise UsageError(f'the model has {n} classes: an indexed PNG holds at most {MAX_CLASSES}')


def encode_mask(labels: np.ndarray, palette: Sequence[Color]) -> bytes:
    """Encode a segmentation mask as an indexed PNG.

    Args:
        labels: (H, W), the index of each pixel's class.
        palette: RGB color of each class.
    """
    image = Image.fromarray(np.ascontiguousarray(labels.astype(np.uint8, copy=False)))
    values = [value for color in palette for value in color]
    image.putpalette(values + [0] * (768 - len(values)))  # Pillow writes no more bits than a short palette needs
    content = io.BytesIO()
    image.save(content, 'PNG', compress_level=1)
    return content.getvalue()


def write_class_list(path: Path, classes: Sequence[str]) -> None:
    """Write the names of classes, one per line: line n, counted from 0, is what the value n of a mask means."""
    path.write_text(''.join(f'{name}\n' for name in classes), encoding='utf-8')


def mask_colors(classes: Sequence[str], palette: Sequence[Color]) -> list[Color]:
    """Return the palette of masks: the data set's own, or colors that can be told apart."""
    return list(palette) if len(palette) == len(classes) else class_colors(len(classes))
