"""Documentation pages and their content."""

import re
from collections.abc import Iterable

from convnext_dense.paper.results import PaperResult
from convnext_dense.paper.tables import format_table
from helpers.paths import ROOT

README = (ROOT / 'README.md').read_text()
README_ZH = (ROOT / 'README_zh-CN.md').read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [
        ROOT / 'README.md',
        ROOT / 'README_zh-CN.md',
        ROOT / 'CHANGELOG.md',
        ROOT / 'CONTRIBUTING.md',
        *sorted((ROOT / 'docs').rglob('*.md')),
    ]
}


RESULTS_HEADER = ('recipe', 'weights', 'precision', 'box AP', 'mask AP', 'mIoU', 'mIoU multi-scale')
RESULTS_HEADER += ('parameters', 'FLOPs')
UNTRAINED = ('untrained', '', '', '')  # instead of metrics


def results_table(results: Iterable[PaperResult], name: str) -> str:
    """The table of results that a page should have; `name` is a template of the name of a recipe."""
    rows = [
        [
            name.format(row.recipe),
            {'1k': 'ImageNet-1K', '22k': 'ImageNet-22K'}.get(row.pretraining, row.pretraining),
            row.precision,
            *([str(row.metrics.get(metric, '')) for metric in RESULTS_HEADER[3:7]] if row.metrics else UNTRAINED),
            f'{row.params_m}M' if row.params_m else '',
            f'{row.gflops}G' if row.gflops else '',
        ]
        for row in results
    ]
    return format_table(RESULTS_HEADER, rows, 'll', markdown=True)


def code_blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of each block of code."""
    return re.findall(r'^ *```(\w*)\n(.*?)^ *```', page, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[tuple[str, str]]:
    """Blocks of code without their comments, which are translated."""
    return [(language, re.sub(r' +# .*', '', code)) for language, code in code_blocks(page)]


def link_targets(page: str) -> set[str]:
    """Targets of links and pictures."""
    return set(re.findall(r'\]\(([^)\s]+)\)', page))


def tables(page: str) -> list[list[str]]:
    """Cells of all rows of tables."""
    return [
        [cell.strip() for cell in line.strip('|').split('|')] for line in re.findall(r'^\|.*\|$', page, re.MULTILINE)
    ]
