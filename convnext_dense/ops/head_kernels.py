"""Compiled kernels of necks and heads (head_kernels.c) for x86 CPUs with AVX-512 or AVX2.

Everything that enters a kernel is checked twice: by the operators, which know the tensors, and by the kernels
themselves, which return an error code for sizes and pointers that they cannot work with.
"""

import ctypes
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from .avx512 import _cpu_flags

SOURCE = Path(__file__).with_name('head_kernels.c')
CHANNEL_MULTIPLE = 16
STRUCT_VERSION = 1
# Compiled variants of the source, the fastest first, and the features that a processor needs for each.
VARIANTS = {
    'head_kernels_avx512': {'avx512f', 'avx512bw', 'avx512dq', 'avx512vl', 'fma'},
    'head_kernels_avx2': {'avx2', 'fma'},
}


def _struct(name: str, doc: str, **fields: str) -> type[ctypes.Structure]:
    """A struct of head_kernels.c, which describes it; fields by ctypes' name of their type."""
    members = [(field, getattr(ctypes, kind)) for kind, names in fields.items() for field in names.split()]
    return type(name, (ctypes.Structure,), dict(_fields_=members, __doc__=doc))


Level = _struct('Level', 'A feature map of a pyramid.', c_int64='height width', c_double='scale', c_void_p='data')
RoIAlignArgs = _struct(
    'RoIAlignArgs',
    'Arguments of RoIAlign.',
    c_int64='version threads images channels n_levels n_rois out_height out_width sampling_ratio aligned bf16 '
    'channels_last',
    c_void_p='levels rois roi_levels features',
)
TapSumArgs = _struct(
    'TapSumArgs',
    'Arguments of the sum of upsampled products.',
    c_int64='version threads images channels height width n_levels align_corners bf16 relu',
    c_void_p='levels base sum',
)
STRUCTS = (Level, RoIAlignArgs, TapSumArgs)
# The struct that a kernel takes beside the levels.
KERNELS = {
    'roi_align': RoIAlignArgs,
    'roi_align_backward': RoIAlignArgs,
    'tap_sum': TapSumArgs,
    'tap_sum_backward': TapSumArgs,
}


def available() -> bool:
    """Whether the kernels run on this machine."""
    return _library() is not None


def is_plain(x: torch.Tensor) -> bool:
    """Whether a tensor is one of the CPU with memory that kernels can read, and nothing traces what happens to it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) not in (torch.Tensor, torch.nn.Parameter):
        return False
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return False
    return (x.device.type, x.layout) == ('cpu', torch.strided) and not x.is_neg()


def variant() -> str:
    """The compiled variant that runs here; empty without one."""
    return next((name for name in VARIANTS if name in str(getattr(_library(), '_name', ''))), '')


def launch(kernel: str, maps: Sequence[torch.Tensor], scales: Sequence[float] = (), **fields) -> None:
    """Run a kernel.

    Args:
        kernel: A key of `KERNELS`.
        maps: The feature maps of a pyramid, (N, C, H, W), channels_last.
        scales: Of each feature map, for those kernels that read it.
        fields: Numbers and tensors of the kernel's struct.

    Raises:
        RuntimeError: The kernel refuses its arguments.
    """
    levels = (Level * len(maps))(
        *(
            Level(height=x.shape[2], width=x.shape[3], scale=scale, data=x.data_ptr())
            for x, scale in zip(maps, scales or [1.0] * len(maps))
        )
    )
    values = {k: v.data_ptr() if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
    values |= dict(version=STRUCT_VERSION, threads=torch.get_num_threads(), n_levels=len(maps), images=len(maps[0]))
    args = KERNELS[kernel](levels=ctypes.cast(levels, ctypes.c_void_p), **values)
    _raise_error(getattr(_library(), f'convnext_{kernel}')(ctypes.byref(args)))


def nms(coords: torch.Tensor, threshold: float, offset: float) -> torch.Tensor:
    """Greedy NMS of boxes in the order of their scores.

    Args:
        coords: x1, y1, x2, y2 of each box, (4, n), float32, contiguous.
        threshold: Overlap (IoU) above which the box with the lower score goes.
        offset: What the width and height of a box have beyond x2 - x1 and y2 - y1.

    Returns:
        Whether each box stays, (n,).
    """
    keep = torch.empty(coords.shape[1], dtype=torch.int32, device='cpu')
    _raise_error(_library().convnext_nms(len(keep), coords.data_ptr(), threshold, offset, keep.data_ptr()))
    return keep.bool()


def _raise_error(code: int) -> None:
    if code:
        raise RuntimeError(f'head_kernels.c: {_library().convnext_head_error_message(code).decode()}')


@cache
def _library() -> ctypes.CDLL | None:
    """The kernels; None where there are none for this processor, or they are of another source than the one here."""
    flags = _cpu_flags()
    for name, required in VARIANTS.items():
        files = [SOURCE.with_name(name + suffix) for suffix in EXTENSION_SUFFIXES]
        file = next((path for path in files if path.exists()), None)
        if file and required <= flags:
            try:
                return _load(file)
            except (OSError, AttributeError):
                continue  # the backbone's kernels, installed with these, warn
    return None


def _load(file: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(file))
    library.convnext_head_source.restype = ctypes.c_char_p
    if library.convnext_head_source().decode() != hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]:
        raise OSError('it was compiled from another head_kernels.c than the one beside it')
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    for name, argtypes, restype in (
        ('convnext_head_error_message', (integer,), ctypes.c_char_p),
        ('convnext_head_struct_size', (integer,), integer),
        *((f'convnext_{kernel}', (pointer,), integer) for kernel in KERNELS),
        ('convnext_nms', (integer, pointer, real, real, pointer), integer),
    ):
        getattr(library, name).argtypes, getattr(library, name).restype = argtypes, restype
    for i, struct in enumerate(STRUCTS):
        if library.convnext_head_struct_size(i) != ctypes.sizeof(struct):
            raise OSError(f'its struct {struct.__name__} is not laid out as Python expects')
    return library
