"""This backbone against the other ConvNeXts that are installed and Swin: time, memory, and distance of features."""

import importlib
import importlib.util
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from convnext_dense.checkpoints import load_backbone
from convnext_dense.errors import UsageError
from convnext_dense.models.convnext import ARCHS, ConvNeXt
from convnext_dense.ops import dispatch

DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}
MEMORY_FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
SWIN_ARCHS = {  # arguments of mmdet's; the paper compares models of equal size
    'tiny': dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    'small': dict(embed_dims=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    'base': dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    'large': dict(embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
}
V2_SUFFIX = '-v2'  # of the name of an arch
PAPER_RATIOS = {'tiny': 1.47}  # the same of the classifiers at 224 x 224 on an A100 (table 12)


@dataclass(frozen=True)
class Case:
    """What is measured: 'inference' or 'training' (forward and backward), at height x width."""

    arch: str
    mode: str
    height: int
    width: int
    batch: int
    dtype: str
    device: str
    compiled: bool


@dataclass(frozen=True)
class Result:
    """Milliseconds (median, quartiles) or MB of one backbone in a case.

    `ratio` is its median over ours, `first` the milliseconds of the first two runs where they compile.
    """

    case: Case
    backbone: str
    memory_format: str
    median: float
    low: float
    high: float
    ratio: float | None = None
    first: float | None = None

    def as_dict(self) -> dict:
        return {**asdict(self.case), **{k: v for k, v in asdict(self).items() if k != 'case'}}


def _split_arch(arch: str) -> tuple[str, bool]:
    """'tiny-v2' -> 'tiny', True."""
    return arch.removesuffix(V2_SUFFIX), arch.endswith(V2_SUFFIX)


def _build_ours(arch: str, cls: type = ConvNeXt, **settings) -> ConvNeXt:
    name, use_grn = _split_arch(arch)
    return cls(name, use_grn=use_grn, **settings)


class _Reference(ConvNeXt):
    """The reference implementation: every block runs its own `forward`, without the fast operators."""

    def forward(self, x):
        with dispatch.disabled():
            return super().forward(x)


def _timm(arch: str, **settings) -> nn.Module:
    _torchvision()
    name, is_v2 = _split_arch(arch)
    name = f'convnext{"v2" if is_v2 else ""}_{name}'
    return importlib.import_module('timm').create_model(name, features_only=True, **settings)


def _torchvision_model(arch: str) -> nn.Module:
    trunk = getattr(_torchvision().models, f'convnext_{arch}')().features

    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = trunk

        def forward(self, x):
            maps = []
            for i, part in enumerate(self.features):
                x = part(x)
                if i % 2:
                    maps.append(x)
            return maps

    return Stages()


def _torchvision():
    """torchvision; one that was built for another torch comes without operators, which no ConvNeXt needs."""
    try:
        return importlib.import_module('torchvision')
    except RuntimeError as error:
        if 'torchvision::nms' not in str(error):
            raise
    library = torch.library.Library('torchvision', 'DEF')
    _torchvision.library = library  # its definitions live as long as it does
    for name in ('nms', 'qnms'):
        library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    return importlib.import_module('torchvision')


def _transformers(arch: str) -> nn.Module:
    name, is_v2 = _split_arch(arch)
    with _with_torchvision():
        library = importlib.import_module('transformers')
        backbone = library.ConvNextV2Backbone if is_v2 else library.ConvNextBackbone
    sizes = ARCHS[name]
    config = (library.ConvNextV2Config if is_v2 else library.ConvNextConfig)(
        depths=list(sizes['depths']),
        hidden_sizes=list(sizes['channels']),
        out_features=[f'stage{i}' for i in range(1, 5)],
    )
    return backbone(config)


def _mmpretrain(arch: str) -> nn.Module:
    with _with_torchvision():
        backbones = importlib.import_module('mmpretrain.models.backbones')
    name, is_v2 = _split_arch(arch)
    settings = dict(use_grn=True, layer_scale_init_value=0.0) if is_v2 else {}
    return backbones.ConvNeXt(name, out_indices=[0, 1, 2, 3], gap_before_final_norm=False, **settings)


def _swin(arch: str) -> nn.Module:
    if arch not in SWIN_ARCHS:
        raise UsageError(f'there is no Swin of the size of {arch}')
    with _with_torchvision():
        models = importlib.import_module('mmdet.models')
    return models.SwinTransformer(**SWIN_ARCHS[arch], drop_path_rate=0.0)


@contextmanager
def _with_torchvision():
    """For libraries that import torchvision where it is installed."""
    if importlib.util.find_spec('torchvision'):
        _torchvision()
    yield


# How to build each backbone for an arch. The three of `ours` differ in training only.
BACKBONES: dict[str, Callable[[str], nn.Module]] = {
    'ours': _build_ours,
    'ours-cp-mlp': lambda arch: _build_ours(arch, with_cp=True, cp_scope='mlp'),
    'ours-cp-block': lambda arch: _build_ours(arch, with_cp=True),
    'reference': lambda arch: _build_ours(arch, _Reference),  # the authors' code, but for its class
    'mmpretrain': _mmpretrain,
    'timm': _timm,
    'timm-conv-mlp': lambda arch: _timm(arch, conv_mlp=True),
    'torchvision': _torchvision_model,
    'transformers': _transformers,
    'swin-mmdet': _swin,
}
OURS = 'ours'


def build(name: str, arch: str) -> nn.Module:
    """Raises UsageError, which names the name, where it is not there or does not build."""
    try:
        torch.manual_seed(0)
        return BACKBONES[name](arch)
    except Exception as error:  # of other libraries, in any way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f'{name}: {reason}') from error


def available(names: list[str], arch: str) -> tuple[list[str], list[str]]:
    """Names of the backbones that can be built here, and a message for each that cannot."""
    buildable, missing = [], []
    for name in names:
        try:
            with torch.device('meta'):
                build(name, arch)
            buildable.append(name)
        except UsageError as error:
            try:
                build(name, arch)  # some cannot be built on the meta device
                buildable.append(name)
            except UsageError:
                missing.append(str(error))
    return buildable, missing


def feature_distance(name: str, arch: str, size: int = 64) -> float | None:
    """Largest relative distance of a map of ours from the name's with its weights; None where they are of another
    architecture. Maps of names without output norms are normalized.

    Raises:
        UsageError: the weights cannot be shared.
    """
    if name.startswith('swin') or name.startswith(OURS):
        return None
    baseline, ours = build(name, arch), _build_ours(arch).eval()
    baseline.eval()  # mmpretrain's returns None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'weights.pth')
        torch.save(baseline.state_dict(), file)
        load_backbone(ours, file)
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs = zip(_feature_maps(baseline(image)), ours(image))
        return max(_relative_distance(_normalize(t), _normalize(o)) for t, o in pairs)


def measure_time(case: Case, names: list[str], rounds: int) -> Iterator[Result]:
    """Each backbone in each memory format, one run after the other in each round; the first two rounds warm up."""
    keys = [
        (name, memory_format)
        for name in names
        for memory_format in (['contiguous'] if name.startswith((OURS, 'swin')) else MEMORY_FORMATS)
    ]
    # While the device is free:
    first = {key: run_in_subprocess(_time_first_runs, case, *key) if case.compiled else None for key in keys}
    runs = {key: _make_step(case, build(key[0], case.arch), key[1]) for key in keys}
    milliseconds = {key: [] for key in runs}
    for i in range(rounds + 2):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            if i >= 2:
                milliseconds[key].append(1000 * (time.perf_counter() - start))
    our_median = statistics.median(milliseconds.get((OURS, 'contiguous'), [float('nan')]))
    for (name, memory_format), values in milliseconds.items():
        yield _result(case, name, memory_format, values, our_median, first[name, memory_format])


def break_even_runs(compiled: dict, eager: dict) -> int | None:
    """From how many runs on a compiled backbone is faster in total; None where it never is. Results as dictionaries."""
    won = eager['median'] - compiled['median']
    lost = compiled['first'] - 2 * compiled['median']
    return None if won <= 0 else max(1, math.ceil(lost / won))


def measure_memory(case: Case, names: list[str]) -> Iterator[Result]:
    """Peak memory of a step in MB, beyond what the process held before it, which is mostly weights; each backbone in a
    process of its own. On a CPU it is resident memory (Linux)."""
    peaks = {name: run_in_subprocess(_peak_memory, case, name) for name in names}
    for name, value in peaks.items():
        yield _result(case, name, 'contiguous', [value], peaks.get(OURS, float('nan')))


def gemm_lower_bound(case: Case) -> float:
    """Milliseconds of the matmuls of a forward pass alone, at the rate that this device reaches on their shapes
    in their fastest implementation, a cache-sized tile at a time."""
    dtype, device = DTYPES[case.dtype], case.device
    sizes, total = ARCHS[_split_arch(case.arch)[0]], 0.0
    in_channels, area = 3 * 16, 16
    for i, (depth, channels) in enumerate(zip(sizes['depths'], sizes['channels'])):
        area = (4 * 2**i) ** 2
        rows = case.batch * case.height * case.width // area
        matmuls = [(in_channels, channels, 1), (channels, 4 * channels, depth), (4 * channels, channels, depth)]
        for inner, outer, times_run in matmuls:
            tile = min(rows, dispatch.onednn.TILE)
            total += times_run * rows / tile * _matmul_time(tile, inner, outer, dtype, device)
        in_channels = 4 * channels
    return 1000 * total


def _make_step(case: Case, model: nn.Module, memory_format: str) -> Callable[[], None]:
    """One run of a case."""
    model = model.to(case.device, memory_format=MEMORY_FORMATS[memory_format])
    model.train(case.mode == 'training')
    image = torch.randn(case.batch, 3, case.height, case.width, device=case.device)
    image = image.contiguous(memory_format=MEMORY_FORMATS[memory_format])
    called = model
    if case.compiled and isinstance(model, ConvNeXt):
        model.compile_blocks()  # as the tools' flag does
    elif case.compiled:
        called = torch.compile(model, dynamic=True)

    def run():
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(case.mode == 'training'), _autocast(case.device, case.dtype):
            maps = _feature_maps(called(image))
            loss = sum(m.float().mean() for m in maps) if case.mode == 'training' else None
        del maps
        if loss is not None:
            loss.backward()
        _synchronize(case.device)

    return run


def run_in_subprocess(function: Callable, *args):
    """Its result in a process of its own."""
    with get_context('spawn').Pool(1) as pool:
        return pool.apply(function, args, dict(threads=torch.get_num_threads()))


def _time_first_runs(case: Case, name: str, memory_format: str, threads: int) -> float:
    """Milliseconds of the first two runs, of which nothing was compiled before."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        os.environ['TORCHINDUCTOR_CACHE_DIR'] = folder
        run = _make_step(case, build(name, case.arch), memory_format)
        start = time.perf_counter()
        run(), run()
        return 1000 * (time.perf_counter() - start)


def _peak_memory(case: Case, name: str, threads: int) -> float:
    torch.set_num_threads(threads)
    with redirect_stdout(sys.stderr):  # libraries print as they are imported
        model = build(name, case.arch)
    small = Case(case.arch, case.mode, 64, 64, 1, case.dtype, case.device, case.compiled)
    _make_step(small, model, 'contiguous')()  # what libraries allocate once
    run = _make_step(case, model, 'contiguous')
    model.zero_grad(set_to_none=True)
    return peak_memory(run, case.device)


def peak_memory(run: Callable[[], None], device: str) -> float:
    """Peak memory of a run in MB, beyond what the process held before it; on a CPU resident memory (Linux)."""
    if device != 'cpu':
        torch.cuda.reset_peak_memory_stats()
        initial = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - initial) / 1e6
    Path('/proc/self/clear_refs').write_text('5')  # the peak starts anew
    initial = _resident('VmRSS')
    run()
    return _resident('VmHWM') - initial


def _resident(key: str) -> float:
    return (
        int(next(line for line in Path('/proc/self/status').read_text().splitlines() if key in line).split()[1]) / 1e3
    )


def _matmul_time(rows: int, inner: int, outer: int, dtype: torch.dtype, device: str) -> float:
    x, weight = (
        torch.randn(rows, inner, device=device, dtype=dtype),
        torch.randn(outer, inner, device=device, dtype=dtype),
    )
    image = x.view(1, rows, 1, inner).permute(0, 3, 1, 2)
    functions = [lambda: F.linear(x, weight), lambda: F.conv2d(image, weight[:, :, None, None])]
    if device == 'cpu' and dtype in dispatch.onednn.dtypes():
        functions.append(lambda: dispatch.onednn._onednn_linear(x, weight))
    best = float('inf')
    with torch.no_grad():
        for function in functions:
            for _ in range(5):
                start = time.perf_counter()
                function()
                _synchronize(device)
                best = min(best, time.perf_counter() - start)
    return best


def _result(case, name, memory_format, values, our_median, first=None) -> Result:
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    median = statistics.median(values)
    ratio = None if our_median != our_median else median / our_median
    return Result(case, name, memory_format, median, quartiles[0], quartiles[2], ratio, first)


def _feature_maps(output) -> list[torch.Tensor]:
    return list(getattr(output, 'feature_maps', output))


def _normalize(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-6)


def _relative_distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def _autocast(device: str, dtype: str):
    return torch.autocast(device.split(':')[0], DTYPES[dtype], enabled=dtype != 'fp32')


def _synchronize(device: str) -> None:
    if device != 'cpu':
        torch.cuda.synchronize()


def make_cases(archs, modes, resolutions, batches, dtypes, device, compiled) -> Iterator[Case]:
    """All combinations; `compiled` False, True or 'both'."""
    compiled_values = {'both': (False, True)}.get(compiled, (compiled,))
    combinations = product(archs, modes, resolutions, batches, dtypes, compiled_values)
    for arch, mode, (height, width), batch, dtype, is_compiled in combinations:
        yield Case(arch, mode, height, width, batch, dtype, device, is_compiled)
