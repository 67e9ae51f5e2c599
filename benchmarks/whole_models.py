"""Whole models of the paper: ours next to stock mmdet and mmseg with mmpretrain's ConvNeXt, and with Swin."""

import importlib
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext, redirect_stdout
from functools import partial

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import nn

from convnext_dense import optimize
from convnext_dense.errors import UsageError
from convnext_dense.models.convnext import ARCHS
from convnext_dense.ops import dispatch
from convnext_dense.paper.recipe_diff import CONFIGS

from .backbone import (
    DTYPES,
    MEMORY_FORMATS,
    SWIN_ARCHS,
    _autocast,
    _matmul_time,
    _split_arch,
    _synchronize,
    _with_torchvision,
    build,
    peak_memory,
    run_in_subprocess,
)

# Of each recipe (width, height) in inference and in training, and the paper's ratio of images per second of tiny,
# ConvNeXt : Swin, where it has one.
RECIPES = {
    'mask_rcnn/convnext_t': ({'inference': (1280, 800), 'training': (1280, 800)}, 1.11),  # table 3
    'cascade/convnext_t': ({'inference': (1280, 800), 'training': (1280, 800)}, None),
    'upernet/convnext_t': ({'inference': (2048, 512), 'training': (512, 512)}, None),
}
OURS, REFERENCE, STOCK, SWIN = 'ours', 'ours-reference', 'stock-mmpretrain', 'swin-mmdet'
STOCK_CHANNELS_LAST = f'{STOCK}-channels-last'
CANDIDATES = {  # and what `--baselines` calls them
    OURS: 'ours',
    REFERENCE: 'reference',
    STOCK: 'mmpretrain',
    STOCK_CHANNELS_LAST: 'mmpretrain',
    SWIN: 'swin-mmdet',
}
STOCK_TYPES = {'FP32RoIExtractor': 'SingleRoIExtractor'}  # of the others the name follows 'FP32'
PARTS = ('backbone', 'neck', 'rpn_head', 'bbox_roi_extractor', 'bbox_head', 'mask_roi_extractor', 'mask_head')
PARTS += ('decode_head', 'auxiliary_head')


def measure_models(
    device: str,
    dtype: str,
    rounds: int,
    mode: str = 'inference',
    archs: tuple[str, ...] = ('tiny',),
    size: tuple[int, int] | None = None,
    baselines: Collection[str] = tuple(CANDIDATES.values()),
) -> Iterator[dict]:
    """Seconds of whole models with random weights, runs interleaved; `mode` is 'inference' or 'training'.

    Stock models run in float32 where they cannot run in `dtype`: mmcv's RoIAlign on a CPU knows no bfloat16.
    """
    for recipe, (sizes, paper_ratio) in RECIPES.items():
        for arch in archs:
            width, height = size or sizes[mode]
            make_run = partial(
                _make_step, recipe, arch, device=device, dtype=dtype, mode=mode, height=height, width=width
            )
            runs, missing = {}, []
            for name in _candidates(baselines):
                try:
                    runs[name] = make_run(name)
                except (ImportError, UsageError) as error:
                    missing.append(f'{name}: {str(error).splitlines()[0]}')
            seconds = defaultdict(list)
            for i in range(rounds + 1):
                for name, (run, _) in runs.items():
                    start = time.perf_counter()
                    run()
                    if i:
                        seconds[name].append(time.perf_counter() - start)
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            stock = [medians[name] for name in (STOCK, STOCK_CHANNELS_LAST) if name in medians]
            yield {
                'model': recipe,
                'arch': arch,
                'mode': mode,
                'size': (width, height),
                'seconds': medians,
                'missing': missing,
                'ratio': min(stock) / medians[OURS] if stock else None,
                'swin_ratio': medians[SWIN] / medians[OURS] if SWIN in medians else None,
                'paper_ratio': paper_ratio if arch == 'tiny' else None,
                'parts': _part_fractions(*runs[OURS]),
                'gemm_bound': _gemm_bound(make_run(REFERENCE)[0], device, dtype) if mode == 'inference' else None,
            }


def measure_model_memory(
    device: str,
    dtype: str,
    mode: str = 'inference',
    archs: tuple[str, ...] = ('tiny',),
    size: tuple[int, int] | None = None,
    baselines: Collection[str] = tuple(CANDIDATES.values()),
) -> Iterator[dict]:
    """Peak memory of whole models in MB, beyond what the process held before, mostly weights; each in a process of its
    own, in the dtypes of `measure_models`."""
    for recipe, (sizes, _) in RECIPES.items():
        for arch in archs:
            width, height = size or sizes[mode]
            peaks, missing = {}, []
            for name in _candidates(baselines):
                case = recipe, arch, name, device, dtype, mode, height, width
                try:
                    peaks[name] = run_in_subprocess(_peak_model_memory, case)
                except (ImportError, UsageError) as error:
                    missing.append(f'{name}: {str(error).splitlines()[0]}')
            yield {
                'model': recipe,
                'arch': arch,
                'mode': mode,
                'size': (width, height),
                'peak_mb': peaks,
                'missing': missing,
            }


def _candidates(baselines: Collection[str]) -> list[str]:
    return [name for name, baseline in CANDIDATES.items() if baseline in (OURS, *baselines)]


def _peak_model_memory(case: tuple, threads: int) -> float:
    torch.set_num_threads(threads)
    with redirect_stdout(sys.stderr):  # libraries print as they are imported
        _make_step(*case[:-2], 256, 256)[0]()  # what libraries allocate once
        run, _ = _make_step(*case)
    return peak_memory(run, case[3])


def _make_step(recipe, arch, name, device, dtype, mode, height, width) -> tuple[Callable[[], None], nn.Module]:
    model = _build(recipe, arch, name).to(device)
    if name == STOCK_CHANNELS_LAST:
        model = model.to(memory_format=MEMORY_FORMATS['channels_last'])
        for module in model.modules():
            if type(module).__name__ == 'RoIAlign':  # which reads any map as contiguous
                module.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    model.train(mode == 'training')
    image = torch.randn(2 if mode == 'training' and 'upernet' in recipe else 1, 3, height, width, device=device)
    if name == STOCK_CHANNELS_LAST:
        image = image.contiguous(memory_format=torch.channels_last)
    samples = _samples(recipe, len(image), height, width, device)
    if name.startswith((STOCK, SWIN)) and device == 'cpu' and 'upernet' not in recipe:
        dtype = 'fp32'

    def run():
        model.zero_grad(set_to_none=True)
        with dispatch.disabled() if name == REFERENCE else nullcontext():
            with torch.set_grad_enabled(mode == 'training'), _autocast(device, dtype):
                if mode == 'training':
                    losses = model(image, samples, mode='loss')
                else:
                    model(image, samples if 'upernet' not in recipe else None, mode='tensor')
            if mode == 'training':
                terms = (t for key, v in losses.items() if 'loss' in key for t in (v if isinstance(v, list) else [v]))
                sum(terms).backward()
        _synchronize(device)

    return run, model


def _build(recipe: str, arch: str, name: str) -> nn.Module:
    config = Config.fromfile(CONFIGS / f'{recipe}.py', import_custom_modules=False)
    init_default_scope(config.default_scope)
    with _with_torchvision():
        importlib.import_module(f'{config.default_scope}.models')
        importlib.import_module('convnext_dense.models.fp32_heads')  # with mmdet's models, of which Swin is
    size, use_grn = _split_arch(arch)
    cfg, channels = config.model, list(ARCHS[size]['channels'])
    cfg.backbone.update(init_cfg=None, arch=size, use_grn=use_grn)
    _set_type(cfg, 'SyncBN', 'BN')
    if 'neck' in cfg:
        cfg.neck.in_channels = channels
    else:
        cfg.decode_head.in_channels, cfg.auxiliary_head.in_channels = channels, channels[2]
    if name.startswith((STOCK, SWIN)):
        for old in ('RPNHead', 'Shared2FCBBoxHead', 'ConvFCBBoxHead', 'FCNMaskHead'):
            _set_type(cfg, f'FP32{old}', old)
        for old, new in STOCK_TYPES.items():
            _set_type(cfg, old, new)
    if name == SWIN:
        if arch not in SWIN_ARCHS:
            raise UsageError(f'there is no Swin of the size of {arch}')
        cfg.backbone = dict(type='mmdet.SwinTransformer', **SWIN_ARCHS[arch])
    model = MODELS.build(cfg)
    if name.startswith(STOCK):
        model.backbone = build('mmpretrain', arch)
    return optimize(model) if name == OURS else model


def _set_type(cfg, old: str, new: str) -> None:
    if isinstance(cfg, dict):
        if cfg.get('type') == old:
            cfg['type'] = new
        cfg = [*cfg.values()]
    for value in cfg if isinstance(cfg, (list, tuple)) else ():
        _set_type(value, old, new)


def _samples(recipe: str, n: int, height: int, width: int, device: str) -> list:
    """Samples with a few objects or a segmentation mask."""
    meta = dict(
        img_shape=(height, width), ori_shape=(height, width), pad_shape=(height, width), scale_factor=(1.0, 1.0)
    )
    generator = torch.Generator().manual_seed(0)
    if 'upernet' in recipe:
        structures = importlib.import_module('mmseg.structures')
        mask = torch.randint(150, (1, height, width), generator=generator).to(device)
        return [structures.SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=mask)) for _ in range(n)]
    structures = importlib.import_module('mmdet.structures')
    masks = importlib.import_module('mmdet.structures.mask')
    corners = torch.rand(8, 2, generator=generator) * torch.tensor([width, height]) * 0.6
    boxes = torch.cat([corners, corners + torch.tensor([width, height]) * 0.3], 1)
    sample = structures.DetDataSample(metainfo=meta)
    bitmaps = masks.BitmapMasks(torch.ones(8, height, width, dtype=torch.uint8).numpy(), height, width)
    sample.gt_instances = InstanceData(bboxes=boxes.to(device), labels=torch.arange(8).to(device), masks=bitmaps)
    return [sample] * n


def _part_fractions(run: Callable[[], None], model: nn.Module) -> dict[str, float]:
    """Fraction of a run that the `forward` of each part takes; the rest is 'other'."""
    seconds, handles, starts = defaultdict(float), [], {}

    def begin(module, _):
        starts[module] = time.perf_counter()

    for name, module in model.named_modules():
        for part in PARTS:
            # Those of a cascade, one for each stage, are in a list.
            parent, _, last = name.rpartition('.')
            if isinstance(module, nn.ModuleList) or part not in (
                last,
                parent.rpartition('.')[2] if last.isdigit() else last,
            ):
                continue

            def end(module, _, __, part=part):
                seconds[part] += time.perf_counter() - starts.pop(module)

            handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    start = time.perf_counter()
    run()
    total = time.perf_counter() - start
    for handle in handles:
        handle.remove()
    fractions = {part: value / total for part, value in seconds.items()}
    return fractions | {'other': 1 - sum(fractions.values())}


def _gemm_bound(run: Callable[[], None], device: str, dtype: str) -> float:
    """Seconds of the matmuls and convolutions of the reference implementation, at the rate of this device's matmuls."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    rows, inner, outer = 4096, 2304, 512
    rate = 2 * rows * inner * outer / _matmul_time(rows, inner, outer, DTYPES[dtype], device)
    return counter.get_total_flops() / rate
