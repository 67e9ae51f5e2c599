"""Images whose channels are not those of RGB: which data sets hold them, and what their values are."""

import hashlib
from collections.abc import Iterable, Sequence
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
from ..errors import UnreadableImageError, UsageError, count
from .check_images import LARGE_PIXELS, MAX_BYTES, MAX_PIXELS, ImageInfo, inspect_all, inspect_image, one_at_a_time
from .diagnostics import Report
from .files import open_regular, size_of
from .request import DatasetRequest

CHANNEL_SUFFIXES = (*TIFF_SUFFIXES, ARRAY_SUFFIX)  # files that may have any number of channels
RGB_COUNTS = (1, 3, 4)  # numbers of channels of images that OpenCV reads as RGB
MAX_PROBED = 20  # images whose headers are read to find one that can be read
HASH_BYTES = 2**20  # read at a time
AUTO = 'auto'  # channels follow from the images, not from a trained model


class Moments(NamedTuple):
    """Number, mean and sum of the squared distances from it (`m2`) of the values of each channel, (C,)."""

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

    def add(self, added: 'Moments') -> 'Moments':
        """Return the moments of the values of both (Chan et al., 1979)."""
        num_values = self.count + added.count
        fraction, delta = added.count / np.maximum(num_values, 1), added.mean - self.mean
        m2 = self.m2 + added.m2 + delta**2 * self.count * fraction
        return Moments(num_values, self.mean + delta * fraction, m2)


class ChannelSelection(NamedTuple):
    """What the image files of a data set have to hold, and which of their channels are used.

    Attributes:
        layout (FileLayout | None): layout that all files have to have; None for RGB.
        source (str): what has this layout: the first image, or the model; empty if files need no comparison.
        channels (Sequence[int] | None): numbers of the channels that are used; None for all.
        reader (ChannelReader | None): reader of a trained model; None for a new training.
    """

    layout: FileLayout | None = None
    source: str = ''
    channels: Sequence[int] | None = None
    reader: ChannelReader | None = None

    def inspect(self, paths: Sequence[str | Path], report: Report) -> dict[str | Path, ImageInfo]:
        """Inspect images as `inspect_image`, or with the moments of their channels."""
        infos = inspect_all(self._inspect_channels if self.layout else self._inspect_rgb, paths, 'images')
        for path, info in infos.items():
            if info.detail and not info.problem:
                report.add('all', 'channels-read-as-rgb', info.describe(Path(path).name))
        return infos

    def _inspect_rgb(self, path: str | Path) -> ImageInfo:
        """Inspect an image that is read as RGB; it may hold something else than the first one."""
        info = inspect_image(path)
        if not self.source or Path(path).suffix.lower() not in CHANNEL_SUFFIXES:
            return info
        try:
            with open_regular(path, MAX_BYTES), explain_errors():
                layout = describe_file(path)
        except (OSError, UsageError, UnreadableImageError):
            return info
        if layout.is_rgb:
            return info
        code = 'value-type-mismatch' if layout.num_channels in RGB_COUNTS else 'channel-count-mismatch'
        text = f'{_describe(layout)}, {self.source} is RGB of 8 bits'
        return info._replace(problem=info.problem and code, detail=text)

    def _inspect_channels(self, path: str | Path) -> ImageInfo:
        """Read the channels of an image and compute their moments; a file of another layout is a problem."""
        try:
            with open_regular(path, MAX_BYTES) as file, explain_errors():
                if not size_of(file):
                    return ImageInfo(problem='empty-file')
                layout = describe_file(path)
                if layout.height * layout.width > MAX_PIXELS:
                    return ImageInfo(problem='image-too-large')
                has_count = layout.num_channels == self.layout.num_channels
                if not has_count or layout.dtype != self.layout.dtype:
                    code = 'value-type-mismatch' if has_count else 'channel-count-mismatch'
                    text = f'{_describe(layout)}, {self.source} has {_describe(self.layout)}'
                    return ImageInfo(problem=code, detail=text)
                digest = hashlib.blake2b(digest_size=16)
                while block := file.read(HASH_BYTES):
                    digest.update(block)
                with one_at_a_time(layout.height * layout.width * layout.num_channels > LARGE_PIXELS):
                    moments = Moments.of_pixels(read_channels(path, self.channels))
                return ImageInfo(layout.width, layout.height, digest=digest.hexdigest(), moments=moments)
        except OSError as error:
            return ImageInfo(problem=getattr(error, 'code', 'missing-image'))
        except (UsageError, UnreadableImageError):
            return ImageInfo(problem='truncated-image')

    def measure(self, infos: Iterable[ImageInfo], report: Report) -> dict | None:
        """Return the fields of the `ChannelReader` of the images; None for RGB.

        Mean and standard deviation of each channel are those of all pixels of the training images, or of the model's.

        Raises:
            UsageError: no training image can be read.
        """
        if not self.layout or self.reader:
            return self.reader and self.reader._asdict()
        channels = tuple(self.channels or range(1, self.layout.num_channels + 1))
        total = Moments(*np.zeros((3, len(channels))))
        for info in infos:
            total = total.add(info.moments) if info.moments else total
        if not total.count.any():
            report.raise_if_errors()
            raise UsageError('no training image can be read, so that its channels cannot be measured')
        std = np.sqrt(total.m2 / np.maximum(total.count, 1))
        for channel in np.flatnonzero(std == 0):
            report.add('train', 'constant-channel', f'channel {channels[channel]}')
        mean, std = total.mean.tolist(), np.where(std > 0, std, 1.0).tolist()
        means, stds = (' '.join(f'{value:.6g}' for value in values) for values in (mean, std))
        text = f'images of {_describe(self.layout)}; channels {",".join(map(str, channels))}, on the training images: '
        report.facts.append(f'{text}mean {means}, std {stds}')
        common = dict(num_channels=self.layout.num_channels, dtype=self.layout.dtype)
        return dict(channels=channels, mean=mean, std=std, **common)


def select_channels(
    paths: Iterable[str | Path], request: DatasetRequest, trained: ChannelReader | str | None, report: Report
) -> ChannelSelection:
    """Select the channels of images: those that are asked for, of a trained model, or all of images that are not RGB.

    Args:
        paths: paths of the training images, if there are any.
        request: what the user asks for.
        trained: how a trained model reads images; None if as RGB; `AUTO` for a new training.
        report: the report that is added to.

    Raises:
        UsageError: images have fewer channels than asked for, or rasterio is needed and not installed.
    """
    if trained is None:
        return ChannelSelection()
    if trained != AUTO:
        layout = FileLayout(0, 0, trained.num_channels, trained.dtype)
        return ChannelSelection(layout, 'the model', trained.channels, trained)
    path, layout = _find_layout(paths, request.channels)
    if request.channels is None and layout and layout.is_rgb:
        if layout.num_channels == 4:
            report.add('all', 'fourth-channel', 'RGB of 8 bits')
        return ChannelSelection(source=path.name)
    return ChannelSelection(layout, path.name, request.channels) if layout else ChannelSelection()


def _find_layout(
    paths: Iterable[str | Path], channels: Sequence[int] | None
) -> tuple[Path, FileLayout] | tuple[None, None]:
    """Return the first image that can be read, and what it holds.

    Returns:
        None twice if no image can be read, or if their format is one of RGB and no channels are asked for.
    """
    for path in islice(map(Path, paths), MAX_PROBED):
        if channels is None and path.suffix.lower() not in CHANNEL_SUFFIXES:
            break
        try:
            with open_regular(path, MAX_BYTES), explain_errors():
                layout = describe_file(path)
        except UsageError:
            if channels is None and inspect_image(path).problem is None:
                break  # OpenCV reads it as RGB
            raise
        except (OSError, UnreadableImageError):
            continue  # which the check reports
        if channels is not None and max(channels) > layout.num_channels:
            raise UsageError(f'--channels {max(channels)}: {path} has {layout.num_channels}')
        return path, layout
    return None, None


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


def _describe(layout: FileLayout) -> str:
    return f'{count(layout.num_channels, "channel")} of {layout.dtype}'
