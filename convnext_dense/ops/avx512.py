"""The form that is compiled: kernels.c, for float32 parameters and processors with AVX-512.

A thread takes some hundred pixels at a time from the depthwise convolution to the output, so that nothing in between
leaves its cache. Kept for the backward pass: the input; the depthwise convolution's output, unless `with_cp` is True;
in wide blocks the hidden layer before GELU, unless `with_cp` is set.
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

from .block_params import Parameters, Settings

SOURCE = Path(__file__).with_name('avx512_kernels.c')
NEEDED = {'avx512f', 'avx512bw', 'avx512dq', 'avx512vl'}  # of a processor
LANES = 32  # channels come in multiples of it
SIDE = 7  # of the depthwise kernel
WITH_WORK = ('forward', 'backward', 'patches', 'patches_backward', 'output_backward')  # kernels that want memory
SIDES = (4, 2)  # of patches of the stem and of a downsampling
WIDE = 384  # channels from which on the hidden layer is sooner kept for the backward pass than computed again

# A thread keeps the memory that the kernels work in: of 20 MB of fresh pages, tiny's, the system has to clear each one,
# which can take longer than a block.
_own, _NOTHING = threading.local(), torch.empty(0, dtype=torch.uint8, device='cpu')


def _structure(integers, floats, pointers):
    names = ((integers, ctypes.c_int64), (floats, ctypes.c_float), (pointers, ctypes.c_void_p))
    fields = [(name, kind) for group, kind in names for name in group.split()]
    return type('Arguments', (ctypes.Structure,), dict(_fields_=fields))


# Block, Patches, Output and Call of kernels.c.
_Block = _structure(
    'images height width channels threads bf16',
    'eps factor',
    ' '.join(Parameters._fields) + ' x y hidden out grad grad_x grad_y grad_linear1 grad_linear2 sums work',
)
_Patches = _structure(
    'images height width channels outputs side threads bf16 of_image of_channel of_row of_pixel',
    'eps',
    'x weight bias norm norm_bias out grad grad_x grad_weight sums work',
)
_Output = _structure('images area channels threads', 'eps', 'x norm norm_bias out grad grad_x sums work')
_Step = _structure('', '', 'kernel arguments')


class Call(NamedTuple):
    """A kernel of kernels.c that is to run."""

    name: str
    arguments: ctypes.Structure
    tensors: tuple[torch.Tensor | None, ...]  # that the arguments point into: they have to last until it ran


def run(*calls: Call) -> None:
    """One kernel after the other, without a return to Python: what that needs is no longer in the cache then."""
    library = _library()
    work = _work(max((_bytes_of_work(call) for call in calls), default=0))
    for call in calls:
        call.arguments.work = work
    kernels = [ctypes.cast(getattr(library, f'convnext_{call.name}'), ctypes.c_void_p) for call in calls]
    steps = (_Step * len(calls))(*((k.value, ctypes.addressof(c.arguments)) for k, c in zip(kernels, calls)))
    library.convnext_run(steps, len(calls))


def _bytes_of_work(call: Call) -> int:
    if call.name not in WITH_WORK:
        return 0
    return getattr(_library(), f'convnext_{call.name}_work')(ctypes.byref(call.arguments))


def _work(size: int) -> int:
    """Where the thread's working memory is, of that many bytes at least."""
    if getattr(_own, 'work', _NOTHING).numel() < size:
        _own.work = _NOTHING  # before the new one comes
        _own.work = torch.empty(size, dtype=torch.uint8, device='cpu')
    return getattr(_own, 'work', _NOTHING).data_ptr()


def takes(x: torch.Tensor, p: Parameters, padding: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether a block with these parameters and products in `dtype` has this form here; its output is float32."""
    c = x.shape[1]
    if c % LANES or dtype not in dtypes() or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if p.gamma is None and x.dtype != torch.float32:  # then the plain form's output is not float32
        return False
    linears = ((4 * c, c), (4 * c,), (c, 4 * c), (c,))
    shapes = ((c, 1, SIDE, SIDE), (c,), (c,), (c,), *linears, *([] if p.gamma is None else [(c,)]))
    if padding != (SIDE // 2, SIDE // 2):
        return False
    return _fit([t for t in p if t is not None], shapes)


def inputs(settings: Settings, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z = x.float()
    return z, z


def forward(settings, x, z, parameters, keep=False):
    """Output, and what is kept."""
    z = x.float() if z is None else z
    keep_y = keep and settings.with_cp is not True
    keep_hidden = keep and not settings.with_cp and z.shape[-1] >= WIDE
    kept = (
        torch.empty_like(z, dtype=settings.dtype) if keep_y else None,
        z.new_empty(*z.shape[:-1], 4 * z.shape[-1], dtype=settings.dtype) if keep_hidden else None,
    )
    out = torch.empty_like(z)
    if len(z):  # stochastic depth has left some
        run(_block('forward', settings, z, parameters, y=kept[0], hidden=kept[1], out=out))
    return out, kept


def forward_all(
    blocks: Sequence[tuple[Settings, Parameters]], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[Call]]:
    """Output of blocks one after the other, over two maps in turn, one of them `x`, N x H x W x C in float32; the map
    that is free then; and the calls that do it. Nothing is kept."""
    maps = [x, torch.empty_like(x)]
    calls = [
        _block('forward', settings, maps[i % 2], parameters, out=maps[1 - i % 2])
        for i, (settings, parameters) in enumerate(blocks)
    ]
    return maps[len(blocks) % 2], maps[1 - len(blocks) % 2], calls


def backward(settings, z, kept, parameters, grad, needed):
    """Gradients of x (none: z's is all of it), of z and of the parameters, None where not `needed`."""
    _, of_z, *of_parameters = needed
    p, channels = parameters, z.shape[-1]
    z, y, hidden, grad = map(_contiguous, (z, *kept, grad))  # hooks of saved tensors may have laid them otherwise
    found = dict(y=y, hidden=hidden, grad=grad, grad_y=torch.empty_like(z))
    found['grad_x'] = torch.empty_like(z) if of_z else None
    if any(of_parameters):
        taps = SIDE * SIDE
        # Not empty_like: the weights may be views.
        found |= dict(grad_linear1=z.new_empty(p.linear1.shape), grad_linear2=z.new_empty(p.linear2.shape))
        found['sums'] = z.new_empty((4 + 4 + taps) * channels)
    run(_block('backward', settings, z, parameters, **found))
    if not any(of_parameters):
        return None, found['grad_x'], *[None] * len(parameters)
    sizes = [4 * channels, *[channels] * 4, taps * channels]
    bias1, bias2, norm, norm_bias, depthwise_bias, of_taps = found['sums'].split(sizes)
    depthwise = of_taps.view(taps, channels).t().reshape(p.depthwise.shape)
    linear2, bias2, gamma = p.branch_gradients(settings.factor, found['grad_linear2'], bias2)
    all_found = (depthwise, depthwise_bias, norm, norm_bias, found['grad_linear1'], bias1, linear2, bias2, gamma)
    return None, found['grad_x'], *(t if n else None for t, n in zip(all_found, of_parameters))


class Patches(NamedTuple):
    side: int  # 4 of the stem, whose norm comes after the convolution, 2 of a downsampling, whose norm comes before
    eps: float
    dtype: torch.dtype  # of the products


def takes_patches(conv: nn.Conv2d, norm: nn.LayerNorm, x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a stem or a downsampling has this form here. A stem's image gets no gradient."""
    side = conv.kernel_size[0]
    expected = ((side, side), (side, side), (0, 0), (1, 1), 1, 'zeros')
    found = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    if side not in SIDES or found != expected or min(x.shape[2:]) < side or x.shape[1] != conv.in_channels:
        return False
    if side == 2 and not (x.shape[1] % LANES == 0 and x.is_contiguous(memory_format=torch.channels_last)):
        return False
    if side == 4 and x.requires_grad:
        return False
    before, after = x.shape[1], conv.out_channels
    shapes = ((after, before, side, side), (after,), *[(before if side == 2 else after,)] * 2)
    if after % LANES or dtype not in dtypes() or x.dtype != torch.float32:
        return False
    return _fit((conv.weight, conv.bias, norm.weight, norm.bias), shapes)


def patches(settings: Patches, x, weight, bias, norm, norm_bias) -> tuple[torch.Tensor, Call]:
    """N x C x H x W -> N x H // side x W // side x C', float32, and the call that makes it."""
    height, width = (n // settings.side for n in x.shape[2:])
    out = x.new_empty(len(x), height, width, len(weight))
    return out, _patches('patches', settings, x, weight, (bias, norm, norm_bias), out=out)


def patches_backward(settings, x, weight, bias, norm, norm_bias, grad, needed):
    """Gradients of all but `settings`, None where not `needed`."""
    of_parameters, found = needed[1:], dict(grad=_contiguous(grad))
    if settings.side == 2:  # pixels of odd sizes that no patch covers have none
        x = x.contiguous(memory_format=torch.channels_last)  # hooks of saved tensors may have laid it otherwise
        covered = not any(n % 2 for n in x.shape[2:])
        found['grad_x'] = torch.empty_like(x) if covered else torch.zeros_like(x)
    sizes = (len(bias), len(norm), len(norm))
    if any(of_parameters):
        found['grad_weight'] = x.new_empty(len(weight), _patch_size(weight))
        found['sums'] = x.new_empty(sum(sizes))
    run(_patches('patches_backward', settings, x, weight, (bias, norm, norm_bias), **found))
    if not any(of_parameters):
        return found.get('grad_x'), None, None, None, None
    of_weight = found['grad_weight'][:, : weight[0].numel()].reshape(weight.shape)
    all_found = (found.get('grad_x'), of_weight, *found['sums'].split(sizes))
    return tuple(t if n else None for t, n in zip(all_found, needed))


def patches_plainly(settings, x, weight, bias, norm, norm_bias):
    def normalised(x):
        return F.layer_norm(x.permute(0, 2, 3, 1), norm.shape, norm, norm_bias, settings.eps).permute(0, 3, 1, 2)

    if settings.side == 2:
        return F.conv2d(normalised(x), weight, bias, stride=2).permute(0, 2, 3, 1)
    return normalised(F.conv2d(x, weight, bias, stride=settings.side)).permute(0, 2, 3, 1)


def _patch_size(weight: torch.Tensor) -> int:
    return -(-weight[0].numel() // LANES) * LANES


def _patches(name, settings, x, weight, vectors, **tensors) -> Call:
    missing, rows = _patch_size(weight) - weight[0].numel(), weight.flatten(1)
    rows = _contiguous(F.pad(rows, (0, missing)) if missing else rows)
    sizes = (len(x), *(n // settings.side for n in x.shape[2:]), x.shape[1], len(weight), settings.side)
    tensors |= dict(zip(('bias', 'norm', 'norm_bias'), map(_contiguous, vectors)), x=x, weight=rows)
    integers = (*sizes, torch.get_num_threads(), settings.dtype == torch.bfloat16, *x.stride())
    return Call(name, _Patches(*integers, settings.eps, **_pointers(tensors)), tuple(tensors.values()))


def takes_output(norm: nn.LayerNorm, x: torch.Tensor) -> bool:
    """Whether the norm of a map that is emitted has this form here."""
    c = x.shape[1]
    if c % LANES or x.dtype != torch.float32 or not x.is_contiguous(memory_format=torch.channels_last) or not dtypes():
        return False
    return norm.normalized_shape == (c,) and _fit((norm.weight, norm.bias), ((c,), (c,)))


def output(eps: float, x, norm, norm_bias, free: torch.Tensor | None = None) -> tuple[torch.Tensor, Call]:
    """LayerNorm of N x C x H x W in channels_last, contiguous, and the call that makes it, in a `free` map where there
    is one."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if free is None else free.view(x.shape)
    return out, _output('output', eps, x, norm=norm, norm_bias=norm_bias, out=out)


def output_backward(eps, x, norm, norm_bias, grad, needed):
    x = x.contiguous(memory_format=torch.channels_last)
    found = dict(grad_x=torch.empty_like(x), sums=x.new_empty(2 * len(norm)))
    run(_output('output_backward', eps, x, norm=norm, norm_bias=norm_bias, grad=_contiguous(grad), **found))
    all_found = (found['grad_x'], *found['sums'].chunk(2))
    return tuple(t if n else None for t, n in zip(all_found, needed))


def output_plainly(eps, x, norm, norm_bias):
    return F.layer_norm(x.permute(0, 2, 3, 1), norm.shape, norm, norm_bias, eps).permute(0, 3, 1, 2)


def _output(name, eps, x, **tensors) -> Call:
    n, channels, height, width = x.shape
    integers = (n, height * width, channels, torch.get_num_threads())
    tensors |= {name: _contiguous(tensors[name]) for name in ('norm', 'norm_bias')} | dict(x=x)
    return Call(name, _Output(*integers, eps, **_pointers(tensors)), tuple(tensors.values()))


def _fit(parameters: Sequence[torch.Tensor | None], shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether they are what the kernels take them for, once they are contiguous."""
    return all(
        type(p) in (nn.Parameter, torch.Tensor)
        and (p.dtype, p.device.type, p.layout) == (torch.float32, 'cpu', torch.strided)
        and tuple(p.shape) == shape
        for p, shape in zip(parameters, shapes, strict=True)
    )


def _contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor as the kernels read memory: row after row, no sign kept aside. A parameter or a gradient may be any
    view: sliced, expanded, transposed."""
    return None if t is None else t.resolve_neg().contiguous()


def _pointers(tensors: dict[str, torch.Tensor | None]) -> dict[str, int]:
    return {name: t.data_ptr() for name, t in tensors.items() if t is not None}


def _block(name, settings, x, parameters, **tensors) -> Call:
    integers = (*x.shape, torch.get_num_threads(), settings.dtype == torch.bfloat16)
    tensors |= dict(zip(Parameters._fields, map(_contiguous, parameters)), x=x)
    return Call(name, _Block(*integers, settings.eps, settings.factor, **_pointers(tensors)), tuple(tensors.values()))


@cache
def dtypes() -> tuple[torch.dtype, ...]:
    """Those that this machine has this form for."""
    if why_not():
        return ()
    # Where the processor multiplies tiles of bfloat16, oneDNN does, and is faster.
    bfloat16 = 'avx512_bf16' in _flags() and 'amx_bf16' not in _flags()
    return (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)


def why_not() -> str:
    """What keeps this machine from this form; empty where nothing does."""
    flags = _flags()
    if not flags:
        return 'they are for Linux on x86-64, where /proc/cpuinfo says what the processor has'
    missing = NEEDED - flags
    if missing:
        return f'this processor has no {", ".join(sorted(missing))}'
    return '' if _library() else 'they were not compiled when convnext_dense was installed, or do not load'


def _flags() -> set[str]:
    """What the processor can do, as Linux says."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith('flags')), '').split())


@cache
def _library() -> ctypes.CDLL | None:
    """None where the kernels were not compiled, do not load, or come from another source than the one that is here."""
    file = next(
        (f for suffix in EXTENSION_SUFFIXES if (f := SOURCE.with_name('avx512_kernels' + suffix)).exists()), None
    )
    if file is None:
        _warn('the kernels were not compiled when convnext_dense was installed')
        return None
    try:
        library = ctypes.CDLL(str(file))
        library.convnext_source.restype = ctypes.c_char_p
        if library.convnext_source().decode() != source_hash():
            raise OSError('it was compiled from another avx512_kernels.c than the one beside it')
        for name in WITH_WORK:
            getattr(library, f'convnext_{name}_work').restype = ctypes.c_int64
        library.convnext_run.argtypes = (ctypes.c_void_p, ctypes.c_int64)
        library.convnext_prepare()
    except (OSError, AttributeError) as error:
        _warn(f'{file.name} is left unused: {error}')
        return None
    return library


def _warn(what: str) -> None:
    warnings.warn(f'{what}; the backbone is slower on this CPU. Install it again, with gcc as compiler', stacklevel=2)


def source_hash() -> str:
    """What setup.py compiles into the kernels."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
