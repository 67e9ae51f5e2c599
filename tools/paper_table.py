#!/usr/bin/env python
"""The paper's tables with what your own work dirs hold beside them.

`last` and `best` are evaluations during training, `tested` is by tools/test.py; `difference` is ours minus the paper's.
Rows without a run stay empty.
"""

import argparse
from pathlib import Path

import environment  # noqa: F401

from convnext_dense.cli.arguments import ArgumentParser
from convnext_dense.cli.exit import exit_on_error
from convnext_dense.errors import UsageError
from convnext_dense.paper.results import MAIN_METRICS, PAPER_RESULTS
from convnext_dense.paper.tables import format_table
from convnext_dense.paper.work_dirs import TrainingRun, find_runs

HEADER = ('recipe', 'figure', 'paper', 'last', 'best', 'tested', 'difference', 'expected')
HEADER += ('done', 'precision', 'batch', 'notes')


def parse_args():
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='*', help='work dirs, or folders that hold them (default: work_dirs)')
    parser.add_argument('--markdown', action='store_true', help='a table for a README')
    parser.add_argument('--picture', metavar='FILE', help='bars, the paper against ours, as .png, .pdf or .svg')
    return parser.parse_args()


def lines(runs: list[TrainingRun]) -> list[list[str]]:
    """A line for each figure of each row and run; runs that are no row of the paper's come last."""
    found = []
    for row in PAPER_RESULTS:
        for run in [run for run in runs if run.row is row] or [None]:
            found += [_line(row.recipe, name, row.figures[name], run) for name in MAIN_METRICS if name in row.figures]
    for run in runs:
        if run.row is None:
            names = [name for name in MAIN_METRICS if run.best(name) is not None or run.test(name)]
            found += [_line(str(run.folder), name, None, run) for name in names or ['-']]
    return found


def _line(title: str, figure: str, paper: float | None, run: TrainingRun | None) -> list[str]:
    first = [title, figure, _number(paper)]
    if run is None:
        return [*first, *[''] * (len(HEADER) - len(first))]
    test = run.test(figure)
    difference, verdict = run.verdict(figure) if paper is not None else (None, '')
    return [
        *first,
        _number(run.last(figure)),
        _number(run.best(figure)),
        _number(test and test.figures[figure]),
        '' if difference is None else f'{difference:+.1f}',
        verdict,
        f'{run.done:,.0f}/{run.length:,.0f}' if run.trained else '',
        run.precision if run.trained else '',
        str(run.total_batch or '') if run.trained else '',
        '; '.join(_notes(run)),
    ]


def _notes(run: TrainingRun) -> list[str]:
    notes = [] if run.row is None else [str(run.folder)]
    notes += [f'tested: {name}' for name in dict.fromkeys(test.checkpoint for test in run.tests)]
    if run.trained and run.row and run.departures():
        notes.append(f'not as the recipe: {", ".join(run.departures())}')
    if run.trained and not run.finished:
        notes.append(f'not finished, last written {run.written:%Y-%m-%d %H:%M}')
    return notes + run.problems


def _number(value: float | None) -> str:
    return '' if value is None else f'{value:.1f}'


def draw(runs: list[TrainingRun], file: str) -> None:
    """Two panels of bars: box AP and mIoU of each row, the paper's and ours, of finished trainings and other tests."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5), layout='constrained')
    for panel, name in zip(panels, ('box AP', 'mIoU')):
        rows = [row for row in PAPER_RESULTS if name in row.figures]
        ours = {}
        for run in runs:
            if run.row in rows and run.result(name) is not None:
                ours[run.row.recipe] = run.result(name)
        places = range(len(rows))
        panel.bar([i - 0.2 for i in places], [row.figures[name] for row in rows], 0.4, label='paper', color='0.75')
        bars = panel.bar(
            [i + 0.2 for i in places], [ours.get(row.recipe, 0) for row in rows], 0.4, label='ours', color='tab:blue'
        )
        panel.bar_label(bars, [_number(ours.get(row.recipe)) for row in rows])
        panel.set_xticks(list(places), [row.recipe for row in rows], rotation=30, ha='right')
        panel.set_ylabel(f'{name}, %')
        panel.margins(y=0.15)
        panel.legend(loc='upper left', ncols=2)
    try:
        figure.savefig(file)
    except ValueError as error:
        raise UsageError(f"--picture '{file}': {error}") from error


def main():
    args = parse_args()
    with exit_on_error():
        folders = args.folders or ['work_dirs'] * Path('work_dirs').is_dir()
        runs = find_runs(folders)
        print(format_table(HEADER, lines(runs), args.markdown))
        if args.picture:
            draw(runs, args.picture)


if __name__ == '__main__':
    main()
