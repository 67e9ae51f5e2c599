"""Training curves from mmengine's logs: losses, learning rates by layer and metrics, drawn as one plot."""

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import accumulate, cycle, groupby
from pathlib import Path

from mmengine.config import Config

from ..config.work_dir import TIMESTAMP_GLOB
from ..engine.lr_finder import ema
from ..errors import UsageError
from ..type_names import TASKS
from .results import MAIN_METRICS, to_paper_metrics
from .session import Session
from .work_dirs import TrainingRun, find_runs

NOT_METRICS = ('step', 'iter', 'epoch', 'time', 'data_time', 'memory')  # logged next to an evaluation's metrics
MAX_DRAWN = 1e100  # matplotlib has no tick labels for much larger values
MAX_MARKERS = 60  # a longer curve is drawn without markers
COLORS = ('#0b6fb8', '#d1495b', '#2e8b57', '#e08e1a', '#7a4fa3', '#8c564b', '#17a2b8', '#b5a900', '#d667b0', '#555555')


@dataclass
class TrainingCurves:
    """Logged values of a training by progress x. Values that a resumed run repeats replace the earlier ones.

    Attributes:
        run: The training.
        unit: Unit of x: 'epochs', or 'optimizer steps' if the training is iteration-based.
        losses: (x, total loss and its parts by name).
        lrs: (x, learning rate by layer id), or by mmengine's names ('lr', 'base_lr') if the scales of the layers are
            unknown.
        metrics: (x, metrics of an evaluation): the paper's in percent, others as logged.
        resume_points: Values of x at which later sessions resumed the training.
        color: Color of the training among others.
    """

    run: TrainingRun
    unit: str
    losses: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    lrs: list[tuple[float, dict[int | str, float]]] = field(default_factory=list)
    metrics: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    resume_points: list[float] = field(default_factory=list)
    color: str = COLORS[0]

    @property
    def panel_key(self) -> tuple[str, str]:
        """Task and unit of x; curves with the same key share panels."""
        scope = self.run.config.get('default_scope', '')
        return TASKS.get(scope, scope), self.unit


def read_curves(folders: Iterable[str | Path]) -> list[TrainingCurves]:
    """Read the curves of every training in and below folders.

    Args:
        folders: Work dirs, or folders that contain them.

    Returns:
        The curves; trainings without a logged iteration are skipped.

    Raises:
        UsageError: If a folder does not exist or contains no training with a logged iteration.
    """
    by_work_dir = {}
    for folder in folders:
        if fnmatch(Path(folder).name, TIMESTAMP_GLOB):
            raise UsageError(f'{folder} is one session of a run: give its work dir, {Path(folder).parent}')
        runs = find_runs([folder])
        curves = [curves for run in runs if run.sessions and (curves := _curves_of(run)).losses]
        if not curves:
            raise UsageError(f'{folder} {_why_no_curves(runs)}: give the work dir of a training')
        by_work_dir |= {c.run.work_dir.resolve(): c for c in curves}
    return list(by_work_dir.values())


def _why_no_curves(runs: Sequence[TrainingRun]) -> str:
    if not runs:
        return 'holds no run'
    return 'has logged no iteration yet' if any(run.has_training for run in runs) else 'holds only tests'


def _curves_of(run: TrainingRun) -> TrainingCurves:
    curves = TrainingCurves(run, run.unit)
    for session in run.sessions:
        _add_session(curves, session)
    _report_undrawn(curves)
    return curves


def _add_session(curves: TrainingCurves, session: Session) -> None:
    last_x = curves.losses[-1][0] if curves.losses else 0.0
    for i, raw_record in enumerate(session.records):
        record = {re.sub('^(train|val)/', '', key): value for key, value in raw_record.items()}  # of log_with_hierarchy
        is_training = 'loss' in record or 'lr' in record
        x = last_x = _x_value(record, is_training, session, last_x)
        if i == 0:  # a later session resumed the run before its first record
            _drop_overlap(curves, x, is_training)
        if is_training:
            curves.losses.append((x, _losses(record)))
            curves.lrs.append((x, layer_lrs(record, session.facts.layer_lr_scales, session.config)))
        elif metrics := _metrics(record):
            curves.metrics.append((x, metrics))


def _report_undrawn(curves: TrainingCurves) -> None:
    """Add values that cannot be drawn to the issues of the run, which contain non-finite losses already."""
    points = [*curves.losses, *curves.lrs, *curves.metrics]
    undrawn = [(x, name, v) for x, values in points for name, v in values.items() if not _is_drawn(v)]
    undrawn = [(x, name, v) for x, name, v in undrawn if name != 'loss' or math.isfinite(v)]
    if undrawn:
        x, name, value = undrawn[0]
        name = f'lr of layer {name}' if isinstance(name, int) else name
        more_values = f', nor are {len(undrawn) - 1} more values' if len(undrawn) > 1 else ''
        curves.run.issues.append(f'{name} {value:g} at {x:g} {curves.unit} is not drawn{more_values}')


def _is_drawn(value: float) -> bool:
    return abs(value) <= MAX_DRAWN  # False for NaN


def _drop_overlap(curves: TrainingCurves, x: float, is_training: bool) -> None:
    """Remove the values at or after the first record of a later session, at `x`.

    If that record is an evaluation, training values at `x` are kept.
    """
    if curves.losses:
        curves.resume_points = [r for r in curves.resume_points if r < x] + [x]
    for name in ('losses', 'lrs', 'metrics'):
        keep_x = name != 'metrics' and not is_training
        points = getattr(curves, name)
        setattr(curves, name, [point for point in points if point[0] < x or (keep_x and point[0] == x)])


def _x_value(record: dict, is_training: bool, session: Session, last_x: float) -> float:
    """Return the progress at a record.

    By default, mmengine logs the epoch as the step of an evaluation. In an iteration-based training that step is
    meaningless, so the evaluation gets the progress of the last training record.
    """
    if is_training:
        return session.progress_at(record)
    step = record.get('step', 0)
    logger = (session.config.get('default_hooks') or {}).get('logger') or {}
    step_is_epoch = logger.get('log_metric_by_epoch', True)
    if session.by_epoch:
        return step if step_is_epoch else step / session.min_iters_per_epoch
    return last_x if step_is_epoch else step / session.facts.accumulation_steps


def layer_lrs(record: dict, scales: dict[int, float], config: Config) -> dict[int | str, float]:
    """Compute the learning rate of each layer at a logged iteration.

    mmengine logs two learning rates: `lr` of the first parameter group, and `base_lr` for a scale of 1. Schedules apply
    the same affine map to all groups (a factor and, with `eta_min`, a summand), which these two values determine.

    Args:
        record: Logged numbers by name.
        scales: Learning rate scale by layer id, in the order of the parameter groups.
        config: Config of the session.

    Returns:
        Learning rate by layer id; the logged values if `scales` is empty.
    """
    if 'lr' not in record:
        return {}
    lr, first_scale = record['lr'], next(iter(scales.values()), None)
    if not first_scale:
        differs = 'base_lr' in record and record['base_lr'] != lr
        return {'lr': lr} | ({'base_lr': record['base_lr']} if differs else {})
    if first_scale == 1:
        return dict.fromkeys(scales, lr)
    scaled_later = (config.get('auto_scale_lr') or {}).get('enable')  # mmengine does not scale base_lr
    base = lr / first_scale if scaled_later else record.get('base_lr', lr / first_scale)
    return {layer: base + (lr - base) * (1 - scale) / (1 - first_scale) for layer, scale in scales.items()}


def _losses(record: dict) -> dict[str, float]:
    """Return the total loss and its parts, summed over cascade stages and decoder layers (`s0.loss_cls`)."""
    losses = {}
    for key, value in record.items():
        if 'loss' in key.split('.')[-1] and isinstance(value, (int, float)):
            name = re.sub(r'^[a-z]\d+\.', '', key)
            losses[name] = losses.get(name, 0) + value
    return losses


def _metrics(record: dict) -> dict[str, float]:
    return to_paper_metrics(record) or {
        key: value for key, value in record.items() if key not in NOT_METRICS and isinstance(value, (int, float))
    }


def format_progress(run: TrainingRun) -> str:
    """Format progress and metrics of a run in one line, such as '12.4 of 36 epochs, box AP 40.0 (best 41.2)'."""
    progress = f'{math.floor(10 * run.progress) / 10:,.1f}'.removesuffix('.0')
    parts = [f'{progress} of {run.length:,.0f} {run.unit}' if run.length else f'{progress} {run.unit}']
    for metric in MAIN_METRICS:
        if run.last(metric) is not None:
            parts.append(f'{metric} {run.last(metric):.1f} (best {run.best(metric):.1f})')
    return ', '.join(parts)


def plot(curves: Sequence[TrainingCurves], file: str | Path, smooth: float = 0.0) -> Path:
    """Plot trainings: for each task and unit, one panel for the loss, one for the learning rate, and one per metric.

    A single run is drawn with the parts of its loss and the learning rates of all layers; several runs with their total
    loss and the learning rates of the first layer and the heads.

    Args:
        curves: Curves of one or more trainings.
        file: Path of the image. A path without suffix gets .png.
        smooth: Factor of the exponential moving average of losses, in [0, 1).

    Returns:
        The path of the image.

    Raises:
        UsageError: If matplotlib does not support the suffix.
    """
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.figure import Figure

    file = Path(file) if Path(file).suffix else Path(f'{file}.png')
    if file.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise UsageError(f"--out '{file}': give a name that ends with .png, .pdf or .svg")
    for each, color in zip(curves, cycle(COLORS)):
        each.color = color
    groups = [list(g) for _, g in groupby(sorted(curves, key=lambda c: c.panel_key), lambda c: c.panel_key)]
    n_rows = [math.ceil(len(_panel_names(group)) / 2) for group in groups]
    figure = Figure(figsize=(11, 0.6 + 3.4 * sum(n_rows)), dpi=130, layout='constrained')
    grid = figure.add_gridspec(sum(n_rows), 2)
    for group, row in zip(groups, accumulate([0, *n_rows])):
        title = '' if len(groups) == 1 else f'{group[0].panel_key[0]}: '.removeprefix(': ')
        _draw_group(figure, grid, row, group, title, smooth, single_run=len(curves) == 1)
    names = _names([c.run.work_dir for c in curves])
    if len(curves) == 1:
        figure.suptitle(f'{names[0]}: {format_progress(curves[0].run)}', fontsize=11)
    else:
        lines = [figure.axes[0].plot([], [], color=c.color, label=name)[0] for c, name in zip(curves, names)]
        figure.legend(handles=lines, loc='outside upper center', ncols=min(len(lines), 4), frameon=False)
    figure.savefig(file)
    return file


def _draw_group(
    figure, grid, row: int, group: Sequence[TrainingCurves], title: str, smooth: float, single_run: bool
) -> None:
    """Draw the panels of runs with the same task and unit, two per row of the grid."""
    panels = _panel_names(group)
    for i, name in enumerate(panels):
        full_width = i % 2 == 0 and i == len(panels) - 1
        axis = figure.add_subplot(grid[row + i // 2, slice(2) if full_width else i % 2])
        axis.set_title(f'{title}{name}', fontsize=11)
        if name == 'loss':
            _draw_losses(axis, group, smooth, single_run)
        elif name == 'lr':
            _draw_lrs(axis, group, single_run)
        else:
            _draw_metric(axis, group, name)
        _style_axis(axis, group)


def _panel_names(group: Sequence[TrainingCurves]) -> list[str]:
    """Return the names of the panels; of metrics that are not the paper's, only two, means first."""
    metrics = list(dict.fromkeys(name for curves in group for _, values in curves.metrics for name in values))
    other_metrics = sorted(metrics, key=lambda name: not name.split('/')[-1].startswith('m'))[:2]
    lr = ['lr'] if any(lrs for curves in group for _, lrs in curves.lrs) else []
    return ['loss', *lr, *([name for name in MAIN_METRICS if name in metrics] or other_metrics)]


def _line(points: Sequence[tuple[float, dict]], name) -> tuple[list[float], list[float]]:
    named = [(x, values[name]) for x, values in points if name in values]
    return [x for x, _ in named], [value if _is_drawn(value) else math.nan for _, value in named]


def _plot_line(axis, xs: Sequence[float], values: Sequence[float], **style) -> None:
    """Draw a curve; values without neighbors get a marker, because there is no line to see."""
    drawn = [math.isfinite(value) for value in values]
    single = [i for i, ok in enumerate(drawn) if ok and not any(drawn[max(i - 1, 0) : i] + drawn[i + 1 : i + 2])]
    axis.plot(xs, values, **{'marker': 'o', 'ms': 4, 'markevery': single, **style})


def _draw_losses(axis, group: Sequence[TrainingCurves], smooth: float, single_run: bool) -> None:
    for curves in group:
        xs, values = _line(curves.losses, 'loss')
        if smooth:
            _plot_line(axis, xs, values, color=curves.color, lw=0.8, alpha=0.3)
        _plot_line(axis, xs, ema(values, smooth), color=curves.color, lw=1.8, label='total')
    if single_run:
        names = dict.fromkeys(name for _, losses in curves.losses for name in losses if name != 'loss')
        for i, name in enumerate(names if len(names) > 1 else []):
            xs, values = _line(curves.losses, name)
            _plot_line(axis, xs, ema(values, smooth), color=COLORS[1 + i % (len(COLORS) - 1)], lw=1, label=name)
        for i, x in enumerate(curves.resume_points):
            axis.axvline(x, color='0.5', lw=0.8, ls=':', label='_' if i else 'resumed')
        axis.legend(fontsize=8, frameon=False, ncols=2)
    axis.set_ylim(bottom=0)


def _draw_lrs(axis, group: Sequence[TrainingCurves], single_run: bool) -> None:
    if single_run:
        _draw_all_layers(axis, group[0])
    else:
        for curves in group:
            layers = _layers(curves)
            for layer in dict.fromkeys([*layers[:1], *layers[-1:]]):
                line_style = '-' if layer == layers[-1] else '--'
                _plot_line(axis, *_line(curves.lrs, layer), color=curves.color, lw=1.4, ls=line_style)
        axis.set_title(f'{axis.get_title()} of the heads, of the first layer dashed', fontsize=11)
    positive = [value for line in axis.lines for value in line.get_ydata() if value > 0]
    if positive:  # the start of a warmup and the end of a poly schedule would dominate the panel
        axis.set_yscale('log')
        axis.set_ylim(max(min(positive), 1e-4 * max(positive)) / 1.5, max(positive) * 1.5)


def _layers(curves: TrainingCurves) -> list[int | str]:
    """Return the layer ids in order, after mmengine's names."""
    layers = dict.fromkeys(layer for _, lrs in curves.lrs for layer in lrs)
    return sorted(layers, key=lambda layer: layer if isinstance(layer, int) else -1)


def _draw_all_layers(axis, curves: TrainingCurves) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    layers = _layers(curves)
    shades = colormaps['viridis'].resampled(max(len(layers), 2))
    for i, layer in enumerate(layers):
        style = dict(color=shades(i) if len(layers) > 1 else curves.color, lw=1.4, label=layer)
        _plot_line(axis, *_line(curves.lrs, layer), **style)
    if not all(isinstance(layer, int) for layer in layers):
        axis.legend(fontsize=8, frameon=False)
    elif len(layers) > 1:
        norm = BoundaryNorm(range(len(layers) + 1), len(layers))
        bar = axis.figure.colorbar(ScalarMappable(norm, shades), ax=axis, pad=0.02)
        bar.set_ticks([i + 0.5 for i in range(len(layers))], labels=[str(layer) for layer in layers], fontsize=7)
        bar.set_label('layer id, the last: heads', fontsize=8)


def _draw_metric(axis, group: Sequence[TrainingCurves], name: str) -> None:
    paper_values = {}
    for curves in group:
        xs, values = _line(curves.metrics, name)
        if all(map(math.isnan, values)):
            continue
        markers = dict(ms=3.5, markevery=1) if len(xs) < MAX_MARKERS else {}
        _plot_line(axis, xs, values, color=curves.color, lw=1.6, **markers)
        best = max((i for i, value in enumerate(values) if not math.isnan(value)), key=values.__getitem__)
        text = f'{values[best]:.1f}' if name in MAIN_METRICS else f'{values[best]:.3g}'
        _annotate(axis, text, (xs[best], values[best]), curves.color, ha='right')
        paper = curves.run.paper_result
        if paper is not None and name in paper.metrics:
            paper_values.setdefault(paper.metrics[name], curves.color)
    for i, (value, color) in enumerate(sorted(paper_values.items())):
        axis.axhline(value, color=color, lw=1, ls='--', alpha=0.7)
        _annotate(axis, f'paper {value}', (0.01 + 0.17 * i, value), color, xycoords=axis.get_yaxis_transform())
    if name in MAIN_METRICS:
        axis.set_ylabel('%')
        low, high = axis.get_ylim()
        axis.set_ylim(max(min(low, high - 2), -0.5), max(high, low + 2) + 0.1 * (high - low))


def _annotate(axis, text: str, xy: tuple[float, float], color, **settings) -> None:
    axis.annotate(text, xy, xytext=(0, 4), textcoords='offset points', fontsize=8, color=color, **settings)


def _style_axis(axis, group: Sequence[TrainingCurves]) -> None:
    unit = group[0].unit
    is_iteration = all(session.facts.accumulation_steps == 1 for c in group for session in c.run.sessions)
    axis.set_xlabel('iterations' if unit == 'optimizer steps' and is_iteration else unit)
    max_x = max(x for c in group for x, _ in c.losses + c.metrics)
    axis.set_xlim(0, 1.02 * max_x)
    if max_x >= 10_000:
        axis.xaxis.set_major_formatter(lambda x, _: f'{x / 1000:g}k' if x else '0')
    axis.grid(color='0.9', lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[['top', 'right']].set_visible(False)


def _names(work_dirs: Sequence[Path]) -> list[str]:
    """Return the paths of work dirs without their common part."""
    if len(work_dirs) == 1:
        return [str(work_dirs[0])]
    paths = [work_dir.resolve() for work_dir in work_dirs]
    common = Path(os.path.commonpath([path.parent for path in paths]))
    return [str(path.relative_to(common)) for path in paths]
