"""Images whose channels are not those of RGB: which data sets hold them, and what their values are."""

import hashlib
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..channel_files import (
    ARRAY_SUFFIX,
    TIFF_SUFFIXES,
    ChannelReader,
    FileLayout,
    describe_file,
    explain_errors,
    read_channels,
)
from ..errors import UnreadableImageError, UsageError
from .check_images import LARGE_PIXELS, MAX_BYTES, MAX_PIXELS, ImageInfo, inspect_all, inspect_image, one_at_a_time
from .diagnostics import Report
from .files import open_regular, size_of

MAX_PROBED = 20  # images whose headers are read to find one that can be read
HASH_BYTES = 2**20  # at a time
AUTO = 'auto'  # channels are found, not those of a trained model


class Moments(NamedTuple):
    """Moments of the values of each channel.

    Attributes:
        count (np.ndarray): number of values, (C,).
        mean (np.ndarray): (C,).
        m2 (np.ndarray): sum of the squared distances from the mean, (C,).
    """

    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray

    @classmethod
    def of_pixels(cls, pixels: np.ndarray) -> 'Moments':
        """Compute the moments of an image (H, W, C); values that are not finite do not count."""
        rows = []
        for channel in np.moveaxis(pixels, -1, 0):
            values = channel[np.isfinite(channel)].astype(np.float64)
            rows.append((values.size, values.mean(), values.var() * values.size) if values.size else (0, 0.0, 0.0))
        return cls(*np.array(rows).T)

    def add(self, other: 'Moments') -> 'Moments':
        """Return the moments of the values of both (Chan et al., 1979)."""
        count = self.count + other.count
        share, delta = other.count / np.maximum(count, 1), other.mean - self.mean
        return Moments(count, self.mean + delta * share, self.m2 + other.m2 + delta**2 * self.count * share)


def find_layout(paths: Iterable[str | Path], channels: Sequence[int] | None) -> FileLayout | None:
    """Find out what the first image that can be read holds.

    Args:
        paths: of the images.
        channels: numbers of channels that are asked for; None to take all of images that are not RGB.

    Returns:
        The layout; None if no image can be read, or if their format is one of RGB and no channels are asked for.

    Raises:
        UsageError: there are fewer channels than asked for, or rasterio is needed and not installed.
    """
    for path in islice(paths, MAX_PROBED):
        if channels is None and Path(path).suffix.lower() not in (*TIFF_SUFFIXES, ARRAY_SUFFIX):
            return None
        try:
            with open_regular(path, MAX_BYTES), explain_errors():
                layout = describe_file(path)
        except UsageError:
            if channels is None and inspect_image(path).problem is None:
                return None  # OpenCV reads it as RGB
            raise
        except (OSError, UnreadableImageError):
            continue  # which the check reports
        if channels is not None and max(channels) > layout.num_channels:
            raise UsageError(f'--channels {max(channels)}: {path} has {layout.num_channels}')
        return layout
    return None


def inspect_images(
    paths: Sequence, layout: FileLayout | None, channels: Sequence[int] | None
) -> dict[str | Path, ImageInfo]:
    """Inspect images as `inspect_image`, or with the moments of their channels.

    Args:
        paths: of the files.
        layout: that all have to have; None for RGB.
        channels: numbers of those that are used; None for all.
    """
    inspect = inspect_image if layout is None else partial(inspect_channels, layout=layout, channels=channels)
    return inspect_all(inspect, paths, 'images')


def inspect_channels(path: str | Path, layout: FileLayout, channels: Sequence[int] | None) -> ImageInfo:
    """Read channels of an image and compute their moments; a file of another layout is a problem."""
    try:
        with open_regular(path, MAX_BYTES) as file, explain_errors():
            if not size_of(file):
                return ImageInfo(problem='empty-file')
            own = describe_file(path)
            if own.height * own.width > MAX_PIXELS:
                return ImageInfo(problem='image-too-large')
            if own.num_channels != layout.num_channels:
                return ImageInfo(problem='channel-count-mismatch')
            if own.dtype != layout.dtype:
                return ImageInfo(problem='value-type-mismatch')
            digest = hashlib.blake2b(digest_size=16)
            while block := file.read(HASH_BYTES):
                digest.update(block)
            with one_at_a_time(own.height * own.width * own.num_channels > LARGE_PIXELS):
                moments = Moments.of_pixels(read_channels(path, channels))
            return ImageInfo(own.width, own.height, digest=digest.hexdigest(), moments=moments)
    except OSError as error:
        return ImageInfo(problem=getattr(error, 'code', 'missing-image'))
    except (UsageError, UnreadableImageError):
        return ImageInfo(problem='truncated-image')


def measure(
    layout: FileLayout, channels: Sequence[int] | None, infos: Iterable[ImageInfo], report: Report
) -> ChannelReader:
    """Measure mean and standard deviation of each channel on all pixels of the training images.

    Args:
        layout: of the files.
        channels: numbers of those that are used; None for all.
        infos: of the training images.
        report: to add to.

    Raises:
        UsageError: no image can be read.
    """
    channels = tuple(channels or range(1, layout.num_channels + 1))
    total = Moments(*np.zeros((3, len(channels))))
    for info in infos:
        total = total.add(info.moments) if info.moments else total
    if not total.count.any():
        report.raise_if_errors()
        raise UsageError('no training image can be read, so that its channels cannot be measured')
    std = np.sqrt(total.m2 / np.maximum(total.count, 1))
    for channel, value in zip(channels, std):
        if not value:
            report.add('train', 'constant-channel', f'channel {channel}')
    std = np.where(std > 0, std, 1.0)
    reader = ChannelReader(channels, tuple(total.mean.tolist()), tuple(std.tolist()), layout.num_channels, layout.dtype)
    report.facts.append(describe_channels(reader))
    return reader


def describe_channels(reader: ChannelReader) -> str:
    """Return channels, mean and standard deviation in one line."""
    mean, std = (' '.join(f'{value:.6g}' for value in values) for values in (reader.mean, reader.std))
    numbers = ','.join(map(str, reader.channels))
    return (
        f'images of {reader.num_channels} channels of {reader.dtype}; channels {numbers}, on the training images: '
        f'mean {mean}, std {std}'
    )


def parse_channels(text: str | None) -> tuple[int, ...] | None:
    """Parse `--channels`: numbers from 1, separated by commas.

    Raises:
        UsageError: they are none, or one occurs twice.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(',')]
    if not all(part.isdecimal() and 0 < int(part) < 10**4 for part in parts):
        raise UsageError(f"--channels '{text}': give numbers from 1, such as 3,2,1")
    channels = tuple(map(int, parts))
    if len({*channels}) < len(channels):
        raise UsageError(f"--channels '{text}': a channel is named twice")
    return channels


def select_channels(
    paths: Iterable[str | Path],
    channels: Sequence[int] | None,
    trained: ChannelReader | str | None,
    report: Report,
) -> tuple[FileLayout | None, Sequence[int] | None]:
    """Return what files have to hold (None: RGB), and the numbers of the channels that are used (None: all).

    Args:
        paths: of the training images, if there are any.
        channels: of the request.
        trained: how a trained model reads images; None if as RGB; `AUTO` for a new training.
        report: to add to.
    """
    if trained == AUTO:
        layout = find_layout(paths, channels)
        if channels is None and layout and layout.is_rgb:
            if layout.num_channels == 4:
                report.add('all', 'fourth-channel', 'RGB of 8 bits')
            layout = None
        return layout, channels
    if trained is None:
        return None, None
    return FileLayout(0, 0, trained.num_channels, trained.dtype), trained.channels
