"""The form that is compiled: kernels.c, for float32 parameters and processors with AVX-512.

A thread takes some hundred pixels at a time from the depthwise convolution to the output, so that nothing in between
leaves its cache. Kept for the backward pass: the input; the depthwise convolution's output, unless `with_cp` is True;
in wide blocks the hidden layer before GELU, unless `with_cp` is set.
"""

import ctypes
import hashlib
import warnings
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from .blocks import Parameters, Settings

SOURCE = Path(__file__).with_name('kernels.c')
LANES = 32  # channels come in multiples of it
SIDE = 7  # of the depthwise kernel
WIDE = 384  # channels from which on the hidden layer is sooner kept for the backward pass than computed again
INTEGERS = ('images', 'height', 'width', 'channels', 'threads', 'bf16')
MAPS = ('x', 'y', 'hidden', 'out', 'grad', 'grad_x', 'grad_y', 'grad_linear1', 'grad_linear2', 'sums', 'work')


class _Arguments(ctypes.Structure):
    """Block of kernels.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in INTEGERS),
        *((name, ctypes.c_float) for name in ('eps', 'factor')),
        *((name, ctypes.c_void_p) for name in (*Parameters._fields, *MAPS)),
    ]


def takes(x: torch.Tensor, p: Parameters, dtype: torch.dtype) -> bool:
    """Whether a block with these parameters and products in `dtype` has this form here; its output is float32."""
    channels, _, *sides = p.depthwise.shape
    if channels % LANES or sides != [SIDE, SIDE] or dtype not in dtypes():
        return False
    if p.gamma is None and x.dtype != torch.float32:  # then the plain form's output is not float32
        return False
    return all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in p)


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
    _call('forward', settings, z, parameters, y=kept[0], hidden=kept[1], out=out)
    return out, kept


def backward(settings, z, kept, parameters, grad, needed):
    """Gradients of x (none: z's is all of it), of z and of the parameters, None where not `needed`."""
    _, of_z, *of_parameters = needed
    p, channels = parameters, z.shape[-1]
    found = dict(y=kept[0], hidden=kept[1], grad=grad, grad_y=torch.empty_like(z))
    found['grad_x'] = torch.empty_like(z) if of_z else None
    if any(of_parameters):
        taps = SIDE * SIDE
        found |= dict(grad_linear1=torch.empty_like(p.linear1), grad_linear2=torch.empty_like(p.linear2))
        found['sums'] = z.new_empty((4 + 4 + taps) * channels)
    _call('backward', settings, z, parameters, **found)
    if not any(of_parameters):
        return None, found['grad_x'], *[None] * len(parameters)
    sizes = [4 * channels, *[channels] * 4, taps * channels]
    bias1, bias2, norm, norm_bias, depthwise_bias, of_taps = found['sums'].split(sizes)
    depthwise = of_taps.view(taps, channels).t().reshape(p.depthwise.shape)
    linear2, bias2, gamma = p.branch_gradients(settings.factor, found['grad_linear2'], bias2)
    all_found = (depthwise, depthwise_bias, norm, norm_bias, found['grad_linear1'], bias1, linear2, bias2, gamma)
    return None, found['grad_x'], *(t if n else None for t, n in zip(all_found, of_parameters))


def _call(name, settings, x, parameters, **tensors):
    images, height, width, channels = x.shape
    if not images:  # stochastic depth left none
        return
    integers = (images, height, width, channels, torch.get_num_threads(), settings.dtype == torch.bfloat16)
    tensors |= {**parameters._asdict(), 'x': x}
    pointers = {key: t.data_ptr() for key, t in tensors.items() if t is not None}
    arguments = _Arguments(*integers, eps=settings.eps, factor=settings.factor, **pointers)
    size = _library().convnext_work(ctypes.byref(arguments), name == 'backward')
    work = torch.empty(size, dtype=torch.uint8)
    arguments.work = work.data_ptr()
    getattr(_library(), f'convnext_{name}')(ctypes.byref(arguments))


@cache
def dtypes() -> tuple[torch.dtype, ...]:
    """Those that this machine has this form for."""
    flags = _flags()
    if not {'avx512f', 'avx512bw', 'avx512dq', 'avx512vl'} <= flags or _library() is None:
        return ()
    # Where the processor multiplies tiles of bfloat16, oneDNN does, and is faster.
    bfloat16 = 'avx512_bf16' in flags and 'amx_bf16' not in flags
    return (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)


def _flags() -> set[str]:
    """What the processor can do, as Linux says."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith('flags')), '').split())


@cache
def _library() -> ctypes.CDLL | None:
    """None where the kernels were not compiled, or from another source than the one that is here."""
    file = next((f for suffix in EXTENSION_SUFFIXES if (f := SOURCE.with_name('kernels' + suffix)).exists()), None)
    if file is None:
        return None
    library = ctypes.CDLL(str(file))
    library.convnext_source.restype = ctypes.c_char_p
    if library.convnext_source().decode() != source_hash():
        warnings.warn(
            f'{file.name} was compiled from another kernels.c than the one beside it, and is left unused, which is '
            'slower: install convnext_dense again',
            stacklevel=2,
        )
        return None
    library.convnext_work.restype = ctypes.c_int64
    return library


def source_hash() -> str:
    """What setup.py compiles into the kernels."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
