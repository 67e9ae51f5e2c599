"""The form of torch's own operations, for any x86 CPU on which oneDNN is fast.

- Maps stay channels_last: to LayerNorm and the products a map is rows, a pixel each, without a copy.
- The four-fold hidden layer is worked through in tiles of rows that stay in cache; it is never whole in memory.
- Products are oneDNN's, GELU in the same pass: in float32 up to three times the rate of MKL's, where F.linear goes.
- The backward pass computes the hidden layer again, tile by tile, where that costs less than to write and read it.
- The gradient of depthwise weights is the diagonal of that of a convolution in groups, which has a fast kernel.

Kept for the backward pass: the input in the dtype of the products; the depthwise convolution's output, unless `with_cp`
is True; in wide blocks the hidden layer before GELU, unless `with_cp` is set.
"""

import math
import platform
from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F

from .block_params import Settings

DTYPES = (torch.float32, torch.bfloat16)
TILE = 4096  # rows whose hidden layer fits in the cache
WIDE = 384  # channels from which on the hidden layer is sooner kept for the backward pass than computed again
GROUPS = (16, 8)  # channels of a group in the gradient of depthwise weights: a vector of the processor


def inputs(settings: Settings, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x, x.to(settings.dtype)


def forward(settings, x, z, parameters, keep=False):
    """Output, and what is kept; without `keep` the output may lie where the depthwise convolution's lay."""
    keep_hidden = keep and not settings.with_cp and x.shape[-1] >= WIDE
    p = parameters.cast(settings.dtype)
    y, hidden = depthwise(inputs(settings, x)[1] if z is None else z, p, settings), []
    dtype = torch.promote_types(x.dtype, y.dtype if p.gamma is None else p.gamma.dtype)
    out = y if not keep and y.dtype == dtype else torch.empty_like(y, dtype=dtype)
    for x_rows, y_rows, out_rows in _tiles(x, y, out):
        n = F.layer_norm(y_rows, y_rows.shape[-1:], p.norm, p.norm_bias, settings.eps)
        h = _linear(n, p.linear1, p.bias1, gelu=not keep_hidden)
        if keep_hidden:
            hidden.append(h)
            h = F.gelu(h)
        branch = _linear(h, p.linear2, p.bias2)
        if p.gamma is None:
            torch.add(x_rows, branch, alpha=settings.factor, out=out_rows)
        else:
            torch.addcmul(x_rows, p.gamma, branch, value=settings.factor, out=out_rows)
    return out, (None if settings.with_cp is True else y, *hidden)


def backward(settings, z, kept, parameters, grad, needed):
    """Gradients of x by the shortcut, of z and of the parameters, None where not `needed`."""
    # Hooks of saved tensors may have laid them otherwise.
    y, *hidden = (None if t is None else t.contiguous() for t in kept)
    _, needs_z, *needs_parameters = needed
    p, of_parameters = parameters.cast(settings.dtype), any(needs_parameters)
    y = depthwise(z, p, settings) if y is None else y
    scale = settings.factor if p.gamma is None else settings.factor * p.gamma
    norm, of_norms = (y.shape[-1:], p.norm, p.norm_bias), (True, of_parameters, of_parameters)
    grad_y, sums = [], None
    for i, (y_rows, g) in enumerate(_tiles(y, grad)):
        n, mean, rstd = torch.native_layer_norm(y_rows, *norm, settings.eps)
        a = hidden[i] if hidden else _linear(n, p.linear1, p.bias1)
        grad_a = torch.ops.aten.gelu_backward(_linear((scale * g).to(settings.dtype), p.linear2.t()), a)
        grad_n = _linear(grad_a, p.linear1.t())
        grad_rows, *found = torch.ops.aten.native_layer_norm_backward(
            grad_n, y_rows, norm[0], mean, rstd, *norm[1:], of_norms
        )
        grad_y.append(grad_rows)
        if of_parameters:
            found += [*_gradients(grad_a, n), *_gradients(g.to(settings.dtype), F.gelu(a))]
            sums = [t.float() if t.dtype == torch.bfloat16 else t for t in found] if sums is None else sums
            if i:
                torch._foreach_add_(sums, found)
    grad_y = (grad_y[0] if len(grad_y) == 1 else torch.cat(grad_y)).view(y.shape)
    of_z, *found = _depthwise_backward(settings, grad_y, z, p.depthwise, needs_z, of_parameters)
    if not of_parameters:
        return grad, of_z, *[None] * len(parameters)
    *sums, of_linear2, of_bias2 = sums
    found += [*sums, *p.branch_gradients(settings.factor, of_linear2, of_bias2)]
    found = zip(found, parameters, needs_parameters)
    return grad, of_z, *(t.to(like.dtype) if n else None for t, like, n in found)


def depthwise(z, p, settings):
    z = z.permute(0, 3, 1, 2)
    y = F.conv2d(z, p.depthwise, p.depthwise_bias, padding=settings.padding, groups=len(p.depthwise))
    return y.permute(0, 2, 3, 1).contiguous()


def _depthwise_backward(settings, grad, z, weight, of_input, of_parameters):
    """Gradients of input, weight and bias. In a convolution in groups of several channels, whose gradient of weights
    is many times faster, the weight of an output channel and its own input channel has the same gradient."""
    channels = len(weight)
    size = next((n for n in GROUPS if channels % n == 0), 1)
    grouped = weight.new_empty(channels, size, *weight.shape[2:]).contiguous(memory_format=torch.channels_last)
    grad, z = grad.permute(0, 3, 1, 2), z.permute(0, 3, 1, 2)

    def backward(weight, groups, mask):
        return torch.ops.aten.convolution_backward(
            grad, z, weight, [channels], (1, 1), settings.padding, (1, 1), False, (0, 0), groups, mask
        )

    found_z = backward(weight, channels, (True, False, False))[0] if of_input else None
    if not of_parameters:
        return found_z.permute(0, 2, 3, 1), None, None
    _, found, found_bias = backward(grouped, channels // size, (False, True, True))
    found = found.unflatten(0, (-1, size)).diagonal(dim1=1, dim2=2)  # channels / size x kernel x kernel x size
    found = found.permute(0, 3, 1, 2).reshape(weight.shape)
    return None if found_z is None else found_z.permute(0, 2, 3, 1), found, found_bias


def _linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, gelu=False) -> torch.Tensor:
    """The Linear that `torch.compile` calls, oneDNN's: F.linear goes to MKL in float32, and in bfloat16 adds the bias
    in a pass of its own."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, *(('gelu', [], 'none') if gelu else ('none', [], '')))


def _gradients(grad: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of weight and bias of a Linear whose input was `rows`."""
    if rows.dtype == torch.bfloat16:
        wide = grad.shape[1] > rows.shape[1]
        return (rows.t() @ grad).t() if wide else grad.t() @ rows, grad.sum(0)
    # In float32 the gradient of a pointwise convolution's weight is the fastest product over pixels there is.
    weight = grad.new_empty(grad.shape[1], rows.shape[1], 1, 1)
    _, weight, bias = torch.ops.aten.convolution_backward(
        *(_image(grad), _image(rows), weight, [len(weight)], (1, 1), (0, 0), (1, 1), False, (0, 0), 1),
        (False, True, True),
    )
    return weight[:, :, 0, 0], bias


def _image(rows: torch.Tensor) -> torch.Tensor:
    """Rows as channels_last images of one row each: sixteen where that divides, since with one thread torch takes a
    pointwise convolution of fewer elsewhere than to oneDNN."""
    n = 16 if len(rows) % 16 == 0 else 1
    return rows.view(n, 1, -1, rows.shape[-1]).permute(0, 3, 1, 2)


def _tiles(*maps: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """The same rows of each map, N x H x W x C, tile by tile."""
    rows = [m.view(-1, m.shape[-1]) for m in maps]
    for start in range(0, len(rows[0]), TILE):
        yield [r[start : start + TILE] for r in rows]


def dtypes() -> tuple[torch.dtype, ...]:
    """Those for which oneDNN is there, and fast, on this machine."""
    return _known_dtypes() if torch.backends.mkldnn.enabled else ()


@cache
def _known_dtypes() -> tuple[torch.dtype, ...]:
    if platform.machine() not in ('x86_64', 'AMD64') or not torch.backends.mkldnn.is_available():
        return ()
    dtypes = DTYPES if torch.ops.mkldnn._is_mkldnn_bf16_supported() else DTYPES[:1]
    return tuple(dtype for dtype in dtypes if _linear_is_there(dtype))


def _linear_is_there(dtype: torch.dtype) -> bool:
    """Whether torch's internal Linear is what it was when this was written."""
    rows, weight, bias = (
        torch.linspace(-1, 1, math.prod(shape), dtype=dtype, device='cpu').view(shape)
        for shape in ((3, 8), (5, 8), (5,))
    )
    expected = F.linear(rows.double(), weight.double(), bias.double())
    try:
        found = _linear(rows, weight, bias), _linear(rows, weight, bias, gelu=True)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return all((f.double() - e).abs().max() < 0.03 for f, e in zip(found, (expected, F.gelu(expected))))
