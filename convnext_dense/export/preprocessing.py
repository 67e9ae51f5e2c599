"""What mmdet's and mmseg's data preprocessors do to images in a test, as part of the exported graph."""

import torch
import torch.nn.functional as F
from torch import nn

from ..channel_files import ChannelReader
from ..errors import UsageError, count

# Whose `forward` is known; of a class derived from one of them it may be another one.
DET_FORWARDS = ('ImgDataPreprocessor.forward', 'DetDataPreprocessor.forward')
SEG_FORWARDS = ('SegDataPreProcessor.forward',)


class Preprocess(nn.Module):
    """Normalization, order of channels and padding of a batch, as a model's `data_preprocessor` does them in a test.

    Args:
        data_preprocessor: mmdet's DetDataPreprocessor, mmseg's SegDataPreProcessor or mmengine's ImgDataPreprocessor.
        reader: How the test pipeline reads and normalizes images of other channels than RGB; None if it does not.

    Raises:
        UsageError: If it is of a class that does something else.
    """

    def __init__(self, data_preprocessor: nn.Module, reader: ChannelReader | None = None):
        super().__init__()
        forward = type(data_preprocessor).forward.__qualname__
        if forward not in (*DET_FORWARDS, *SEG_FORWARDS):
            raise UsageError(
                f'the data_preprocessor {type(data_preprocessor).__name__} cannot be exported: use DetDataPreprocessor '
                'or SegDataPreProcessor, or export the model without it'
            )
        is_seg = forward in SEG_FORWARDS
        # Without the underscore: mmseg before it was derived from mmengine's ImgDataPreprocessor.
        name = 'channel_conversion' if hasattr(data_preprocessor, 'channel_conversion') else '_channel_conversion'
        converts = getattr(data_preprocessor, name)
        self.flips = converts == (reader is not None)  # images of a reader come in the order of the test pipeline
        self.normalize_channels = NormalizeChannels(reader) if reader else nn.Identity()
        self.normalizes = data_preprocessor._enable_normalize
        n_means = 1
        if self.normalizes:
            n_means = len(data_preprocessor.mean)
            self.register_buffer('mean', data_preprocessor.mean.detach().float().clone(), persistent=False)
            self.register_buffer('std', data_preprocessor.std.detach().float().clone(), persistent=False)
        self.channels = None  # any number
        if is_seg and n_means == 3:
            self.channels = (1, 3)  # mmseg repeats a grayscale image
        elif not is_seg and (n_means == 3 or converts):
            self.channels = (3,)
        test_padding = (
            (data_preprocessor.test_cfg or {}) if is_seg else dict(size_divisor=data_preprocessor.pad_size_divisor)
        )
        self.size, self.divisor = test_padding.get('size'), test_padding.get('size_divisor') or 1
        self.pad_value = data_preprocessor.pad_val if is_seg else data_preprocessor.pad_value

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Prepare a batch of images of one size.

        Args:
            images: (N, C, H, W), uint8 or float in 0 to 255; RGB where they have three channels, otherwise in the order
                in which the files have them. With `reader`, the values of its channels in its order.

        Returns:
            What the model takes, (N, C, H', W') of float32, padded at the right and at the bottom.

        Raises:
            UsageError: If the model takes another number of channels.
        """
        channels = images.shape[1]
        if self.channels and channels not in self.channels:
            allowed = ' or '.join(map(str, self.channels))
            raise UsageError(f'images of {count(channels, "channel")}: the data_preprocessor takes {allowed}')
        images = self.normalize_channels(images)
        if channels == 3 and self.flips:
            images = images[:, [2, 1, 0]]
        images = images.float()
        if self.normalizes:
            images = (images - self.mean) / self.std
        return self._pad(images)

    def _pad(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        if self.size is not None:
            bottom, right = torch.sym_max(self.size[-2] - height, 0), torch.sym_max(self.size[-1] - width, 0)
        elif self.divisor > 1:
            bottom, right = ((n + self.divisor - 1) // self.divisor * self.divisor - n for n in (height, width))
        else:
            return images
        return F.pad(images, (0, right, 0, bottom), value=self.pad_value)


class NormalizeChannels(nn.Module):
    """What `ChannelReader.normalize` does."""

    def __init__(self, reader: ChannelReader):
        super().__init__()
        for name in ('mean', 'std'):
            values = torch.tensor(getattr(reader, name), dtype=torch.float32)
            self.register_buffer(name, values[:, None, None], persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalize values (N, C, H, W); those that are not finite become the mean."""
        images = (images.float() - self.mean) / self.std
        return torch.where(images.isfinite(), images, torch.zeros_like(images))
