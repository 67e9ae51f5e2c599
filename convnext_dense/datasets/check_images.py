"""All images and label maps of a data set read once, side by side: what is wrong with the files themselves."""

import hashlib
import io
import os
import sys
import threading
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from mmengine.utils import ProgressBar
from PIL import Image, UnidentifiedImageError

from .files import NotRegularError, PointerError, TooLargeError, open_regular, size_of

MAX_BYTES = 2**30  # of a file
MAX_PIXELS = 178_956_970  # Pillow's own limit, by which mmseg reads label maps
# Beyond these a file is decoded while no other such one is, so that memory does not grow with the number of cores.
LARGE_BYTES, LARGE_PIXELS = 2**26, 2**25
# What Pillow may try to read, where it can: the rest holds no photographs, or has another program read it.
FORMATS = ('JPEG', 'PNG', 'BMP', 'DIB', 'TIFF', 'WEBP', 'JPEG2000', 'PPM', 'GIF', 'AVIF', 'PCX', 'TGA')
Image.init()
FORMATS = tuple(name for name in FORMATS if name in Image.OPEN)
LOSSY_FORMATS = ('JPEG', 'MPO', 'JPEG2000', 'AVIF')
LOSSY_TIFF = ('jpeg', 'tiff_jpeg', 'webp')  # Pillow's words for its compression


class ImageInfo(NamedTuple):
    """An image file: its size as training reads it, whether EXIF swapped its width and height, a hash of its bytes;
    `problem` is a kind of report.KINDS where it cannot be read."""

    width: int = 0
    height: int = 0
    turned: bool = False
    digest: str = ''
    problem: str | None = None


class MaskInfo(NamedTuple):
    """A label map: its size, how many pixels have each value, as mmseg reads it; `problem` as in Seen."""

    width: int = 0
    height: int = 0
    counts: np.ndarray | None = None
    palette: bool = False
    problem: str | None = None


_large = threading.RLock()


def inspect_image(path: str) -> ImageInfo:
    """Read an image as training does, and find out what is wrong where that fails."""
    try:
        with open_regular(path, MAX_BYTES) as file, _one_at_a_time(size_of(file) > LARGE_BYTES):
            return _seen(file.read(size_of(file)))
    except NotRegularError:
        return ImageInfo(problem='not-a-regular-file')
    except TooLargeError:
        return ImageInfo(problem='file-too-large')
    except PointerError:
        return ImageInfo(problem='git-lfs-pointer')
    except OSError:
        return ImageInfo(problem='missing-image')


def _seen(data: bytes) -> ImageInfo:
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
    with _one_at_a_time(size[0] * size[1] > LARGE_PIXELS):
        return _decoded_by_both(data, image)


def _decoded_by_both(data: bytes, image: Image.Image | None) -> ImageInfo:
    """What OpenCV makes of the bytes of an image, that Pillow opened where it knows what it is."""
    stored = image.size if image and image.format != 'TIFF' else None
    is_jpeg = image is not None and image.format == 'JPEG'
    try:
        if is_jpeg:  # an eighth of the size is decoded in a third of the time, from all of the file
            image.draft('L', (image.width // 8, image.height // 8))
        if is_jpeg or (image and image.format == 'PNG'):  # some versions of OpenCV fill up what is cut off, unsaid
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
    turned = stored is not None and size == stored[::-1] != stored  # TIFFs are always turned, in training too
    return ImageInfo(*size, turned, hashlib.blake2b(data, digest_size=16).hexdigest())


def _full_size(reduced: tuple[int, int], stored: tuple[int, int], has_exif: bool) -> tuple[int, int] | None:
    """The size of an image of which an eighth was decoded, and which may be turned; None where that does not tell."""
    upright = tuple(-(-side // 8) for side in stored)
    if reduced == upright and (upright != upright[::-1] or stored == stored[::-1] or not has_exif):
        return stored
    return stored[::-1] if reduced == upright[::-1] != upright else None


def inspect_mask(path: str) -> MaskInfo:
    """Read a label map as mmseg does, by Pillow, without turning it."""
    try:
        with open_regular(path, MAX_BYTES) as file, _one_at_a_time(size_of(file) > LARGE_BYTES):
            return _labels(file)
    except NotRegularError:
        return MaskInfo(problem='not-a-regular-file')
    except TooLargeError:
        return MaskInfo(problem='file-too-large')
    except PointerError:
        return MaskInfo(problem='git-lfs-pointer')
    except Image.DecompressionBombError:
        return MaskInfo(problem='mask-too-large')
    except Exception:  # a broken file can fail in any way
        return MaskInfo(problem='unreadable-mask')


def _labels(file: BinaryIO) -> MaskInfo:
    with Image.open(file, formats=FORMATS) as image, _one_at_a_time(image.width * image.height > LARGE_PIXELS):
        if image.width * image.height > MAX_PIXELS:  # whatever Pillow's limit is set to
            return MaskInfo(problem='mask-too-large')
        if _is_lossy(image, file):
            return MaskInfo(problem='mask-lossy-format')
        labels, palette = np.asarray(image).squeeze(), image.mode == 'P'
        if 1 in image.size:  # which mmseg reads as a list of pixels
            return MaskInfo(problem='mask-single-row')
        if labels.ndim != 2:
            return MaskInfo(problem='mask-in-color' if labels.ndim > 2 else 'unreadable-mask')
        if labels.dtype.itemsize > 1 and labels.size and not 0 <= labels.min() <= labels.max() <= 255:
            return MaskInfo(problem='mask-not-8-bit')
        counts = cv2.calcHist([labels.astype(np.uint8)], [0], None, [256], [0, 256]).ravel().astype(int)
        return MaskInfo(labels.shape[1], labels.shape[0], counts, palette)


def _is_lossy(image: Image.Image, file: BinaryIO) -> bool:
    """Whether the pixels of an image that Pillow opened are no longer those that were written."""
    if image.format == 'WEBP':
        file.seek(0)
        return b'VP8L' not in file.read(size_of(file))
    return image.format in LOSSY_FORMATS or image.info.get('compression') in LOSSY_TIFF


def inspect_pair(pair: tuple[str, str]) -> tuple[ImageInfo, MaskInfo]:
    """An image and its label map."""
    return inspect_image(pair[0]), inspect_mask(pair[1])


def inspect_all(function: Callable, items: Iterable[Hashable], what: str) -> dict:
    """`function` of each item, in as many threads as there are cores: decoding leaves Python alone. A bar on a
    terminal, a line elsewhere."""
    items = list(dict.fromkeys(items))
    print(f'reading {len(items):,} {what}', file=sys.stderr)
    bar = ProgressBar(len(items), file=sys.stderr) if sys.stderr.isatty() and items else None
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    pool = ThreadPoolExecutor(n_threads())
    try:
        found = {}
        for item, seen in zip(items, pool.map(function, items)):
            found[item] = seen
            if bar:
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for thousands of images
        cv2.setNumThreads(before)
    if bar:
        print(file=sys.stderr)
    return found


def n_threads() -> int:
    """As many as this process has cores, at most 16."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1, 16)


def _one_at_a_time(large: bool) -> AbstractContextManager:
    return _large if large else nullcontext()


def _decoded_size(data: bytes, flag: int) -> tuple[int, int] | None:
    """Width and height of what OpenCV decodes, None where it cannot."""
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except cv2.error:
        return None
    return None if pixels is None else pixels.shape[1::-1]


def _decode_failure(data: bytes) -> str:
    """The kind of problem of bytes that OpenCV cannot decode."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
        return 'unreadable-image'
    except UnidentifiedImageError:
        return 'not-an-image'
    except Exception:  # a broken file can fail in any way
        return 'truncated-image'
