"""Text tables for the terminal or as Markdown."""

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = 'l', markdown: bool = False) -> str:
    """Format rows as a table with aligned columns.

    Args:
        header: Names of the columns.
        rows: Cells of each row, as many as there are columns.
        align: 'l' or 'r' for each column from the first on; columns without a letter are aligned right, as numbers.
        markdown: Whether to write a Markdown table.

    Returns:
        The table, one line per row.
    """
    align = align.ljust(len(header), 'r')
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    aligned = [
        [cell.ljust(n) if side == 'l' else cell.rjust(n) for cell, n, side in zip(line, widths, align)]
        for line in lines
    ]
    if not markdown:
        return '\n'.join('  '.join(line).rstrip() for line in aligned)
    rule = ['-' * n if side == 'l' else '-' * (n - 1) + ':' for n, side in zip(widths, align)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in [aligned[0], rule, *aligned[1:]])
