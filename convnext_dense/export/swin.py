"""mmdet's and mmseg's Swin Transformer that a tracer can follow: feature maps are padded without a condition."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UsageError
from .deformable import copy_with_shared_weights

MODULES = 'mmdet.models.backbones.swin', 'mmseg.models.backbones.swin'


def traceable_backbone(model: nn.Module) -> nn.Module:
    """Return a model whose backbone can be traced, with the same parameters; the model itself unless it has a Swin.

    Raises:
        UsageError: If the patches that it merges overlap, or are not padded to a whole number.
    """
    if type(model.backbone).forward.__module__ not in MODULES:
        return model
    model = copy_with_shared_weights(model)
    for module in model.backbone.modules():
        if hasattr(module, 'adap_padding') and not _is_known(module):
            raise UsageError('SwinTransformer can be exported only with patches that are padded and do not overlap')
        forward = FORWARDS.get(type(module).__name__)
        if forward:
            module.forward = partial(forward, module)
    return model


def _is_known(module):
    """Whether a PatchEmbed or PatchMerging cuts a padded feature map into patches that touch."""
    conv = module.projection if hasattr(module, 'projection') else module.sampler
    shape = conv.kernel_size, conv.padding, conv.dilation
    return module.adap_padding is not None and shape == (conv.stride, (0, 0), (1, 1))


def _pad(padding, x):
    """Replace `AdaptivePadding.forward`."""
    height, width = ((n + stride - 1) // stride * stride - n for n, stride in zip(x.shape[2:], padding.stride))
    if padding.padding == 'corner':
        return F.pad(x, [0, width, 0, height])
    return F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2])


def _attend_in_windows(attention, query, hw_shape):
    """Replace `ShiftWindowMSA.forward`."""
    n, _, channels = query.shape
    (height, width), side, shift = hw_shape, attention.window_size, attention.shift_size
    rows, columns = ((size + side - 1) // side for size in hw_shape)
    x = query.reshape(n, height, width, channels)
    x = F.pad(x, (0, 0, 0, columns * side - width, 0, rows * side - height))
    mask = None
    if shift:
        x = torch.roll(x, (-shift, -shift), (1, 2))
        regions = _regions(rows * side, side, shift, x)[:, None] * 3 + _regions(columns * side, side, shift, x)
        regions = _windows(regions[None, ..., None], rows, columns, side).flatten(1).repeat(n, 1)
        mask = torch.where(regions[:, None] == regions[..., None], 0.0, -100.0).to(x.dtype)
    x = attention.w_msa(_windows(x, rows, columns, side), mask=mask)
    x = x.reshape(n, rows, columns, side, side, channels).transpose(2, 3)
    x = x.reshape(n, rows * side, columns * side, channels)
    if shift:
        x = torch.roll(x, (shift, shift), (1, 2))
    return attention.drop(x[:, :height, :width].reshape(n, height * width, channels))


def _regions(size, side, shift, x):
    """Which of the three parts of a shifted line each of its pixels is in, (size,); only pixels of one part attend."""
    pixels = torch.arange(size, device=x.device)
    return (pixels >= size - side).long() + (pixels >= size - shift)


def _windows(x, rows, columns, side):
    """Windows (N * rows * columns, side * side, C) of feature maps (N, rows * side, columns * side, C)."""
    x = x.reshape(x.shape[0], rows, side, columns, side, x.shape[3]).transpose(2, 3)
    return x.reshape(x.shape[0] * rows * columns, side * side, x.shape[5])


def _merge_patches(merging, x, input_size):
    """Replace `PatchMerging.forward` for padded patches that do not overlap."""
    x = merging.adap_padding(x.reshape(x.shape[0], *input_size, x.shape[2]).permute(0, 3, 1, 2))
    n, channels = x.shape[:2]
    kernel = merging.sampler.kernel_size
    rows, columns = x.shape[2] // kernel[0], x.shape[3] // kernel[1]
    x = x.reshape(n, channels, rows, kernel[0], columns, kernel[1]).permute(0, 2, 4, 1, 3, 5)
    x = x.reshape(n, rows * columns, channels * kernel[0] * kernel[1])
    return merging.reduction(merging.norm(x) if merging.norm else x), (rows, columns)


FORWARDS = {'AdaptivePadding': _pad, 'ShiftWindowMSA': _attend_in_windows, 'PatchMerging': _merge_patches}
