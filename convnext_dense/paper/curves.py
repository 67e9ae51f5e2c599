"""Curves of runs: loss, lr by layer and what evaluations found, read from mmengine's own logs, drawn as one picture."""

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import accumulate, groupby
from pathlib import Path

from mmengine.config import Config

from ..config.recipe import accumulative_counts
from ..config.work_dir import TIMESTAMP_GLOB, read_log_text
from ..errors import UsageError
from .results import MAIN_METRICS, to_paper_metrics
from .work_dirs import SCALARS, TrainingRun, find_runs, read_records

TASKS = {'mmdet': 'detection', 'mmseg': 'segmentation'}
# What evaluators log beside their figures.
NO_METRICS = ('step', 'iter', 'epoch', 'time', 'data_time', 'memory')
# The layers' lrs as text logs hold them: our table of them, and what mmdet's constructor prints.
TABLE = re.compile(r'\w+_wise lr decay, rate ([\d.e-]+):\n +id +lr +parameters\n((?: +\d+ +[\d.e+-]+ +[\d,]+\n)+)')
GROUP = re.compile(r'"layer_(\d+)_(?:no_)?decay": \{.*?"lr_scale": ([\d.e+-]+)', re.DOTALL)
LARGEST = 1e100  # what is drawn; beyond it scales have no numbers for their ends
COLORS = ('#0b6fb8', '#d1495b', '#2e8b57', '#e08e1a', '#7a4fa3', '#8c564b', '#17a2b8', '#b5a900', '#d667b0', '#555555')


@dataclass
class TrainingCurves:
    """What a training logged, by its position x: epochs, or updates where it counts iterations. What a resumed run did
    again replaces what it went back behind.

    `losses` are the total and its parts by name, `lrs` the lr of each layer id, or what mmengine logs ('lr', 'base_lr')
    where no log says how the layers' differ, `figures` what evaluations found: those of the paper in percent,
    others as they are, `resumed` where later starts took up the run.
    """

    run: TrainingRun
    unit: str
    losses: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    lrs: list[tuple[float, dict[int | str, float]]] = field(default_factory=list)
    figures: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    resumed: list[float] = field(default_factory=list)

    @property
    def kind(self) -> tuple[str, str]:
        """What curves in one panel have in common: the task and the unit of x."""
        scope = self.run.config.get('default_scope', '')
        return TASKS.get(scope, scope), self.unit


def read_curves(folders: Iterable[str | Path]) -> list[TrainingCurves]:
    """The curves of every training in and below these folders; what has logged no iteration yet is left out.

    Raises:
        UsageError: a folder is not there or holds no training that has logged anything.
    """
    found = {}
    for folder in folders:
        if fnmatch(Path(folder).name, TIMESTAMP_GLOB):
            raise UsageError(f'{folder} is one start of a run: give its work dir, {Path(folder).parent}')
        runs = find_runs([folder])
        curves = [curves for run in runs if run.starts and (curves := _curves_of(run)).losses]
        if not curves:
            what = 'holds no run' if not runs else 'holds tests alone' if not any(r.trained for r in runs) else None
            raise UsageError(f'{folder} {what or "has logged no iteration yet"}: give the work dir of a training')
        found |= {c.run.folder.resolve(): c for c in curves}
    return list(found.values())


def _curves_of(run: TrainingRun) -> TrainingCurves:
    counts_epochs = 'max_epochs' in (run.config.get('train_cfg') or {})
    curves = TrainingCurves(run, 'epochs' if counts_epochs else 'updates')
    for start, config in run.starts:
        records = [_strip_prefix(record) for record in read_records(start / SCALARS, [])]
        log = read_log_text(start / f'{start.name}.log')
        per_epoch = _iterations_per_epoch(log, records) if counts_epochs else 0
        scales, begun = layer_scales(log, config), False
        last = curves.losses[-1][0] if curves.losses else 0.0
        for record in records:
            trains = 'loss' in record or 'lr' in record
            x = last = _x_value(record, trains, config, per_epoch, last)
            if not begun:  # a later start took up the run before what it logs first
                begun = True
                _drop_overlap(curves, x, trains)
            if trains:
                curves.losses.append((x, _losses(record)))
                curves.lrs.append((x, layer_lrs(record, scales, config)))
            elif figures := _figures(record):
                curves.figures.append((x, figures))
    _say_undrawn(curves)
    return curves


def _say_undrawn(curves: TrainingCurves) -> None:
    """Say which values are no place in a picture, but for losses that are lost, which the run itself says."""
    points = [*curves.losses, *curves.lrs, *curves.figures]
    values = [(x, name, value) for x, found in points for name, value in found.items() if not _is_drawn(value)]
    values = [(x, name, value) for x, name, value in values if name != 'loss' or math.isfinite(value)]
    if values:
        x, name, value = values[0]
        name = f'lr of layer {name}' if isinstance(name, int) else name
        others = f', nor are {len(values) - 1} values more' if len(values) > 1 else ''
        curves.run.problems.append(f'{name} {value:g} at {x:g} {curves.unit} is not drawn{others}')


def _is_drawn(value: float) -> bool:
    return abs(value) <= LARGEST  # which nothing is that is no number


def _strip_prefix(record: dict) -> dict:
    """A record without the prefixes that `log_with_hierarchy` sets."""
    return {re.sub('^(train|val)/', '', key): value for key, value in record.items()}


def _drop_overlap(curves: TrainingCurves, x: float, trains: bool) -> None:
    """Leave out what lies behind the first record of a later start, at `x`; what was trained before it is evaluated
    stays."""
    if curves.losses:
        curves.resumed = [r for r in curves.resumed if r < x] + [x]
    for name in ('losses', 'lrs', 'figures'):
        stays = name != 'figures' and not trains
        points = getattr(curves, name)
        setattr(curves, name, [point for point in points if point[0] < x or (stays and point[0] == x)])


def _x_value(record: dict, trains: bool, config: Config, per_epoch: int, last: float) -> float:
    """Where a record lies. mmengine gives evaluations the number of their epoch, unless told otherwise; loops that
    count iterations have none."""
    step = record.get('step', 0)
    logger = (config.get('default_hooks') or {}).get('logger') or {}
    if per_epoch and trains:
        epoch = record.get('epoch', math.ceil(step / per_epoch))
        return min(max(step / per_epoch, epoch - 1), epoch)
    if per_epoch:
        return step if logger.get('log_metric_by_epoch', True) else step / per_epoch
    if not trains and logger.get('log_metric_by_epoch', True):
        return last
    return step / accumulative_counts(config)


def _iterations_per_epoch(log: str, records: Sequence[dict]) -> int:
    """By the text log's `Epoch(train)  [3][ 50/7330]`, else the least that fits the records."""
    said = re.search(r'Epoch\(train\) *\[ *\d+\]\[ *\d+/(\d+)\]', log)
    if said:
        return int(said[1])
    return max((math.ceil(r['step'] / r['epoch']) for r in records if r.get('epoch') and r.get('step')), default=1)


def layer_scales(log: str, config: Config) -> dict[int, float]:
    """The lr scale of each layer id that a run trains, by its text log, in the order of its parameter groups; {} where
    the log does not say."""
    try:
        return _scales(log, config.get('optim_wrapper', {}).get('optimizer', {}).get('lr'))
    except (ValueError, ZeroDivisionError, OverflowError, TypeError):  # numbers that no run writes
        return {}


def _scales(log: str, base: float | None) -> dict[int, float]:
    table = TABLE.search(log)
    if not table:
        return {int(layer): float(scale) for layer, scale in GROUP.findall(log)}
    rate = float(table[1])
    lrs = {int(line.split()[0]): float(line.split()[1]) for line in table[2].splitlines()}
    if rate == 1 or not base:
        return dict.fromkeys(lrs, 1.0) if rate == 1 else {}
    # The table's lrs are rounded; the depth that they stand for is whole.
    return {layer: rate ** round(math.log(lr / base) / math.log(rate)) for layer, lr in lrs.items()}


def layer_lrs(record: dict, scales: dict[int, float], config: Config) -> dict[int | str, float]:
    """The lr of each layer id at a logged iteration; what is logged itself where the layers' scales are not known.

    mmengine logs two lrs: `lr` of the first parameter group and `base_lr`, that of scale 1. Schedules move all groups
    by the same affine map (a factor, and with `eta_min` a summand), which these two settle.
    """
    if 'lr' not in record:
        return {}
    lr, first = record['lr'], next(iter(scales.values()), None)
    if not first:
        differs = 'base_lr' in record and record['base_lr'] != lr
        return {'lr': lr} | ({'base_lr': record['base_lr']} if differs else {})
    if first == 1:
        return dict.fromkeys(scales, lr)
    scaled_later = (config.get('auto_scale_lr') or {}).get('enable')  # by mmengine, which leaves base_lr as it was
    base = lr / first if scaled_later else record.get('base_lr', lr / first)
    return {layer: base + (lr - base) * (1 - scale) / (1 - first) for layer, scale in scales.items()}


def _losses(record: dict) -> dict[str, float]:
    """The total loss and its parts; those of a cascade's stages or a decoder's layers (`s0.loss_cls`) are added up."""
    found = {}
    for key, value in record.items():
        if 'loss' in key.split('.')[-1] and isinstance(value, (int, float)):
            name = re.sub(r'^[a-z]\d+\.', '', key)
            found[name] = found.get(name, 0) + value
    return found


def _figures(record: dict) -> dict[str, float]:
    return to_paper_metrics(record) or {
        key: value for key, value in record.items() if key not in NO_METRICS and isinstance(value, (int, float))
    }


def ema(values: Sequence[float], factor: float) -> list[float]:
    """The exponential mean of what came so far, without the bias to its first value; what is not finite stays."""
    mean, weight, found = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean, weight = factor * mean + (1 - factor) * value, factor * weight + 1 - factor
            value = mean / weight
        found.append(value)
    return found


def format_progress(run: TrainingRun) -> str:
    """How far a run is and what it reached, in words."""
    unit = 'epochs' if 'max_epochs' in (run.config.get('train_cfg') or {}) else 'updates'
    parts = [f'{run.done:,.0f} of {run.length:,.0f} {unit}' if run.length else f'{run.done:,.0f} {unit}']
    for name in MAIN_METRICS:
        if run.last(name) is not None:
            parts.append(f'{name} {run.last(name):.1f} (best {run.best(name):.1f})')
    return ', '.join(parts)


def plot(curves: Sequence[TrainingCurves], file: str | Path, smooth: float = 0.0) -> Path:
    """Write one picture and return its path, a PNG where the name has no ending: for each kind of run a panel of the
    loss, one of the lr by layer, one for each figure. Of one run the parts of the loss and every layer's lr, of several
    their totals, and the lrs of the first layer and the heads.

    Raises:
        UsageError: matplotlib writes no file of that name's ending.
    """
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.figure import Figure

    file = Path(file) if Path(file).suffix else Path(f'{file}.png')
    if file.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise UsageError(f"--out '{file}': give a name that ends with .png, .pdf or .svg")
    alone = len(curves) == 1
    colors = {id(c): COLORS[i % len(COLORS)] for i, c in enumerate(curves)}
    kinds = [list(g) for _, g in groupby(sorted(curves, key=lambda c: c.kind), lambda c: c.kind)]
    n_rows = [math.ceil(len(_panel_names(kind)) / 2) for kind in kinds]
    figure = Figure(figsize=(11, 0.6 + 3.4 * sum(n_rows)), dpi=130, layout='constrained')
    grid = figure.add_gridspec(sum(n_rows), 2)
    for kind, row in zip(kinds, accumulate([0, *n_rows])):
        panels = _panel_names(kind)
        for i, what in enumerate(panels):
            widely = i % 2 == 0 and i == len(panels) - 1
            axis = figure.add_subplot(grid[row + i // 2, slice(2) if widely else i % 2])
            axis.set_title(what if len(kinds) == 1 else f'{kind[0].kind[0]}: {what}'.removeprefix(': '), fontsize=11)
            if what == 'loss':
                _draw_losses(axis, kind, colors, smooth, alone)
            elif what == 'lr':
                _draw_lrs(axis, kind, colors, alone)
            else:
                _draw_figure(axis, kind, colors, what)
            _style_axis(axis, kind)
    names = _names([c.run.folder for c in curves])
    if alone:
        figure.suptitle(f'{names[0]}: {format_progress(curves[0].run)}', fontsize=11)
    else:
        lines = [figure.axes[0].plot([], [], color=colors[id(c)], label=name)[0] for c, name in zip(curves, names)]
        figure.legend(handles=lines, loc='outside upper center', ncols=min(len(lines), 4), frameon=False)
    figure.savefig(file)
    return file


def _panel_names(kind: Sequence[TrainingCurves]) -> list[str]:
    """What is drawn of runs of one kind; of figures that are not the paper's the first two, means before others."""
    found = list(dict.fromkeys(name for curves in kind for _, figures in curves.figures for name in figures))
    others = sorted(found, key=lambda name: not name.split('/')[-1].startswith('m'))[:2]
    lr = ['lr'] if any(lrs for curves in kind for _, lrs in curves.lrs) else []
    return ['loss', *lr, *([name for name in MAIN_METRICS if name in found] or others)]


def _line(points: Sequence[tuple[float, dict]], name) -> tuple[list[float], list[float]]:
    found = [(x, values[name]) for x, values in points if name in values]
    return [x for x, _ in found], [value if _is_drawn(value) else math.nan for _, value in found]


def _draw_losses(axis, kind: Sequence[TrainingCurves], colors: dict, smooth: float, alone: bool) -> None:
    for curves in kind:
        parts = [name for name in dict.fromkeys(n for _, losses in curves.losses for n in losses) if name != 'loss']
        color = colors[id(curves)]
        xs, values = _line(curves.losses, 'loss')
        if smooth:
            axis.plot(xs, values, color=color, lw=0.8, alpha=0.3)
        axis.plot(xs, ema(values, smooth), color=color, lw=1.8, label='total')
        if alone:
            for i, name in enumerate(parts if len(parts) > 1 else []):
                xs, values = _line(curves.losses, name)
                axis.plot(xs, ema(values, smooth), color=COLORS[1 + i % (len(COLORS) - 1)], lw=1, label=name)
            for i, x in enumerate(curves.resumed):
                axis.axvline(x, color='0.5', lw=0.8, ls=':', label='_' if i else 'resumed')
            axis.legend(fontsize=8, frameon=False, ncols=2)
    axis.set_ylim(bottom=0)


def _draw_lrs(axis, kind: Sequence[TrainingCurves], colors: dict, alone: bool) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    for curves in kind:
        layers = dict.fromkeys(layer for _, lrs in curves.lrs for layer in lrs)
        layers = sorted(layers, key=lambda layer: layer if isinstance(layer, int) else -1)
        shades = colormaps['viridis'].resampled(max(len(layers), 2))
        for i, layer in enumerate(layers):
            if alone or i in (0, len(layers) - 1):
                color = shades(i) if alone and len(layers) > 1 else colors[id(curves)]
                style = '-' if alone or i == len(layers) - 1 else '--'
                axis.plot(*_line(curves.lrs, layer), color=color, lw=1.4, ls=style, label=layer)
    if not alone:
        axis.set_title(f'{axis.get_title()} of the heads, of the first layer dashed', fontsize=11)
    elif not all(isinstance(layer, int) for layer in layers):
        axis.legend(fontsize=8, frameon=False)
    elif len(layers) > 1:
        norm = BoundaryNorm(range(len(layers) + 1), len(layers))
        bar = axis.figure.colorbar(ScalarMappable(norm, shades), ax=axis, pad=0.02)
        bar.set_ticks([i + 0.5 for i in range(len(layers))], labels=[str(layer) for layer in layers], fontsize=7)
        bar.set_label('layer id, the last: heads', fontsize=8)
    highest = max((value for line in axis.lines for value in line.get_ydata() if value > 0), default=0)
    if highest > 0:  # what a warmup begins with and poly ends with would take most of the panel
        lowest = min((v for line in axis.lines for v in line.get_ydata() if v > 0), default=highest)
        axis.set_yscale('log')
        axis.set_ylim(max(lowest, 1e-4 * highest) / 1.5, highest * 1.5)


def _draw_figure(axis, kind: Sequence[TrainingCurves], colors: dict, name: str) -> None:
    papers = {}
    for curves in kind:
        xs, values = _line(curves.figures, name)
        if all(map(math.isnan, values)):
            continue
        color = colors[id(curves)]
        axis.plot(xs, values, color=color, lw=1.6, marker='o', ms=3.5 if len(xs) < 60 else 0)
        best = max((i for i, value in enumerate(values) if not math.isnan(value)), key=values.__getitem__)
        text = f'{values[best]:.1f}' if name in MAIN_METRICS else f'{values[best]:.3g}'
        _annotate(axis, text, (xs[best], values[best]), color, ha='right')
        if curves.run.row is not None and name in curves.run.row.figures:
            papers.setdefault(curves.run.row.figures[name], color)
    for i, (value, color) in enumerate(sorted(papers.items())):
        axis.axhline(value, color=color, lw=1, ls='--', alpha=0.7)
        _annotate(axis, f'paper {value}', (0.01 + 0.17 * i, value), color, xycoords=axis.get_yaxis_transform())
    if name in MAIN_METRICS:
        axis.set_ylabel('%')
        low, high = axis.get_ylim()
        axis.set_ylim(max(min(low, high - 2), -0.5), max(high, low + 2) + 0.1 * (high - low))


def _annotate(axis, text: str, place: tuple[float, float], color, **settings) -> None:
    axis.annotate(text, place, xytext=(0, 4), textcoords='offset points', fontsize=8, color=color, **settings)


def _style_axis(axis, kind: Sequence[TrainingCurves]) -> None:
    unit = kind[0].unit
    if unit == 'updates' and all(accumulative_counts(config) == 1 for c in kind for _, config in c.run.starts):
        unit = 'iterations'
    axis.set_xlabel(unit)
    last = max(x for c in kind for x, _ in c.losses + c.figures)
    axis.set_xlim(0, 1.02 * last)
    if last >= 10_000:
        axis.xaxis.set_major_formatter(lambda x, _: f'{x / 1000:g}k' if x else '0')
    axis.grid(color='0.9', lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[['top', 'right']].set_visible(False)


def _names(folders: Sequence[Path]) -> list[str]:
    """Folders without what they have in common at their beginning."""
    if len(folders) == 1:
        return [str(folders[0])]
    paths = [folder.resolve() for folder in folders]
    common = Path(os.path.commonpath([path.parent for path in paths]))
    return [str(path.relative_to(common)) for path in paths]
