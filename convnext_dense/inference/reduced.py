"""Read large images at the reduced size at which predictions are drawn."""

from pathlib import Path

import cv2
import numpy as np

from ..channel_files import ChannelReader, to_rgb
from .drawing import picture_size, to_bgr
from .images import ColorType
from .row_reader import open_rows

ROWS = 256  # rows of the picture that are computed at a time


def read_reduced(path: str | Path, color_type: ColorType = 'color') -> tuple[np.ndarray, tuple[int, int]]:
    """Read an image at the size at which predictions are drawn, by rows if the file format allows it.

    Args:
        path: Path of the file.
        color_type: 'color', 'grayscale' or 'unchanged', or the reader of other channels.

    Returns:
        The image (h, w, 3), BGR of uint8, and the original size (H, W).

    Raises:
        UnreadableImageError: If the file cannot be read; the message is the reason without the path.
    """
    reader, show = open_rows(path, color_type), to_bgr
    if isinstance(color_type, ChannelReader):
        show = lambda rows: np.ascontiguousarray(to_rgb(rows)[..., ::-1])  # noqa: E731
    try:
        height, (small_height, small_width) = reader.size[0], picture_size(reader.size)
        if small_height >= height:
            return show(reader.read(0, height)), reader.size
        result = np.empty((small_height, small_width, 3), np.uint8)
        for top in range(0, small_height, ROWS):
            bottom = min(top + ROWS, small_height)
            rows = reader.read(top * height // small_height, -(-bottom * height // small_height))
            cv2.resize(show(rows), (small_width, bottom - top), result[top:bottom], interpolation=cv2.INTER_AREA)
        return result, reader.size
    finally:
        reader.close()
