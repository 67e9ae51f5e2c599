"""Convolutions of necks and heads on a CPU: in channels_last, by oneDNN, and if they are 3 x 3 by a kernel of ours.

The kernel (`torch.ops.convnext_dense.conv3x3`) is for float32, where it takes half the multiplications. In bfloat16
oneDNN's convolutions run at the rate of the processor's matmuls.
"""

import torch
import torch.nn.functional as F

from . import avx512, onednn
from .head_kernels import is_plain
from .operators import (
    _below_autograd,
    _check,
    _define,
    _needs_reference_grads,
    _reference_grads,
    needs_grad,
    register,
)

DTYPES = (torch.float32, torch.bfloat16)
MIN_PIXELS = 256  # of all images, for `conv3x3`: with fewer, packing the weights takes longer than the convolution

# A convolution of x (N, C, H, W), weight (C_out, C, 3, 3) and bias (C_out) with stride and padding 1.
conv3x3 = _define('conv3x3(Tensor x, Tensor weight, Tensor? bias, bool relu) -> Tensor')


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
    x, dtype = x.contiguous(memory_format=torch.channels_last), compute_dtype(x)
    if (stride, padding, dilation, groups) == ((1, 1), (1, 1), (1, 1), 1) and prefers_conv3x3(x, weight):
        return conv3x3(*(None if t is None else t.to(dtype) for t in (x, weight, bias)), relu)
    if needs_grad(x, weight, bias):
        out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return out.relu() if relu else out
    x, weight, bias = (None if t is None else t.detach().to(dtype) for t in (x, weight, bias))
    with torch.autocast('cpu', enabled=False):
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, padding, stride, dilation, groups, 'relu' if relu else 'none', [], ''
        )


def prefers_conv3x3(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `conv3x3` runs, and is faster than oneDNN, on a feature map and a weight that `conv` supports."""
    n, _, height, width = x.shape
    return n * height * width >= MIN_PIXELS and avx512.supports_conv3x3(x.shape, weight, compute_dtype(x))


# ---- the operator ----------------------------------------------------------------------------------------------------


def _conv3x3_cpu(x, weight, bias, relu):
    _check(x.ndim == 4 and x.numel() > 0 and x.device.type == 'cpu' and not x.is_neg(), 'x must be a map (N, C, H, W)')
    _check(not weight.is_neg(), 'weight must have no pending negation')
    avx512.check_conv3x3(x, weight, bias)
    return avx512.conv3x3(x, weight, bias, relu)


def _conv3x3_fake(x, weight, bias, relu):
    shape = (len(x), len(weight), *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _conv3x3_reference(x, weight, bias=None):
    return F.conv2d(x, weight, bias, padding=1)


class _Conv3x3Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return _below_autograd(conv3x3, x, weight, bias, False)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        if _needs_reference_grads(grad):
            return (*_reference_grads(_conv3x3_reference, (x, weight, bias), grad, ctx.needs_input_grad),)
        grad = grad.resolve_neg().contiguous(memory_format=torch.channels_last)
        # The gradient of the input is a convolution, too, by the weight turned around.
        grad_x = conv3x3(grad, weight.flip(2, 3).transpose(0, 1), None, False) if needs_x else None
        args = [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, needs_weight, needs_bias]
        _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, x, weight, None if bias is None else [len(bias)], *args
        )
        return grad_x, grad_weight, grad_bias


def _conv3x3_autograd(x, weight, bias, relu):
    if needs_grad(x, weight, bias):
        out = _Conv3x3Function.apply(x, weight, bias)
        return out.relu() if relu else out
    return _below_autograd(conv3x3, x, weight, bias, relu)


register({conv3x3: (_conv3x3_cpu, _conv3x3_fake, _conv3x3_autograd)})
