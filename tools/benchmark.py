#!/usr/bin/env python
"""This backbone against every ConvNeXt that is installed (timm, torchvision, transformers, mmpretrain) and mmdet's Swin
of the same size: runs interleaved in one process, peak memory each in a process of its own. A ratio is theirs to ours.

Needs no data and no weights. `make benchmark` sets up the others in an environment of their own.
"""

import argparse
import json
import os
import sys
import warnings
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')

import environment  # noqa: F401
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, of which `benchmarks` is a part
from benchmarks.backbone import (
    BACKBONES,
    DTYPES,
    OURS,
    PAPER_RATIOS,
    V2_SUFFIX,
    available,
    break_even_runs,
    feature_distance,
    gemm_lower_bound,
    make_cases,
    measure_memory,
    measure_time,
)
from benchmarks.whole_models import measure_model_memory, measure_models
from convnext_dense.cli.arguments import ArgumentParser
from convnext_dense.cli.exit import exit_on_error
from convnext_dense.errors import UsageError
from convnext_dense.models.convnext import ARCHS
from convnext_dense.ops import dispatch
from convnext_dense.paper.tables import format_table

SIZE_ALIASES = dict(T='tiny', S='small', B='base', L='large', XL='xlarge')

WHOLE_MODELS = 'models', 'models-training', 'models-memory', 'models-training-memory'


def parse_args():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        '--sizes', nargs='+', default=['T'], metavar='SIZE', help='T S B L XL, or names such as atto; T-v2, ...: V2'
    )
    parser.add_argument('--resolutions', nargs='+', default=[(512, 512), (800, 1280)], type=_resolution, metavar='HxW')
    parser.add_argument('--batches', nargs='+', default=[1], type=int, metavar='N')
    parser.add_argument('--dtypes', nargs='+', default=['fp32', 'bf16'], choices=DTYPES)
    parser.add_argument(
        '--measure',
        nargs='+',
        default=['inference', 'training'],
        choices=('inference', 'training', 'inference-memory', 'training-memory', *WHOLE_MODELS),
        help='time or peak memory of a forward pass, of forward and backward; of whole models, and of their steps',
    )
    parser.add_argument(
        '--baselines', nargs='*', metavar='NAME', help=f'compare with these of {", ".join(BACKBONES)} (default: all)'
    )
    parser.add_argument('--compiled', nargs='?', const='yes', default='no', choices=('no', 'yes', 'both'))
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, help="of the CPU (default: torch's)")
    parser.add_argument('--rounds', type=int, default=7, help='runs of each, after two that warm up')
    parser.add_argument('--json', action='store_true', help='print JSON: milliseconds, MB, ratios to ours')
    parser.add_argument('--markdown', action='store_true', help='print a Markdown table')
    parser.add_argument('--plot', metavar='FILE', help='draw bars: each backbone of a case in its faster memory format')
    args = parser.parse_args()
    args.archs = [_arch(size) for size in args.sizes]
    for arch in args.archs:
        if arch.removesuffix(V2_SUFFIX) not in ARCHS:
            parser.error(f"--sizes '{arch}': give some of {', '.join(SIZE_ALIASES)} or {', '.join(ARCHS)}")
    for name in args.baselines or ():
        if name not in BACKBONES:
            parser.error(f"--baselines '{name}': give some of {', '.join(BACKBONES)}")
    if min(*args.batches, args.rounds, args.threads or 1) < 1:
        parser.error('--batches, --rounds and --threads are at least 1')
    return args


def _arch(size: str) -> str:
    name = size.removesuffix(V2_SUFFIX)
    return SIZE_ALIASES.get(name, name) + size.removeprefix(name)


def _resolution(text: str) -> tuple[int, int]:
    height, _, width = text.partition('x')
    if not (height.isdigit() and width.isdigit() and min(int(height), int(width)) >= 32):
        raise argparse.ArgumentTypeError(f"'{text}': give height x width, each at least 32, such as 800x1280")
    return int(height), int(width)


def main():
    args = parse_args()
    warnings.filterwarnings('ignore')
    with exit_on_error():
        if args.device != 'cpu' and not torch.cuda.is_available():
            raise UsageError(f'--device {args.device}: no GPU was found; --device cpu')
        torch.set_num_threads(args.threads or torch.get_num_threads())
        with redirect_stdout(sys.stderr):  # libraries print while they are imported
            report = run_benchmarks(args)
        if args.plot:
            draw(report['results'], args.plot)
    if args.json:
        print(json.dumps(report, indent=2))
        return
    print('\n'.join(format_report(report, args.markdown)))


def run_benchmarks(args) -> dict:
    names = [OURS, *(n for n in (BACKBONES if args.baselines is None else args.baselines) if n != OURS)]
    report = {
        'machine': machine(args),
        'missing': [],
        'feature_distances': {},
        'gemm_lower_bounds': [],
        'results': [],
        'models': [],
    }
    modes = [m for m in args.measure if m not in WHOLE_MODELS]
    for arch in args.archs if modes else []:
        buildable, missing = available(names, arch)
        report['missing'] += [f'{arch}: {line}' for line in missing]
        for name in buildable:
            try:
                distance = feature_distance(name, arch)
            except UsageError as error:
                report['missing'].append(f'{arch}: the features of {name} were not compared: {error}')
                continue
            if distance is not None:
                report['feature_distances'][f'{arch}, {name}'] = distance
                if distance > 1e-4:
                    raise UsageError(f'the features of {name} differ from ours with the same weights by {distance:.1e}')
        compiled = {'no': False, 'yes': True, 'both': 'both'}[args.compiled]
        kinds = dict.fromkeys(m.removesuffix('-memory') for m in modes)
        for case in make_cases([arch], kinds, args.resolutions, args.batches, args.dtypes, args.device, compiled):
            chosen = [n for n in buildable if case.mode == 'training' or not n.startswith('ours-')]
            if case.mode in modes:
                report['results'] += [{**r.as_dict(), 'unit': 'ms'} for r in measure_time(case, chosen, args.rounds)]
                if case.mode == 'inference':
                    report['gemm_lower_bounds'].append({**vars(case), 'ms': gemm_lower_bound(case)})
            if f'{case.mode}-memory' in modes:
                report['results'] += [{**r.as_dict(), 'unit': 'MB'} for r in measure_memory(case, chosen)]
    baselines = BACKBONES if args.baselines is None else args.baselines
    for measure in (m for m in args.measure if m in WHOLE_MODELS):
        function = measure_model_memory if measure.endswith('memory') else partial(measure_models, rounds=args.rounds)
        mode = 'training' if 'training' in measure else 'inference'
        for dtype in args.dtypes:
            for result in function(args.device, dtype, mode=mode, archs=args.archs, baselines=baselines):
                report['models'].append({'dtype': dtype, **result})
                print('\n'.join(format_model(report['models'][-1])), flush=True)  # to stderr: all take an hour
    return report


def machine(args) -> str:
    name = torch.cuda.get_device_name() if args.device != 'cpu' else _processor()
    backend = '' if args.device != 'cpu' else f', ours: {dispatch.backend_summary()}'
    return f'{name}, {torch.get_num_threads()} threads, torch {torch.__version__}{backend}'


def _processor() -> str:
    try:
        with open('/proc/cpuinfo') as lines:
            return next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return 'CPU'


def format_report(report: dict, markdown: bool) -> list[str]:
    lines = [report['machine'], *(f'left out: {line}' for line in report['missing'])]
    lines += [f'{key}: features equal ours to {value:.0e}' for key, value in report['feature_distances'].items()]
    if report['results']:
        header = ('name', 'memory format', 'measurement', 'size', 'dtype', 'median', 'quartiles', '', 'ratio')
        rows = [
            (
                r['backbone'],
                r['memory_format'],
                f'{r["arch"]} {r["mode"]}{" compiled" if r["compiled"] else ""}',
                f'{r["height"]}x{r["width"]} x {r["batch"]}',
                r['dtype'],
                f'{r["median"]:.1f}',
                f'{r["low"]:.1f}-{r["high"]:.1f}',
                r['unit'],
                '-' if r['ratio'] is None else f'{r["ratio"]:.2f}',
            )
            for r in report['results']
        ]
        lines += ['', format_table(header, rows, 'lrl', markdown), *compile_break_even(report['results'])]
    lines += [
        f'{b["arch"]} {b["height"]}x{b["width"]} x {b["batch"]} {b["dtype"]}: matmuls alone take {b["ms"]:.1f} ms'
        for b in report['gemm_lower_bounds']
    ]
    lines += [
        f'{r["arch"]} 224x224 x {r["batch"]} {r["dtype"]}: ConvNeXt : Swin {r["ratio"]:.2f} in images per second, '
        f'in the paper {PAPER_RATIOS[r["arch"]]} (classifiers on an A100)'
        for r in report['results']
        if r['backbone'].startswith('swin') and r['arch'] in PAPER_RATIOS and r['unit'] == 'ms'
        if (r['mode'], r['height'], r['width']) == ('inference', 224, 224)
    ]
    lines += [line for m in report['models'] for line in format_model(m)]
    return lines


def format_model(m: dict) -> list[str]:
    """The lines of the report about one whole model."""
    case = f'{m["model"]} {m["arch"]} {m["mode"]} {m["size"][0]}x{m["size"][1]} {m["dtype"]}'
    if 'peak_mb' in m:
        peaks = ', '.join(f'{name} {value:.0f}' for name, value in m['peak_mb'].items())
        return [f'{case}, peak MB: {peaks}', *(f'{case}: left out: {line}' for line in m['missing'])]
    seconds = ', '.join(f'{name} {value:.2f}' for name, value in m['seconds'].items())
    parts = ', '.join(f'{name} {fraction:.0%}' for name, fraction in m['parts'].items())
    lines = [f'{case}, seconds: {seconds}; parts of ours: {parts}']
    lines += [f'{case}: left out: {line}' for line in m['missing']]
    if m['ratio']:
        lines.append(f'{case}: stock : ours {m["ratio"]:.2f}')
    if m['swin_ratio']:
        paper = f', in the paper {m["paper_ratio"]}' if m['paper_ratio'] else ''
        lines.append(f'{case}: ConvNeXt : Swin {m["swin_ratio"]:.2f} in images per second{paper}')
    if m['gemm_bound']:
        lines.append(f'{case}: matmuls of the reference implementation alone take {m["gemm_bound"]:.2f} s')
    return lines


def compile_break_even(results: list[dict]) -> list[str]:
    """From how many runs on compiling pays, for what was measured both eager and compiled."""
    lines, eager = [], {}
    for r in results:
        key = tuple(r[k] for k in ('arch', 'mode', 'height', 'width', 'batch', 'dtype', 'backbone', 'memory_format'))
        if r['unit'] != 'ms':
            continue
        if not r['compiled']:
            eager[key] = r
        elif key in eager:
            runs = break_even_runs(r, eager[key])
            pays = 'does not pay: it is no faster' if runs is None else f'pays from {runs} runs on'
            lines.append(f'{", ".join(map(str, key))}: compiling, {r["first"] / 1000:.1f} s with two runs, {pays}')
    return lines


def draw(results: list[dict], file: str) -> None:
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    best = {}
    for r in results:
        suffix = ' compiled' if r['compiled'] else ''
        group = f'{r["arch"]} {r["mode"]}{suffix}\n{r["height"]}x{r["width"]} x {r["batch"]}\n{r["dtype"]}, {r["unit"]}'
        entry = best.setdefault(group, {})
        entry[r['backbone']] = min(r['median'], entry.get(r['backbone'], float('inf')))
    names = list(dict.fromkeys(name for entry in best.values() for name in entry))
    figure, axes = plt.subplots(1, max(len(best), 1), figsize=(2.2 * max(len(best), 2), 4.5), squeeze=False)
    for axis, (group, entry) in zip(axes[0], best.items()):
        for i, name in enumerate(names):
            axis.bar(i, entry.get(name, 0), color='C3' if name.startswith(OURS) else 'C7')
        axis.set_title(group, fontsize=8)
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    figure.tight_layout()
    try:
        figure.savefig(file, dpi=150)
    except ValueError as error:
        raise UsageError(f"--plot '{file}': {str(error).splitlines()[0]}") from error


if __name__ == '__main__':
    main()
