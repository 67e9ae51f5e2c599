"""All images and label maps of a data set read once, side by side: what is wrong with the files themselves."""

import hashlib
import io
import os
import sys
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np
from mmengine.utils import ProgressBar
from PIL import Image, UnidentifiedImageError

ORIENTATION, SWAPPED = 274, (5, 6, 7, 8)  # EXIF's tag, and its values that swap width and height
ENDINGS = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.jpe', '.jp2', '.ppm', '.pgm', '.pbm')


class Seen(NamedTuple):
    """An image file: its size as training reads it, whether EXIF swapped its width and height, a hash of its bytes;
    `problem` is a kind of report.KINDS where it cannot be read."""

    width: int = 0
    height: int = 0
    turned: bool = False
    digest: str = ''
    problem: str | None = None


class Labels(NamedTuple):
    """A label map: its size, how many pixels have each value, as mmseg reads it; `problem` as in Seen."""

    width: int = 0
    height: int = 0
    counts: np.ndarray | None = None
    palette: bool = False
    problem: str | None = None


def look(path: str) -> Seen:
    """Read an image as training does, and find out what is wrong where that fails."""
    try:
        with open(path, 'rb') as file:
            data = file.read()
    except OSError:
        return Seen(problem='missing image')
    if not data:
        return Seen(problem='empty file')
    flag, size, swaps = cv2.IMREAD_COLOR, None, False
    try:
        image = Image.open(io.BytesIO(data))
        swaps = image.getexif().get(ORIENTATION) in SWAPPED
        if image.format == 'JPEG':  # an eighth of the size is decoded in a third of the time, from all of the file
            flag, size = cv2.IMREAD_REDUCED_COLOR_8, image.size
            image.draft('L', (image.width // 8, image.height // 8))
            image.load()  # some versions of OpenCV fill up what is cut off and say nothing
    except (UnidentifiedImageError, Image.DecompressionBombError):
        pass  # OpenCV may know what it is
    except Exception:  # a broken file can fail in any way
        return Seen(problem='image cut short')
    pixels = _decoded(data, flag)
    if pixels is None:
        return Seen(problem=_why(data))
    stored = _decoded(data, flag | cv2.IMREAD_IGNORE_ORIENTATION) if swaps else pixels  # some formats are not turned
    turned = stored is not None and stored.shape != pixels.shape
    size = size[:: -1 if turned else 1] if size else pixels.shape[1::-1]
    return Seen(*size, turned, hashlib.blake2b(data, digest_size=16).hexdigest())


def look_at_labels(path: str) -> Labels:
    """Read a label map as mmseg does, by Pillow, without turning it."""
    try:
        with Image.open(path) as image:
            labels, palette = np.asarray(image).squeeze(), image.mode == 'P'
    except Exception:  # a broken file can fail in any way
        return Labels(problem='unreadable label map')
    if labels.ndim != 2:
        return Labels(problem='label map in colours')
    if labels.dtype.itemsize > 1 and labels.size and not 0 <= labels.min() <= labels.max() <= 255:
        return Labels(problem='labels beyond 255')
    counts = cv2.calcHist([labels.astype(np.uint8)], [0], None, [256], [0, 256]).ravel().astype(int)
    return Labels(labels.shape[1], labels.shape[0], counts, palette)


def look_at_pair(pair: tuple[str, str]) -> tuple[Seen, Labels]:
    """An image and its label map."""
    return look(pair[0]), look_at_labels(pair[1])


def look_at_all(function: Callable, items: Iterable[Hashable], what: str) -> dict:
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


def _decoded(data: bytes, flag: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except cv2.error:
        return None


def _why(data: bytes) -> str:
    """The kind of problem of bytes that OpenCV cannot decode."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
        return 'unreadable image'
    except UnidentifiedImageError:
        return 'not an image'
    except Exception:  # a broken file can fail in any way
        return 'image cut short'
