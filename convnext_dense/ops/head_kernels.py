"""Compiled kernels of necks and heads (head_kernels.c): RoIAlign and NMS on x86 CPUs with AVX-512 or AVX2.

Everything that enters a kernel is checked twice: by the operators, which know the tensors, and by the kernels
themselves, which return an error code for sizes and pointers that they cannot work with.
"""

import ctypes
import hashlib
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from .avx512 import _cpu_flags

SOURCE = Path(__file__).with_name('head_kernels.c')
CHANNEL_MULTIPLE = 16
STRUCT_VERSION = 1
# Compiled forms of the source, the fastest first, and the features that a processor needs for each.
VARIANTS = {
    'head_kernels_avx512': {'avx512f', 'avx512bw', 'avx512dq', 'avx512vl', 'fma'},
    'head_kernels_avx2': {'avx2', 'fma'},
}


class Level(ctypes.Structure):
    """A feature map, (N, H, W, C), and the scale of boxes' coordinates to its pixels."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ('height', 'width')),
        ('scale', ctypes.c_double),
        ('data', ctypes.c_void_p),
    ]


class RoIAlignArgs(ctypes.Structure):
    """Arguments of RoIAlign, which head_kernels.c describes."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ('version', 'threads', 'images', 'channels', 'n_levels', 'n_boxes', 'out_height', 'out_width')
        ),
        *((name, ctypes.c_int64) for name in ('sampling_ratio', 'aligned', 'bf16', 'channels_last')),
        *((name, ctypes.c_void_p) for name in ('levels', 'boxes', 'box_levels', 'features')),
    ]


STRUCTS = (Level, RoIAlignArgs)


def available() -> bool:
    """Whether the kernels run on this machine."""
    return _library() is not None


def variant() -> str:
    """The compiled form that runs here; empty without one."""
    return next((name for name in VARIANTS if name in str(getattr(_library(), '_name', ''))), '')


def roi_align(backward: bool, levels: list[Level], **fields: int | float | torch.Tensor) -> None:
    """Run RoIAlign or its gradient; tensors become pointers.

    Raises:
        RuntimeError: The kernel refuses its arguments.
    """
    array = (Level * len(levels))(*levels)
    values = {k: v.data_ptr() if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
    args = RoIAlignArgs(
        version=STRUCT_VERSION,
        threads=torch.get_num_threads(),
        n_levels=len(levels),
        levels=ctypes.cast(array, ctypes.c_void_p),
        **values,
    )
    library = _library()
    kernel = library.convnext_roi_align_backward if backward else library.convnext_roi_align
    _raise_error(kernel(ctypes.byref(args)))


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
        ('convnext_roi_align', (pointer,), integer),
        ('convnext_roi_align_backward', (pointer,), integer),
        ('convnext_nms', (integer, pointer, real, real, pointer), integer),
    ):
        getattr(library, name).argtypes, getattr(library, name).restype = argtypes, restype
    for i, struct in enumerate(STRUCTS):
        if library.convnext_head_struct_size(i) != ctypes.sizeof(struct):
            raise OSError(f'its struct {struct.__name__} is not laid out as Python expects')
    return library
