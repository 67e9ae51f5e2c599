"""A faster implementation of mmseg's EncoderDecoder, which `optimize` inserts into a model.

Importing this requires mmseg.
"""

import torch
from mmseg.models.segmentors import EncoderDecoder


class FusedEncoderDecoder(EncoderDecoder):
    """mmseg's EncoderDecoder with a sum of sliding windows in place, in the memory format of the logits.

    mmseg pads the logits of each window to the size of the image, and adds them in its own memory format: of 150
    classes in channels_last this takes longer than the model.
    """

    def slide_inference(self, inputs: torch.Tensor, batch_img_metas: list[dict]) -> torch.Tensor:
        """Return the mean of the logits of all windows that cover a pixel; see mmseg's method.

        Args:
            inputs: Images (N, C, H, W).
            batch_img_metas: Metainfo of each image.

        Returns:
            Logits (N, number of classes, H, W) in the dtype of the images.
        """
        (stride_y, stride_x), (crop_height, crop_width) = self.test_cfg.stride, self.test_cfg.crop_size
        n, _, height, width = inputs.shape
        total, count = None, inputs.new_zeros(1, 1, height, width)
        for top in _window_starts(height, crop_height, stride_y):
            for left in _window_starts(width, crop_width, stride_x):
                area = (..., slice(top, top + crop_height), slice(left, left + crop_width))
                window = inputs[area]
                batch_img_metas[0]['img_shape'] = window.shape[2:]
                logits = self.encode_decode(window, batch_img_metas)
                if total is None:
                    total = _zeros_like_logits(logits, (n, self.out_channels, height, width), inputs.dtype)
                total[area] += logits
                count[area] += 1
        # mmseg asserts this, too: a stride may be larger than the window.
        size, stride = f'{crop_height} x {crop_width}', f'{stride_y} and {stride_x}'
        assert count.all(), f'windows of {size} pixels, {stride} apart, leave gaps'
        return total.div_(count)


def _window_starts(size: int, crop: int, stride: int) -> list[int]:
    """First pixels of windows along a side; the last window ends where the image does."""
    n_windows = max(size - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride, size - crop), 0) for i in range(n_windows)]


def _zeros_like_logits(logits: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    channels_last = logits.is_contiguous(memory_format=torch.channels_last) and not logits.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=logits.device, memory_format=memory_format).zero_()
