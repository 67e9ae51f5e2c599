"""A block on an x86 CPU, forward and backward: what `Block` computes, sooner and in less memory.

Of two forms the first that takes the block is used: `fused`, which is compiled at installation and wants AVX-512, and
`tiled`, of torch's own operations. Both read parameters anew in each pass: there is nothing to invalidate. Samples that
lose the branch to stochastic depth are not computed.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as modules

from . import fused, tiled
from .blocks import Parameters, Settings

HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')


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
    dtype = _autocast_dtype() or x.dtype
    form = fused if fused.takes(x, parameters, dtype) else tiled
    kept, factor = _draw(block.drop_path, x)
    rows = x.permute(0, 2, 3, 1).contiguous()
    chosen = rows if kept is None else rows[kept]
    settings = Settings(dtype, block.norm.eps, block.dwconv.padding, factor, with_cp)
    differentiable = any(t is not None and t.requires_grad for t in (x, *parameters))
    with torch.autocast('cpu', enabled=False):
        if torch.is_grad_enabled() and differentiable:
            out = _Block.apply(form, settings, *form.inputs(settings, chosen), *parameters)
        else:
            out = form.forward(settings, chosen, None, parameters)[0]
        if kept is not None:
            out = rows.to(out.dtype).index_copy(0, kept, out)
    return out.permute(0, 3, 1, 2)


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
            elif torch.is_grad_enabled():  # gradients of these gradients are wanted
                found = grad, *_differentiable_backward(ctx.settings, z, parameters, grad, needed[1:])
            else:
                found = ctx.form.backward(ctx.settings, z, kept, parameters, grad.contiguous(), needed)
        return None, None, *found


def _differentiable_backward(settings, z, parameters, grad, needed):
    """Gradients of z and of the parameters, of operations that have gradients themselves."""
    p = parameters.cast(settings.dtype)
    y = tiled.depthwise(z.to(settings.dtype), p, settings)
    y = F.layer_norm(y, y.shape[-1:], p.norm, p.norm_bias, settings.eps)
    y = settings.factor * F.linear(F.gelu(F.linear(y, p.linear1, p.bias1)), p.linear2, p.bias2)
    y = y if p.gamma is None else p.gamma * y
    inputs = [t for t, n in zip((z, *parameters), needed) if n]
    found = iter(torch.autograd.grad(y, inputs, grad.to(y.dtype), create_graph=True))
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
    if x.device.type != 'cpu' or x.ndim != 4 or not x.numel() or _watched():
        return False
    return (_autocast_dtype() or x.dtype) in tiled.dtypes()


def _watched() -> bool:
    """Whether something looks at or transforms the operations that make up a block."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or any(getattr(modules, f'_global{name}') for name in HOOKS)
    )


def _autocast_dtype() -> torch.dtype | None:
    return torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else None


def _parameters(block: nn.Module) -> Parameters | None:
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
    return Parameters(
        *(conv.weight, conv.bias, block.norm.weight, block.norm.bias),
        *(block.pwconv1.weight, block.pwconv1.bias, block.pwconv2.weight, block.pwconv2.bias, block.gamma),
    )


def _fit(parameters: Parameters, x: torch.Tensor) -> bool:
    """Whether they are plain tensors that the plain form would take: of the input's dtype, or autocast's to cast."""
    dtype = torch.float32 if _autocast_dtype() else x.dtype
    *needed, gamma = parameters
    return all(
        type(p) in (nn.Parameter, torch.Tensor) and p.device == x.device and p.dtype == dtype
        for p in [*needed, *([] if gamma is None else [gamma])]
    )
