"""A block on an x86 CPU, forward and backward: what `Block` computes, sooner and in less memory.

- Maps stay channels_last: to LayerNorm and the products a map is rows, a pixel each, without a copy.
- The four-fold hidden layer is worked through in tiles of rows that stay in cache; it is never whole in memory.
- Products are oneDNN's, GELU in the same pass: in float32 two to three times the rate of MKL's, where F.linear goes.
- The backward pass computes the hidden layer again, tile by tile, where that costs less than to write and read it.
- The gradient of depthwise weights is the diagonal of that of a convolution in groups, which has a fast kernel.
- Samples that lose the branch to stochastic depth are not computed.

Parameters are read anew in each pass: there is nothing to invalidate.
"""

import platform
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as modules

DTYPES = (torch.float32, torch.bfloat16)
TILE = 4096  # rows whose hidden layer fits in the cache
WIDE = 384  # channels from which on the hidden layer is sooner kept for the backward pass than computed again
GROUPS = (16, 8)  # channels of a group in the gradient of depthwise weights: a vector of the processor
HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')


class _Settings(NamedTuple):
    dtype: torch.dtype  # of the products
    eps: float
    padding: tuple[int, int]
    factor: float  # of the branch: what stochastic depth scales it by
    with_cp: bool | str


class _Parameters(NamedTuple):
    """Of a block, in the order in which it uses them."""

    depthwise: torch.Tensor
    depthwise_bias: torch.Tensor
    norm: torch.Tensor
    norm_bias: torch.Tensor
    linear1: torch.Tensor
    bias1: torch.Tensor
    linear2: torch.Tensor
    bias2: torch.Tensor
    gamma: torch.Tensor | None


def layout(x: torch.Tensor) -> torch.Tensor:
    """An image in the memory format that `run` wants; as it is where `run` would not take it."""
    return x.contiguous(memory_format=torch.channels_last) if _takes(x) else x


def run(block: nn.Module, x: torch.Tensor, with_cp: bool | str = False) -> torch.Tensor | None:
    """`block(x)`, N x C x H x W, in channels_last; `with_cp` as in `ConvNeXt`.

    None where there is no fast form: of the device, the dtype, a block that is not as built (other modules, hooks,
    parameters), or under what watches operations (tracers, transforms, modes).
    """
    parameters = _parameters(block) if _takes(x) else None
    if parameters is None or not _fit(parameters, x):
        return None
    kept, factor = _draw(block.drop_path, x)
    rows = x.permute(0, 2, 3, 1).contiguous()
    chosen = rows if kept is None else rows[kept]
    settings = _Settings(_autocast_dtype() or x.dtype, block.norm.eps, block.dwconv.padding, factor, with_cp)
    differentiable = any(t is not None and t.requires_grad for t in (x, *parameters))
    with torch.autocast('cpu', enabled=False):
        if torch.is_grad_enabled() and differentiable:
            out = _Block.apply(settings, chosen, chosen.to(settings.dtype), *parameters)
        else:
            out = _forward(settings, chosen, chosen.to(settings.dtype), parameters)[0]
        if kept is not None:
            out = rows.to(out.dtype).index_copy(0, kept, out)
    return out.permute(0, 3, 1, 2)


class _Block(torch.autograd.Function):
    """x + branch(z), N x H x W x C, where z is x in the dtype of the products.

    Kept for the backward pass: z; the depthwise convolution's output, unless `with_cp` is True; in wide blocks the
    hidden layer before GELU, unless `with_cp` is set. The rest is computed again.
    """

    @staticmethod
    def forward(ctx, settings, x, z, *parameters):
        keep_hidden = not settings.with_cp and x.shape[-1] >= WIDE
        out, y, hidden = _forward(settings, x, z, _Parameters(*parameters), keep=True, keep_hidden=keep_hidden)
        ctx.settings = settings
        ctx.save_for_backward(*parameters, z, None if settings.with_cp is True else y, *hidden)
        return out

    @staticmethod
    def backward(ctx, grad):
        saved, n = ctx.saved_tensors, len(_Parameters._fields)
        parameters, (z, y, *hidden) = _Parameters(*saved[:n]), saved[n:]
        with torch.autocast('cpu', enabled=False):
            if not len(grad):  # stochastic depth left no sample, and every parameter is to have a gradient
                found = [torch.zeros_like(t) if n else None for t, n in zip((z, *parameters), ctx.needs_input_grad[2:])]
            elif torch.is_grad_enabled():  # gradients of these gradients are wanted
                found = _differentiable_backward(ctx.settings, z, parameters, grad, ctx.needs_input_grad[2:])
            else:
                found = _backward(ctx.settings, z, y, hidden, parameters, grad, ctx.needs_input_grad[2:])
        return None, grad, *found


def _forward(settings, x, z, parameters, keep=False, keep_hidden=False):
    """Output, depthwise convolution's output, and tiles of the hidden layer before GELU where it is to be kept; unless
    `keep` the first may lie where the second lay."""
    p = _cast(parameters, settings.dtype)
    y, hidden = _depthwise(z, p, settings), []
    del z  # of a forward pass alone nobody needs it any more
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
    return out, y, hidden


def _backward(settings, z, y, hidden, parameters, grad, needed):
    """Gradients of z and of the parameters, None where not `needed`."""
    p, of_parameters = _cast(parameters, settings.dtype), any(needed[1:])
    y = _depthwise(z, p, settings) if y is None else y
    scale = settings.factor if p.gamma is None else settings.factor * p.gamma
    norm, of_norms = (y.shape[-1:], p.norm, p.norm_bias), (True, of_parameters, of_parameters)
    grad_y, sums = [], None
    for i, (y_rows, g) in enumerate(_tiles(y, grad.contiguous())):
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
    of_z, *found = _depthwise_backward(settings, grad_y, z, p.depthwise, needed[0], of_parameters)
    if not of_parameters:
        return of_z, *[None] * len(parameters)
    *_, of_linear2, of_bias2 = sums  # of the branch before `scale`
    of_gamma = None
    if p.gamma is not None:
        of_gamma = settings.factor * ((of_linear2 * p.linear2).sum(1) + of_bias2 * p.bias2)
    of_linear2 *= scale if p.gamma is None else scale[:, None]
    of_bias2 *= scale
    found = zip((*found, *sums, of_gamma), parameters, needed[1:])
    return of_z, *(t.to(like.dtype) if n else None for t, like, n in found)


def _differentiable_backward(settings, z, parameters, grad, needed):
    """As `_backward`, of operations that have gradients themselves."""
    p = _cast(parameters, settings.dtype)
    y = _depthwise(z, p, settings)
    y = F.layer_norm(y, y.shape[-1:], p.norm, p.norm_bias, settings.eps)
    y = settings.factor * F.linear(F.gelu(F.linear(y, p.linear1, p.bias1)), p.linear2, p.bias2)
    y = y if p.gamma is None else p.gamma * y
    inputs = [t for t, n in zip((z, *parameters), needed) if n]
    found = iter(torch.autograd.grad(y, inputs, grad.to(y.dtype), create_graph=True))
    return tuple(next(found) if n else None for n in needed)


def _depthwise(z, p, settings):
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


def _cast(p: _Parameters, dtype: torch.dtype) -> _Parameters:
    """Parameters as autocast has them: of convolutions and Linears in `dtype`, the others as they are."""
    names = ('depthwise', 'depthwise_bias', 'linear1', 'bias1', 'linear2', 'bias2')
    return p._replace(**{name: getattr(p, name).to(dtype) for name in names})


def _draw(drop_path: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """The samples that keep the branch, None for all, and the factor of it."""
    if not drop_path.training or drop_path.rate == 0:
        return None, 1.0
    kept = drop_path.draw(x).nonzero().flatten()
    return (None if len(kept) == len(x) else kept), 1 / (1 - drop_path.rate)


def _takes(x: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not torch.Tensor:
        return False
    if x.device.type != 'cpu' or x.ndim != 4 or not x.numel() or _watched():
        return False
    return (_autocast_dtype() or x.dtype) in _dtypes()


def _watched() -> bool:
    """Whether something looks at or transforms the operations that make up a block."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or any(getattr(modules, f'_global{name}') for name in HOOKS)
    )


def _dtypes() -> tuple[torch.dtype, ...]:
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
        torch.linspace(-1, 1, n, dtype=dtype).view(shape) for n, shape in ((24, (3, 8)), (40, (5, 8)), (5, (5,)))
    )
    expected = F.linear(rows.double(), weight.double(), bias.double())
    try:
        found = _linear(rows, weight, bias), _linear(rows, weight, bias, gelu=True)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return all((f.double() - e).abs().max() < 0.03 for f, e in zip(found, (expected, F.gelu(expected))))


def _autocast_dtype() -> torch.dtype | None:
    return torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else None


def _parameters(block: nn.Module) -> _Parameters | None:
    """None where the block is not as built."""
    parts = [block, *block.children()]
    if [type(part) for part in parts[1:]] != list(block.PARTS):
        return None
    if any('forward' in vars(part) or part._compiled_call_impl for part in parts):
        return None
    if any(getattr(part, name) for part in parts for name in HOOKS):
        return None
    conv = block.dwconv
    if (conv.stride, conv.dilation, conv.groups, conv.padding_mode) != ((1, 1), (1, 1), len(conv.weight), 'zeros'):
        return None
    return _Parameters(
        *(conv.weight, conv.bias, block.norm.weight, block.norm.bias),
        *(block.pwconv1.weight, block.pwconv1.bias, block.pwconv2.weight, block.pwconv2.bias, block.gamma),
    )


def _fit(parameters: _Parameters, x: torch.Tensor) -> bool:
    """Whether they are plain tensors that the plain form would take: of the input's dtype, or autocast's to cast."""
    dtype = torch.float32 if _autocast_dtype() else x.dtype
    *needed, gamma = parameters
    return all(
        type(p) in (nn.Parameter, torch.Tensor) and p.device == x.device and p.dtype == dtype
        for p in [*needed, *([] if gamma is None else [gamma])]
    )
