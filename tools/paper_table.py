#!/usr/bin/env python
"""The paper's results next to those of your own work dirs.

Below ConvNeXt's thirteen stand the paper's baselines, later publications and recipes that nobody trained, with sources
in docs/recipes.md.
`last` and `best` are evaluations during training, `tested` is by tools/test.py; `difference` is ours minus the paper's.
Recipes without a run stay empty.
"""

import argparse
from pathlib import Path

import environment  # noqa: F401

from convnext_dense.cli.arguments import ArgumentParser
from convnext_dense.cli.exit import exit_on_error
from convnext_dense.errors import UsageError
from convnext_dense.paper.results import MAIN_METRICS, RESULTS
from convnext_dense.paper.tables import format_table
from convnext_dense.paper.work_dirs import TrainingRun, find_runs

HEADER = ('recipe', 'metric', 'paper', 'last', 'best', 'tested', 'difference', 'vs. paper')
HEADER += ('done', 'precision', 'batch', 'notes')
UNTRAINED = 'untrained'  # in the place of a metric that nobody has published
ALIGN = 'll' + 'r' * (len(HEADER) - 3) + 'l'


def parse_args():
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='*', help='work dirs, or folders that contain them (default: work_dirs)')
    parser.add_argument('--markdown', action='store_true', help='print a Markdown table')
    parser.add_argument('--plot', metavar='FILE', help='draw the paper and ours as bars: a .png, .pdf or .svg')
    return parser.parse_args()


def table_rows(runs: list[TrainingRun]) -> list[list[str]]:
    """A row for each metric of each result of the paper and each run; runs of other configs come last."""
    rows = []
    for result in RESULTS:
        for run in [run for run in runs if run.paper_result is result] or [None]:
            rows += [_row(result.recipe, n, result.metrics.get(n, UNTRAINED), run) for n in result.main_metrics]
    for run in runs:
        if run.paper_result is None:
            metrics = [name for name in MAIN_METRICS if run.best(name) is not None or run.last_test(name)]
            rows += [_row(str(run.work_dir), name, None, run) for name in metrics or ['-']]
    return rows


def _row(title: str, metric: str, paper: float | str | None, run: TrainingRun | None) -> list[str]:
    cells = [title, metric, _fmt(paper)]
    if run is None:
        return [*cells, *[''] * (len(HEADER) - len(cells))]
    test = run.last_test(metric)
    difference, comparison = run.compare_to_paper(metric) if isinstance(paper, float) else (None, '')
    return [
        *cells,
        _fmt(run.last(metric)),
        _fmt(run.best(metric)),
        _fmt(test and test.metrics[metric]),
        '' if difference is None else f'{difference:+.1f}',
        comparison,
        f'{run.done:,.0f}/{run.length:,.0f}' if run.has_training else '',
        run.precision if run.has_training else '',
        str(run.total_batch or '') if run.has_training else '',
        '; '.join(_notes(run)),
    ]


def _notes(run: TrainingRun) -> list[str]:
    notes = [] if run.paper_result is None else [str(run.work_dir)]
    notes += [f'tested: {name}' for name in dict.fromkeys(record.checkpoint for record in run.eval_records)]
    if run.has_training and run.paper_result and run.deviations():
        notes.append(f'differs from the recipe: {", ".join(run.deviations())}')
    if run.has_training and not run.is_finished:
        notes.append(f'not finished, last logged {run.last_logged:%Y-%m-%d %H:%M}')
    return notes + run.issues


def _fmt(value: float | str | None) -> str:
    return '' if value is None else value if isinstance(value, str) else f'{value:.1f}'


def draw(runs: list[TrainingRun], file: str) -> None:
    """Draw box AP and mIoU of each recipe as bars: the paper's, and ours of finished trainings and of other tests."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5), layout='constrained')
    for panel, metric in zip(panels, ('box AP', 'mIoU')):
        results = [result for result in RESULTS if metric in result.metrics]
        final = [(run, run.final(metric)) for run in runs if run.paper_result in results]
        value_of_recipe = {run.paper_result.recipe: value for run, value in final if value is not None}
        heights = [value_of_recipe.get(result.recipe) for result in results]
        xs = range(len(results))
        panel.bar([x - 0.2 for x in xs], [r.metrics[metric] for r in results], 0.4, label='paper', color='0.75')
        bars = panel.bar([x + 0.2 for x in xs], [h or 0 for h in heights], 0.4, label='ours', color='tab:blue')
        panel.bar_label(bars, [_fmt(h) for h in heights])
        panel.set_xticks(list(xs), [result.recipe for result in results], rotation=30, ha='right')
        panel.set_ylabel(f'{metric}, %')
        panel.margins(y=0.15)
        panel.legend(loc='upper left', ncols=2)
    try:
        figure.savefig(file)
    except ValueError as error:
        raise UsageError(f"--plot '{file}': {error}") from error


def main():
    args = parse_args()
    with exit_on_error():
        folders = args.folders or ['work_dirs'] * Path('work_dirs').is_dir()
        runs = find_runs(folders)
        print(format_table(HEADER, table_rows(runs), ALIGN, args.markdown))
        if args.plot:
            draw(runs, args.plot)


if __name__ == '__main__':
    main()
