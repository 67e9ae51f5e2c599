"""Calls of every entry point of the C files as C sees them: structs, and memory of exactly the size that they need."""

import ctypes
import random
import re
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import torch

from convnext_dense.ops import avx512, head_kernels
from convnext_dense.ops.avx512 import DW_KERNEL
from convnext_dense.ops.block_params import HIDDEN_RATIO

TAPS = DW_KERNEL**2
# Compiled modules, and the module of the package that loads each.
MODULES = {'avx512_kernels': avx512, **dict.fromkeys(head_kernels.VARIANTS, head_kernels)}
# Fields that may be 0, those that are 0 or 1, and, by entry point, further zeros and pointers that may be null.
ZERO = {'n_rois', 'sampling_ratio', 'aligned', 'bf16', 'align_corners', 'relu', *(f'stride_{axis}' for axis in 'nchw')}
FLAGS = {'aligned', 'bf16', 'channels_last', 'align_corners', 'relu'}
OPTIONAL = {
    'convnext_block': {'y', 'hidden'},
    'convnext_block_backward': {'y', 'hidden', 'grad_x'},
    'convnext_patch_embed_backward': {'grad_x'},
    'convnext_roi_align': {'channels_last'},
    'convnext_conv3x3': {'bias'},
}


class Call(NamedTuple):
    """A call of an entry point that takes a struct.

    Attributes:
        entry: Name of the function.
        args: Its struct.
        outputs: Tensors that it has to fill, NaN until then.
        memory: What else the struct points to.
    """

    entry: str
    args: ctypes.Structure
    outputs: list[torch.Tensor]
    memory: list


def exported_functions(module) -> set[str]:
    """Names of the functions that a C file exports."""
    pattern = r'^(?!static|INLINE)[a-z][\w ]*[ *](convnext_\w+)\('
    return set(re.findall(pattern, module.SOURCE.read_text(), re.MULTILINE))


def is_available(name: str) -> bool:
    """Whether a compiled module runs on this machine."""
    if name == 'avx512_kernels':
        return bool(avx512.dtypes())
    return _path_of(name).exists() and head_kernels.VARIANTS[name] <= avx512._cpu_flags()


def _path_of(name: str) -> Path:
    return MODULES[name].SOURCE.with_name(name + EXTENSION_SUFFIXES[0])


def load(name: str) -> ctypes.CDLL:
    """A compiled module, all of whose functions return an int64 unless they return text."""
    library = ctypes.CDLL(str(_path_of(name)))
    for function in exported_functions(MODULES[name]):
        getattr(library, function).restype = ctypes.c_int64
    for function in ('error_message', 'describe_struct', 'source', 'head_error_message', 'head_source'):
        if hasattr(library, f'convnext_{function}'):
            getattr(library, f'convnext_{function}').restype = ctypes.c_char_p
    if hasattr(library, 'convnext_init_tables'):
        library.convnext_init_tables()
    return library


def run(library: ctypes.CDLL, call: Call) -> int:
    return getattr(library, call.entry)(ctypes.byref(call.args))


def invalid_changes(call: Call) -> Iterator[tuple[str, int | None, str]]:
    """Fields of a call's struct, values that the entry point has to refuse, and a word of its message."""
    accepted = OPTIONAL.get(call.entry, set()) | ZERO
    if not getattr(call.args, 'grad_gamma', True):
        accepted = accepted | {'gamma'}
    for name, kind in call.args._fields_:
        value = getattr(call.args, name)
        if kind is ctypes.c_void_p and value:
            yield name, value + 1, 'misaligned'
            if name not in accepted:
                yield name, None, 'null'
        elif kind is ctypes.c_int64 and (name != 'workspace_bytes' or value):
            word = name if name in ('version', 'threads') else ''
            too_large = () if name == 'workspace_bytes' else (2,) if name in FLAGS else (1 << 50, 2**63 - 1)
            zero = () if name in accepted else (0,)
            yield from ((name, v, word) for v in (-1, -(2**63), *zero, *too_large))


# ---- avx512_kernels.c ------------------------------------------------------------------------------------------------


def _fill(struct, memory_sizes, outputs, is_bf16=False, **numbers) -> tuple[ctypes.Structure, list, list]:
    """A struct and its memory: `memory_sizes` values per pointer; y and hidden may be bfloat16."""
    tensors = {}
    for name, size in memory_sizes.items():
        dtype = torch.bfloat16 if is_bf16 and name in ('y', 'hidden') else torch.float32
        values = torch.full((size,), float('nan')) if name in outputs else torch.randn(size) / 2
        tensors[name] = values.to(dtype)
    args = struct(**numbers, **{name: t.data_ptr() for name, t in tensors.items()})
    return args, [tensors[name] for name in outputs], [*tensors.values()]


def _with_workspace(library: ctypes.CDLL, entry: str, args, outputs, memory) -> Call:
    if hasattr(library, f'{entry}_workspace'):
        size = getattr(library, f'{entry}_workspace')(ctypes.byref(args))
        assert size > 0, (entry, size)
        memory.append(torch.empty(size, dtype=torch.uint8))
        args.workspace, args.workspace_bytes = memory[-1].data_ptr(), size
    return Call(entry, args, outputs, memory)


def block(
    library, backward=False, shape=(2, 3, 5, 32), threads=2, bf16=False, use_grn=True, save=True, needs_params=True
) -> Call:
    """A block with a layer scale; `save`: with y and hidden, as in training of wide blocks."""
    (images, height, width, c), hidden = shape, HIDDEN_RATIO * shape[-1]
    rows = images * height * width
    sizes = dict(dwconv_weight=TAPS * c, dwconv_bias=c, norm_weight=c, norm_bias=c, pwconv1_weight=hidden * c)
    sizes |= dict(pwconv1_bias=hidden, pwconv2_weight=hidden * c, pwconv2_bias=c, gamma=c, x=rows * c)
    sizes |= dict(grn_gamma=hidden, grn_beta=hidden) if use_grn else {}
    outputs = dict(y=rows * c, hidden=rows * hidden) if save else {}
    if backward:
        sizes |= outputs | dict(grad=rows * c)
        outputs = dict(grad_x=rows * c, grad_y=rows * c)
        if needs_params:
            outputs |= dict(grad_pwconv1_weight=hidden * c, grad_pwconv2_weight=hidden * c, grad_gamma=c)
            outputs |= dict(grad_grn_gamma=hidden, grad_grn_beta=hidden) if use_grn else {}
            outputs |= dict(sums=2 * hidden + TAPS * c)
    else:
        outputs |= dict(out=rows * c)
    numbers = dict(images=images, height=height, width=width, channels=c, bf16=bf16, threads=threads)
    numbers |= dict(version=avx512.STRUCT_VERSION, eps=1e-6, grn_eps=1e-6, keep_prob_scale=1.25)
    struct = avx512._library().structs['BlockArgs']
    entry = 'convnext_block_backward' if backward else 'convnext_block'
    return _with_workspace(library, entry, *_fill(struct, sizes | outputs, outputs, bf16, **numbers))


def patch_embed(
    library, backward=False, shape=(2, 8, 13, 3), out_channels=64, patch_size=4, threads=2, bf16=False
) -> Call:
    """A stem (patch_size 4) of a contiguous image or a downsampling (2) of a map in channels_last."""
    images, height, width, c = shape
    out_rows = images * (height // patch_size) * (width // patch_size)
    patch_numel = -(-c * patch_size**2 // 32) * 32
    norm = out_channels if patch_size == 4 else c
    sizes = dict(x=images * height * width * c, weight=out_channels * patch_numel, bias=out_channels)
    sizes |= dict(norm_weight=norm, norm_bias=norm)
    outputs = dict(out=out_rows * out_channels)
    if backward:
        sizes |= dict(grad=out_rows * out_channels)
        outputs = dict(grad_weight=out_channels * patch_numel, sums=out_channels + 2 * norm)
        outputs |= dict(grad_x=sizes['x']) if patch_size == 2 else {}
    strides = (c * height * width, height * width, width, 1)
    if patch_size == 2:
        strides = (c * height * width, 1, width * c, c)
    numbers = dict(zip(('stride_n', 'stride_c', 'stride_h', 'stride_w'), strides), threads=threads, images=images)
    numbers |= dict(height=height // patch_size, width=width // patch_size, channels=c, out_channels=out_channels)
    numbers |= dict(version=avx512.STRUCT_VERSION, patch_size=patch_size, bf16=bf16, eps=1e-6)
    struct = avx512._library().structs['PatchEmbedArgs']
    entry = 'convnext_patch_embed_backward' if backward else 'convnext_patch_embed'
    args, filled, memory = _fill(struct, sizes | outputs, outputs, **numbers)
    if backward and patch_size == 2:  # pixels that no patch covers are the caller's
        filled[-1].view(images, height, width, c)[:, height // 2 * 2 :] = 0
        filled[-1].view(images, height, width, c)[:, :, width // 2 * 2 :] = 0
    return _with_workspace(library, entry, args, filled, memory)


def norm_nchw(library, backward=False, images=2, area=35, channels=64, threads=2) -> Call:
    n = images * area * channels
    sizes = dict(x=n, norm_weight=channels, norm_bias=channels)
    outputs = dict(grad_x=n, sums=2 * channels) if backward else dict(out=n)
    sizes |= dict(grad=n) if backward else {}
    numbers = dict(version=avx512.STRUCT_VERSION, threads=threads, images=images, area=area, channels=channels)
    struct = avx512._library().structs['NormArgs']
    entry = 'convnext_norm_nchw_backward' if backward else 'convnext_norm_nchw'
    return _with_workspace(library, entry, *_fill(struct, sizes | outputs, outputs, eps=1e-6, **numbers))


def conv3x3(library, backward=False, shape=(2, 5, 7, 32), out_channels=64, has_bias=True, relu=0, threads=2) -> Call:
    """Its own backward pass: the gradient of the input is a convolution."""
    images, height, width, c = shape
    pixels = images * height * width
    sizes = dict(x=pixels * c, weight=out_channels * 9 * c) | (dict(bias=out_channels) if has_bias else {})
    numbers = dict(images=images, height=height, width=width, channels=c, out_channels=out_channels)
    numbers |= dict(version=avx512.STRUCT_VERSION, relu=relu, threads=threads)
    outputs = dict(out=pixels * out_channels)
    struct = avx512._library().structs['Conv3x3Args']
    return _with_workspace(library, 'convnext_conv3x3', *_fill(struct, sizes | outputs, outputs, **numbers))


# ---- head_kernels.c --------------------------------------------------------------------------------------------------


def _levels(sides, maps):
    levels = [
        head_kernels.Level(height=h, width=w, scale=2.0**-i, data=m.data_ptr())
        for i, ((h, w), m) in enumerate(zip(sides, maps))
    ]
    return (head_kernels.Level * len(levels))(*levels)


def roi_align(
    library,
    backward=False,
    images=2,
    channels=48,
    sides=((13, 7), (6, 3)),
    n_rois=5,
    out_size=(7, 3),
    sampling_ratio=0,
    aligned=1,
    bf16=False,
    channels_last=True,
    threads=2,
    extent=14.0,
) -> Call:
    """RoIs of which some lie partly or wholly outside of the maps."""
    if backward:  # which is for float32 in channels_last alone
        bf16, channels_last = False, True
    nan, dtype = float('nan'), torch.bfloat16 if bf16 else torch.float32
    maps = [torch.randn(images * channels * h * w).to(dtype) for h, w in sides]
    features = torch.randn(n_rois * channels * out_size[0] * out_size[1])
    outputs = maps if backward else [features]
    for t in outputs:
        t.fill_(nan)
    corners = torch.randn(n_rois, 2) * extent
    rois = torch.cat([torch.randint(images, (n_rois, 1)), corners, corners + torch.rand(n_rois, 2) * extent], 1)
    rois, roi_levels = rois.contiguous(), torch.randint(len(sides), (n_rois,))
    levels = _levels(sides, maps)
    numbers = dict(images=images, channels=channels, n_levels=len(sides), n_rois=n_rois, sampling_ratio=sampling_ratio)
    numbers |= dict(out_height=out_size[0], out_width=out_size[1], aligned=aligned, bf16=bf16, threads=threads)
    args = head_kernels.RoIAlignArgs(
        version=head_kernels.STRUCT_VERSION,
        channels_last=channels_last,
        levels=ctypes.addressof(levels),
        **{k: v.data_ptr() if v.numel() else None for k, v in (('rois', rois), ('roi_levels', roi_levels))},
        features=features.data_ptr() if n_rois else None,
        **numbers,
    )
    entry = 'convnext_roi_align_backward' if backward else 'convnext_roi_align'
    return Call(entry, args, outputs, [levels, maps, features, rois, roi_levels])


def tap_sum(
    library,
    backward=False,
    images=2,
    channels=80,
    size=(9, 5),
    sides=((4, 3), (1, 1)),
    align_corners=0,
    bf16=False,
    relu=0,
    threads=2,
) -> Call:
    nan, dtype = float('nan'), torch.bfloat16 if bf16 else torch.float32
    maps = [torch.randn(images * 9 * channels * h * w).to(dtype) for h, w in sides]
    base, total = (torch.randn(images * channels * size[0] * size[1]).to(dtype) for _ in range(2))
    outputs = maps if backward else [total]
    for t in outputs:
        t.fill_(nan)
    levels = _levels(sides, maps)
    args = head_kernels.TapSumArgs(
        version=head_kernels.STRUCT_VERSION,
        threads=threads,
        images=images,
        channels=channels,
        height=size[0],
        width=size[1],
        n_levels=len(sides),
        align_corners=align_corners,
        bf16=bf16,
        relu=relu and not backward,
        levels=ctypes.addressof(levels),
        base=None if backward else base.data_ptr(),
        sum=total.data_ptr(),
    )
    entry = 'convnext_tap_sum_backward' if backward else 'convnext_tap_sum'
    return Call(entry, args, outputs, [levels, maps, base, total])


# By module, the functions above, and sizes at the edges: one pixel, one row, one column, more rows than a tile has.
CALLS = {avx512: (block, patch_embed, norm_nchw, conv3x3), head_kernels: (roi_align, tap_sum)}
EDGES = {
    block: [
        dict(shape=(1, 1, 1, 32), threads=1, save=False),
        dict(shape=(1, 1, 9, 64), use_grn=False),
        dict(shape=(2, 11, 1, 32), threads=5, bf16=True),
        dict(shape=(3, 7, 17, 96), threads=3, save=False),
        dict(shape=(1, 3, 130, 32), threads=1, bf16=True, save=False, use_grn=False),
        dict(shape=(2, 3, 3, 416), threads=4, use_grn=False, save=False),
        dict(shape=(1, 5, 6, 64), needs_params=False),
    ],
    patch_embed: [
        dict(shape=(1, 4, 4, 1), out_channels=32, threads=1),
        dict(shape=(2, 7, 31, 3), threads=4, bf16=True),
        dict(shape=(1, 4, 260, 5), threads=1),
        dict(shape=(1, 2, 2, 32), patch_size=2, threads=3),
        dict(shape=(2, 5, 3, 96), patch_size=2, bf16=True),
        dict(shape=(1, 3, 131, 64), patch_size=2, out_channels=96, threads=1),
    ],
    norm_nchw: [
        dict(images=1, area=1, channels=32, threads=1),
        dict(images=3, area=17, channels=96, threads=5),
        dict(area=16),
    ],
    conv3x3: [
        dict(shape=(1, 1, 1, 32), out_channels=32, threads=1, has_bias=False),
        dict(shape=(3, 1, 9, 64), out_channels=96, threads=5, relu=1),
        dict(shape=(1, 9, 1, 64), out_channels=32, relu=1),
        dict(shape=(1, 17, 33, 96), threads=3),
        dict(shape=(1, 2, 345, 32), threads=3, has_bias=False),
    ],
    roi_align: [
        dict(images=1, channels=16, sides=((1, 1),), n_rois=1, out_size=(1, 1), threads=1),
        dict(n_rois=0),
        dict(channels=272, sides=((1, 19), (19, 1)), n_rois=9, threads=4, channels_last=False),
        dict(sides=((3, 2),) * 3, sampling_ratio=3, aligned=0, bf16=True, extent=400.0),
        dict(channels=16, out_size=(2, 31), n_rois=3, extent=0.0),
    ],
    tap_sum: [
        dict(images=1, channels=16, size=(1, 1), sides=((1, 1),), threads=1),
        dict(channels=64, size=(1, 17), sides=((1, 8), (1, 1)), threads=5, relu=1),
        dict(channels=144, size=(19, 1), sides=((9, 1), (30, 2)), bf16=True, align_corners=1),
        dict(size=(3, 3), sides=((3, 3),) * 3, align_corners=1),
    ],
}


def edge_calls(library: ctypes.CDLL, module) -> Iterator[Call]:
    """Forward and backward calls of all kernels of a module at the edges."""
    for make in CALLS[module]:
        for settings in EDGES[make]:
            if _supports(module, settings):
                yield from (make(library, backward, **settings) for backward in (False, True))


def random_call(library: ctypes.CDLL, module, r: random.Random) -> Call:
    """A call at random sizes."""
    make, side = r.choice(CALLS[module]), lambda: r.choice([1, r.randint(1, 9), r.randint(1, 40)])
    settings = dict(threads=r.randint(1, 6), **RANDOM[make](r, side))
    if not _supports(module, settings):
        settings['bf16'] = False
    return make(library, r.random() < 0.5, **settings)


RANDOM = {
    block: lambda r, side: dict(
        shape=(r.randint(1, 3), side(), side(), 32 * r.choice([1, 2, 3, 7, 13])),
        bf16=r.random() < 0.5,
        use_grn=r.random() < 0.5,
        save=r.random() < 0.5,
        needs_params=r.random() < 0.7,
    ),
    patch_embed: lambda r, side: (
        dict(shape=(r.randint(1, 3), 3 + side(), 3 + side(), r.randint(1, 20)), bf16=r.random() < 0.5)
        if r.random() < 0.5
        else dict(
            shape=(r.randint(1, 3), 1 + side(), 1 + side(), 32 * r.randint(1, 5)),
            out_channels=32 * r.randint(1, 5),
            patch_size=2,
            bf16=r.random() < 0.5,
        )
    ),
    norm_nchw: lambda r, side: dict(images=r.randint(1, 3), area=side() * side(), channels=32 * r.randint(1, 9)),
    conv3x3: lambda r, side: dict(
        shape=(r.randint(1, 3), side(), r.choice([side(), r.randint(150, 400)]), 32 * r.randint(1, 4)),
        out_channels=32 * r.randint(1, 4),
        has_bias=r.random() < 0.7,
        relu=r.randint(0, 1),
    ),
    roi_align: lambda r, side: dict(
        images=r.randint(1, 3),
        channels=16 * r.randint(1, 20),
        sides=[(side(), side()) for _ in range(r.randint(1, 4))],
        n_rois=r.choice([0, 1, 7]),
        out_size=(r.randint(1, 15), r.randint(1, 15)),
        sampling_ratio=r.choice([0, 0, 1, 5]),
        aligned=r.randint(0, 1),
        bf16=r.random() < 0.5,
        channels_last=r.random() < 0.5,
        extent=r.choice([0.0, 3.0, 40.0, 3000.0]),
    ),
    tap_sum: lambda r, side: dict(
        images=r.randint(1, 3),
        channels=16 * r.randint(1, 12),
        size=(side(), side()),
        sides=[(r.randint(1, 12), r.randint(1, 12)) for _ in range(r.randint(1, 3))],
        align_corners=r.randint(0, 1),
        bf16=r.random() < 0.5,
        relu=r.randint(0, 1),
    ),
}


def _supports(module, settings: dict) -> bool:
    return module is head_kernels or not settings.get('bf16') or torch.bfloat16 in avx512.dtypes()
