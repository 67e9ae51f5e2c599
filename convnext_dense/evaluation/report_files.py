"""Tables of a report, in the log and as CSV, and its plots: confusion matrix and precision-recall curves."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmengine.logging import print_log

NUM_WORST_IMAGES = 20  # that are drawn
MAX_ANNOTATED = 25  # classes up to which each cell has its number
MAX_LABELED = 10  # curves up to which each has a color and a name


def log_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Log a table; numbers with one digit, NaN as a dash."""
    from terminaltables import AsciiTable

    def format_cell(cell: object) -> str:
        return ('-' if math.isnan(cell) else f'{cell:.1f}') if isinstance(cell, float) else str(cell)

    table = AsciiTable([list(header), *([format_cell(cell) for cell in row] for row in rows)])
    for column in range(1, len(header)):
        table.justify_columns[column] = 'right'
    print_log(f'{title}\n{table.table}', logger='current')


def write_csv(file: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table; NaN as an empty cell."""
    with open(file, 'w', newline='', encoding='utf-8') as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        for row in rows:
            writer.writerow(['' if isinstance(cell, float) and math.isnan(cell) else cell for cell in row])


def mean_of_numbers(values: Sequence[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    numbers = np.asarray(values)[~np.isnan(values)]
    return float(numbers.mean()) if numbers.size else math.nan


def write_confusion_matrix(file: Path, counts: np.ndarray, names: Sequence[str], title: str) -> None:
    """Write a confusion matrix (C, C), whose rows are the ground truth, as CSV, and draw it in percent of its rows.

    The two files have the path `file` with another suffix.
    """
    from matplotlib.figure import Figure

    write_csv(file.with_suffix('.csv'), ['', *names], [[name, *row] for name, row in zip(names, counts)])
    percent, n = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1), len(names)
    side = 3 + n * (0.45 if n <= MAX_ANNOTATED else 0.16)
    figure = Figure(figsize=(side + 0.8, side), dpi=110, layout='constrained')
    axes = figure.add_subplot()
    image = axes.imshow(percent, cmap='Blues', vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, shrink=0.7, label='% of the row')
    size = 9 if n <= MAX_ANNOTATED else 6
    axes.set_xticks(range(n), names, rotation=90, fontsize=size)
    axes.set_yticks(range(n), names, fontsize=size)
    axes.set(xlabel='predicted', ylabel='ground truth', title=title)
    if n <= MAX_ANNOTATED:
        for (i, j), value in np.ndenumerate(percent):
            if counts[i, j]:
                text = f'{value:.0f}' if value >= 0.5 else '<1'
                axes.text(j, i, text, ha='center', va='center', fontsize=8, color='white' if value > 55 else 'black')
    figure.savefig(file.with_suffix('.png'))


def plot_pr_curves(precision: np.ndarray, recalls: np.ndarray, names: Sequence[str], file: Path, title: str) -> None:
    """Draw precision over recall: by class at IoU 0.5, and of their mean at each IoU.

    Args:
        precision: Precision (T, R, C) at IoU 0.5, 0.55, ..., at each recall, by class; negative for a class without
            objects.
        recalls: Recall of each point, (R,).
        names: Names of the classes.
        file: Path of the image.
        title: Title above the plot.
    """
    from matplotlib.figure import Figure

    precision = np.where(precision < 0, np.nan, precision)
    present = [i for i in range(len(names)) if not np.isnan(precision[0, 0, i])]
    figure = Figure(figsize=(11, 4.8), dpi=110, layout='constrained')
    figure.suptitle(title)
    by_class, by_iou = figure.subplots(1, 2, sharey=True)
    for i in sorted(present, key=lambda i: -precision[0, :, i].mean()):
        style = dict(lw=1.6, label=f'{names[i]} {100 * precision[0, :, i].mean():.1f}')
        by_class.plot(
            recalls, precision[0, :, i], **(style if len(present) <= MAX_LABELED else dict(color='0.75', lw=0.7))
        )
    for t, curves in enumerate(precision[:, :, present] if present else ()):
        iou, mean = 0.5 + 0.05 * t, curves.mean(1)
        label = f'{iou:.2f}: {100 * mean.mean():.1f}'
        by_iou.plot(recalls, mean, color=(0.05, 0.25 + 0.06 * t, 0.75), alpha=1 - 0.07 * t, label=label)
        if t == 0:
            by_class.plot(recalls, mean, color='black', lw=2.2, label=f'mean {100 * mean.mean():.1f}')
    titles = (f'by class at IoU 0.5 (AP50){_extremes(precision[0], present, names)}', 'mean over classes by IoU (AP)')
    for axes, text in zip((by_class, by_iou), titles):
        axes.set(xlabel='recall', ylabel='precision', xlim=(0, 1), ylim=(0, 1.02))
        axes.set_title(text, fontsize=10)
        axes.grid(alpha=0.3)
        if present:
            axes.legend(fontsize=8, loc='lower left')
    figure.savefig(file)


def _extremes(precision: np.ndarray, present: Sequence[int], names: Sequence[str]) -> str:
    """Return the best and the worst class, where classes are too many for a legend."""
    if len(present) <= MAX_LABELED:
        return ''
    order = sorted(present, key=lambda i: precision[:, i].mean())
    worst, best = (f'{names[i]} {100 * precision[:, i].mean():.1f}' for i in (order[0], order[-1]))
    return f'\nbest {best}, worst {worst}'
