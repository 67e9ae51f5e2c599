"""A 3 x 3 convolution of concatenated feature maps, of which all but the first are upsampled bilinearly before.

That is what UperNet spends most of its time on. Both are linear, and a tap of the convolution mixes channels where
upsampling mixes pixels: so the taps are applied to the small feature maps, as a matmul (the products), and an operator
(`torch.ops.convnext_dense.tap_sum`) adds up the products, shifted and upsampled. A feature map upsampled by s thereby
takes 1 / s^2 of the multiplications, and neither upsampled nor concatenated feature maps are ever in memory.
"""

from collections.abc import Sequence

import torch

from . import head_kernels, onednn
from .conv import DTYPES, compute_dtype, conv
from .head_kernels import is_plain
from .operators import _below_autograd, _check, _define, needs_grad, register

TAPS = 9

# base (N, C, H, W) plus the sum of products (N, 9 C, h, w), whose channels are tap by tap.
tap_sum = _define('tap_sum(Tensor base, Tensor[] products, bool align_corners, bool relu) -> Tensor')
# Gradients of products of such heights and widths.
tap_sum_backward = _define('tap_sum_backward(Tensor grad, int[] heights, int[] widths, bool align_corners) -> Tensor[]')


def supports_upsampled_conv(maps: Sequence[torch.Tensor], weight: torch.Tensor) -> bool:
    """Whether `upsampled_conv` runs on these feature maps and this weight, in the dtype that autocast gives them."""
    tensors = (*maps, weight)
    if len(maps) < 2 or not all(map(is_plain, tensors)) or not head_kernels.available():
        return False
    if any(x.ndim != 4 or len(x) != len(maps[0]) or not x.numel() for x in maps):
        return False
    if weight.shape[1:] != (sum(x.shape[1] for x in maps), 3, 3) or weight.shape[0] % head_kernels.CHANNEL_MULTIPLE:
        return False
    return {compute_dtype(t) for t in tensors} <= set(DTYPES) and compute_dtype(maps[0]) in onednn.dtypes()


def upsampled_conv(
    maps: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    align_corners: bool = False,
    relu: bool = False,
) -> torch.Tensor:
    """Convolution, with padding of 1, of the concatenation of feature maps in the size of the first.

    Args:
        maps: (N, C_i, H_i, W_i), which are resized bilinearly to the size of the first, as a rule the largest.
        weight: (C, sum of C_i, 3, 3).
        bias: (C,).
        align_corners: That of the upsampling.
        relu: Whether a ReLU follows.

    Returns:
        (N, C, H_0, W_0), channels_last.
    """
    first, *others = weight.split([x.shape[1] for x in maps], 1)
    base = conv(maps[0], first, bias, padding=(1, 1))
    by_tap = (w.permute(2, 3, 0, 1).reshape(TAPS * len(w), w.shape[1], 1, 1) for w in others)
    products = [conv(x, w, None) for x, w in zip(maps[1:], by_tap)]
    dtype = base.dtype
    return tap_sum(base, [p.to(dtype) for p in products], align_corners, relu)


# ---- the operator ----------------------------------------------------------------------------------------------------


def _check_maps(x: torch.Tensor, channels: int) -> None:
    is_map = x.ndim == 4 and x.numel() > 0 and x.device.type == 'cpu' and not x.is_neg()
    _check(is_map, 'feature maps must be (N, C, H, W)')
    _check(x.dtype in DTYPES, 'feature maps must be float32 or bfloat16')
    _check(channels % head_kernels.CHANNEL_MULTIPLE == 0, 'the number of channels must be a multiple of 16')
    _check(head_kernels.available(), 'the kernels are not for this machine, or were not compiled')


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _tap_sum_cpu(base, products, align_corners, relu):
    _check_maps(base, base.shape[1] if base.ndim == 4 else 0)
    shape = (len(base), TAPS * base.shape[1])
    _check(len(products) > 0, 'there must be products')
    _check(all(p.ndim == 4 and p.shape[:2] == shape and p.dtype == base.dtype for p in products), 'products must fit')
    _check(not any(p.is_neg() or p.device != base.device or not p.numel() for p in products), 'products must fit')
    out = torch.empty_like(base, memory_format=torch.channels_last)
    _launch('tap_sum', [*map(_channels_last, products)], out, align_corners, relu, base=_channels_last(base))
    return out


def _launch(kernel, products, total, align_corners, relu, **fields):
    _, channels, height, width = total.shape
    head_kernels.launch(
        kernel,
        products,
        channels=channels,
        height=height,
        width=width,
        align_corners=align_corners,
        bf16=total.dtype == torch.bfloat16,
        relu=relu,
        sum=total,
        **fields,
    )


def _tap_sum_fake(base, products, align_corners, relu):
    return torch.empty_like(base, memory_format=torch.channels_last)


def _tap_sum_backward_cpu(grad, heights, widths, align_corners):
    _check_maps(grad, grad.shape[1] if grad.ndim == 4 else 0)
    _check(len(heights) == len(widths) > 0, 'there must be a height and a width of each feature map')
    _check(min(*heights, *widths) > 0, 'heights and widths must be positive')
    grads = _tap_sum_backward_fake(grad, heights, widths, align_corners)
    _launch('tap_sum_backward', grads, _channels_last(grad), align_corners, False)
    return grads


def _tap_sum_backward_fake(grad, heights, widths, align_corners):
    n, channels = grad.shape[:2]
    return [grad.new_empty(n, h, w, TAPS * channels).permute(0, 3, 1, 2) for h, w in zip(heights, widths)]


class _TapSumFunction(torch.autograd.Function):
    """Saves nothing: the sum is linear."""

    @staticmethod
    def forward(ctx, base, align_corners, *products):
        ctx.sizes = [p.shape[2] for p in products], [p.shape[3] for p in products]
        ctx.align_corners = align_corners
        return _below_autograd(tap_sum, base, products, align_corners, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad = grad.resolve_neg()
        return grad, None, *tap_sum_backward(grad, *ctx.sizes, ctx.align_corners)


def _tap_sum_autograd(base, products, align_corners, relu):
    if needs_grad(base, *products):
        out = _TapSumFunction.apply(base, align_corners, *products)
        return out.relu() if relu else out
    return _below_autograd(tap_sum, base, products, align_corners, relu)


register(
    {
        tap_sum: (_tap_sum_cpu, _tap_sum_fake, _tap_sum_autograd),
        tap_sum_backward: (_tap_sum_backward_cpu, _tap_sum_backward_fake, None),
    }
)
