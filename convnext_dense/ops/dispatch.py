"""The backbone's parts on an x86 CPU: what they compute, sooner and in less memory.

Of two forms of a block, forward and backward, the first that takes it is used: `fused`, which is compiled at
installation and wants AVX-512, and `tiled`, of torch's own operations. Stem, downsampling and output norms have a form
in `fused`. All read parameters anew in each pass: there is nothing to invalidate. Samples that lose the branch to
stochastic depth are not computed.

Modules ask for their fast form from within their own `forward`, so that hooks, wrappers and `compile` around them work
as ever. What has none goes its own way: another device or dtype, modules whose children are not as built (of another
class, hooked, with another `forward`, on the class too), or all under what watches operations (tracers, transforms,
modes).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as modules
from torch.overrides import _get_current_function_mode_stack, _len_torch_function_stack
from torch.utils._device import DeviceContext

from . import avx512, onednn
from .block_params import Parameters, Settings

# Methods that `forward` of a module that may have a fast form calls.
INNER_METHODS = {'residual', 'mlp', '_conv_forward'}
CALLED = {'__call__', '_call_impl', 'forward', *INNER_METHODS}
HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
_off = 0
_known: dict[type, list[tuple[type, str, object]]] = {}


def know(*classes: type[nn.Module]) -> None:
    """Note what modules of these classes call. Where one of these methods is another one later, on the class or on one
    that it is derived from, they have to be called."""
    for kind in classes:
        parents = [parent for parent in kind.__mro__[1:] if issubclass(parent, nn.Module) and parent is not nn.Module]
        methods = [(kind, name) for name in CALLED if hasattr(kind, name)]
        methods += [(parent, name) for parent in parents for name in CALLED & vars(parent).keys()]
        _known[kind] = [(owner, name, getattr(owner, name)) for owner, name in methods]


@contextmanager
def plainly() -> Iterator[None]:
    """Everything goes its own way, to measure and to test."""
    global _off
    _off += 1
    try:
        yield
    finally:
        _off -= 1


def described() -> str:
    """In words, the form that blocks have on this machine's CPU, in each dtype that may have a fast one."""
    compiled = avx512.dtypes()
    forms = {'compiled kernels': compiled, 'tiles': [d for d in onednn.dtypes() if d not in compiled]}
    names = {form: ', '.join(str(d).removeprefix('torch.') for d in dtypes) for form, dtypes in forms.items()}
    parts = [f'{form} for {dtypes}' for form, dtypes in names.items() if dtypes] or ['the plain form']
    return ', '.join(parts if compiled else [f'no compiled kernels ({avx512.why_not()})', *parts])


def stage(
    downsample: nn.Module, blocks: nn.Module, norm: nn.Module | None, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Without gradients, one call of the kernels takes `x`, N x C x H x W, through the stem or a downsampling and the
    blocks, and on through the `norm` to a contiguous map. The result is None where gradients are wanted, or one of the
    modules does not run in the kernels or has to be called."""
    inputs = None if torch.is_grad_enabled() else _patches(downsample, x)
    if inputs is None or type(blocks) is not nn.Sequential:
        return None
    if not all(map(_untouched, (downsample, blocks, *blocks, *([] if norm is None else [norm])))):
        return None
    rows, first = avx512.patches(*inputs)
    settled = []
    for block in blocks:
        form, dtype, parameters = _form(block, rows.permute(0, 3, 1, 2))
        if form is not avx512 or (block.drop_path.training and block.drop_path.rate):
            return None
        settled.append((Settings(dtype, block.norm.eps, block.dwconv.padding, 1.0, False), parameters))
    rows, free, calls = avx512.forward_all(settled, rows)
    x, out = rows.permute(0, 3, 1, 2), None
    if norm is not None:
        inputs = _output(norm, x)
        if inputs is None:
            return None
        out, last = avx512.output(*inputs, free)
        calls.append(last)
    avx512.run(first, *calls)
    return x, out


def patches(module: nn.Sequential, x: torch.Tensor) -> torch.Tensor | None:
    """The stem or a downsampling of `x`, in channels_last; None where it has no fast form."""
    inputs = _patches(module, x)
    return None if inputs is None else _Part.apply('patches', *inputs).permute(0, 3, 1, 2)


def block(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """The block of `x`, N x C x H x W, in channels_last; None where it has no fast form."""
    if not _takes(x):
        return None
    form, dtype, parameters = _form(module, x)
    if form is None:
        return None
    kept, factor = _draw(module.drop_path, x)
    rows = x.permute(0, 2, 3, 1).contiguous()
    chosen = rows if kept is None else rows[kept]
    settings = Settings(dtype, module.norm.eps, module.dwconv.padding, factor, module.with_cp)
    with torch.autocast('cpu', enabled=False):
        if _differentiable(x, parameters):
            out = _Block.apply(form, settings, *form.inputs(settings, chosen), *parameters)
        else:
            out = form.forward(settings, chosen, None, parameters)[0]
        if kept is not None:
            out = rows.to(out.dtype).index_copy(0, kept, out)
    return out.permute(0, 3, 1, 2)


def output(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor | None:
    """The norm of a map that is emitted, contiguous; None where it has no fast form."""
    inputs = _output(norm, x)
    return None if inputs is None else _Part.apply('output', *inputs)


def layout(x: torch.Tensor) -> torch.Tensor:
    """A map in the memory format that blocks want; as it is where they would not take it."""
    return x.contiguous(memory_format=torch.channels_last) if _takes(x) else x


def _patches(module: nn.Sequential, x: torch.Tensor) -> tuple | None:
    """What `fused.patches` takes."""
    if not _takes(x) or not _as_built(module, 'patches'):
        return None
    dtype = _autocast_dtype() or x.dtype
    if dtype != torch.float32 and not module.before_layer_scale:  # the plain form's output is not float32 then
        return None
    conv, norm = sorted(module, key=lambda part: isinstance(part, nn.LayerNorm))
    if not avx512.takes_patches(conv, norm, x, dtype):
        return None
    settings = avx512.Patches(conv.kernel_size[0], norm.eps, dtype)
    return settings, x, conv.weight, conv.bias, norm.weight, norm.bias


def _output(norm: nn.LayerNorm, x: torch.Tensor) -> tuple | None:
    """What `fused.output` takes."""
    if _takes(x) and _as_built(norm, 'output') and avx512.takes_output(norm, x):
        return norm.eps, x, norm.weight, norm.bias
    return None


class _Block(torch.autograd.Function):
    """x + branch(z), N x H x W x C: `z` is x in the dtype that the form wants, which keeps of it and of layers between
    what its backward pass needs."""

    @staticmethod
    def forward(ctx, form, settings, x, z, *parameters):
        out, kept = form.forward(settings, x, z, Parameters(*parameters), keep=True)
        ctx.form, ctx.settings = form, settings
        ctx.save_for_backward(*parameters, z, *kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        saved, n = ctx.saved_tensors, len(Parameters._fields)
        parameters, (z, *kept) = Parameters(*saved[:n]), saved[n:]
        needed = ctx.needs_input_grad[2:]
        with torch.autocast('cpu', enabled=False):
            if not len(grad):  # stochastic depth left no sample, and every parameter is to have a gradient
                found = grad, *(torch.zeros_like(t) if n else None for t, n in zip((z, *parameters), needed[1:]))
            elif _needs_autograd(grad):
                found = grad, *_differentiable_backward(ctx.settings, z, parameters, grad, needed[1:])
            else:
                found = ctx.form.backward(ctx.settings, z, kept, parameters, grad.contiguous(), needed)
        return None, None, *found


class _Part(torch.autograd.Function):
    """A function of `fused` by its name, run at once, of which the inputs alone are kept for the backward pass."""

    @staticmethod
    def forward(ctx, name, settings, *inputs):
        ctx.name, ctx.settings = name, settings
        ctx.save_for_backward(*inputs)
        out, call = getattr(avx512, name)(settings, *inputs)
        avx512.run(call)
        return out

    @staticmethod
    def backward(ctx, grad):
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        if _needs_autograd(grad):
            plainly = getattr(avx512, f'{ctx.name}_plainly')
            return None, None, *_gradients(lambda: plainly(ctx.settings, *inputs), inputs, grad, needed)
        return None, None, *getattr(avx512, f'{ctx.name}_backward')(ctx.settings, *inputs, grad, needed)


def _needs_autograd(grad: torch.Tensor) -> bool:
    """Whether gradients have to come from torch's operations: they are to be differentiated themselves, or `grad`
    stands for several (`is_grads_batched`, vectorized Jacobians) and has no memory that a kernel could read."""
    return torch.is_grad_enabled() or not torch._C._has_storage(grad)


def _differentiable_backward(settings, z, parameters, grad, needed):
    """Gradients of z and of the parameters, of operations that have gradients themselves."""

    def branch():
        p = parameters.cast(settings.dtype)
        y = onednn.depthwise(z.to(settings.dtype), p, settings)
        y = F.layer_norm(y, y.shape[-1:], p.norm, p.norm_bias, settings.eps)
        y = settings.factor * F.linear(F.gelu(F.linear(y, p.linear1, p.bias1)), p.linear2, p.bias2)
        return y if p.gamma is None else p.gamma * y

    return _gradients(branch, (z, *parameters), grad, needed)


def _gradients(function, inputs, grad, needed):
    """Those of the `inputs` of a `function` that are `needed`, else None."""
    chosen = [t for t, n in zip(inputs, needed) if n]
    with torch.enable_grad():
        out = function()
    found = iter(torch.autograd.grad(out, chosen, grad.to(out.dtype), create_graph=torch.is_grad_enabled()))
    return tuple(next(found) if n else None for n in needed)


def _draw(drop_path: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """The samples that keep the branch, None for all, and the factor of it."""
    if not drop_path.training or drop_path.rate == 0:
        return None, 1.0
    kept = drop_path.draw(x).nonzero().flatten()
    return (None if len(kept) == len(x) else kept), 1 / (1 - drop_path.rate)


def _takes(x: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not torch.Tensor:
        return False
    if (x.device.type, x.layout) != ('cpu', torch.strided) or x.ndim != 4 or not x.numel() or x.is_neg():
        return False
    if _off or _watched():
        return False
    return {x.dtype, _autocast_dtype() or x.dtype} <= {*avx512.dtypes(), *onednn.dtypes()}


def _watched() -> bool:
    """Whether something looks at or transforms the operations that make up a block."""
    if _len_torch_function_stack() and any(type(m) is not DeviceContext for m in _get_current_function_mode_stack()):
        return True
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or any(getattr(modules, f'_global{name}') for name in HOOKS)
    )


def _differentiable(x: torch.Tensor, parameters: Iterable[torch.Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters))


def _as_built(module: nn.Module, function: str) -> bool:
    """Whether its class, not one derived from it, says that this function may run it, and no child has to be called.

    A backward hook of the deprecated kind is shown the last operation of the plain form."""
    wanted, classes = vars(type(module)).get('FAST', ('', ()))
    children = [*module.children()]
    if wanted != function or tuple(type(child) for child in children) != classes:
        return False
    if module._is_full_backward_hook is False or not INNER_METHODS.isdisjoint(vars(module)):
        return False
    return _is_known(type(module)) and all(map(_untouched, children))


def _untouched(module: nn.Module) -> bool:
    """Whether to call the module is to run the `forward` of its class, and nothing else."""
    if any(getattr(module, name) for name in HOOKS) or module._compiled_call_impl:
        return False
    return _is_known(type(module)) and CALLED.isdisjoint(vars(module))


def _is_known(kind: type) -> bool:
    return kind in _known and all(getattr(owner, name) is method for owner, name, method in _known[kind])


def _autocast_dtype() -> torch.dtype | None:
    return torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else None


def _form(block: nn.Module, x: torch.Tensor) -> tuple:
    """The form that has `block(x)`, the dtype of its products, and the parameters; None, None, None: neither has."""
    parameters = _parameters(block)
    if parameters is None or not _fit(parameters, x):
        return None, None, None
    dtype = _autocast_dtype() or x.dtype
    if avx512.takes(x, parameters, block.dwconv.padding, dtype):
        return avx512, dtype, parameters
    return (onednn, dtype, parameters) if {x.dtype, dtype} <= set(onednn.dtypes()) else (None, None, None)


def _parameters(block: nn.Module) -> Parameters | None:
    """None where the block is not as built."""
    if not _as_built(block, 'block'):
        return None
    conv, norm, linear1, _, linear2, _ = block.children()
    channels = len(conv.weight)
    if (conv.stride, conv.dilation, conv.groups, conv.padding_mode) != ((1, 1), (1, 1), channels, 'zeros'):
        return None
    if isinstance(conv.padding, str) or norm.normalized_shape != (channels,):
        return None
    if block.gamma is not None and block.gamma.shape != (channels,):
        return None
    return Parameters(
        *(conv.weight, conv.bias, norm.weight, norm.bias),
        *(linear1.weight, linear1.bias, linear2.weight, linear2.bias, block.gamma),
    )


def _fit(parameters: Parameters, x: torch.Tensor) -> bool:
    """Whether they are plain tensors that the plain form would take: of the input's dtype, or autocast's to cast."""
    dtype = torch.float32 if _autocast_dtype() else x.dtype
    *needed, gamma = parameters
    return all(
        type(p) in (nn.Parameter, torch.Tensor) and (p.device, p.layout, p.dtype) == (x.device, torch.strided, dtype)
        for p in [*needed, *([] if gamma is None else [gamma])]
    )
