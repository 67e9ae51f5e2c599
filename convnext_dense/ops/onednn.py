"""Backend of torch's own operators, for any x86 CPU on which oneDNN is fast.

- Feature maps stay channels_last: to LayerNorm and matmuls a map is a matrix with one row per pixel, without a copy.
- The four times wider hidden layer is computed in tiles of rows that stay in cache; it is never whole in memory.
- Matmuls are oneDNN's, fused with GELU: in float32 up to three times the speed of MKL, which F.linear uses.
- The backward pass recomputes the hidden layer tile by tile where that costs less than to write and read it.
- The gradient of the depthwise weight is the diagonal of that of a grouped convolution, which has a fast kernel.

Saved for the backward pass: the input in the dtype of the matmuls; the depthwise convolution's output, unless `with_cp`
is True; in wide blocks the hidden layer before GELU, unless `with_cp` is set.
"""

import math
import platform
from collections.abc import Iterator, Sequence
from functools import cache

import torch
import torch.nn.functional as F

from .block_params import PARAM_TYPES, SAVE_DWCONV, SAVE_HIDDEN, BlockArgs, BlockParams

DTYPES = (torch.float32, torch.bfloat16)
TILE = 4096  # rows whose hidden layer fits in the cache
SAVE_HIDDEN_FROM = 384  # channels from which on saving the hidden layer is faster than recomputing it
GROUP_SIZES = (16, 8)  # channels per group in the gradient of the depthwise weight: a vector of the processor


def check_block(x: torch.Tensor, params: BlockParams, args: BlockArgs) -> None:
    """Raise a RuntimeError unless a block can run. oneDNN's Linear does not check the shape of its bias."""
    if not {x.dtype, args.dtype} <= set(dtypes()):
        raise RuntimeError(f'oneDNN is not available for {x.dtype} and {args.dtype} on this machine')
    hidden = params.pwconv1_weight.shape[0] if params.pwconv1_weight.ndim else 0  # of any width
    shapes = params.expected_shapes(x.shape[-1], params.dwconv_weight.shape[2:], hidden)
    if [p.shape for p in params.present()] != shapes:
        raise RuntimeError(f'parameters of a block of {x.shape[-1]} channels must be of shapes {shapes}')


def supports_params(params: BlockParams, dtype: torch.dtype) -> bool:
    """Whether parameters are plain tensors of such a dtype on the CPU, as torch's own operators take them."""
    return all(
        type(p) in PARAM_TYPES and p.is_cpu and p.layout is torch.strided and p.dtype == dtype for p in params.present()
    )


def output_dtype(x: torch.Tensor, params: BlockParams, args: BlockArgs) -> torch.dtype:
    """Dtype of a block's output, that of the reference implementation."""
    return torch.promote_types(x.dtype, args.dtype if params.gamma is None else params.gamma.dtype)


def hidden_shapes(x: torch.Tensor, params: BlockParams) -> list[tuple[int, int]]:
    """Shapes of the saved hidden layer, tile by tile."""
    n_rows = x.numel() // x.shape[-1]
    return [(min(TILE, n_rows - start), len(params.pwconv1_weight)) for start in range(0, n_rows, TILE)]


@torch.autocast('cpu', enabled=False)
def forward(
    args: BlockArgs, x: torch.Tensor, z: torch.Tensor | None, params: BlockParams
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run a block.

    Args:
        args: Settings of the block.
        x: Map (N, H, W, C), contiguous.
        z: The same map in `args.dtype`; None to cast it here.
        params: Parameters of the block.

    Returns:
        The output, (N, H, W, C), and what is saved: the depthwise convolution's output, the tiles of the hidden layer.
    """
    save_hidden = args.save_level >= SAVE_HIDDEN
    p = params.cast(args.dtype)
    y, hidden = depthwise_conv(x.to(args.dtype) if z is None else z, p, args.padding), []
    dtype = output_dtype(x, params, args)
    out = y if args.save_level < SAVE_DWCONV and y.dtype == dtype else torch.empty_like(y, dtype=dtype)
    for x_rows, y_rows, out_rows in _row_tiles(x, y, out):
        n = F.layer_norm(y_rows, y_rows.shape[-1:], p.norm_weight, p.norm_bias, args.eps)
        h = _onednn_linear(n, p.pwconv1_weight, p.pwconv1_bias, gelu=not save_hidden)
        if save_hidden:
            hidden.append(h)
            h = F.gelu(h)
        branch = _onednn_linear(h, p.pwconv2_weight, p.pwconv2_bias)
        if p.gamma is None:
            torch.add(x_rows, branch, alpha=args.keep_prob_scale, out=out_rows)
        else:
            torch.addcmul(x_rows, p.gamma, branch, value=args.keep_prob_scale, out=out_rows)
    return out, [*([y] if args.save_level >= SAVE_DWCONV else []), *hidden]


@torch.autocast('cpu', enabled=False)
def backward(
    args: BlockArgs,
    grad: torch.Tensor,
    z: torch.Tensor,
    saved: Sequence[torch.Tensor],
    params: BlockParams,
    z_is_x: bool,
    needs_grad: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Gradients of a block's input and parameters.

    Args:
        args: Settings of the block.
        grad: Gradient of the output, (N, H, W, C), contiguous.
        z: The input of the depthwise convolution, (N, H, W, C).
        saved: As returned by `forward`.
        params: Parameters of the block.
        z_is_x: Whether z is also the shortcut, so that its gradient is the sum of both.
        needs_grad: Whether z and each of the parameters needs a gradient.

    Returns:
        Gradients of z and of the parameters, row-major; None where none is needed.
    """
    z = z.to(args.dtype)
    y, *hidden = (t.contiguous() for t in (saved if args.save_level >= SAVE_DWCONV else [z, *saved]))
    needs_z, *needs_params = needs_grad
    p, needs_param_grads = params.cast(args.dtype), any(needs_params)
    if args.save_level < SAVE_DWCONV:
        y = depthwise_conv(z, p, args.padding)
    scale = args.keep_prob_scale if p.gamma is None else args.keep_prob_scale * p.gamma
    norm, norm_mask = (y.shape[-1:], p.norm_weight, p.norm_bias), (True, needs_param_grads, needs_param_grads)
    grad_y, sums = [], None
    for i, (y_rows, g) in enumerate(_row_tiles(y, grad)):
        n, mean, rstd = torch.native_layer_norm(y_rows, *norm, args.eps)
        a = hidden[i] if hidden else _onednn_linear(n, p.pwconv1_weight, p.pwconv1_bias)
        grad_h = _onednn_linear((scale * g).to(args.dtype), p.pwconv2_weight.t())
        grad_a = torch.ops.aten.gelu_backward(grad_h, a)
        grad_n = _onednn_linear(grad_a, p.pwconv1_weight.t())
        grad_rows, *grads = torch.ops.aten.native_layer_norm_backward(
            grad_n, y_rows, norm[0], mean, rstd, *norm[1:], norm_mask
        )
        grad_y.append(grad_rows)
        if needs_param_grads:
            grads += [*_linear_wgrad(grad_a, n), *_linear_wgrad(g.to(args.dtype), F.gelu(a))]
            sums = [t.float() if t.dtype == torch.bfloat16 else t for t in grads] if sums is None else sums
            if i:
                torch._foreach_add_(sums, grads)
    grad_y = (grad_y[0] if len(grad_y) == 1 else torch.cat(grad_y)).view(y.shape)
    grad_z, *grads = _depthwise_conv_backward(args.padding, grad_y, z, p.dwconv_weight, needs_z, needs_param_grads)
    if needs_z:
        grad_z = grad + grad_z if z_is_x else grad_z.contiguous()
    if not needs_param_grads:
        return [grad_z, *[None] * len(params)]
    *sums, grad_pwconv2, grad_bias2 = sums
    grads += [*sums, *p.scale_branch_grads(args.keep_prob_scale, grad_pwconv2, grad_bias2)]
    grads = [t.to(p.dtype).contiguous() if n else None for t, p, n in zip(grads, params, needs_params)]
    return [grad_z, *grads]


def depthwise_conv(z: torch.Tensor, p: BlockParams, padding: tuple[int, int]) -> torch.Tensor:
    """Depthwise convolution of a map (N, H, W, C)."""
    z = z.permute(0, 3, 1, 2)
    y = F.conv2d(z, p.dwconv_weight, p.dwconv_bias, padding=padding, groups=len(p.dwconv_weight))
    return y.permute(0, 2, 3, 1).contiguous()


def _depthwise_conv_backward(padding, grad, z, weight, needs_input_grad, needs_param_grads):
    """Gradients of input, weight and bias.

    The gradient of the weight is computed for groups of several channels, which is many times faster: the weight of an
    output channel and its own input channel has the same gradient there.
    """
    channels = len(weight)
    size = next((n for n in GROUP_SIZES if channels % n == 0), 1)
    grouped = weight.new_empty(channels, size, *weight.shape[2:]).contiguous(memory_format=torch.channels_last)
    grad, z = grad.permute(0, 3, 1, 2), z.permute(0, 3, 1, 2)

    def convolution_backward(weight, groups, mask):
        return torch.ops.aten.convolution_backward(
            grad, z, weight, [channels], (1, 1), padding, (1, 1), False, (0, 0), groups, mask
        )

    grad_z = None
    if needs_input_grad:
        grad_z = convolution_backward(weight, channels, (True, False, False))[0].permute(0, 2, 3, 1)
    if not needs_param_grads:
        return grad_z, None, None
    _, grad_weight, grad_bias = convolution_backward(grouped, channels // size, (False, True, True))
    # (channels / size, kernel, kernel, size)
    grad_weight = grad_weight.unflatten(0, (-1, size)).diagonal(dim1=1, dim2=2)
    return grad_z, grad_weight.permute(0, 3, 1, 2).reshape(weight.shape), grad_bias


def _onednn_linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, gelu: bool = False
) -> torch.Tensor:
    """The Linear that `torch.compile` calls.

    F.linear uses MKL in float32, and in bfloat16 adds the bias in a second pass.
    """
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, *(('gelu', [], 'none') if gelu else ('none', [], '')))


def _linear_wgrad(grad: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of weight and bias of a Linear whose input was `rows`."""
    if rows.dtype == torch.bfloat16:
        wide = grad.shape[1] > rows.shape[1]
        return (rows.t() @ grad).t() if wide else grad.t() @ rows, grad.sum(0)
    # In float32 the gradient of a pointwise convolution's weight is the fastest matmul over pixels there is.
    weight = grad.new_empty(grad.shape[1], rows.shape[1], 1, 1)
    _, weight, bias = torch.ops.aten.convolution_backward(
        *(_rows_as_image(grad), _rows_as_image(rows), weight, [len(weight)], (1, 1), (0, 0), (1, 1), False, (0, 0), 1),
        (False, True, True),
    )
    return weight[:, :, 0, 0], bias


def _rows_as_image(rows: torch.Tensor) -> torch.Tensor:
    """View rows as channels_last images of height 1.

    Sixteen images where that divides, because with one thread torch does not use oneDNN for a pointwise convolution of
    fewer.
    """
    n = 16 if len(rows) % 16 == 0 else 1
    return rows.view(n, 1, -1, rows.shape[-1]).permute(0, 3, 1, 2)


def _row_tiles(*maps: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Yield the same rows of each map (N, H, W, C), tile by tile."""
    rows = [m.view(-1, m.shape[-1]) for m in maps]
    for start in range(0, len(rows[0]), TILE):
        yield [r[start : start + TILE] for r in rows]


def dtypes() -> tuple[torch.dtype, ...]:
    """Dtypes for which oneDNN is available, and fast, on this machine."""
    return _supported_dtypes() if torch.backends.mkldnn.enabled else ()


@cache
def _supported_dtypes() -> tuple[torch.dtype, ...]:
    if platform.machine() not in ('x86_64', 'AMD64') or not torch.backends.mkldnn.is_available():
        return ()
    dtypes = DTYPES if torch.ops.mkldnn._is_mkldnn_bf16_supported() else DTYPES[:1]
    return tuple(dtype for dtype in dtypes if _probe_onednn_linear(dtype))


def _probe_onednn_linear(dtype: torch.dtype) -> bool:
    """Whether torch's internal Linear computes what this file expects of it."""
    rows, weight, bias = (
        torch.linspace(-1, 1, math.prod(shape), dtype=dtype, device='cpu').view(shape)
        for shape in ((3, 8), (5, 8), (5,))
    )
    expected = F.linear(rows.double(), weight.double(), bias.double())
    try:
        outputs = _onednn_linear(rows, weight, bias), _onednn_linear(rows, weight, bias, gelu=True)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return all((out.double() - e).abs().max() < 0.03 for out, e in zip(outputs, (expected, F.gelu(expected))))
