"""The fast CPU implementations as torch operators, `torch.ops.convnext_dense`.

They are blocks, stem and downsampling, output norms, and whole stages for inference. Each has a schema, an
implementation for fake tensors and one for the CPU, which checks its arguments; those with gradients have an operator
for these. Profilers, dispatch modes, FLOP counters and tracers therefore see operators that torch knows. Feature maps
are contiguous (N, H, W, C) inside the backbone, (N, C, H, W) at its ends.

Autograd is registered by hand, not with `torch.library.register_autograd`, which takes 0.4 ms per call of an operator
with as many arguments: as long as a small block.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import _C

from . import avx512, onednn
from .avx512 import PatchEmbedArgs, PatchEmbedParams
from .block_params import GRN_EPS, SAVE_DWCONV, SAVE_HIDDEN, SAVE_INPUT, BlockArgs, BlockParams

ROW_MAJOR = torch.contiguous_format
BACKENDS = {'avx512': avx512, 'onednn': onednn}
N_BLOCK_PARAMS = len(BlockParams._fields)

LIBRARY = torch.library.Library('convnext_dense', 'FRAGMENT')
_BLOCK_INPUTS = ', '.join(
    f'Tensor{"?" if name in ("grn_gamma", "grn_beta", "gamma") else ""} {name}' for name in BlockParams._fields
)
_BLOCK_ARGS = 'str backend, ScalarType dtype, float eps, int[2] padding, float keep_prob_scale, int save_level'
_PATCH_INPUTS = 'Tensor x, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias'
_PATCH_ARGS = 'int patch_size, float eps, ScalarType dtype'


def _define(schema: str) -> torch._ops.OpOverload:
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(torch.ops.convnext_dense, schema.partition('(')[0]).default


# x + branch(z): z is x in the dtype of the matmuls, or None for the operator to cast x.
block = _define(f'block(Tensor x, Tensor? z, {_BLOCK_INPUTS}, {_BLOCK_ARGS}) -> (Tensor out, Tensor[] saved)')
# Gradients of z and the parameters that need one; that of z includes the shortcut's where `z_is_x`.
block_backward = _define(
    f'block_backward(Tensor grad, Tensor z, Tensor[] saved, {_BLOCK_INPUTS}, {_BLOCK_ARGS}, bool z_is_x, '
    'bool[] needs_grad) -> Tensor[]'
)
patch_embed = _define(f'patch_embed({_PATCH_INPUTS}, {_PATCH_ARGS}) -> Tensor')
patch_embed_backward = _define(
    f'patch_embed_backward(Tensor grad, {_PATCH_INPUTS}, {_PATCH_ARGS}, bool[] needs_grad) -> Tensor[]'
)
output_norm = _define('output_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor')
output_norm_backward = _define(
    'output_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, float eps, bool[] needs_grad) -> Tensor[]'
)
# Stem or downsampling, blocks and, with `norm_params`, output norm; `eps` of each in this order. Inference only.
stage = _define(
    'stage(Tensor x, Tensor[] patch_params, Tensor[] block_params, Tensor[] norm_params, int patch_size, '
    'ScalarType dtype, float[] eps) -> Tensor[]'
)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f'convnext_dense operator: {message}')


def _check_map(x: torch.Tensor) -> None:
    _check(x.ndim == 4 and x.is_contiguous() and not x.is_neg(), 'x must be a contiguous feature map (N, H, W, C)')
    _check(x.device.type == 'cpu' and min(x.shape[1:]) > 0, 'x must be on the CPU and not be empty')


def _check_grad(
    grad: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    needs_grad: Sequence[bool],
    inputs: Sequence[torch.Tensor | None],
) -> None:
    """The gradient of an output of this shape and dtype: the kernels read its memory as such."""
    _check(grad.shape == tuple(shape) and grad.is_contiguous(), f'grad must be contiguous, of shape {tuple(shape)}')
    _check(grad.device.type == 'cpu' and grad.dtype == dtype and not grad.is_neg(), f'grad must be {dtype}, on the CPU')
    _check(len(needs_grad) == len(inputs), f'needs_grad must have {len(inputs)} values')
    _check(not any(n and t is None for n, t in zip(needs_grad, inputs)), 'an input that is None has no gradient')


def _checked_backend(x: torch.Tensor, params: BlockParams, args: BlockArgs, z_is_x: bool):
    """The module of the backend, which accepts these arguments."""
    _check(args.backend in BACKENDS, f'backend must be one of {", ".join(BACKENDS)}')
    _check(SAVE_INPUT <= args.save_level <= SAVE_HIDDEN, f'save_level must be {SAVE_INPUT} to {SAVE_HIDDEN}')
    _check(z_is_x or args.backend == 'onednn', 'only oneDNN takes x in a second dtype')
    _check_map(x)
    BACKENDS[args.backend].check_block(x, params, args)
    return BACKENDS[args.backend]


# ---- blocks ----------------------------------------------------------------------------------------------------------


def _split_block_args(args: Sequence) -> tuple[BlockParams, BlockArgs]:
    return BlockParams(*args[:N_BLOCK_PARAMS]), BlockArgs(*args[N_BLOCK_PARAMS:])


def _block_cpu(x, z, *args):
    params, args = _split_block_args(args)
    backend = _checked_backend(x, params, args, z is None)
    _check(
        z is None or (z.dtype == args.dtype and z.shape == x.shape and z.is_contiguous()),
        'z must be x in the dtype of the matmuls, contiguous',
    )
    return backend.forward(args, x, z, params)


def _block_backward_cpu(grad, z, saved, *args):
    *args, z_is_x, needs_grad = args
    params, args = _split_block_args(args)
    backend = _checked_backend(z, params, args, z_is_x)
    # Of oneDNN's output, the dtype follows from x too, which is not saved where z is.
    dtype = backend.output_dtype(z, params, args) if z_is_x or args.backend == 'avx512' else grad.dtype
    _check_grad(grad, z.shape, dtype, needs_grad, (z, *params))
    _check(grad.is_floating_point(), 'grad must be of a floating dtype')
    _check([(t.shape, t.dtype) for t in saved] == _saved_meta(z, params, args), 'saved must come from the forward pass')
    if not len(grad):  # stochastic depth has left no sample, and every parameter is to have a gradient
        return [torch.zeros_like(t, memory_format=ROW_MAJOR) for t, n in zip((z, *params), needs_grad) if n]
    return _owned(backend.backward(args, grad, z, saved, params, z_is_x, needs_grad))


def _saved_meta(x: torch.Tensor, params: BlockParams, args: BlockArgs) -> list[tuple[Sequence[int], torch.dtype]]:
    """Shapes and dtypes of what the forward pass saves beside its inputs."""
    shapes = [x.shape] if args.save_level >= SAVE_DWCONV else []
    shapes += BACKENDS[args.backend].hidden_shapes(x, params) if args.save_level >= SAVE_HIDDEN else []
    return [(shape, args.dtype) for shape in shapes]


def _block_fake(x, z, *args):
    params, args = _split_block_args(args)
    out = x.new_empty(x.shape, dtype=BACKENDS[args.backend].output_dtype(x, params, args))
    return out, [x.new_empty(shape, dtype=dtype) for shape, dtype in _saved_meta(x, params, args)]


def _block_backward_fake(grad, z, saved, *args):
    *args, z_is_x, needs_grad = args
    inputs = (z, *args[:N_BLOCK_PARAMS])
    dtypes = (grad.dtype if z_is_x else z.dtype, *(None if p is None else p.dtype for p in inputs[1:]))
    return [t.new_empty(t.shape, dtype=dtype) for t, dtype, n in zip(inputs, dtypes, needs_grad) if n]


class _BlockFunction(torch.autograd.Function):
    """Saves z, or x where that is None, the parameters, and what the operator returns to be saved."""

    @staticmethod
    def forward(ctx, x, z, *args):
        out, saved = _below_autograd(block, x, z, *args)
        ctx.z_is_x, ctx.block_args = z is None, BlockArgs(*args[N_BLOCK_PARAMS:])
        ctx.save_for_backward(x if z is None else z, *args[:N_BLOCK_PARAMS], *saved)
        return out

    @staticmethod
    def backward(ctx, grad):
        z, *tensors = ctx.saved_tensors
        params, saved = BlockParams(*tensors[:N_BLOCK_PARAMS]), tensors[N_BLOCK_PARAMS:]
        needs_x, needs_z, *needs_params = ctx.needs_input_grad[: 2 + N_BLOCK_PARAMS]
        needs_grad = [needs_x if ctx.z_is_x else needs_z, *needs_params]
        if _needs_reference_grads(grad):
            grads = _block_reference_grads(ctx.block_args, z, params, grad, ctx.z_is_x, needs_grad)
        else:
            z, *saved = (t.contiguous() for t in (z, *saved))  # hooks of saved tensors may have changed the strides
            args = (*params, *ctx.block_args, ctx.z_is_x, needs_grad)
            grads = _unpack(block_backward(_row_major(grad), z, saved, *args), needs_grad)
        grad_z, *grads = grads
        grad_x, grad_z = (grad_z, None) if ctx.z_is_x else (grad if needs_x else None, grad_z)
        return grad_x, grad_z, *grads, *[None] * len(ctx.block_args)


def _block_autograd(x, z, *args):
    if needs_grad(x, z, *args[:N_BLOCK_PARAMS]):
        return _BlockFunction.apply(x, z, *args), []  # the function saves the rest
    return _below_autograd(block, x, z, *args)


def _block_reference_grads(args, z, params, grad, z_is_x, needs_grad):
    """Gradients of z and of the parameters from operators that are differentiable themselves."""

    def branch(z, *params):
        p = BlockParams(*params).cast(args.dtype)
        y = onednn.depthwise_conv(z.to(args.dtype), p, args.padding)
        y = F.layer_norm(y, y.shape[-1:], p.norm_weight, p.norm_bias, args.eps)
        y = F.gelu(F.linear(y, p.pwconv1_weight, p.pwconv1_bias))
        if p.grn_gamma is not None:
            y = _grn_reference(y, p).to(args.dtype)
        y = args.keep_prob_scale * F.linear(y, p.pwconv2_weight, p.pwconv2_bias)
        return y if p.gamma is None else p.gamma * y

    with torch.autocast('cpu', enabled=False):
        grads = _reference_grads(branch, (z, *params), grad, needs_grad)
    if z_is_x and needs_grad[0]:
        grads[0] = grad + grads[0]
    return grads


def _grn_reference(h, p):
    norm = torch.linalg.vector_norm(h, dim=(1, 2), keepdim=True, dtype=torch.promote_types(h.dtype, torch.float32))
    nx = norm / (norm.mean(-1, keepdim=True) + GRN_EPS)
    return p.grn_gamma * (h * nx.to(h.dtype)) + p.grn_beta + h


# ---- stem, downsampling, output norm ---------------------------------------------------------------------------------


def _patch_embed_cpu(x, *args):
    params, args = PatchEmbedParams(*args[:4]), PatchEmbedArgs(*args[4:])
    avx512.check_patch_embed(x, params, args)
    out, call = avx512.patch_embed(args, x, params)
    avx512.launch(call)
    return out


def _patch_embed_backward_cpu(grad, x, *args):
    params, args, needs_grad = PatchEmbedParams(*args[:4]), PatchEmbedArgs(*args[4:7]), args[7]
    avx512.check_patch_embed(x, params, args)
    _check_grad(grad, _patch_embed_shape(x, params.weight, args.patch_size), x.dtype, needs_grad, (x, *params))
    _check(args.patch_size == 2 or not needs_grad[0], 'the image before a stem has no gradient')
    return _owned(avx512.patch_embed_backward(args, grad, x, params, needs_grad))


def _patch_embed_shape(x: torch.Tensor, weight: torch.Tensor, patch_size: int) -> tuple[int, ...]:
    return len(x), x.shape[2] // patch_size, x.shape[3] // patch_size, len(weight)


def _patch_embed_fake(x, weight, bias, norm_weight, norm_bias, patch_size, eps, dtype):
    return x.new_empty(_patch_embed_shape(x, weight, patch_size))


def _patch_embed_backward_fake(grad, x, weight, bias, norm_weight, norm_bias, patch_size, eps, dtype, needs_grad):
    grads = torch.empty_like(x), *(t.new_empty(t.shape) for t in (weight, bias, norm_weight, norm_bias))
    return [t for t, n in zip(grads, needs_grad) if n]


def _patch_embed_input(x, patch_size, eps, dtype):
    return x.contiguous(memory_format=torch.channels_last) if patch_size == 2 else x


def _output_norm_cpu(x, weight, bias, eps):
    _check_map(x)
    avx512.check_norm(x, weight, bias)
    out, call = avx512.norm_nchw(eps, x, weight, bias)
    avx512.launch(call)
    return out


def _output_norm_backward_cpu(grad, x, weight, bias, eps, needs_grad):
    _check_map(x)
    avx512.check_norm(x, weight, bias)
    n, height, width, channels = x.shape
    _check_grad(grad, (n, channels, height, width), x.dtype, needs_grad, (x, weight, bias))
    return _owned(avx512.norm_nchw_backward(eps, grad, x, weight, bias, needs_grad))


def _output_norm_fake(x, weight, bias, eps):
    n, height, width, channels = x.shape
    return x.new_empty(n, channels, height, width)


def _output_norm_backward_fake(grad, x, weight, bias, eps, needs_grad):
    return [t.new_empty(t.shape) for t, n in zip((x, weight, bias), needs_grad) if n]


def _autograd_kernel(
    op: Callable, backward_op: Callable, reference: Callable, n_tensors: int, restore: Callable
) -> Callable:
    """Autograd implementation of an operator that saves nothing but its inputs.

    Args:
        op: The operator, of tensors followed by settings.
        backward_op: The operator of its gradients.
        reference: The same function in differentiable operators, for gradients of gradients.
        n_tensors: Number of tensors.
        restore: Gives the input its memory format back, which saved-tensor hooks may have changed.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            ctx.save_for_backward(*args[:n_tensors])
            ctx.settings = args[n_tensors:]
            return _below_autograd(op, *args)

        @staticmethod
        def backward(ctx, grad):
            x, *params = ctx.saved_tensors
            needs_grad = ctx.needs_input_grad[:n_tensors]
            if _needs_reference_grads(grad):
                grads = _reference_grads(lambda *t: reference(*t, *ctx.settings), (x, *params), grad, needs_grad)
            else:
                x = restore(x, *ctx.settings)
                grads = _unpack(backward_op(_row_major(grad), x, *params, *ctx.settings, needs_grad), needs_grad)
            return *grads, *[None] * len(ctx.settings)

    def kernel(*args):
        if needs_grad(*args[:n_tensors]):
            return Function.apply(*args)
        return _below_autograd(op, *args)

    return kernel


# ---- stages ----------------------------------------------------------------------------------------------------------


def _stage_cpu(x, patch_params, block_params, norm_params, patch_size, dtype, eps):
    """Queue all kernels of the stage, which work on two buffers, and launch them once.

    Without a registration for autograd, which would pass these many tensors through Python twice, the check is here.
    """
    _check(not needs_grad(x, *patch_params, *block_params, *norm_params), 'a stage in one call has no gradients')
    _check(torch.autograd.forward_ad._current_level < 0, 'forward-mode AD has no rule for it')
    patch_params, patch_args = PatchEmbedParams(*patch_params), PatchEmbedArgs(patch_size, eps[0], dtype)
    avx512.check_patch_embed(x, patch_params, patch_args)
    x, patch_call = avx512.patch_embed(patch_args, x, patch_params)
    blocks = _stage_blocks(block_params, eps[1 : len(eps) - bool(norm_params)], dtype)
    for args, params in blocks:
        avx512.check_block(x, params, args)
    x, spare, calls = avx512.queue_blocks(blocks, x)
    outputs = [x]
    if norm_params:
        avx512.check_norm(x, *norm_params)
        out, norm_call = avx512.norm_nchw(eps[-1], x, *norm_params, spare)
        outputs, calls = [x, out], [*calls, norm_call]
    avx512.launch(patch_call, *calls)
    return outputs


def _stage_blocks(tensors: Sequence[torch.Tensor], eps: Sequence[float], dtype: torch.dtype):
    """Settings and parameters of each block; each has as many tensors as the others."""
    size, rest = divmod(len(tensors), len(eps)) if eps else (0, 0)
    _check(
        rest == 0 and N_BLOCK_PARAMS - 3 <= size <= N_BLOCK_PARAMS,
        'block_params and eps must belong to the same number of blocks',
    )
    padding = (avx512.DW_KERNEL // 2,) * 2
    args = [BlockArgs('avx512', dtype, e, padding, 1.0, SAVE_INPUT) for e in eps]
    return [*zip(args, (BlockParams.of_present(tensors[i : i + size]) for i in range(0, len(tensors), size)))]


def _stage_fake(x, patch_params, block_params, norm_params, patch_size, dtype, eps):
    n, height, width, channels = _patch_embed_shape(x, patch_params[0], patch_size)
    outputs = [x.new_empty(n, height, width, channels)]
    return [*outputs, x.new_empty(n, channels, height, width)] if norm_params else outputs


# ---- gradients -------------------------------------------------------------------------------------------------------


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records an operator of these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _below_autograd(op: Callable, *args):
    """Run an operator's implementation. Forward-mode AD is refused: it would silently lose the tangents."""
    _check(torch.autograd.forward_ad._current_level < 0, 'forward-mode AD has no rule for it')
    with _C._AutoDispatchBelowAutograd():
        return op(*args)


def _needs_reference_grads(grad: torch.Tensor) -> bool:
    """Whether gradients have to come from torch's own operators.

    Either they are to be differentiated themselves, or `grad` is a batch of gradients (`is_grads_batched`, vectorized
    Jacobians), which has no memory that a kernel could read.
    """
    return torch.is_grad_enabled() or not _C._has_storage(grad)


def _reference_grads(
    function: Callable, inputs: Sequence[torch.Tensor | None], grad: torch.Tensor, needs_grad: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Gradients of the inputs of a function, None where none is needed."""
    targets = [t for t, n in zip(inputs, needs_grad) if n]
    with torch.enable_grad():
        out = function(*inputs)
    grads = torch.autograd.grad(out, targets, grad.to(out.dtype), create_graph=torch.is_grad_enabled())
    return _unpack(grads, needs_grad)


def _unpack(grads: Sequence[torch.Tensor], needs_grad: Sequence[bool]) -> list[torch.Tensor | None]:
    """Gradients of all inputs, from those of the inputs that need one."""
    remaining = iter(grads)
    return [next(remaining) if n else None for n in needs_grad]


def _owned(grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Gradients that there are, each in memory of its own: outputs of an operator may not be views of one another."""
    return [g if g.untyped_storage().nbytes() == g.nbytes else g.clone() for g in grads if g is not None]


def _row_major(grad: torch.Tensor) -> torch.Tensor:
    return grad.resolve_neg().contiguous()


# ---- registration ----------------------------------------------------------------------------------------------------

IMPLEMENTATIONS = {
    block: (_block_cpu, _block_fake, _block_autograd),
    block_backward: (_block_backward_cpu, _block_backward_fake, None),
    patch_embed: (
        _patch_embed_cpu,
        _patch_embed_fake,
        _autograd_kernel(patch_embed, patch_embed_backward, avx512.patch_embed_reference, 5, _patch_embed_input),
    ),
    patch_embed_backward: (_patch_embed_backward_cpu, _patch_embed_backward_fake, None),
    output_norm: (
        _output_norm_cpu,
        _output_norm_fake,
        _autograd_kernel(output_norm, output_norm_backward, avx512.norm_reference, 3, lambda x, eps: x.contiguous()),
    ),
    output_norm_backward: (_output_norm_backward_cpu, _output_norm_backward_fake, None),
    stage: (_stage_cpu, _stage_fake, None),
}


def _on_one_device(fake: Callable) -> Callable:
    """A fake implementation that refuses tensors of several devices.

    One tensor on the meta device suffices for torch to call it, and with the others on the CPU it would return memory
    that nothing has written.
    """

    def checked(*args):
        tensors = [t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else [arg])]
        devices = {t.device for t in tensors if isinstance(t, torch.Tensor)}
        _check(len(devices) == 1, f'all tensors must be on one device, not on {", ".join(sorted(map(str, devices)))}')
        return fake(*args)

    return checked


def register(implementations: dict[torch._ops.OpOverload, tuple[Callable, Callable, Callable | None]]) -> None:
    """Register each operator's implementations: for the CPU, for fake tensors, and for autograd, which may be None."""
    for op, (cpu, fake, autograd) in implementations.items():
        LIBRARY.impl(op, cpu, 'CPU')
        torch.library.register_fake(op, _on_one_device(fake), lib=LIBRARY)
        if autograd:
            LIBRARY.impl(op, autograd, 'Autograd')


register(IMPLEMENTATIONS)
