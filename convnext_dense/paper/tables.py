"""Rows of text as a table, for the terminal or as Markdown."""

from collections.abc import Sequence

# Columns that begin at the left; those of numbers end at the right.
TEXT_COLUMNS = ('recipe', 'config', 'figure', 'weights', 'notes', 'name', 'license', 'address', 'in the file', 'ours')


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """One line a row, in aligned columns."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    aligned = [
        [cell.ljust(n) if name in TEXT_COLUMNS else cell.rjust(n) for name, cell, n in zip(header, line, widths)]
        for line in lines
    ]
    if not markdown:
        return '\n'.join('  '.join(line).rstrip() for line in aligned)
    rule = ['-' * n if name in TEXT_COLUMNS else '-' * (n - 1) + ':' for name, n in zip(header, widths)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in [aligned[0], rule, *aligned[1:]])
