"""Which implementation of a module runs: its reference implementation, or an operator of `operators`.

On an x86 CPU a block runs in the first backend that supports it, `avx512` or `onednn`; stem, downsampling and output
norms have `avx512` only. Parameters are read anew in each pass: there is nothing to invalidate. Samples whose branch
stochastic depth drops are not computed.

Modules ask from within their own `forward`, so that hooks, wrappers and `compile` around them work as always. The
functions here return None where the reference implementation has to run: on another device or in another dtype; where
a module's children are not as built (of another class, hooked, with another `forward`, on the class too); while torch
traces or compiles, so that graphs show plain operators; and under `torch.func` and forward-mode AD, which see
operators that are written in Python too late.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, product

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import avx512, onednn, operators, triton_blocks
from .avx512 import PatchEmbedArgs, PatchEmbedParams
from .block_params import SAVE_DWCONV, SAVE_HIDDEN, SAVE_INPUT, BlockArgs, BlockParams

# Methods that `forward` of a module that has an operator calls.
INNER_METHODS = {'residual', 'mlp', '_conv_forward'}
CALLED_METHODS = {'__call__', '_call_impl', 'forward', *INNER_METHODS}
HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
GLOBAL_HOOKS = [getattr(nn_module, f'_global{name}') for name in HOOKS]

_disabled_depth = 0
# By class, the operator that may replace its `forward`, and the classes that its children then have to be of.
_EXPECTED_CHILDREN: dict[type, tuple[str, set[tuple[type, ...]]]] = {}
# By class, the methods that its instances call, each with the class that it is looked up on.
_ORIGINAL_METHODS: dict[type, list[tuple[type, str, object]]] = {}


def register(operator: str, *children: type[nn.Module] | tuple[type[nn.Module], ...]) -> Callable[[type], type]:
    """Class decorator: `operator` ('block', 'patch_embed', 'output_norm') may replace `forward` of instances.

    Args:
        operator: The operator.
        children: Classes of an instance's children, in order, without which `forward` has to run; a tuple of those of
            which a child may be.
    """
    choices = [child if isinstance(child, tuple) else (child,) for child in children]

    def decorate(cls: type) -> type:
        _EXPECTED_CHILDREN[cls] = operator, {*product(*choices)}
        remember_methods(cls, *chain(*choices))
        return cls

    return decorate


def remember_methods(*classes: type[nn.Module]) -> None:
    """Note the methods of classes that operators replace.

    Where one of them is another one later, on the class or on one that it is derived from, it has to be called.
    """
    for cls in classes:
        parents = [parent for parent in cls.__mro__[1:] if issubclass(parent, nn.Module) and parent is not nn.Module]
        methods = [(cls, name) for name in CALLED_METHODS if hasattr(cls, name)]
        methods += [(parent, name) for parent in parents for name in CALLED_METHODS & vars(parent).keys()]
        _ORIGINAL_METHODS[cls] = [(owner, name, getattr(owner, name)) for owner, name in methods]


remember_methods(nn.Sequential)


@contextmanager
def disabled() -> Iterator[None]:
    """Disable all operators, so that every module runs its reference implementation; for benchmarks and tests.

    Not thread-safe: the switch holds for the whole process.
    """
    global _disabled_depth
    _disabled_depth += 1
    try:
        yield
    finally:
        _disabled_depth -= 1


def backend_summary() -> str:
    """Describe which implementation blocks have on this machine's CPU, for each dtype that has a fast one."""
    compiled = avx512.dtypes()
    backends = {'AVX-512 kernels': compiled, 'oneDNN': [d for d in onednn.dtypes() if d not in compiled]}
    names = {name: ', '.join(str(d).removeprefix('torch.') for d in dtypes) for name, dtypes in backends.items()}
    parts = [f'{name} for {dtypes}' for name, dtypes in names.items() if dtypes] or ['the reference implementation']
    return ', '.join(parts if compiled else [f'no AVX-512 kernels ({avx512.unavailable_reason()})', *parts])


# ---- what modules call -----------------------------------------------------------------------------------------------


def stage_forward(
    downsample: nn.Module, blocks: nn.Module, norm: nn.Module | None, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Run a stem or a downsampling, the blocks of a stage and its output norm as one operator, for inference.

    Args:
        downsample: Stem or downsampling.
        blocks: Sequence of blocks.
        norm: Output norm, if the stage has an output.
        x: Input, (N, C, H, W).

    Returns:
        The blocks' output, channels_last, and the norm's, contiguous; None where gradients are wanted, or one of the
        modules does not run in the AVX-512 kernels or has to be called.
    """
    call = None if torch.is_grad_enabled() else _patch_embed_args(downsample, x)
    if call is None or type(blocks) is not nn.Sequential:
        return None
    if not all(map(_is_unmodified, (downsample, blocks, *blocks, *([] if norm is None else [norm])))):
        return None
    params, args = call
    channels = len(params.weight)
    block_params, eps = [], [args.eps]
    for block in blocks:
        selected = _select_backend(block, channels, torch.float32)
        if selected is None or selected[0] != 'avx512' or _drops_paths(block):
            return None
        block_params.append(selected[2])
        eps.append(block.norm.eps)
    if len({(p.gamma is None, p.grn_gamma is None) for p in block_params}) > 1:
        return None
    norm_params = []
    if norm is not None:
        if not _has_expected_children(norm, 'output_norm') or not avx512.supports_norm(channels, norm):
            return None
        norm_params = [norm.weight, norm.bias]
        eps.append(norm.eps)
    has_layer_scale = bool(block_params) and block_params[0].gamma is not None
    block_params = [t for p in block_params for t in p if t is not None]
    outputs = operators.stage(x.float(), list(params), block_params, norm_params, args.patch_size, args.dtype, eps)
    rows, *out = (t.to(_map_dtype(args.dtype, has_layer_scale)) for t in outputs)
    return rows.permute(0, 3, 1, 2), (out[0] if out else None)


def patch_embed_forward(module: nn.Sequential, x: torch.Tensor) -> torch.Tensor | None:
    """Run a stem or a downsampling of x, (N, C, H, W); the output is channels_last."""
    call = _patch_embed_args(module, x)
    if call is None:
        return None
    params, args = call
    out = operators.patch_embed(x.float(), *params, *args).permute(0, 3, 1, 2)
    return out.to(_map_dtype(args.dtype, module.before_layer_scale))


def block_forward(block: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """Run a block of x, (N, C, H, W); the output is channels_last."""
    if x.is_cuda:
        return _gpu_block_forward(block, x)
    selected = _select_backend(block, x.shape[1], x.dtype) if _is_eligible(x) else None
    if selected is None:
        return None
    backend, dtype, params = selected
    sample_ids, scale = _sample_drop_path(block.drop_path, x)
    rows = x.permute(0, 2, 3, 1).contiguous()
    inputs = rows if sample_ids is None else rows[sample_ids]
    z, needs_grad = None, operators.needs_grad(x, *params)
    if backend == 'onednn' and dtype != x.dtype and needs_grad:
        z = inputs.to(dtype)  # which is what the operator saves, not the larger input
    save_level = _save_level(block, backend) if needs_grad else SAVE_INPUT
    args = BlockArgs(backend, dtype, block.norm.eps, block.dwconv.padding, scale, save_level)
    out = operators.block(inputs, z, *params, *args)[0]
    if sample_ids is not None:
        out = rows.to(out.dtype).index_copy(0, sample_ids, out)
    return out.permute(0, 3, 1, 2)


def _gpu_block_forward(block: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """Run a block on a GPU in half precision."""
    dtype = _autocast_dtype('cuda') or x.dtype
    if dtype not in triton_blocks.DTYPES or not _may_use_operators(x) or _get_current_dispatch_mode() is not None:
        return None
    params = _block_params(block)
    if params is None or block.dwconv.padding != (3, 3):
        return None
    args = triton_blocks.Block(params, None, block.norm.eps, dtype)
    rows = x.permute(0, 2, 3, 1).contiguous()
    if not triton_blocks.supports(rows, args):
        return None
    if _drops_paths(block):
        args = args._replace(scale=block.drop_path.sample_scale(x))
    return triton_blocks.run(rows, args, block.with_cp).permute(0, 3, 1, 2)


def norm_forward(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor | None:
    """Run an output norm of x, (N, C, H, W) in channels_last; the output is contiguous."""
    if not _is_eligible(x) or not x.is_contiguous(memory_format=torch.channels_last):
        return None
    if not _has_expected_children(norm, 'output_norm') or not avx512.supports_norm(x.shape[1], norm):
        return None
    rows = x.permute(0, 2, 3, 1).contiguous().float()
    return operators.output_norm(rows, norm.weight, norm.bias, norm.eps).to(x.dtype)


def to_channels_last(x: torch.Tensor) -> torch.Tensor:
    """Convert a feature map to the memory format that blocks prefer, if they may run as operators."""
    return x.contiguous(memory_format=torch.channels_last) if _is_eligible(x) else x


def may_replace(*modules: nn.Module) -> bool:
    """Whether something else may be computed than by calling these modules of other libraries.

    Their classes have to be known (`remember_methods`), and none of them may be hooked, wrapped or changed.
    """
    if _disabled_depth or any(GLOBAL_HOOKS) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not _is_transformed() and all(map(_is_unmodified, modules))


# ---- eligibility of tensors ------------------------------------------------------------------------------------------


def _is_eligible(x: torch.Tensor) -> bool:
    """Whether operators for the CPU may run on an input at all."""
    if not x.is_cpu or not _may_use_operators(x):
        return False
    return {x.dtype, _autocast_dtype() or x.dtype} <= {*avx512.dtypes(), *onednn.dtypes()}


def _may_use_operators(x: torch.Tensor) -> bool:
    """Whether nothing that they do not know looks at operators, and the input is a feature map in memory."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not torch.Tensor:
        return False
    if x.layout != torch.strided or x.ndim != 4 or not x.numel() or x.is_neg():
        return False
    return not (_disabled_depth or _is_transformed() or any(GLOBAL_HOOKS))


def _is_transformed() -> bool:
    """Whether `torch.func` or forward-mode AD looks into operators, for which ours have no rules.

    Without this check the latter would silently lose tangents.
    """
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _map_dtype(dtype: torch.dtype, has_layer_scale: bool) -> torch.dtype:
    """Dtype of the reference's feature maps for matmuls in `dtype`: a layer scale, which is float32, decides."""
    return torch.float32 if has_layer_scale else dtype


def _autocast_dtype(device: str = 'cpu') -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


# ---- eligibility of modules ------------------------------------------------------------------------------------------


def _has_expected_children(module: nn.Module, operator: str) -> bool:
    """Whether its class, not one derived from it, is registered for this operator, and no child has to be called.

    A backward hook of the deprecated kind is shown the last operator of the reference implementation.
    """
    expected, classes = _EXPECTED_CHILDREN.get(type(module), ('', {}))
    children = module._modules.values()
    if expected != operator or tuple(map(type, children)) not in classes:
        return False
    if module._is_full_backward_hook is False or not INNER_METHODS.isdisjoint(vars(module)):
        return False
    return _has_original_methods(type(module)) and all(map(_is_unmodified, children))


def _is_unmodified(module: nn.Module) -> bool:
    """Whether to call the module is to run the `forward` of its class, and nothing else."""
    # This runs for every module in every pass: loops and attributes, not generators and names of attributes.
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    if module._compiled_call_impl or not CALLED_METHODS.isdisjoint(module.__dict__):
        return False
    return _has_original_methods(type(module))


def _has_original_methods(cls: type) -> bool:
    methods = _ORIGINAL_METHODS.get(cls)
    if methods is None:
        return False
    for owner, name, method in methods:  # noqa: SIM110
        if getattr(owner, name) is not method:
            return False
    return True


# ---- arguments of operators ------------------------------------------------------------------------------------------


def _patch_embed_args(module: nn.Module, x: torch.Tensor) -> tuple[PatchEmbedParams, PatchEmbedArgs] | None:
    """Parameters and settings of a stem or a downsampling; None where the reference implementation has to run."""
    if not _is_eligible(x) or not _has_expected_children(module, 'patch_embed'):
        return None
    dtype = _autocast_dtype() or x.dtype
    conv, norm = sorted(module, key=lambda part: isinstance(part, nn.LayerNorm))
    size = conv.kernel_size[0]
    conv_args = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    if conv_args != ((size, size), (size, size), (0, 0), (1, 1), 1, 'zeros') or x.shape[1] != conv.in_channels:
        return None
    params = PatchEmbedParams(conv.weight, conv.bias, norm.weight, norm.bias)
    args = PatchEmbedArgs(size, norm.eps, dtype)
    needs_image_grad = size == 4 and x.requires_grad
    return (params, args) if not needs_image_grad and avx512.supports_patch_embed(x, params, args) else None


def _select_backend(
    block: nn.Module, channels: int, x_dtype: torch.dtype
) -> tuple[str, torch.dtype, BlockParams] | None:
    """The backend for a block of so many channels, the dtype of its matmuls, and the block's parameters."""
    params = _block_params(block)
    if params is None:
        return None
    autocast_dtype = _autocast_dtype()
    dtype = autocast_dtype or x_dtype
    # The dtype that the reference implementation wants of parameters: the input's, or what autocast casts.
    float32_params = dtype == torch.float32 or autocast_dtype
    if float32_params and avx512.supports_block(channels, x_dtype, params, block.dwconv.padding, dtype):
        return 'avx512', dtype, params
    param_dtype = torch.float32 if autocast_dtype else x_dtype
    if {x_dtype, dtype} <= set(onednn.dtypes()) and onednn.supports_params(params, param_dtype):
        return 'onednn', dtype, params
    return None


def _block_params(block: nn.Module) -> BlockParams | None:
    """None where the block is not as built."""
    if not _has_expected_children(block, 'block'):
        return None
    conv, norm, pwconv1, grn, pwconv2, _ = block._modules.values()
    channels = len(conv.weight)
    if (conv.stride, conv.dilation, conv.groups, conv.padding_mode) != ((1, 1), (1, 1), channels, 'zeros'):
        return None
    if isinstance(conv.padding, str) or norm.normalized_shape != (channels,):
        return None
    if block.gamma is not None and block.gamma.shape != (channels,):
        return None
    return BlockParams(
        *(conv.weight, conv.bias, norm.weight, norm.bias, pwconv1.weight, pwconv1.bias),
        *((None, None) if type(grn) is nn.Identity else (grn.gamma, grn.beta)),
        *(pwconv2.weight, pwconv2.bias, block.gamma),
    )


def _drops_paths(block: nn.Module) -> bool:
    return block.drop_path.training and block.drop_path.drop_prob > 0


def _sample_drop_path(drop_path: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """Indices of the samples that keep the branch, None for all of them, and the factor of the branch."""
    if not drop_path.training or drop_path.drop_prob == 0:
        return None, 1.0
    sample_ids = drop_path.sample_scale(x).nonzero().flatten()
    return (None if len(sample_ids) == len(x) else sample_ids), 1 / (1 - drop_path.drop_prob)


def _save_level(block: nn.Module, backend: str) -> int:
    """What a block saves for the backward pass, by its `with_cp` and its width."""
    if block.with_cp is True:
        return SAVE_INPUT
    is_wide = len(block.dwconv.weight) >= operators.BACKENDS[backend].SAVE_HIDDEN_FROM
    return SAVE_HIDDEN if is_wide and not block.with_cp else SAVE_DWCONV
