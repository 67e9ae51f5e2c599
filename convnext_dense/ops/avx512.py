"""Backend of kernels for AVX-512, compiled from avx512_kernels.c at installation, for float32 parameters.

A thread takes some hundred pixels at a time from the depthwise convolution to the output, so that intermediate values
stay in its cache. Saved for the backward pass: the input; the depthwise convolution's output, unless `with_cp` is True;
in wide blocks the hidden layer before GELU, unless `with_cp` is set.

Everything that enters a kernel is checked twice: by the `check_*` functions here, which know the tensors, and by the
kernels themselves, which return an error code for sizes and pointers that they cannot work with.
"""

import ctypes
import hashlib
import threading
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .block_params import GRN_EPS, HIDDEN_RATIO, PARAM_TYPES, SAVE_DWCONV, SAVE_HIDDEN, BlockArgs, BlockParams

SOURCE = Path(__file__).with_name('avx512_kernels.c')
REQUIRED_CPU_FLAGS = {'avx512f', 'avx512bw', 'avx512dq', 'avx512vl'}
CHANNEL_MULTIPLE = 32
DW_KERNEL = 7  # side of the depthwise kernel
PATCH_SIZES = (4, 2)  # of the stem and of a downsampling
SAVE_HIDDEN_FROM = 384  # channels from which on saving the hidden layer is faster than recomputing it

STRUCT_VERSION = 3
STRUCTS = ('BlockArgs', 'PatchEmbedArgs', 'NormArgs', 'Conv3x3Args', 'KernelCall')  # avx512_kernels.c describes them
# The struct that a kernel takes; those in NEEDS_WORKSPACE also take memory to work in.
KERNELS = {
    'block': 'BlockArgs',
    'block_backward': 'BlockArgs',
    'patch_embed': 'PatchEmbedArgs',
    'patch_embed_backward': 'PatchEmbedArgs',
    'norm_nchw': 'NormArgs',
    'norm_nchw_backward': 'NormArgs',
    'conv3x3': 'Conv3x3Args',
}
NEEDS_WORKSPACE = [name for name in KERNELS if name != 'norm_nchw']

# A thread keeps its workspace: the system has to clear 20 MB of fresh pages (tiny's), which can take longer than a
# block.
_tls, _EMPTY = threading.local(), torch.empty(0, dtype=torch.uint8, device='cpu')


class KernelCall(NamedTuple):
    """A kernel to launch.

    Attributes:
        name: A key of `KERNELS`.
        args: The kernel's struct.
        tensors: What the struct points into; they have to live until the kernel has run.
    """

    name: str
    args: ctypes.Structure
    tensors: tuple[torch.Tensor | None, ...]


def launch(*calls: KernelCall) -> None:
    """Run kernels one after the other.

    Between them there is no return to Python, after which their code and data would no longer be in the cache.

    Raises:
        RuntimeError: A kernel refuses its arguments.
    """
    library = _library()
    sizes = [_workspace_bytes(call) for call in calls]
    workspace = _workspace_ptr(max(sizes, default=0))
    for call, size in zip(calls, sizes):
        call.args.workspace, call.args.workspace_bytes = workspace, size
    queue = (library.structs['KernelCall'] * len(calls))(
        *((library.addresses[call.name], ctypes.addressof(call.args)) for call in calls)
    )
    failure = library.run_queue(queue, len(calls))
    if failure:
        index, code = divmod(failure, 256)
        raise RuntimeError(f'convnext_{calls[index].name}: {library.error_message(code).decode()}')


def _workspace_bytes(call: KernelCall) -> int:
    if call.name not in NEEDS_WORKSPACE:
        return 0
    size = _library().workspace_sizes[call.name](ctypes.byref(call.args))
    if size < 0:
        raise RuntimeError(f'convnext_{call.name}: {_library().error_message(-size).decode()}')
    return size


def _workspace_ptr(size: int) -> int:
    """Address of the thread's workspace, of that many bytes at least."""
    if getattr(_tls, 'workspace', _EMPTY).numel() < size:
        _tls.workspace = _EMPTY  # free the old one first
        _tls.workspace = torch.empty(size, dtype=torch.uint8, device='cpu')
    return getattr(_tls, 'workspace', _EMPTY).data_ptr()


def _pack(kernel: str, **fields: int | float | torch.Tensor | None) -> KernelCall:
    """Fill the struct of a kernel; tensors become pointers."""
    struct = _library().structs[KERNELS[kernel]]
    tensors, values = [], {}
    for name, value in fields.items():
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            values[name] = value.data_ptr()
        elif value is not None:
            values[name] = value
    if not values.keys() <= struct.field_names:
        unknown = ', '.join(sorted(values.keys() - struct.field_names))
        raise RuntimeError(f'{struct.__name__} of avx512_kernels.c has no field {unknown}')
    args = struct(version=STRUCT_VERSION, threads=torch.get_num_threads(), **values)
    return KernelCall(kernel, args, (*tensors,))


# ---- blocks ----------------------------------------------------------------------------------------------------------


def supports_block(
    channels: int, x_dtype: torch.dtype, params: BlockParams, padding: tuple[int, int], dtype: torch.dtype
) -> bool:
    """Whether a block with matmuls in `dtype` runs here."""
    if channels % CHANNEL_MULTIPLE or dtype not in dtypes() or x_dtype not in (torch.float32, torch.bfloat16):
        return False
    shapes = params.expected_shapes(channels, (DW_KERNEL, DW_KERNEL), HIDDEN_RATIO * channels)
    return padding == (DW_KERNEL // 2, DW_KERNEL // 2) and _params_match(params.present(), shapes)


def check_block(x: torch.Tensor, params: BlockParams, args: BlockArgs) -> None:
    """Raise a RuntimeError unless the kernels can run the block."""
    if not supports_block(x.shape[-1], x.dtype, params, tuple(args.padding), args.dtype):
        raise RuntimeError(
            f'the AVX-512 kernels take float32 and bfloat16 feature maps of a multiple of {CHANNEL_MULTIPLE} channels, '
            f'{DW_KERNEL} x {DW_KERNEL} depthwise kernels, and float32 parameters of the shapes that belong to them'
        )


def output_dtype(x: torch.Tensor, params: BlockParams, args: BlockArgs) -> torch.dtype:
    """Dtype of a block's output, that of the reference: a layer scale makes it float32."""
    return x.dtype if params.gamma is None else torch.float32


def hidden_shapes(x: torch.Tensor, params: BlockParams) -> list[tuple[int, int]]:
    """Shape of the saved hidden layer."""
    return [(x.numel() // x.shape[-1], HIDDEN_RATIO * x.shape[-1])]


def forward(args: BlockArgs, x: torch.Tensor, z: None, params: BlockParams) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run a block; `z` is for the other backend.

    Returns:
        The output, (N, H, W, C), and what is saved: the depthwise convolution's output, the hidden layer.
    """
    dtype, x = output_dtype(x, params, args), x.float()
    out = torch.empty_like(x)
    saved = [torch.empty_like(x, dtype=args.dtype)] if args.save_level >= SAVE_DWCONV else []
    if args.save_level >= SAVE_HIDDEN:
        saved += [x.new_empty(shape, dtype=args.dtype) for shape in hidden_shapes(x, params)]
    if len(x):  # stochastic depth has left samples
        launch(_block_call('block', args, x, params, out=out, **dict(zip(('y', 'hidden'), saved))))
    return out.to(dtype), saved


def queue_blocks(
    blocks: Sequence[tuple[BlockArgs, BlockParams]], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[KernelCall]]:
    """Queue blocks for inference, alternating between `x`, which is overwritten, and one other buffer.

    Args:
        blocks: Settings and parameters of each block.
        x: Feature map (N, H, W, C), float32.

    Returns:
        The buffer with the output, the unused buffer, and the calls; nothing runs until `launch(*calls)`.
    """
    buffers = [x, torch.empty_like(x)]
    calls = [
        _block_call('block', args, buffers[i % 2], params, out=buffers[1 - i % 2])
        for i, (args, params) in enumerate(blocks)
    ]
    return buffers[len(blocks) % 2], buffers[1 - len(blocks) % 2], calls


def backward(
    args: BlockArgs,
    grad: torch.Tensor,
    x: torch.Tensor,
    saved: Sequence[torch.Tensor],
    params: BlockParams,
    z_is_x: bool,
    needs_grad: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Gradients of a block's input, shortcut included, and of its parameters; None where none is needed.

    Args:
        args: Settings of the block.
        grad: Gradient of the output, (N, H, W, C), contiguous.
        x: The input, (N, H, W, C).
        saved: As returned by `forward`.
        params: Parameters of the block.
        z_is_x: True; for the other backend.
        needs_grad: Whether x and each of the parameters needs a gradient.
    """
    needs_x, *needs_params = needs_grad
    dtype, grad, x = grad.dtype, grad.float(), x.float()
    p, channels, taps = params, x.shape[-1], DW_KERNEL**2
    fields = dict(zip(('y', 'hidden'), map(_contiguous, saved)))
    fields |= dict(grad=grad, grad_y=torch.empty_like(x), grad_x=torch.empty_like(x) if needs_x else None)
    if any(needs_params):
        # Not empty_like: the weights may be views.
        fields |= {f'grad_{name}': x.new_empty(getattr(p, name).shape) for name in ('pwconv1_weight', 'pwconv2_weight')}
        fields['sums'] = x.new_empty((2 * HIDDEN_RATIO + taps) * channels)
        fields |= {
            f'grad_{name}': None if getattr(p, name) is None else x.new_empty(getattr(p, name).shape)
            for name in ('grn_gamma', 'grn_beta', 'gamma')
        }
    launch(_block_call('block_backward', args, x, params, **fields))
    grad_x = fields['grad_x'].to(dtype) if needs_x else None
    if not any(needs_params):
        return [grad_x, *[None] * len(params)]
    sizes = [HIDDEN_RATIO * channels, *[channels] * 4, taps * channels]
    pwconv1_bias, pwconv2_bias, norm_weight, norm_bias, dwconv_bias, dw_taps = fields['sums'].split(sizes)
    dwconv_weight = dw_taps.view(taps, channels).t().contiguous().view(p.dwconv_weight.shape)
    pwconv1 = fields['grad_pwconv1_weight'], pwconv1_bias
    pwconv2 = fields['grad_pwconv2_weight'], pwconv2_bias
    grn = fields['grad_grn_gamma'], fields['grad_grn_beta']
    grads = (dwconv_weight, dwconv_bias, norm_weight, norm_bias, *pwconv1, *grn, *pwconv2, fields['grad_gamma'])
    return [grad_x, *(t if n else None for t, n in zip(grads, needs_params))]


def _block_call(kernel: str, args: BlockArgs, x: torch.Tensor, params: BlockParams, **fields) -> KernelCall:
    images, height, width, channels = x.shape
    fields |= dict(zip(BlockParams._fields, map(_contiguous, params)))
    fields |= dict(images=images, height=height, width=width, channels=channels, bf16=args.dtype == torch.bfloat16)
    return _pack(kernel, eps=args.eps, grn_eps=GRN_EPS, keep_prob_scale=args.keep_prob_scale, x=x, **fields)


# ---- stem and downsampling -------------------------------------------------------------------------------------------


class PatchEmbedArgs(NamedTuple):
    """Settings of a stem or a downsampling.

    Attributes:
        patch_size: 4 for the stem, whose norm follows the convolution; 2 for a downsampling, whose norm precedes it.
        eps: Epsilon of the LayerNorm.
        dtype: Dtype of the matmul operands.
    """

    patch_size: int
    eps: float
    dtype: torch.dtype


class PatchEmbedParams(NamedTuple):
    """Parameters of a stem or a downsampling."""

    weight: torch.Tensor
    bias: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor


def supports_patch_embed(x: torch.Tensor, params: PatchEmbedParams, args: PatchEmbedArgs) -> bool:
    """Whether a stem or a downsampling of x, (N, C, H, W), runs here, once that is float32."""
    size, in_channels, out_channels = args.patch_size, x.shape[1], len(params.weight)
    if size not in PATCH_SIZES or min(x.shape[2:]) < size or not in_channels:
        return False
    if size == 2 and (in_channels % CHANNEL_MULTIPLE or not x.is_contiguous(memory_format=torch.channels_last)):
        return False
    if out_channels % CHANNEL_MULTIPLE or args.dtype not in dtypes():
        return False
    norm = (in_channels if size == 2 else out_channels,)
    return _params_match(params, ((out_channels, in_channels, size, size), (out_channels,), norm, norm))


def check_patch_embed(x: torch.Tensor, params: PatchEmbedParams, args: PatchEmbedArgs) -> None:
    """Raise a RuntimeError unless the kernels can run the stem or the downsampling."""
    is_map = x.ndim == 4 and x.is_cpu and x.dtype == torch.float32 and not x.is_neg()
    if not is_map or not supports_patch_embed(x, params, args):
        raise RuntimeError(
            f'the AVX-512 kernels take float32 feature maps (N, C, H, W), patches of {PATCH_SIZES} pixels, a multiple '
            f'of {CHANNEL_MULTIPLE} output channels, and before a downsampling channels_last'
        )


def patch_embed(args: PatchEmbedArgs, x: torch.Tensor, params: PatchEmbedParams) -> tuple[torch.Tensor, KernelCall]:
    """Queue a stem or a downsampling: (N, C, H, W) -> (N, H // size, W // size, C'), float32."""
    height, width = (n // args.patch_size for n in x.shape[2:])
    out = x.new_empty(len(x), height, width, len(params.weight))
    return out, _patch_embed_call('patch_embed', args, x, params, out=out)


def patch_embed_backward(
    args: PatchEmbedArgs, grad: torch.Tensor, x: torch.Tensor, params: PatchEmbedParams, needs_grad: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Gradients of x and of the parameters, None where none is needed."""
    needs_params, fields = any(needs_grad[1:]), {}
    if args.patch_size == 2:  # pixels that no patch covers, of odd sizes, have gradient 0
        covered = not any(n % 2 for n in x.shape[2:])
        fields['grad_x'] = torch.empty_like(x) if covered else torch.zeros_like(x)
    sizes = [len(t) for t in params[1:]]
    if needs_params:
        fields['grad_weight'] = x.new_empty(len(params.weight), _padded_patch_numel(params.weight))
        fields['sums'] = x.new_empty(sum(sizes))
    launch(_patch_embed_call('patch_embed_backward', args, x, params, grad=grad, **fields))
    grads = [fields.get('grad_x'), *[None] * len(params)]
    if needs_params:
        grads[1] = fields['grad_weight'][:, : params.weight[0].numel()].reshape(params.weight.shape)
        grads[2:] = fields['sums'].split(sizes)
    return [t if n else None for t, n in zip(grads, needs_grad)]


def patch_embed_reference(x, weight, bias, norm_weight, norm_bias, patch_size, eps, dtype) -> torch.Tensor:
    """What `patch_embed` computes, in torch's own operators, for gradients of gradients."""

    def layer_norm(x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), norm_weight.shape, norm_weight, norm_bias, eps)
        return x.permute(0, 3, 1, 2)

    if patch_size == 2:
        return F.conv2d(layer_norm(x), weight, bias, stride=2).permute(0, 2, 3, 1)
    return layer_norm(F.conv2d(x, weight, bias, stride=patch_size)).permute(0, 2, 3, 1)


def _padded_patch_numel(weight: torch.Tensor) -> int:
    return -(-weight[0].numel() // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE


def _patch_embed_call(
    kernel: str, args: PatchEmbedArgs, x: torch.Tensor, params: PatchEmbedParams, **fields
) -> KernelCall:
    weight, *vectors = params
    missing, rows = _padded_patch_numel(weight) - weight[0].numel(), weight.flatten(1)
    rows = _contiguous(F.pad(rows, (0, missing)) if missing else rows)
    fields |= dict(zip(PatchEmbedParams._fields, (rows, *map(_contiguous, vectors))))
    images, channels, *sides = x.shape
    height, width = (n // args.patch_size for n in sides)
    fields |= dict(images=images, height=height, width=width, channels=channels, out_channels=len(weight))
    fields |= dict(zip(('stride_n', 'stride_c', 'stride_h', 'stride_w'), x.stride()))
    return _pack(kernel, x=x, patch_size=args.patch_size, bf16=args.dtype == torch.bfloat16, eps=args.eps, **fields)


# ---- output norm -----------------------------------------------------------------------------------------------------


def supports_norm(channels: int, norm: nn.LayerNorm) -> bool:
    """Whether the norm of an output of so many channels runs here, if that is float32."""
    return norm.normalized_shape == (channels,) and _norm_params_match(channels, norm.weight, norm.bias)


def check_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Raise a RuntimeError unless the kernels can run the norm of x, (N, H, W, C)."""
    if x.dtype != torch.float32 or not _norm_params_match(x.shape[-1], weight, bias):
        raise RuntimeError(
            f'the AVX-512 kernels take float32 feature maps of a multiple of {CHANNEL_MULTIPLE} channels, and a weight '
            'and a bias for each channel'
        )


def _norm_params_match(channels: int, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    if channels % CHANNEL_MULTIPLE or not dtypes():
        return False
    return _params_match((weight, bias), ((channels,), (channels,)))


def norm_nchw(
    eps: float, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, spare: torch.Tensor | None = None
) -> tuple[torch.Tensor, KernelCall]:
    """Queue the LayerNorm of x, (N, H, W, C) -> (N, C, H, W), into the `spare` buffer where there is one."""
    n, height, width, channels = x.shape
    out = x.new_empty(n, channels, height, width) if spare is None else spare.view(n, channels, height, width)
    return out, _norm_call('norm_nchw', eps, x, weight, bias, out=out)


def norm_nchw_backward(
    eps: float,
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    needs_grad: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Gradients of x, (N, H, W, C), weight and bias, None where none is needed; `grad` is (N, C, H, W)."""
    grad_x, sums = torch.empty_like(x), x.new_empty(2 * len(weight))
    launch(_norm_call('norm_nchw_backward', eps, x, weight, bias, grad=grad, grad_x=grad_x, sums=sums))
    return [t if n else None for t, n in zip((grad_x, *sums.chunk(2)), needs_grad)]


def norm_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """What `norm_nchw` computes, in torch's own operators, for gradients of gradients."""
    return F.layer_norm(x, weight.shape, weight, bias, eps).permute(0, 3, 1, 2)


def _norm_call(kernel: str, eps: float, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, **fields):
    n, height, width, channels = x.shape
    fields |= dict(norm_weight=_contiguous(weight), norm_bias=_contiguous(bias))
    return _pack(kernel, images=n, area=height * width, channels=channels, eps=eps, x=x, **fields)


# ---- 3 x 3 convolutions of necks and heads ---------------------------------------------------------------------------


def supports_conv3x3(shape: torch.Size, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a 3 x 3 convolution of a feature map (N, C, H, W), with stride and padding 1, in `dtype` runs here."""
    if weight.ndim != 4 or weight.shape[1:] != (shape[1], 3, 3) or not (dtype == torch.float32 and dtypes()):
        return False
    return not (weight.shape[0] % CHANNEL_MULTIPLE or weight.shape[1] % CHANNEL_MULTIPLE)


def check_conv3x3(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise a RuntimeError unless the kernel can convolve the feature map."""
    params = [weight] if bias is None else [weight, bias]
    shapes = [(len(weight), x.shape[1], 3, 3), (len(weight),)][: len(params)]
    if not (supports_conv3x3(x.shape, weight, x.dtype) and _params_match(params, shapes)):
        raise RuntimeError(
            'the AVX-512 kernels convolve float32 feature maps with float32 weights (C_out, C, 3, 3); '
            f'C and C_out are multiples of {CHANNEL_MULTIPLE}'
        )


def conv3x3(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool) -> torch.Tensor:
    """Convolve a feature map (N, C, H, W), and apply a ReLU if `relu`; the result is channels_last.

    Winograd's algorithm rounds as a sum in another order does. If a value is infinite or NaN, up to 4 x 4 pixels around
    it are.
    """
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    n, channels, height, width = x.shape
    # Not a permuted view of rows, which ReLUs could not change in place.
    shape = (n, len(weight), height, width)
    out = torch.empty(shape, dtype=x.dtype, device='cpu', memory_format=torch.channels_last)
    fields = dict(images=n, height=height, width=width, channels=channels, out_channels=len(weight), relu=relu)
    launch(_pack('conv3x3', x=x, weight=weight, bias=_contiguous(bias), out=out, **fields))
    return out


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _params_match(params: Sequence[torch.Tensor | None], shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether parameters, once they are contiguous, are what the kernels expect."""
    for p, shape in zip(params, shapes, strict=True):
        if type(p) not in PARAM_TYPES or p.dtype is not torch.float32 or not p.is_cpu or p.layout is not torch.strided:
            return False
        if p.shape != shape:
            return False
    return True


def _contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor as the kernels read memory: row-major, without a pending negation.

    A parameter or a gradient may be any view: sliced, expanded, transposed.
    """
    return t if t is None or (t.is_contiguous() and not t.is_neg()) else t.resolve_neg().contiguous()


# ---- the library -----------------------------------------------------------------------------------------------------


@cache
def dtypes() -> tuple[torch.dtype, ...]:
    """Dtypes of matmuls that this backend is used for on this machine."""
    if unavailable_reason():
        return ()
    # Processors with AMX multiply tiles of bfloat16: oneDNN uses that, and is faster.
    bfloat16 = 'avx512_bf16' in _cpu_flags() and 'amx_bf16' not in _cpu_flags()
    return (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)


def unavailable_reason() -> str:
    """Why the kernels cannot be used on this machine; empty if they can."""
    flags = _cpu_flags()
    if not flags:
        return 'they are for Linux on x86-64, where /proc/cpuinfo says what the processor has'
    missing = REQUIRED_CPU_FLAGS - flags
    if missing:
        return f'this processor has no {", ".join(sorted(missing))}'
    return '' if _library() else 'they were not compiled when convnext_dense was installed, or do not load'


def _cpu_flags() -> set[str]:
    """Features of the processor, as Linux reports them."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith('flags')), '').split())


class _Library:
    """The compiled kernels.

    Attributes:
        structs: ctypes structures by name, built from the description that the library exports.
        addresses, workspace_sizes: By kernel, its address and the function that returns the size of its workspace.
    """

    def __init__(self, path: Path):
        self.path = path
        library = ctypes.CDLL(str(path))
        library.convnext_source.restype = ctypes.c_char_p
        if library.convnext_source().decode() != kernel_source_hash():
            raise OSError('it was compiled from another avx512_kernels.c than the one beside it')
        self.structs = {name: _struct_of(library, i, name) for i, name in enumerate(STRUCTS)}
        kernels = {name: getattr(library, f'convnext_{name}') for name in KERNELS}
        self.addresses = {name: ctypes.cast(kernel, ctypes.c_void_p).value for name, kernel in kernels.items()}
        self.workspace_sizes = {name: getattr(library, f'convnext_{name}_workspace') for name in NEEDS_WORKSPACE}
        for function in self.workspace_sizes.values():
            function.restype = ctypes.c_int64
        self.run_queue, self.error_message = library.convnext_run_queue, library.convnext_error_message
        self.run_queue.argtypes, self.run_queue.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_int64
        self.error_message.argtypes, self.error_message.restype = (ctypes.c_int64,), ctypes.c_char_p
        library.convnext_init_tables()


def _struct_of(library: ctypes.CDLL, index: int, name: str) -> type[ctypes.Structure]:
    """Build the ctypes structure of one of the library's structs, which it describes as 'Name kind:field ...'.

    Raises:
        OSError: It is not laid out as ctypes lays out such fields, or its name is another one.
    """
    library.convnext_describe_struct.restype = ctypes.c_char_p
    library.convnext_struct_size.restype = ctypes.c_int64
    described_name, *fields = library.convnext_describe_struct(index).decode().split()
    kinds = {'i': ctypes.c_int64, 'f': ctypes.c_float, 'p': ctypes.c_void_p}
    members = [(field[2:], kinds[field[0]]) for field in fields]
    struct = type(name, (ctypes.Structure,), dict(_fields_=members))
    if (described_name, library.convnext_struct_size(index)) != (name, ctypes.sizeof(struct)):
        raise OSError(f'its struct {described_name} is not laid out as Python expects')
    struct.field_names = {field for field, _ in members}
    return struct


@cache
def _library() -> _Library | None:
    """The kernels; None, with a warning, where they cannot be used.

    They were not compiled, do not load, come from another source than the one installed, or lay out their structs in
    another way.
    """
    candidates = [SOURCE.with_name('avx512_kernels' + suffix) for suffix in EXTENSION_SUFFIXES]
    file = next((path for path in candidates if path.exists()), None)
    if file is None:
        _warn('the kernels were not compiled when convnext_dense was installed')
        return None
    try:
        return _Library(file)
    except (OSError, AttributeError) as error:
        _warn(f'{file.name} cannot be used: {error}')
        return None


def _warn(reason: str) -> None:
    warnings.warn(
        f'{reason}; the backbone falls back to a slower implementation on this CPU. Install it again, with gcc as '
        'compiler',
        stacklevel=2,
    )


def kernel_source_hash() -> str:
    """Hash of the C source; setup.py compiles it into the kernels."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
