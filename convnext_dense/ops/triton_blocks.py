"""The ConvNeXt block on a GPU in half precision: all but the matmuls in Triton kernels.

Eager torch spends most of a block's time in passes over its feature maps in memory (casts, LayerNorm, GELU, GRN, layer
scale, shortcut), in cuDNN's depthwise convolutions, and on the CPU, which starts some fifty kernels for it. Here there
are eight in the forward pass of a block and ten in its backward pass. GELU's and GRN's results are not kept for the
backward pass: they follow from the hidden layer, which is.

It is an autograd function and no operator of torch, because an operator with so many arguments takes as long to be
called as two kernels to be started; where a dispatch mode looks at operators, the reference implementation runs.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .block_params import GRN_EPS, SAVE_DWCONV, SAVE_HIDDEN, SAVE_INPUT, BlockParams

KERNEL_SIZE = 7
DTYPES = (torch.float16, torch.bfloat16)
MIN_TRITON = (3, 3)  # before, a compiled kernel does not take its constants as arguments
MAX_CHANNELS = 4096  # a row of a feature map is one tile of LayerNorm
MAX_PROGRAMS = 264  # over which a reduction is divided: two for each multiprocessor of the largest GPUs
ROWS_PER_PROGRAM = 64  # at least
N_PARAMS = len(BlockParams._fields)


@functools.cache
def kernels():
    """The module of the kernels, or None where there is no Triton, or one that is too old."""
    try:
        import triton

        from . import triton_kernels
    except ImportError:
        return None
    return triton_kernels if tuple(map(int, triton.__version__.split('.')[:2])) >= MIN_TRITON else None


class Block(NamedTuple):
    """What a block computes with: its parameters, and the settings of a call.

    Attributes:
        params: Parameters.
        scale: Factor of each sample's branch under stochastic depth, (N,) float32, or None.
        eps: Epsilon of LayerNorm.
        dtype: Dtype of the matmuls, float16 or bfloat16.
    """

    params: BlockParams
    scale: torch.Tensor | None
    eps: float
    dtype: torch.dtype

    @property
    def sizes(self) -> tuple[int, int]:
        """Channels of the feature map and of the hidden layer."""
        return self.params.pwconv2_weight.shape

    def output_dtype(self, x_dtype: torch.dtype) -> torch.dtype:
        """Dtype of the output for an input's, as type promotion in the reference implementation gives it."""
        gamma = self.params.gamma
        branch = self.dtype if gamma is None else torch.promote_types(self.dtype, gamma.dtype)
        return torch.promote_types(x_dtype, branch)


def supports(x: torch.Tensor, block: Block) -> bool:
    """Whether the kernels compute a block of x, contiguous (N, H, W, C)."""
    p, channels, hidden = block.params, x.shape[-1], len(block.params.pwconv1_bias)
    if block.dtype not in DTYPES or x.dtype not in (torch.float32, block.dtype) or kernels() is None:
        return False
    if channels % 8 or hidden % 8 or max(4 * channels, hidden) > 4 * MAX_CHANNELS:
        return False
    if x.data_ptr() % 16 or max(x[0].numel(), x.numel() // channels) >= 2**31:  # of an image, and pixels in all
        return False
    param_dtype, device = p.dwconv_weight.dtype, x.device
    if param_dtype not in (torch.float32, x.dtype):
        return False
    params, shapes = p.present(), p.expected_shapes(channels, (KERNEL_SIZE, KERNEL_SIZE), hidden)
    for t, shape in zip(params, shapes):
        if t.dtype != param_dtype or t.device != device or t.shape != shape:
            return False
        if not t.is_contiguous() or t.data_ptr() % 16 or t.is_neg():
            return False
    return True


def run(x: torch.Tensor, block: Block, with_cp: bool | str) -> torch.Tensor:
    """Run a block.

    Args:
        x: Feature map that is supported, contiguous (N, H, W, C).
        block: The block.
        with_cp: What the backward pass recomputes: nothing (False), the whole block (True) or all but the depthwise
            convolution ('mlp').

    Returns:
        The output, (N, H, W, C).
    """
    inputs = block.params
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in inputs)):
        save_level = {True: SAVE_INPUT, 'mlp': SAVE_DWCONV}.get(with_cp, SAVE_HIDDEN)
        return _BlockFunction.apply(x, *inputs, block.scale, block.eps, block.dtype, save_level)
    return forward(x, block, None)[0]


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *args):
        *args, save_level = args
        out, saved = forward(x, _block(args), save_level)
        ctx.x_dtype, ctx.settings = x.dtype, args[N_PARAMS + 1 :]
        ctx.save_for_backward(*args[: N_PARAMS + 1], *saved)
        return out

    @staticmethod
    def backward(ctx, grad):
        inputs, saved = ctx.saved_tensors[: N_PARAMS + 1], ctx.saved_tensors[N_PARAMS + 1 :]
        block = _block([*inputs, *ctx.settings])
        if torch.is_grad_enabled():
            raise RuntimeError(
                'convnext_dense: gradients of gradients need the reference implementation: call the model within '
                'convnext_dense.ops.dispatch.disabled()'
            )
        if not torch._C._has_storage(grad):  # a batch of gradients, which has no memory to read
            grads = _reference_grads(grad, saved[0], ctx.x_dtype, block, ctx.needs_input_grad)
        else:
            grad = grad.resolve_neg().contiguous()
            grads = backward(grad if grad.data_ptr() % 16 == 0 else grad.clone(), [*saved], ctx.x_dtype, block)
        return *grads, None, None, None, None


def _block(args) -> Block:
    return Block(BlockParams(*args[:N_PARAMS]), *args[N_PARAMS:])


def _reference_grads(grad, x, x_dtype, block, needs_grad):
    """Gradients of a block from torch's operators."""

    def branch(x, *inputs):
        p = BlockParams(*inputs)
        half = p.cast(block.dtype)
        y = F.conv2d(x.permute(0, 3, 1, 2), half.dwconv_weight, half.dwconv_bias, padding=3, groups=x.shape[-1])
        y = y.permute(0, 2, 3, 1).to(p.norm_weight.dtype)
        y = F.layer_norm(y, y.shape[-1:], p.norm_weight, p.norm_bias, block.eps).to(block.dtype)
        y = F.gelu(F.linear(y, half.pwconv1_weight, half.pwconv1_bias))
        if p.grn_gamma is not None:
            norms = torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True, dtype=torch.float32)
            relative = norms / (norms.mean(-1, keepdim=True) + GRN_EPS)
            y = (p.grn_gamma * (y * relative.to(y.dtype)) + p.grn_beta + y).to(y.dtype)
        y = F.linear(y, half.pwconv2_weight, half.pwconv2_bias)
        y = y if p.gamma is None else p.gamma * y
        return y if block.scale is None else y * block.scale.view(-1, 1, 1, 1).to(y.dtype)

    inputs = [x, *block.params]
    inputs = [t if t is None else t.detach().requires_grad_(needed) for t, needed in zip(inputs, needs_grad)]
    with torch.autocast('cuda', enabled=False), torch.enable_grad():
        out = branch(*inputs)
    grads = iter(torch.autograd.grad(out, [t for t in inputs if t is not None and t.requires_grad], grad.to(out.dtype)))
    grads = [next(grads) if t is not None and t.requires_grad else None for t in inputs]
    if needs_grad[0]:
        grads[0] = grad.to(x_dtype) + grads[0].to(x_dtype)
    return grads


# ---- forward ---------------------------------------------------------------------------------------------------------


def forward(x: torch.Tensor, block: Block, save_level: int | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run a block without autograd.

    Args:
        x: Feature map, contiguous (N, H, W, C).
        block: The block.
        save_level: What to save for a backward pass, as in `BlockArgs`; None where there is none.

    Returns:
        The output, and what `backward` needs: the input in half precision; also the convolution's output; also the
        weights in half precision, the hidden layer before its bias, the branch before its bias, and for GRN the norms
        of the hidden channels and their scales, (N, hidden).
    """
    weights = _half_weights(block)
    x_half = x.to(block.dtype)
    y = _dwconv(x_half, weights[0], block)
    branch, bias, inner = _mlp(y, weights, block, save=save_level == SAVE_HIDDEN)
    out = torch.empty_like(x, dtype=block.output_dtype(x.dtype))
    channels, p = x.shape[-1], block.params
    rows, tile = x.numel() // channels, _tile(channels)
    _launch(
        *('shortcut', (-(-rows // tile['BLOCK_R']), -(-channels // tile['BLOCK_C']))),
        *(branch, x, bias, p.gamma, block.scale, out, rows, rows // len(x)),
        **dict(channels=channels, HAS_GAMMA=p.gamma is not None, HAS_SCALE=block.scale is not None, **tile),
    )
    n_saved = {None: 0, SAVE_INPUT: 1, SAVE_DWCONV: 2}.get(save_level)
    return out, [x_half, y, *weights, *inner][:n_saved]


def _half_weights(block: Block) -> list[torch.Tensor]:
    """Depthwise weights (49, C) and both Linears' weights, in half precision."""
    p, dtype, (channels, hidden) = block.params, block.dtype, block.sizes
    weights = [p.pwconv1_weight.detach(), p.pwconv2_weight.detach()]
    is_half = p.dwconv_weight.dtype == dtype
    out = weights if is_half else [torch.empty_like(weight, dtype=dtype) for weight in weights]
    taps = torch.empty(KERNEL_SIZE**2, channels, dtype=dtype, device=p.dwconv_weight.device)
    size = len(taps) * channels if is_half else channels * max(hidden, len(taps))
    _launch(
        *('cast_weights', (-(-size // 1024), 1), p.dwconv_weight, *weights, taps, *out),
        **dict(channels=channels, hidden=hidden, TAPS=len(taps), CAST=not is_half, BLOCK=1024, num_warps=4),
    )
    return [taps, *out]


def _dwconv(x: torch.Tensor, taps: torch.Tensor, block: Block) -> torch.Tensor:
    y = torch.empty_like(x)
    _launch_dwconv(x, taps, block.params.dwconv_bias, None, y)
    return y


def _launch_dwconv(x, taps, bias, shortcut, out):
    n, height, width, channels = x.shape
    block_h, block_w, block_c = 4, 8, 32 if channels % 64 else 64
    tiles_h, tiles_w = -(-height // block_h), -(-width // block_w)
    _launch(
        *('dwconv', (n * tiles_h * tiles_w * -(-channels // block_c), 1)),
        *(x, taps, bias, shortcut, out, height, width, tiles_h, tiles_w),
        **dict(channels=channels, KERNEL=KERNEL_SIZE, IS_GRADIENT=shortcut is not None),
        **dict(BLOCK_H=block_h, BLOCK_W=block_w, BLOCK_C=block_c, num_warps=block_c // 16),
    )


def _mlp(
    y: torch.Tensor, weights: list[torch.Tensor], block: Block, save: bool
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """LayerNorm, Linear, GELU, GRN and Linear.

    Returns:
        The branch before its bias, this bias, and what is to be saved (`forward`), the weights aside.
    """
    _, weight1, weight2 = weights
    samples, hidden, has_grn = len(y), len(weight1), block.params.grn_gamma is not None
    h = _layer_norm(y, block) @ weight1.t()
    a = torch.empty_like(h) if save else h
    tile = _tile(hidden)
    programs, *sizes = _split(len(h) // samples, samples)
    squares = h.new_empty(samples * programs, hidden, dtype=torch.float32) if has_grn else None
    _launch(
        *('gelu', (samples * programs, -(-hidden // tile['BLOCK_C'])), h, block.params.pwconv1_bias, a, squares),
        *sizes,
        **dict(hidden=hidden, SQUARES=has_grn, **tile),
    )
    if not has_grn:
        branch = (a @ weight2.t()).view_as(y)
        return branch, block.params.pwconv2_bias, [h, branch]
    norms, scale = torch.empty(2, samples, hidden, device=h.device).unbind()
    row = dict(hidden=hidden, BLOCK_C=_power_of_2(hidden), num_warps=8)
    _launch('grn_scale', (samples, 1), squares, block.params.grn_gamma, norms, scale, programs, GRN_EPS, **row)
    weight, bias = _scaled_weight(scale, block)
    branch = torch.bmm(a.view(samples, -1, hidden), weight.transpose(1, 2)).view_as(y)
    return branch, bias, [h, branch, norms, scale]


def _layer_norm(y: torch.Tensor, block: Block) -> torch.Tensor:
    """LayerNorm of the pixels, as rows."""
    channels = y.shape[-1]
    out = y.new_empty(y.numel() // channels, channels)
    block_c = _power_of_2(channels)
    block_r = max(1, 4096 // block_c)
    _launch(
        *('layer_norm', (-(-len(out) // block_r), 1)),
        *(y, block.params.norm_weight, block.params.norm_bias, out, len(out), block.eps),
        **dict(channels=channels, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=8),
    )
    return out


def _scaled_weight(scale: torch.Tensor, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear 2 after GRN: its weight for each sample, (N, C, hidden), and its bias, float32.

    What GRN multiplies and adds to the hidden channels can as well be part of the Linear.
    """
    channels, hidden = block.sizes
    weight = torch.empty(len(scale), channels, hidden, dtype=block.dtype, device=scale.device)
    bias = scale.new_empty(channels)
    _launch(
        *('scale_weight', (channels, len(scale)), block.params.pwconv2_weight, block.params.pwconv2_bias),
        *(block.params.grn_beta, scale, weight, bias),
        **dict(channels=channels, hidden=hidden, BLOCK_K=1024, num_warps=4),
    )
    return weight, bias


# ---- backward --------------------------------------------------------------------------------------------------------


def backward(
    grad: torch.Tensor, saved: list[torch.Tensor], x_dtype: torch.dtype, block: Block
) -> list[torch.Tensor | None]:
    """Gradients of a block.

    Args:
        grad: Of the output, contiguous (N, H, W, C).
        saved: What `forward` returned.
        x_dtype: Dtype of the input.
        block: The block.

    Returns:
        Gradients of the input and of the parameters.
    """
    x_half, y, taps, weight1, weight2, h, branch, *grn = _recompute(saved, block)
    programs, *sizes = _split(len(h) // len(y), len(y))
    columns = _columns(*block.sizes)
    partial = y.new_empty(len(y) * programs, columns['dwconv_weight'].stop, dtype=torch.float32)

    grad_branch = _shortcut_grad(grad, branch, block, partial)
    grad_h = grad_branch @ weight2
    grad_grn, scale_and_square = _grn_grad(h, grad_h, programs, sizes, grn, block) if grn else ((None, None), None)
    a = _gelu_grad(h, grad_h, sizes, scale_and_square, block, partial)
    grad_weight2 = _matmul_float32(grad_branch.t(), a)
    del a, grad_branch
    grad_z = grad_h @ weight1
    z, grad_y = _layer_norm_grad(grad_z, y, block, partial)
    grad_weight1 = _matmul_float32(grad_h.t(), z)
    del grad_h, z, grad_z
    _dwconv_weight_grad(x_half, grad_y, partial)
    grad_x = torch.empty_like(y, dtype=x_dtype)
    _launch_dwconv(grad_y, taps, None, grad, grad_x)

    row = partial.sum(0)
    p = block.params
    named = {name: row[part].view(getattr(p, name).shape) for name, part in columns.items() if name != 'gamma'}
    named |= dict(pwconv1_weight=grad_weight1, pwconv2_weight=grad_weight2, gamma=row[columns['gamma']])
    named |= dict(zip(('grn_gamma', 'grn_beta'), grad_grn))
    grads = [None if t is None else named[name] for name, t in zip(p._fields, p)]
    if p.dwconv_weight.dtype != torch.float32:
        grads = [g if g is None else g.to(p.dwconv_weight.dtype) for g in grads]
    return [grad_x, *grads]


@functools.cache
def _columns(channels: int, hidden: int) -> dict[str, slice]:
    """Where each parameter's gradient lies in the rows of partial sums."""
    sizes = dict.fromkeys(('gamma', 'pwconv2_bias'), channels) | dict(pwconv1_bias=hidden)
    sizes |= dict.fromkeys(('norm_weight', 'norm_bias', 'dwconv_bias'), channels)
    sizes['dwconv_weight'] = channels * KERNEL_SIZE**2
    columns, start = {}, 0
    for name, size in sizes.items():
        columns[name] = slice(start, start + size)
        start += size
    return columns


def _recompute(saved: list[torch.Tensor], block: Block) -> list[torch.Tensor]:
    """All that the backward pass needs."""
    if len(saved) > 2:
        return saved
    weights = _half_weights(block)
    if len(saved) == 1:
        saved = [saved[0], _dwconv(saved[0], weights[0], block)]
    return [*saved, *weights, *_mlp(saved[1], weights, block, save=True)[2]]


def _matmul_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Matmul of half-precision matrices, float32."""
    if _HAS_OUT_DTYPE and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


_HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, 'dtype')  # torch 2.8


def _shortcut_grad(grad, branch, block, partial):
    """The gradient of the branch (rows, C), and partial sums of those of the layer scale and the last bias."""
    gamma, channels = block.params.gamma, branch.shape[-1]
    rows = branch.numel() // channels
    out = branch.new_empty(rows, channels)
    tile = _tile(channels)
    _launch(
        *('shortcut_grad', (len(partial), -(-channels // tile['BLOCK_C']))),
        *(grad, branch, block.params.pwconv2_bias, gamma, block.scale, out, partial),
        *(rows, rows // len(branch), -(-rows // len(partial))),
        **dict(channels=channels, columns=partial.shape[1], first=_columns(*block.sizes)['gamma'].start),
        **dict(HAS_GAMMA=gamma is not None, HAS_SCALE=block.scale is not None, **tile),
    )
    return out


def _grn_grad(h, grad, programs, sizes, grn, block):
    """Gradients of GRN's parameters, and what `_gelu_grad` needs to take the hidden layer's."""
    norms, scale = grn
    samples, hidden = norms.shape
    tile = _tile(hidden)
    partial = norms.new_empty(samples * programs, 2, hidden)
    grid = samples * programs, -(-hidden // tile['BLOCK_C'])
    _launch('grn_grad_sums', grid, h, block.params.pwconv1_bias, grad, partial, *sizes, hidden=hidden, **tile)
    square, param_grads = norms.new_empty(samples, hidden), norms.new_empty(samples, 2, hidden)
    _launch(
        *(
            'grn_grad_scale',
            (samples, 1),
            partial,
            block.params.grn_gamma,
            norms,
            square,
            param_grads,
            programs,
            GRN_EPS,
        ),
        **dict(hidden=hidden, BLOCK_C=_power_of_2(hidden), num_warps=8),
    )
    return param_grads.sum(0).unbind(), (scale, square)


def _gelu_grad(h, grad, sizes, scale_and_square, block, partial):
    """Overwrite the gradient with the hidden layer's; return what Linear 2 multiplied."""
    hidden = h.shape[1]
    out = torch.empty_like(h)
    scale, square = scale_and_square or (None, None)
    tile = _tile(hidden)
    _launch(
        *('gelu_grad', (len(partial), -(-hidden // tile['BLOCK_C']))),
        *(h, block.params.pwconv1_bias, grad, out, scale, block.params.grn_beta, square, partial, *sizes),
        **dict(hidden=hidden, columns=partial.shape[1], first=_columns(*block.sizes)['pwconv1_bias'].start),
        **dict(HAS_GRN=scale is not None, **tile),
    )
    return out


def _layer_norm_grad(grad, y, block, partial):
    """The norm's output (rows, C), and the gradient of its input; partial sums of the parameters' gradients."""
    rows, channels = grad.shape
    block_c = _power_of_2(channels)
    z, grad_y = torch.empty_like(grad), torch.empty_like(y)
    _launch(
        *('layer_norm_grad', (len(partial), 1)),
        *(grad, y, block.params.norm_weight, block.params.norm_bias, grad_y, z, partial),
        *(rows, -(-rows // len(partial)), block.eps),
        **dict(channels=channels, columns=partial.shape[1], first=_columns(*block.sizes)['norm_weight'].start),
        **dict(BLOCK_R=max(1, 2048 // block_c), BLOCK_C=block_c, num_warps=4),
    )
    return z, grad_y


def _dwconv_weight_grad(x, grad, partial):
    n, height, width, channels = x.shape
    block_c = 32 if channels % 64 else 64
    pixels, columns = n * height * width, partial.shape[1]
    _launch(
        *('dwconv_weight_grad', (KERNEL_SIZE * len(partial), -(-channels // block_c))),
        *(x, grad, partial, pixels, height, width, -(-pixels // len(partial))),
        **dict(channels=channels, columns=columns, first=columns - channels * KERNEL_SIZE**2),
        **dict(BLOCK_P=32 if block_c == 32 else 16, BLOCK_C=block_c, num_warps=4),
    )


# ---- launching -------------------------------------------------------------------------------------------------------


def _split(rows_per_sample: int, samples: int) -> tuple[int, int, int, int]:
    """Programs for each sample of a reduction over pixels, and the sizes that its kernel takes."""
    programs = max(1, min(rows_per_sample // ROWS_PER_PROGRAM, MAX_PROGRAMS // samples))
    return programs, rows_per_sample, programs, -(-rows_per_sample // programs)


@functools.cache
def _tile(channels: int) -> dict[str, int]:
    """Tile of an elementwise kernel over (rows, channels)."""
    return dict(BLOCK_R=32, BLOCK_C=32 if channels % 64 else 64, num_warps=4)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


# Compiled kernels, by what they were compiled for. Triton looks them up as well, but takes 20 us more for it.
_compiled: dict[tuple, tuple] = {}


def _launch(name: str, grid: tuple[int, int], *args, num_warps: int, **constants) -> None:
    """Start a kernel of `triton_kernels`.

    Args:
        name: Name of the kernel.
        grid: Number of programs.
        *args: Arguments of the kernel: tensors whose memory is aligned to 16 bytes, None, ints and floats.
        num_warps: Warps of a program.
        **constants: Its constants, in the order of its signature.
    """
    constants_key = tuple(constants.values())
    key = (name, num_warps, args[0].device.index, constants_key, *[getattr(a, 'dtype', None) for a in args])
    kernel = _compiled.get(key)
    if kernel is not None:
        kernel[(*grid, 1)](*args, *constants_key)
        return
    kernel = getattr(kernels(), name)[grid](*args, **constants, num_warps=num_warps)
    if kernel is not None:  # the interpreter has none
        _compiled[key] = kernel
