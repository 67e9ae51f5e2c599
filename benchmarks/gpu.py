"""What a GPU makes of the backbone: equality with the reference, its parts and whole passes next to other libraries.

`make benchmark-gpu` runs the GPU tests and this, and writes the tables into docs/performance.md. Without a GPU
`--device cpu` goes through the same steps on small sizes and writes nothing.
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.backbone import MODELS_OF_PAPER, _autocast, _make_model_step, build
from convnext_dense.models.convnext import ARCHS, ConvNeXt
from convnext_dense.ops import dispatch
from convnext_dense.paper.tables import format_table

PAGE = Path(__file__).resolve().parents[1] / 'docs/performance.md'
BEGIN, END = '<!-- begin of the GPU tables -->', '<!-- end of the GPU tables -->'
HALF = {'fp16': torch.float16, 'bf16': torch.bfloat16}


class _Disabled(torch.nn.Module):
    """A model all of whose blocks run their reference implementation."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        with dispatch.disabled():
            return self.model(x)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--device', default='cuda', choices=('cuda', 'cpu'))
    parser.add_argument('--rounds', type=int, default=15, help='runs of each, after three that warm up')
    parser.add_argument(
        '--sections', nargs='+', default=[*SECTIONS], choices=SECTIONS, metavar='SECTION', help='default: all'
    )
    args = parser.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('no GPU was found: --device cpu goes through the steps without one')
    return args


def main():
    args = parse_args()
    torch.backends.cudnn.benchmark = True
    small = args.device == 'cpu'
    name = 'a dry run on a CPU' if small else torch.cuda.get_device_name()
    tables = [f'{name}, torch {torch.__version__}. Milliseconds, medians of {args.rounds} runs.']
    for title, section in map(SECTIONS.get, args.sections):
        print(f'{title} ...', flush=True)
        header, rows = section(args.device, args.rounds, small)
        tables += [title, format_table(header, rows, 'l' * 2 + 'r' * (len(header) - 2), True)]
        print(tables[-1], flush=True)
    if not small and args.sections == [*SECTIONS]:
        page_start, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text('\n\n'.join([page_start + BEGIN, *tables, END + rest.partition(END)[2]]))


# ---- sections: a header and rows each --------------------------------------------------------------------------------


def equality(device: str, rounds: int, small: bool):
    """Relative errors of feature maps and gradients under autocast, the median of all tensors'."""
    rows = []
    for version, settings in {'V1': {}, 'V2': dict(use_grn=True)}.items():
        for dtype in HALF:
            model = ConvNeXt('atto', drop_path_rate=0.2, **settings).to(device)
            errors = [statistics.median(_errors(model, device, dtype, fast)) for fast in (True, False)]
            assert errors[0] < 1.2 * errors[1], f'{version} {dtype}: {errors[0]:.1e}, eager torch {errors[1]:.1e}'
            rows.append((version, dtype, *(f'{error:.1e}' for error in errors)))
    return ('atto', 'dtype', 'error of ours', 'of eager torch'), rows


def _errors(model, device, dtype, use_kernels) -> list[float]:
    image = torch.randn(2, 3, 96, 128, device=device, generator=torch.Generator(device).manual_seed(0))
    results = []
    for exact in (True, False):
        torch.manual_seed(0)  # of stochastic depth
        model.zero_grad()
        module = model if use_kernels and not exact else _Disabled(model)
        with _autocast(device, 'fp32' if exact else dtype):
            maps = module(image)
        # As a loss scaler does: gradients of half precision would vanish.
        ramps = [torch.linspace(-1e4, 1e4, m.shape[1], device=device)[:, None, None] for m in maps]
        sum((m.float() * ramp).mean() for m, ramp in zip(maps, ramps)).backward()
        results.append([*(m.detach().float() for m in maps), *(p.grad.clone() for p in model.parameters())])
    return [((a - b).norm() / b.norm()).item() for b, a in zip(*results)]


def depthwise(device: str, rounds: int, small: bool):
    """The depthwise convolution of each stage of T for two images of 800 x 1280."""
    rows = []
    channels, height, width = ARCHS['tiny']['channels'], *((32, 32) if small else (200, 320))
    for i, c in enumerate(channels):
        for name, dtype in HALF.items():
            weight = torch.randn(c, 1, 7, 7, device=device, dtype=dtype)
            shape = (2, c, height >> i, width >> i)
            columns = [_cudnn(weight, shape, memory_format, rounds) for memory_format in _FORMATS.values()]
            columns.append(_triton(weight, shape, rounds) if device == 'cuda' else ('-',) * 3)
            rows.append((f'{c} channels, {shape[2]} x {shape[3]}', name, *(' / '.join(times) for times in columns)))
    return ('stage', 'dtype', 'cuDNN, NCHW', 'cuDNN, channels_last', 'ours'), rows


_FORMATS = {'NCHW': torch.contiguous_format, 'channels_last': torch.channels_last}


def _cudnn(weight, shape, memory_format, rounds):
    x = torch.randn(shape, device=weight.device, dtype=weight.dtype).to(memory_format=memory_format)
    args = [1, 1], [3, 3], [1, 1], False, [0, 0], len(weight)
    grad, bias = torch.randn_like(x), torch.zeros_like(weight[:, 0, 0, 0])
    backward = torch.ops.aten.convolution_backward
    return (
        _kernel_time(lambda: torch.ops.aten.convolution(x, weight, bias, *args), rounds),
        _kernel_time(lambda: backward(grad, x, weight, [len(weight)], *args, [True, False, False]), rounds),
        _kernel_time(lambda: backward(grad, x, weight, [len(weight)], *args, [False, True, True]), rounds),
    )


def _triton(weight, shape, rounds):
    from convnext_dense.ops import triton_blocks as blocks

    n, c, height, width = shape
    x = torch.randn(n, height, width, c, device=weight.device, dtype=weight.dtype)
    grad, out, bias = torch.randn_like(x), torch.empty_like(x), torch.zeros(c, device=x.device)
    taps = weight.view(c, -1).t().contiguous()
    partial = x.new_empty(blocks.MAX_PROGRAMS, 49 * c, dtype=torch.float32)
    return (
        _kernel_time(lambda: blocks._launch_dwconv(x, taps, bias, None, out), rounds),
        _kernel_time(lambda: blocks._launch_dwconv(grad, taps, None, x, out), rounds),
        _kernel_time(lambda: (blocks._dwconv_weight_grad(x, grad, partial), partial.sum(0)), rounds),
    )


def backbones(device: str, rounds: int, small: bool):
    """Backbones under autocast in float16: as trained by the recipes (two images per GPU), and with a full GPU."""
    cases = {
        'tiny': [
            ('training', 2, (800, 1280)),
            ('training', 8, (800, 1280)),
            ('inference', 1, (800, 1280)),
            ('inference', 16, (512, 512)),
        ],
        'base': [('training', 2, (800, 1280)), ('inference', 8, (512, 512))],
    }
    if small:
        cases = {'atto': [('training', 1, (64, 64)), ('inference', 1, (64, 64))]}
    rows = []
    for arch, settings in cases.items():
        makers = {
            'ours': lambda arch: ConvNeXt(arch),
            'reference': lambda arch: _Disabled(ConvNeXt(arch)),
            'mmpretrain': lambda arch: build('mmpretrain', arch),
            'timm': lambda arch: build('timm', arch),
            'V2: ours': lambda arch: ConvNeXt(arch, use_grn=True),
            'V2: timm': lambda arch: importlib.import_module('timm').create_model(
                f'convnextv2_{arch}', features_only=True
            ),
        }
        for mode, batch, size in settings:
            times = {
                name: _backbone_time(name, make, arch, mode, batch, size, device, rounds)
                for name, make in makers.items()
            }
            case = f'{arch}, {mode}, {batch} x {size[0]} x {size[1]}'
            rows += [(case, part, *(times[name][k] for name in makers)) for k, part in enumerate(('wall', 'GPU', 'MB'))]
    return ('backbone', '', *makers), rows


def _backbone_time(name, make, arch, mode, batch, size, device, rounds) -> tuple[str, str, str]:
    """Wall time, time of the GPU's kernels alone, and peak memory; of other libraries in their faster memory format."""
    results = []
    has_fixed_format = 'ours' in name or name == 'reference'  # they choose their format themselves
    for memory_format in [*_FORMATS.values()][: 1 if has_fixed_format else 2]:
        try:
            model = make(arch).to(device, memory_format=memory_format)
            model.train(mode == 'training')  # mmpretrain's returns None
        except Exception as error:  # a library that is not there, or does not build
            return (f'- ({type(error).__name__})',) * 3
        image = torch.randn(batch, 3, *size, device=device).to(memory_format=memory_format)

        def step(model=model, image=image):
            model.zero_grad(set_to_none=True)
            with torch.set_grad_enabled(mode == 'training'), _autocast(device, 'fp16' if device == 'cuda' else 'bf16'):
                maps = list(model(image))
                loss = sum(m.float().mean() for m in maps)
            if mode == 'training':
                loss.backward()

        wall = _wall_time(step, rounds, device)
        results.append((wall, *_gpu_time_and_memory(step, device)))
        del model, image, step
        if device == 'cuda':
            torch.cuda.empty_cache()
    wall, gpu, memory = min(results)
    return f'{wall:.1f}', f'{gpu:.1f}', f'{memory:.0f}'


def first_sizes(device: str, rounds: int, small: bool):
    """What a new input size costs a training step, as multi-scale training brings one with almost every batch."""
    model = ConvNeXt('atto' if small else 'tiny').to(device).train()
    rows = []
    for name, module in {'ours': model, 'reference': _Disabled(model)}.items():
        first_times, later_times = [], []
        for i in range(3 if small else 12):
            image = torch.randn(2, 3, *((64, 64 + 32 * i) if small else (480 + 32 * i, 1344 - 32 * i)), device=device)
            for times in (first_times, later_times):
                start = time.perf_counter()
                with _autocast(device, 'fp16' if device == 'cuda' else 'bf16'):
                    loss = sum(m.float().mean() for m in module(image))
                loss.backward()
                _synchronize(device)
                times.append(1000 * (time.perf_counter() - start))
        rows.append(
            ('training step of T', name, *(f'{statistics.median(t[1:]):.1f}' for t in (first_times, later_times)))
        )
    return ('', '', 'a size for the first time', 'again'), rows


def models(device: str, rounds: int, small: bool):
    """Images per second of whole models in float16, random weights, and the paper's ratio."""
    rows = []
    for recipe, ((width, height), ratio) in {} if small else MODELS_OF_PAPER.items():
        rates = []
        for backbone in ('ConvNeXt', 'ConvNeXt, reference', 'Swin'):
            run = _make_model_step(recipe, backbone, device, 'fp16', height, width)
            rates.append(1000 / _wall_time(run, rounds, device))
        cells = (*(f'{rate:.1f}' for rate in rates), f'{rates[0] / rates[2]:.2f}', str(ratio or '-'))
        rows.append((recipe, f'{width} x {height}', *cells))
    return ('model', 'size', 'ours', 'reference', 'Swin', 'ours : Swin', 'in the paper'), rows


SECTIONS: dict[str, tuple[str, Callable]] = {
    'equality': ('**Equality** (against float32)', equality),
    'backbones': ('**Backbones** under autocast in float16, in their faster memory format', backbones),
    'models': ('**Whole models**, images per second, float16', models),
    'depthwise': ('**Depthwise convolution**: forward / gradient of the input / of the weight', depthwise),
    'first_sizes': ('**New input sizes** in training', first_sizes),
}


# ---- timing ----------------------------------------------------------------------------------------------------------


def _wall_time(step: Callable[[], None], rounds: int, device: str) -> float:
    """Median in ms, what the CPU needs to start the kernels included."""
    return statistics.median(_times(step, rounds, device))


def _times(step, rounds, device) -> Iterator[float]:
    for i in range(rounds + 3):
        start = time.perf_counter()
        step()
        _synchronize(device)
        if i >= 3:
            yield 1000 * (time.perf_counter() - start)


def _gpu_time_and_memory(step: Callable[[], None], device: str) -> tuple[float, float]:
    """Time of all kernels of a step in ms, and peak memory beyond what was there before it in MB."""
    if device == 'cpu':
        return float('nan'), float('nan')
    torch.cuda.reset_peak_memory_stats()
    initial = torch.cuda.memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    microseconds = sum(event.self_device_time_total for event in profile.key_averages())
    return microseconds / 1000, (torch.cuda.max_memory_allocated() - initial) / 1e6


def _kernel_time(run: Callable[[], object], rounds: int) -> str:
    """Median in ms, by events of the GPU where there is one."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return f'{do_bench(run, warmup=10, rep=25, return_mode="median"):.3f}'
    return f'{_wall_time(run, 1, "cpu"):.3f}'


def _synchronize(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


if __name__ == '__main__':
    main()
