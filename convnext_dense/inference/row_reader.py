"""Read images by rows, so that large images need not fit into memory."""

import importlib.util
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ..channel_files import (
    TIFF_SUFFIXES,
    ChannelReader,
    damaged,
    describe_file,
    explain_errors,
    open_tiff,
    read_bands,
    to_rgb,
)
from ..errors import UnreadableImageError
from .drawing import picture_size, to_bgr
from .images import ORIENTATION, ColorType, from_array, read_image

WINDOWED_SUFFIXES = ('.tif', '.tiff', '.png')  # formats that rasterio reads by rows
LARGE = 4096 * 4096  # pixels from which the user is told that an image is read as a whole
GDAL_CACHE_BYTES = 16 << 20
CHUNK_ROWS = 128  # rows that are converted at a time
REDUCED_ROWS = 256  # rows of a reduced image that are computed at a time


class RowReader:
    """Reads rows of an image in memory.

    Args:
        pixels: (H, W, C) or (H, W), in the form of `read_image`.

    Attributes:
        size (tuple[int, int]): Height and width in pixels.
    """

    def __init__(self, pixels: np.ndarray):
        self.pixels, self.size = pixels, pixels.shape[:2]

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Return rows `top` to `bottom` (exclusive); neither may be smaller than in the previous call."""
        return self.pixels[top:bottom]

    def close(self) -> None:
        """Close the file."""


class RasterRowReader(RowReader):
    """Reads rows of a TIFF, GeoTIFF or PNG, with only the rows in use in memory.

    Raises:
        UnreadableImageError: If the file cannot be read.
    """

    def __init__(self, path: str | Path, color_type: ColorType):
        import rasterio

        self.color_type, self.error = color_type, rasterio.errors.RasterioError
        self.env = rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_BYTES).__enter__()
        try:
            self.file = rasterio.open(path)
            self.palette = self._palette()
        except self.error as error:
            self.env.__exit__()
            raise UnreadableImageError(str(error)) from error
        self.size = self.file.height, self.file.width
        if isinstance(color_type, ChannelReader):
            self.bands, channels, dtype = list(color_type.channels), (len(color_type.channels),), np.float32
        else:
            self.bands = self._color_bands(rasterio.enums.ColorInterp.alpha)
            channels, dtype = () if color_type == 'grayscale' else (3,), np.uint8
        # The rows that were read last: the next rows overlap them, and PNG can only be read forward.
        self.buffer, self.top, self.n_rows = np.empty((0, self.size[1], *channels), dtype), 0, 0

    def _palette(self) -> np.ndarray | None:
        """Colors (256, 4) of a file with one band of palette indices; None for other files."""
        try:
            colors = self.file.colormap(1) if self.file.count == 1 else {}
        except ValueError:
            return None
        return np.array([colors.get(i, (0, 0, 0, 255)) for i in range(256)], np.uint8) if colors else None

    def _color_bands(self, alpha) -> list[int]:
        """Numbers of the color or gray bands, and of the alpha band if there is one."""
        interpretations = self.file.colorinterp
        colors = [i for i, kind in enumerate(interpretations, 1) if kind != alpha]
        opacity = [i for i, kind in enumerate(interpretations, 1) if kind == alpha]
        colors = colors[:3] if len(colors) >= 3 else colors[:1] * (3 if opacity else 1)
        return colors + opacity[:1]

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Return rows `top` to `bottom` (exclusive); the next call overwrites them."""
        overlap = self.buffer[top - self.top : self.n_rows]
        if bottom - top > len(self.buffer):
            self.buffer = np.empty((bottom - top, *self.buffer.shape[1:]), self.buffer.dtype)
        self.buffer[: len(overlap)] = overlap  # NumPy handles source and target that overlap
        for start in range(top + len(overlap), bottom, CHUNK_ROWS):
            end = min(start + CHUNK_ROWS, bottom)
            self.buffer[start - top : end - top] = self._read(start, end)
        self.top, self.n_rows = top, bottom - top
        return self.buffer[: self.n_rows]

    def _read(self, top: int, bottom: int) -> np.ndarray:
        window = ((top, bottom), (0, self.size[1]))
        if isinstance(self.color_type, ChannelReader):
            with explain_errors():
                return self.color_type.normalize(read_bands(self.file, self.bands, window))
        try:
            pixels = np.moveaxis(self.file.read(self.bands, window=window), 0, -1)
        except self.error as error:
            raise damaged(error) from error
        if self.palette is not None:
            pixels = self.palette[pixels[..., 0]]
        return from_array(np.ascontiguousarray(pixels), 'rgb', self.color_type)

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        self.env.__exit__()


def open_rows(image: np.ndarray | str | Path, color_type: ColorType = 'color') -> RowReader:
    """Open an image to be read by rows.

    Args:
        image: The pixels, or the path of a file. TIFF and PNG are read by rows if rasterio is installed, other formats
            as a whole.
        color_type: 'color', 'grayscale' or 'unchanged', or the reader of other channels.

    Raises:
        UnreadableImageError: If the file cannot be read; the message is the reason without the path.
    """
    if isinstance(image, np.ndarray):
        return RowReader(image)
    if isinstance(color_type, ChannelReader):
        by_rows = _has_bands(image, color_type)
    else:
        by_rows = _is_windowed(image) and color_type != 'unchanged' and _is_plain(image)
    return RasterRowReader(image, color_type) if by_rows else RowReader(read_image(image, color_type).pixels)


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
        for top in range(0, small_height, REDUCED_ROWS):
            bottom = min(top + REDUCED_ROWS, small_height)
            rows = reader.read(top * height // small_height, -(-bottom * height // small_height))
            cv2.resize(show(rows), (small_width, bottom - top), result[top:bottom], interpolation=cv2.INTER_AREA)
        return result, reader.size
    finally:
        reader.close()


def whole_image_note(path: str | Path) -> str:
    """Return a note for the user on a large image that is read as a whole; '' for other images."""
    if _is_windowed(path):
        return ''
    try:
        with Image.open(path) as image:
            n_pixels = image.width * image.height
    except Image.DecompressionBombError:
        n_pixels = LARGE
    except Exception:  # reading the image will report it
        return ''
    if n_pixels < LARGE:
        return ''
    if Path(path).suffix.lower() in WINDOWED_SUFFIXES:
        return 'read as a whole, because rasterio is not installed (pip install rasterio)'
    return 'read as a whole: only TIFF and PNG can be read by rows'


def _is_windowed(path: str | Path) -> bool:
    return Path(path).suffix.lower() in WINDOWED_SUFFIXES and importlib.util.find_spec('rasterio') is not None


def _has_bands(path: str | Path, reader: ChannelReader) -> bool:
    """Whether a file is a TIFF with its channels, those that a reader expects, on one page."""
    if Path(path).suffix.lower() not in TIFF_SUFFIXES:
        return False
    with explain_errors(), open_tiff(path) as file:
        reader.check(describe_file(path))
        return len(file.subdatasets) < 2


def _is_plain(path: str | Path) -> bool:
    """Whether an image is stored upright and has a data type that `from_array` accepts."""
    import rasterio

    try:
        with Image.open(path) as image:
            if image.getexif().get(ORIENTATION, 1) != 1 or (
                getattr(image, 'is_animated', False) and image.format == 'PNG'
            ):
                return False
    except Exception:  # GeoTIFFs with data types or sizes that Pillow does not support
        pass
    try:
        with rasterio.open(path) as file:
            return set(file.dtypes) <= {'uint8', 'uint16'}
    except rasterio.errors.RasterioError:
        return False
