"""Convolutions of necks and heads on a CPU: in channels_last, by oneDNN."""

import torch
import torch.nn.functional as F

from . import onednn
from .head_kernels import is_plain
from .operators import needs_grad

DTYPES = (torch.float32, torch.bfloat16)


def supports_conv(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `conv` runs on a feature map (N, C, H, W) and a weight."""
    if not is_plain(x) or not is_plain(weight) or x.ndim != 4 or not x.numel():
        return False
    dtypes = {compute_dtype(x), compute_dtype(weight)}
    return dtypes <= set(DTYPES) and len(dtypes) == 1 and compute_dtype(x) in onednn.dtypes()


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that a convolution casts an input to."""
    return torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype


def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    relu: bool = False,
) -> torch.Tensor:
    """A convolution and perhaps a ReLU in channels_last, without gradients in one call of oneDNN."""
    x = x.contiguous(memory_format=torch.channels_last)
    if needs_grad(x, weight, bias):
        out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return out.relu() if relu else out
    dtype = compute_dtype(x)
    x, weight, bias = (None if t is None else t.detach().to(dtype) for t in (x, weight, bias))
    with torch.autocast('cpu', enabled=False):
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, padding, stride, dilation, groups, 'relu' if relu else 'none', [], ''
        )
