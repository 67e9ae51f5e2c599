"""Image files of any number of channels and any type of values: TIFF and GeoTIFF, arrays (.npy), and common formats.

Channels are numbered from 1, as GDAL numbers bands. Values of a channel are normalized by the mean and the standard
deviation that were measured on the training images, as the file is read; pixels without a value become the mean.
"""

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from .errors import UnreadableImageError, UsageError, count

TIFF_SUFFIXES = ('.tif', '.tiff')
ARRAY_SUFFIX = '.npy'
EXTRA = 'multichannel'  # of setup.py, with rasterio
UNKNOWN_FORMAT = 'not recognized as being in a supported file format'  # how GDAL says it, after the path
DISPLAY_RANGE = 2.0  # standard deviations around the mean that a picture shows from black to white


class FileLayout(NamedTuple):
    """What an image file holds; `dtype` is NumPy's name of the type of its values.

    Attributes:
        is_rgb (bool): Whether it is gray or RGB of 8 bits, with or without opacity, as any image viewer reads it.
    """

    height: int
    width: int
    num_channels: int
    dtype: str
    is_rgb: bool = False


class ChannelReader(NamedTuple):
    """How images are read whose channels are not those of RGB.

    Attributes:
        channels (Sequence[int]): Numbers of the channels, from 1, in the order of the model's input.
        mean (Sequence[float]): Of each of these.
        std (Sequence[float]): Likewise.
        num_channels (int): Of the files.
        dtype (str): Of the values in the files.
    """

    channels: Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]
    num_channels: int
    dtype: str

    def read(self, path: str | Path) -> np.ndarray:
        """Read an image, (H, W, C) of float32, normalized.

        Raises:
            UnreadableImageError: If it cannot be read, or has other channels; the message is the reason alone.
        """
        with explain_errors():
            self.check(describe_file(path))
            return self.normalize(read_channels(path, self.channels))

    def check(self, layout: FileLayout) -> None:
        """Raise UnreadableImageError if a file has another number of channels or another type of values."""
        if (layout.num_channels, layout.dtype) != (self.num_channels, self.dtype):
            raise UnreadableImageError(
                f'it has {count(layout.num_channels, "channel")} of {layout.dtype}, the model takes files of '
                f'{self.num_channels} of {self.dtype}'
            )

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """Normalize the values of channels (..., C), in which pixels without a value are not finite."""
        pixels = (pixels - np.float32(self.mean)) / np.float32(self.std)
        return np.nan_to_num(pixels, copy=False, nan=0.0, posinf=0.0, neginf=0.0)


def denormalize(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Return the values (..., C, H, W), of float32, whose normalized ones are given."""
    mean, std = (np.float64(values)[:, None, None] for values in (mean, std))
    return (images * std + mean).astype(np.float32)


def to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Return the first three channels of a normalized image (H, W, C), or the first one: (H, W, 3) of uint8."""
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    pixels = pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, 2)
    scaled = (pixels + DISPLAY_RANGE) * (255 / (2 * DISPLAY_RANGE))
    return np.ascontiguousarray(np.clip(scaled, 0, 255).astype(np.uint8))


def describe_file(path: str | Path) -> FileLayout:
    """Return what an image file holds, by its header.

    Raises:
        UsageError: If it is a TIFF, and rasterio is not installed.
        Exception: If it cannot be read; libraries raise what they like.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ARRAY_SUFFIX:
        array = _load_array(path)
        return FileLayout(*array.shape, str(array.dtype))
    if suffix in TIFF_SUFFIXES:
        with open_tiff(path) as file:
            return _describe_tiff(file)
    pixels = _decode(path)
    return FileLayout(*pixels.shape, str(pixels.dtype), is_rgb=pixels.shape[2] in (1, 3, 4))


def read_channels(path: str | Path, channels: Sequence[int] | None = None) -> np.ndarray:
    """Read channels of an image, by their numbers from 1, or all: (H, W, C) of float32.

    Pixels that the file marks as without a value are NaN.

    Raises:
        UsageError: If it is a TIFF, and rasterio is not installed.
        Exception: If it cannot be read; libraries raise what they like.
    """
    suffix = Path(path).suffix.lower()
    if suffix in TIFF_SUFFIXES:
        with open_tiff(path) as file:
            if len(file.subdatasets) < 2:
                return read_bands(file, channels or range(1, file.count + 1))
            pixels = _read_pages(file)
    else:
        pixels = _load_array(path) if suffix == ARRAY_SUFFIX else _decode(path)
    if channels:
        pixels = pixels[..., [channel - 1 for channel in channels]]
    return np.ascontiguousarray(pixels, np.float32)


@contextmanager
def open_tiff(path: str | Path) -> Iterator:
    """Open a TIFF by rasterio.

    Raises:
        UsageError: If rasterio is not installed.
    """
    if importlib.util.find_spec('rasterio') is None:
        raise UsageError(f"TIFF of other channels than RGB needs rasterio: pip install 'convnext_dense[{EXTRA}]'")
    import rasterio

    with warnings.catch_warnings():
        warnings.simplefilter('ignore', rasterio.errors.NotGeoreferencedWarning)
        file = rasterio.open(path, driver='GTiff')  # other formats may name other files
    try:
        yield file
    finally:
        file.close()


def read_bands(file, channels: Sequence[int], window: tuple | None = None) -> np.ndarray:
    """Read channels of an open TIFF, by their numbers from 1: (H, W, C) of float32, NaN where it has no value.

    A window is the first row and that after the last, first column and that after the last; None for all.
    """
    pixels = np.moveaxis(file.read(list(channels), window=window), 0, -1).astype(np.float32)
    for i, channel in enumerate(channels):
        nodata = file.nodatavals[channel - 1]
        if nodata is not None:
            pixels[pixels[..., i] == np.float32(nodata), i] = np.nan
    return np.ascontiguousarray(pixels)


@contextmanager
def explain_errors() -> Iterator[None]:
    """Context manager that turns what libraries raise for a broken file into UnreadableImageError with the reason."""
    try:
        yield
    except (UsageError, UnreadableImageError):
        raise
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UnreadableImageError('not a valid image' if UNKNOWN_FORMAT in reason else reason) from error
    except Exception as error:
        raise damaged(error) from error


def damaged(error: Exception) -> UnreadableImageError:
    """Return the error of a file whose content made a library raise another one."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return UnreadableImageError(f'it is damaged ({reason})')


def _describe_tiff(file) -> FileLayout:
    dtypes = set(file.dtypes)
    if len(dtypes) > 1:
        raise ValueError(f'its channels have several types: {", ".join(sorted(dtypes))}')
    (dtype,) = dtypes
    if dtype.startswith('complex'):
        raise ValueError('its values are complex numbers')
    if len(file.subdatasets) > 1:
        pages = np.broadcast_to(0, (len(file.subdatasets), file.height, file.width))
        return FileLayout(*_channels_last(pages).shape, dtype, is_rgb=dtype == 'uint8')  # viewers show the first page
    names = [kind.name for kind in file.colorinterp]
    is_rgb = dtype == 'uint8' and (file.count in (1, 3) or (file.count in (2, 4) and names[-1] == 'alpha'))
    return FileLayout(file.height, file.width, file.count, dtype, is_rgb)


def _read_pages(file) -> np.ndarray:
    pages = []
    # Names are GTIFF_DIR:NUMBER:PATH, and sorted as texts.
    for name in sorted(file.subdatasets, key=lambda name: int(name.split(':')[1])):
        with open_tiff(name) as page:
            if (page.count, page.height, page.width) != (1, file.height, file.width):
                raise ValueError('its pages differ in size or have several channels')
            pages.append(page.read(1))
    return _channels_last(np.stack(pages))


def _load_array(path: str | Path) -> np.ndarray:
    """Return an array (H, W, C), in memory as far as it is read."""
    array = np.load(path, mmap_mode='r', allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError('an image is an array of two or three dimensions')
    if array.dtype.kind not in 'buif':
        raise ValueError(f'its values are {array.dtype}, not numbers')
    return _channels_last(array)


def _channels_last(array: np.ndarray) -> np.ndarray:
    """Return an array as (H, W, C); the first axis is that of the channels if it is shorter than the last one."""
    if array.ndim == 2:
        return array[..., None]
    return np.moveaxis(array, 0, 2) if array.shape[0] < array.shape[2] else array


def _decode(path: str | Path) -> np.ndarray:
    """Decode a file of a common format: gray, RGB or RGBA as (H, W, C), rotated as its EXIF says."""
    data = np.fromfile(path, np.uint8)
    is_png = data[:4].tobytes() == b'\x89PNG'  # which may have a fourth channel
    pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED if is_png else cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH)
    if pixels is None:
        raise ValueError('it is not an image')
    if pixels.ndim == 2:
        return pixels[..., None]
    return pixels[..., [2, 1, 0, *range(3, pixels.shape[2])]] if pixels.shape[2] >= 3 else pixels
