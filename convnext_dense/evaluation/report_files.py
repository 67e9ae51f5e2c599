"""Tables of a report: in the log, and as CSV."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmengine.logging import print_log

NUM_WORST_IMAGES = 20  # that are drawn


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
