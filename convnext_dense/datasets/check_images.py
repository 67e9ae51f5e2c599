"""Checks of image and mask files: each is read once, in several threads, as training reads it."""

import hashlib
import io
import os
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from mmengine.utils import track_iter_progress
from PIL import Image, UnidentifiedImageError

from .files import DataError, open_regular, size_of

IGNORE_INDEX = 255  # label of pixels that mmseg ignores
MAX_BYTES = 2**30  # largest file of an image or a mask
MAX_PIXELS = 178_956_970  # Pillow's own limit, which also applies when mmseg reads masks
# Larger files are decoded one at a time, so that memory does not grow with the number of cores.
LARGE_BYTES, LARGE_PIXELS = 2**26, 2**25
# Pillow may try these formats; its other ones hold no photographs or start another program.
FORMATS = ('JPEG', 'PNG', 'BMP', 'DIB', 'TIFF', 'WEBP', 'JPEG2000', 'PPM', 'GIF', 'AVIF', 'PCX', 'TGA')
Image.init()
FORMATS = tuple(name for name in FORMATS if name in Image.OPEN)
UNREADABLE = 'unreadable-mask'  # code of a mask that cannot be read if no other code applies
LOSSY_FORMATS = ('JPEG', 'MPO', 'JPEG2000', 'AVIF')
LOSSY_TIFF = ('jpeg', 'tiff_jpeg', 'webp')  # compressions of TIFF as Pillow names them


class ImageInfo(NamedTuple):
    """What an image file is.

    Attributes:
        width (int): width in pixels as training reads the image: rotated as EXIF says.
        height (int): height in pixels, likewise.
        exif_swapped (bool): whether that rotation swapped width and height.
        digest (str): hash of the file's bytes.
        problem (str | None): a code of `diagnostics.RULES` if the file cannot be read.
        moments (object | None): `channels.Moments` of its values, of images that are not read as RGB.
        detail (str): more about the problem.
    """

    width: int = 0
    height: int = 0
    exif_swapped: bool = False
    digest: str = ''
    problem: str | None = None
    moments: object | None = None
    detail: str = ''

    def describe(self, name: str) -> str:
        """Return the name of the image and what more is known of its problem."""
        return f'{name}: {self.detail}' if self.detail else name

    def oriented_size(self, apply_exif: bool) -> tuple[int, int]:
        """Return width and height as they are read with or without EXIF rotation."""
        size = (self.width, self.height)
        return size[::-1] if self.exif_swapped and not apply_exif else size


class MaskInfo(NamedTuple):
    """What the file of a segmentation mask is.

    Attributes:
        width (int): width in pixels as mmseg reads the mask: not rotated.
        height (int): height in pixels, likewise.
        counts (np.ndarray | None): number of pixels of each label value, (256,).
        palette (bool): whether the file has a palette.
        problem (str | None): a code of `diagnostics.RULES` if the file cannot be read.
        other_colors (dict | None): number of pixels of each RGB color that is not in the table of a color-coded mask.
    """

    width: int = 0
    height: int = 0
    counts: np.ndarray | None = None
    palette: bool = False
    problem: str | None = None
    other_colors: dict | None = None


_large = threading.RLock()


def inspect_image(path: str | os.PathLike) -> ImageInfo:
    """Read an image as training does, and find out what is wrong if that fails."""
    try:
        with open_regular(path, MAX_BYTES) as file, one_at_a_time(size_of(file) > LARGE_BYTES):
            return _inspect_bytes(file.read(size_of(file)))
    except OSError as error:
        return ImageInfo(problem=getattr(error, 'code', 'missing-image'))


def _inspect_bytes(data: bytes) -> ImageInfo:
    if not data:
        return ImageInfo(problem='empty-file')
    image, size = None, (MAX_PIXELS, 1)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        size = image.size
    except UnidentifiedImageError:
        pass  # OpenCV may know what it is
    except Image.DecompressionBombError:
        return ImageInfo(problem='image-too-large')
    except Exception:  # a broken file can fail in any way
        return ImageInfo(problem='truncated-image')
    if size[0] * size[1] > MAX_PIXELS:  # whatever Pillow's limit is set to
        return ImageInfo(problem='image-too-large')
    with one_at_a_time(size[0] * size[1] > LARGE_PIXELS):
        return _decode_with_both(data, image)


def _decode_with_both(data: bytes, image: Image.Image | None) -> ImageInfo:
    """Decode an image with OpenCV, as training does, and with Pillow, which detects truncated files."""
    stored = image.size if image and image.format != 'TIFF' else None
    is_jpeg = image is not None and image.format == 'JPEG'
    try:
        if is_jpeg:  # decoding at an eighth of the size takes a third of the time, but reads the whole file
            image.draft('L', (image.width // 8, image.height // 8))
        if is_jpeg or (image and image.format == 'PNG'):  # some versions of OpenCV silently fill up what is cut off
            image.load()
        if image:
            image.close()
    except Exception:  # a broken file can fail in any way
        return ImageInfo(problem='truncated-image')
    size = _decoded_size(data, cv2.IMREAD_REDUCED_COLOR_8 if is_jpeg else cv2.IMREAD_COLOR)
    if size is None:
        return ImageInfo(problem=_decode_failure(data))
    if is_jpeg:
        size = _full_size(size, stored, b'Exif' in data) or _decoded_size(data, cv2.IMREAD_COLOR) or stored
    elif image is None:
        stored = _decoded_size(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if size[0] * size[1] > MAX_PIXELS:
        return ImageInfo(problem='image-too-large')
    exif_swapped = stored is not None and size == stored[::-1] != stored  # unknown for TIFFs, which are always rotated
    return ImageInfo(*size, exif_swapped, hashlib.blake2b(data, digest_size=16).hexdigest())


def _full_size(reduced: tuple[int, int], stored: tuple[int, int], has_exif: bool) -> tuple[int, int] | None:
    """Return the size of an image that was decoded at an eighth and may be rotated; None if that is ambiguous."""
    upright = tuple(-(-side // 8) for side in stored)
    if reduced == upright and (upright != upright[::-1] or stored == stored[::-1] or not has_exif):
        return stored
    return stored[::-1] if reduced == upright[::-1] != upright else None


def inspect_mask(path: str | os.PathLike) -> MaskInfo:
    """Read a segmentation mask as mmseg does: with Pillow, without EXIF rotation."""
    try:
        with open_mask(path) as image:
            labels, palette = np.asarray(image).squeeze(), image.mode == 'P'
            if 1 in image.size:  # mmseg would read it as a list of pixels
                raise DataError('mask-single-row')
            if labels.ndim != 2:
                raise DataError('mask-in-color' if labels.ndim > 2 else 'unreadable-mask')
            if labels.dtype.itemsize > 1 and labels.size and not 0 <= labels.min() <= labels.max() <= 255:
                raise DataError('mask-not-8-bit')
            return MaskInfo(labels.shape[1], labels.shape[0], count_values(labels.astype(np.uint8)), palette)
    except Exception as error:  # a broken file can fail in any way
        return MaskInfo(problem=mask_problem(error))


@contextmanager
def open_mask(
    path: str | os.PathLike, allow_lossy: bool = False, formats: Sequence[str] | None = None
) -> Iterator[Image.Image]:
    """Open an image whose exact values count, by Pillow; large ones are open one at a time.

    Args:
        path: path of the file.
        allow_lossy: whether it may be compressed with loss.
        formats: formats that the file may have, as Pillow names them (default: `FORMATS`).

    Raises:
        DataError: it is too large, or compressed with loss.
        Exception: it cannot be read; Pillow raises what it likes.
    """
    with (
        open_regular(path, MAX_BYTES) as file,
        one_at_a_time(size_of(file) > LARGE_BYTES),
        Image.open(file, formats=formats or FORMATS) as image,
        one_at_a_time(image.width * image.height > LARGE_PIXELS),
    ):
        if image.width * image.height > MAX_PIXELS:  # whatever Pillow's limit is set to
            raise DataError('mask-too-large')
        if not allow_lossy and _is_lossy(image, file):
            raise DataError('mask-lossy-format')
        yield image


def mask_problem(error: Exception) -> str:
    """Return the code of what is wrong with a mask that cannot be read."""
    return 'mask-too-large' if isinstance(error, Image.DecompressionBombError) else getattr(error, 'code', UNREADABLE)


def count_values(labels: np.ndarray) -> np.ndarray:
    """Return how many pixels of a mask (H, W) of uint8 have each value, (256,)."""
    return cv2.calcHist([labels], [0], None, [256], [0, 256]).ravel().astype(int)


def _is_lossy(image: Image.Image, file: BinaryIO) -> bool:
    """Return whether an image that Pillow has opened is compressed with loss."""
    if image.format == 'WEBP':
        file.seek(0)
        return b'VP8L' not in file.read(size_of(file))
    return image.format in LOSSY_FORMATS or image.info.get('compression') in LOSSY_TIFF


def decide_exif_handling(annotated_sizes: Iterable[tuple[ImageInfo, tuple]]) -> bool:
    """Return whether images are to be rotated as EXIF says, which is what training does by default.

    They are not if annotated sizes (width and height) fit images as they are stored, and none fits a rotated one.
    """
    rotated = [(info, size) for info, size in annotated_sizes if info.exif_swapped and info.width != info.height]
    fits_rotated = any(size == info.oriented_size(True) for info, size in rotated)
    return fits_rotated or not any(size == info.oriented_size(False) for info, size in rotated)


def inspect_all(function: Callable, items: Iterable[Hashable], item_name: str) -> dict:
    """Return the result of a function for each item, in one thread per core (decoding releases the GIL).

    A progress bar (on a terminal) or a line names the items as `item_name`.
    """
    items = list(dict.fromkeys(items))
    print(f'reading {len(items):,} {item_name}', file=sys.stderr)
    num_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    pool = ThreadPoolExecutor(n_threads())
    try:
        results = zip(items, pool.map(function, items))
        if items and sys.stderr.isatty():
            results = track_iter_progress((results, len(items)), file=sys.stderr)
        return dict(results)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for thousands of images
        cv2.setNumThreads(num_threads)


def n_threads() -> int:
    """Return the number of cores that this process may use, at most 16."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1, 16)


def one_at_a_time(large: bool) -> AbstractContextManager:
    """Return a context manager in which only one thread at a time is, if `large`."""
    return _large if large else nullcontext()


def _decoded_size(data: bytes, flag: int) -> tuple[int, int] | None:
    """Return width and height of what OpenCV decodes, None if it cannot."""
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except cv2.error:
        return None
    return None if pixels is None else pixels.shape[1::-1]


def _decode_failure(data: bytes) -> str:
    """Return the code of the problem of an image that OpenCV cannot decode."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
        return 'unreadable-image'
    except UnidentifiedImageError:
        return 'not-an-image'
    except Exception:  # a broken file can fail in any way
        return 'truncated-image'
