"""Backend of torch's own operators, for any x86 CPU on which oneDNN is fast.

- Feature maps stay channels_last: to LayerNorm and matmuls they are matrices with one row per pixel, without a copy.
- The four times wider hidden layer is computed in tiles of rows that stay in cache; it is never whole in memory.
- Matmuls are oneDNN's, fused with GELU: in float32 up to three times the speed of MKL, which F.linear uses.
- The backward pass recomputes the hidden layer tile by tile where that costs less than to write and read it.
- Global response normalization (V2) takes two sweeps over the tiles of an image, in either pass: it needs the norm of
  each hidden channel over the whole image before it can scale the first pixel.
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

from .block_params import GRN_EPS, PARAM_TYPES, SAVE_DWCONV, SAVE_HIDDEN, BlockArgs, BlockParams

DTYPES = (torch.float32, torch.bfloat16)
TILE = 4096  # rows whose hidden layer fits in the cache
KEPT_BYTES = 24 << 20  # of the hidden layer that the second sweep of GRN need not compute again
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
    groups = _tile_groups(params, x)
    return [(len(rows), len(params.pwconv1_weight)) for tiles in groups for (rows,) in tiles]


@torch.autocast('cpu', enabled=False)
def forward(
    args: BlockArgs, x: torch.Tensor, z: torch.Tensor | None, params: BlockParams
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run a block.

    Args:
        args: Settings of the block.
        x: Feature map (N, H, W, C), contiguous.
        z: The same feature map in `args.dtype`; None to cast it here.
        params: Parameters of the block.

    Returns:
        The output, (N, H, W, C), and what is saved: the depthwise convolution's output, the tiles of the hidden layer.
    """
    save_hidden = args.save_level >= SAVE_HIDDEN
    p = params.cast(args.dtype)
    y, hidden = depthwise_conv(x.to(args.dtype) if z is None else z, p, args.padding), []
    dtype = output_dtype(x, params, args)
    out = y if args.save_level < SAVE_DWCONV and y.dtype == dtype else torch.empty_like(y, dtype=dtype)

    def hidden_layer(y_rows):
        n = F.layer_norm(y_rows, y_rows.shape[-1:], p.norm_weight, p.norm_bias, args.eps)
        h = _onednn_linear(n, p.pwconv1_weight, p.pwconv1_bias, gelu=not save_hidden)
        if save_hidden:
            hidden.append(h)
            h = F.gelu(h)
        return h

    for tiles in _tile_groups(params, x, y, out):
        weight, bias, hidden_of_tile = p.pwconv2_weight, p.pwconv2_bias, {}
        if p.grn_gamma is not None:
            grn = _Grn(params)
            for i, (_, y_rows, _) in enumerate(tiles):
                h = hidden_layer(y_rows)
                grn.add(h)
                if (i + 1) * h.nbytes <= KEPT_BYTES or save_hidden:
                    hidden_of_tile[i] = hidden[-1] if save_hidden else h
            # What GRN does to the hidden layer is done to the weights behind it.
            weight = (grn.weight * grn.factor()).to(args.dtype)
            bias = (params.pwconv2_bias + grn.weight @ grn.beta).to(args.dtype)
        for i, (x_rows, y_rows, out_rows) in enumerate(tiles):
            h = hidden_of_tile.get(i)
            h = hidden_layer(y_rows) if h is None else F.gelu(h) if save_hidden else h
            branch = _onednn_linear(h, weight, bias)
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
    grad_y, sums, grn, n_tiles = [], None, None, 0
    for tiles in _tile_groups(params, y, grad):
        saved_tiles = dict(enumerate(hidden[n_tiles : n_tiles + len(tiles)]))
        n_tiles += len(tiles)
        if p.grn_gamma is not None:
            grn = _Grn(params, grn)
            for i, (y_rows, g) in enumerate(tiles):
                a = saved_tiles.get(i)
                if a is None:
                    n = F.layer_norm(y_rows, *norm, args.eps)
                    a = _onednn_linear(n, p.pwconv1_weight, p.pwconv1_bias)
                    if (i + 1) * a.nbytes <= KEPT_BYTES:
                        saved_tiles[i] = a
                h = F.gelu(a)
                grn.add(h)
                grn.add_product(*_linear_wgrad(g.to(args.dtype), h))
            grn.finish_image(scale)
        for i, (y_rows, g) in enumerate(tiles):
            n, mean, rstd = torch.native_layer_norm(y_rows, *norm, args.eps)
            a = saved_tiles.get(i)
            if a is None:
                a = _onednn_linear(n, p.pwconv1_weight, p.pwconv1_bias)
            grad_h = _onednn_linear((scale * g).to(args.dtype), p.pwconv2_weight.t())
            if grn:
                grad_h = (grad_h * grn.factor()).addcmul_(grn.correction, F.gelu(a)).to(args.dtype)
            grad_a = torch.ops.aten.gelu_backward(grad_h, a)
            grad_n = _onednn_linear(grad_a, p.pwconv1_weight.t())
            grad_rows, *grads = torch.ops.aten.native_layer_norm_backward(
                grad_n, y_rows, norm[0], mean, rstd, *norm[1:], norm_mask
            )
            grad_y.append(grad_rows)
            if not needs_param_grads:
                continue
            grads += _linear_wgrad(grad_a, n)
            if not grn:
                grads += _linear_wgrad(g.to(args.dtype), F.gelu(a))
            if sums is None:
                sums = [t.float() if t.dtype == torch.bfloat16 else t for t in grads]
            else:
                torch._foreach_add_(sums, grads)
    grad_y = (grad_y[0] if len(grad_y) == 1 else torch.cat(grad_y)).view(y.shape)
    grad_z, *grads = _depthwise_conv_backward(args.padding, grad_y, z, p.dwconv_weight, needs_z, needs_param_grads)
    if needs_z:
        grad_z = grad + grad_z if z_is_x else grad_z.contiguous()
    if not needs_param_grads:
        return [grad_z, *[None] * len(params)]
    if grn:
        *grn_grads, grad_pwconv2, grad_bias2 = grn.param_grads(scale)
    else:
        *sums, grad_pwconv2, grad_bias2 = sums
        grn_grads = None, None
    grads += [*sums, *grn_grads, *p.scale_branch_grads(args.keep_prob_scale, grad_pwconv2, grad_bias2)]
    grads = [t.to(p.dtype).contiguous() if n else None for t, p, n in zip(grads, params, needs_params)]
    return [grad_z, *grads]


class _Grn:
    """Global response normalization of the hidden layer of one image, and its gradients, which add up over images.

    Args:
        params: Parameters of the block, as they are.
        previous: That of the image before.
    """

    def __init__(self, params: BlockParams, previous: '_Grn | None' = None):
        dtype = torch.promote_types(params.grn_gamma.dtype, torch.float32)  # squares of a whole image add up
        self.gamma, self.beta, self.weight = (
            t.to(dtype) for t in (params.grn_gamma, params.grn_beta, params.pwconv2_weight)
        )
        self.squares, self.product, self.grad_bias = (torch.zeros((), dtype=dtype, device='cpu') for _ in range(3))
        self.correction = None
        self.sums = previous.sums if previous else [0, 0, 0]  # gradients of gamma, and of pwconv2 without a scale

    def add(self, h: torch.Tensor) -> None:
        """Add rows of the hidden layer to the norms."""
        self.squares = self.squares + torch.linalg.vector_norm(h, dim=0, dtype=self.squares.dtype).square()

    def factor(self) -> torch.Tensor:
        """What each hidden channel is multiplied with."""
        return 1 + self.gamma * self.relative_norm()

    def relative_norm(self) -> torch.Tensor:
        """Norm of each hidden channel over the mean of all."""
        norm = self.squares.sqrt()
        return norm / (norm.mean() + GRN_EPS)

    def add_product(self, grad_weight: torch.Tensor, grad_bias: torch.Tensor) -> None:
        """Add what pwconv2's gradients would be without GRN and scale, of some rows."""
        dtype = self.weight.dtype
        self.product, self.grad_bias = self.product + grad_weight.to(dtype), self.grad_bias + grad_bias.to(dtype)

    def finish_image(self, scale: torch.Tensor | float) -> None:
        """Add the image to the parameters' gradients; the hidden layer's is `factor * grad + correction * h`."""
        norm = self.squares.sqrt()
        inverse_mean = 1 / (norm.mean() + GRN_EPS)
        column = scale[:, None] if isinstance(scale, torch.Tensor) else scale
        grad_factor = (column * self.product * self.weight).sum(0)
        grad_relative = self.gamma * grad_factor
        grad_norm = inverse_mean * (grad_relative - inverse_mean * (grad_relative * norm).mean())
        self.correction = torch.where(norm > 0, grad_norm / norm, 0)  # torch's norm has no slope at zero
        grads = grad_factor * norm * inverse_mean, self.product * self.factor(), self.grad_bias
        self.sums = [total + grad for total, grad in zip(self.sums, grads)]

    def param_grads(self, scale: torch.Tensor | float) -> tuple[torch.Tensor, ...]:
        """Gradients of gamma and beta, and of pwconv2's weight and bias for a branch without a scale."""
        grad_gamma, grad_weight, grad_bias = self.sums
        grad_beta = (scale * grad_bias) @ self.weight
        return grad_gamma, grad_beta, grad_weight + grad_bias[:, None] * self.beta, grad_bias


def depthwise_conv(z: torch.Tensor, p: BlockParams, padding: tuple[int, int]) -> torch.Tensor:
    """Depthwise convolution of a feature map (N, H, W, C)."""
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


def _tile_groups(params: BlockParams, *maps: torch.Tensor) -> Iterator[list[list[torch.Tensor]]]:
    """Yield the tiles of each image where GRN looks at whole images, else those of all images as one group.

    A tile has the same rows of each feature map (N, H, W, C).
    """
    for images in [maps] if params.grn_gamma is None else zip(*(m.split(1) for m in maps)):
        rows = [m.view(-1, m.shape[-1]) for m in images]
        yield [[r[start : start + TILE] for r in rows] for start in range(0, len(rows[0]), TILE)]


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
