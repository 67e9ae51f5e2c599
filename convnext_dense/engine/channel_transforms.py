"""Transforms for images with any number of channels."""

from collections.abc import Sequence

import numpy as np
from mmcv.transforms import BaseTransform
from mmcv.transforms.loading import LoadImageFromFile
from mmcv.transforms.utils import cache_randomness
from mmengine.registry import TRANSFORMS

from ..channel_files import ChannelReader
from ..errors import UnreadableImageError


@TRANSFORMS.register_module()
class LoadImageChannels(LoadImageFromFile):
    """Read and normalize channels of an image of any data type.

    Args:
        channels: Channel numbers, from 1, in the order of the model's input.
        mean: Mean of each of these channels over the training images.
        std: Standard deviation of each of these channels over the training images.
        num_channels: Number of channels of the files.
        dtype: NumPy data type of the files.
    """

    def __init__(
        self, channels: Sequence[int], mean: Sequence[float], std: Sequence[float], num_channels: int, dtype: str
    ):
        super().__init__(color_type='unchanged')
        self.reader = ChannelReader(tuple(channels), tuple(mean), tuple(std), num_channels, dtype)

    def transform(self, results: dict) -> dict:
        """Read the image at `img_path` as `img`, float32 of shape (H, W, C)."""
        try:
            image = self.reader.read(results['img_path'])
        except UnreadableImageError as error:
            raise UnreadableImageError(f'{results["img_path"]}: {error}') from error
        size = image.shape[:2]
        return {**results, 'img': image, 'img_shape': size, 'ori_shape': size}

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.reader})'


@TRANSFORMS.register_module()
class RandomBrightnessContrast(BaseTransform):
    """Change brightness and contrast of a normalized image with any number of channels.

    Like these two steps of mmseg's PhotoMetricDistortion, but in standard deviations: each with a probability of one
    half, and equally in all channels. There is no change of hue and saturation, which need colors.

    Args:
        brightness_delta: Maximum absolute summand, in standard deviations. Defaults to 0.5, about 32 of 255.
        contrast_range: Minimum and maximum factor of the distance from the mean. Defaults to (0.5, 1.5).
    """

    def __init__(self, brightness_delta: float = 0.5, contrast_range: Sequence[float] = (0.5, 1.5)):
        self.brightness_delta, self.contrast_range = brightness_delta, tuple(contrast_range)

    @cache_randomness
    def _draw(self) -> tuple[float, float]:
        """Draw a random summand and factor."""
        adds, scales = np.random.randint(2, size=2)
        delta = np.random.uniform(-self.brightness_delta, self.brightness_delta)
        factor = np.random.uniform(*self.contrast_range)
        return delta * adds, factor if scales else 1.0

    def transform(self, results: dict) -> dict:
        """Change `img`, float32 of shape (H, W, C)."""
        delta, factor = self._draw()
        results['img'] = (results['img'] * factor + delta).astype(np.float32)
        return results

    def __repr__(self) -> str:
        values = f'brightness_delta={self.brightness_delta}, contrast_range={self.contrast_range}'
        return f'{type(self).__name__}({values})'
