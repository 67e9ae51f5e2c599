"""What tests of the documentation share: pages, and what is in them."""

import re

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


def code_blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of each block of code."""
    return re.findall(r'^ *```(\w*)\n(.*?)^ *```', page, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[tuple[str, str]]:
    """Blocks of code without their comments, which are translated."""
    return [(language, re.sub(r' +# .*', '', code)) for language, code in code_blocks(page)]


def linked(page: str) -> set[str]:
    """Targets of links and pictures."""
    return set(re.findall(r'\]\(([^)\s]+)\)', page))


def tables(page: str) -> list[list[str]]:
    """Cells of all rows of tables."""
    return [
        [cell.strip() for cell in line.strip('|').split('|')] for line in re.findall(r'^\|.*\|$', page, re.MULTILINE)
    ]
