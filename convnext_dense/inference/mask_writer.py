"""Write segmentation masks as indexed PNG files."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from .colors import Color, class_colors

IGNORED = 255  # value of pixels of other classes than the requested ones; mmseg's ignore_index
MAX_CLASSES = 255  # classes in an 8-bit PNG


def encode_mask(labels: np.ndarray, palette: Sequence[Color]) -> bytes:
    """Encode class indices (H, W) as an indexed PNG with the RGB palette of the classes."""
    image = Image.fromarray(np.ascontiguousarray(labels.astype(np.uint8, copy=False)))
    values = [value for color in palette for value in color]
    image.putpalette(values + [0] * (768 - len(values)))  # Pillow writes no more bits than a short palette needs
    content = io.BytesIO()
    image.save(content, 'PNG', compress_level=1)
    return content.getvalue()


def mask_colors(classes: Sequence[str], palette: Sequence[Color]) -> list[Color]:
    """Return the palette of masks: that of the data set, or distinguishable colors."""
    return list(palette) if len(palette) == len(classes) else class_colors(len(classes))
