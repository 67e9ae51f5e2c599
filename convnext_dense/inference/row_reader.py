"""Images read by rows, so that large ones need not fit into memory."""

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from ..channel_files import (
    TIFF_SUFFIXES,
    ChannelReader,
    describe_file,
    explain_errors,
    open_tiff,
    read_bands,
)
from ..errors import UnreadableImageError
from .images import ORIENTATION, ColorType, from_array, read_image

WINDOWED_SUFFIXES = ('.tif', '.tiff', '.png')  # whose files rasterio reads by rows
LARGE = 4096 * 4096  # pixels from which the user is told that an image is read whole
GDAL_CACHE_BYTES = 16 << 20
CHUNK_ROWS = 128  # that are converted at a time


class RowReader:
    """An image in memory.

    Args:
        pixels: (H, W, C) or (H, W), as a model takes them.

    Attributes:
        size (tuple[int, int]): Height and width.
    """

    def __init__(self, pixels: np.ndarray):
        self.pixels, self.size = pixels, pixels.shape[:2]

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Return the rows from `top` to before `bottom`; neither may be smaller than in the call before."""
        return self.pixels[top:bottom]

    def close(self) -> None:
        """Close the file."""


class RasterRowReader(RowReader):
    """A TIFF, GeoTIFF or PNG of which only the rows in use are in memory.

    Args:
        path: Of the file.
        color_type: 'color' or 'grayscale'.

    Raises:
        UnreadableImageError: If it cannot be read.
    """

    def __init__(self, path: str | Path, color_type: str):
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
        self.bands = self._bands(rasterio.enums.ColorInterp.alpha)
        # What was read last: the next rows overlap it, and PNG is read forward only.
        self.buffer, self.top, self.n_rows = self._allocate(0), 0, 0

    def _palette(self) -> np.ndarray | None:
        """Colors (256, 4) of a file of one band whose values are indices."""
        try:
            colors = self.file.colormap(1) if self.file.count == 1 else {}
        except ValueError:
            return None
        return np.array([colors.get(i, (0, 0, 0, 255)) for i in range(256)], np.uint8) if colors else None

    def _bands(self, alpha) -> list[int]:
        """Numbers of the bands that are color or gray, and of the one that is opacity."""
        interpretations = self.file.colorinterp
        colors = [i for i, kind in enumerate(interpretations, 1) if kind != alpha]
        opacity = [i for i, kind in enumerate(interpretations, 1) if kind == alpha]
        colors = colors[:3] if len(colors) >= 3 else colors[:1] * (3 if opacity else 1)
        return colors + opacity[:1]

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Return the rows from `top` to before `bottom`; the next call overwrites them."""
        overlap = self.buffer[top - self.top : self.n_rows]
        if bottom - top > len(self.buffer):
            self.buffer = self._allocate(bottom - top)
        self.buffer[: len(overlap)] = overlap  # an overlap that moves up in its own buffer is copied right by numpy
        for start in range(top + len(overlap), bottom, CHUNK_ROWS):
            end = min(start + CHUNK_ROWS, bottom)
            self.buffer[start - top : end - top] = self._read(start, end)
        self.top, self.n_rows = top, bottom - top
        return self.buffer[: self.n_rows]

    def _allocate(self, n_rows: int) -> np.ndarray:
        channels = () if self.color_type == 'grayscale' else (3,)
        return np.empty((n_rows, self.size[1], *channels), np.uint8)

    def _read(self, top: int, bottom: int) -> np.ndarray:
        window = ((top, bottom), (0, self.size[1]))
        try:
            pixels = np.moveaxis(self.file.read(self.bands, window=window), 0, -1)
        except self.error as error:
            raise UnreadableImageError(f'it is damaged ({error})') from error
        if self.palette is not None:
            pixels = self.palette[pixels[..., 0]]
        return from_array(np.ascontiguousarray(pixels), 'rgb', self.color_type)

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        self.env.__exit__()


class ChannelRowReader(RasterRowReader):
    """A TIFF of any number of channels of which only the rows in use are in memory.

    Args:
        path: Of the file.
        color_type: How its channels are read.

    Raises:
        UnreadableImageError: If it cannot be read, or has other channels than the model takes.
    """

    color_type: ChannelReader

    def _palette(self) -> None:
        """Values are those of the channels."""

    def _bands(self, alpha) -> list[int]:
        return list(self.color_type.channels)

    def _allocate(self, n_rows: int) -> np.ndarray:
        return np.empty((n_rows, self.size[1], len(self.bands)), np.float32)

    def _read(self, top: int, bottom: int) -> np.ndarray:
        with explain_errors():
            pixels = read_bands(self.file, self.bands, ((top, bottom), (0, self.size[1])))
        return self.color_type.normalize(pixels)


def open_rows(image: np.ndarray | str | Path, color_type: ColorType = 'color') -> RowReader:
    """Open an image to be read by rows.

    Args:
        image: The pixels, or the path of a file: TIFF and PNG are read by rows if rasterio is installed, others whole.
        color_type: 'color', 'grayscale' or 'unchanged', or how other channels are read.

    Raises:
        UnreadableImageError: If it cannot be read; the message is the reason alone.
    """
    if isinstance(image, np.ndarray):
        return RowReader(image)
    if isinstance(color_type, ChannelReader):
        return _open_channels(image, color_type)
    if _is_windowed(image) and color_type != 'unchanged' and _is_plain(image):
        return RasterRowReader(image, color_type)
    return RowReader(read_image(image, color_type).pixels)


def _open_channels(path: str | Path, reader: ChannelReader) -> RowReader:
    if Path(path).suffix.lower() not in TIFF_SUFFIXES:
        return RowReader(read_image(path, reader).pixels)
    with explain_errors(), open_tiff(path) as file:
        has_pages = len(file.subdatasets) > 1
        reader.check(describe_file(path))
    return RowReader(read_image(path, reader).pixels) if has_pages else ChannelRowReader(path, reader)


def whole_image_note(path: str | Path) -> str:
    """Return what the user is told of a large image that is read whole; '' for others."""
    if _is_windowed(path):
        return ''
    try:
        with Image.open(path) as image:
            n_pixels = image.width * image.height
    except Image.DecompressionBombError:
        n_pixels = LARGE
    except Exception:  # which reading will name
        return ''
    if n_pixels < LARGE:
        return ''
    if Path(path).suffix.lower() in WINDOWED_SUFFIXES:
        return 'read whole, because rasterio is not installed (pip install rasterio)'
    return 'read whole: only TIFF and PNG can be read by rows'


def _is_windowed(path: str | Path) -> bool:
    return Path(path).suffix.lower() in WINDOWED_SUFFIXES and importlib.util.find_spec('rasterio') is not None


def _is_plain(path: str | Path) -> bool:
    """Whether an image is stored as it is displayed and of a type that `from_array` takes."""
    import rasterio

    try:
        with Image.open(path) as image:
            if image.getexif().get(ORIENTATION, 1) != 1 or (
                getattr(image, 'is_animated', False) and image.format == 'PNG'
            ):
                return False
    except Exception:  # GeoTIFFs of types or sizes that Pillow does not know
        pass
    try:
        with rasterio.open(path) as file:
            return set(file.dtypes) <= {'uint8', 'uint16'}
    except rasterio.errors.RasterioError:
        return False
