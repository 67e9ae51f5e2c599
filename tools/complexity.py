#!/usr/bin/env python
"""Parameters and FLOPs as the paper counts them, of one config or of every recipe beside the paper's figure.

Needs no data, no weights and no GPU. A multiply-add counts as one; docs/recipes.md says what is counted.
"""

import json
import sys
from contextlib import redirect_stdout

import environment  # noqa: F401

from convnext_dense.cli.arguments import make_config_parser
from convnext_dense.cli.exit import exit_on_error
from convnext_dense.config.load import load_config
from convnext_dense.paper.departures import CONFIGS
from convnext_dense.paper.flops import count_flops
from convnext_dense.paper.results import PAPER_RESULTS, find_paper_result
from convnext_dense.paper.tables import format_table

SIZES = {'mmdet': (1280, 800), 'mmseg': (2048, 512)}  # of a config that is no row of the paper


def parse_args():
    parser = make_config_parser(__doc__, nargs='?')
    parser.add_argument('--all', action='store_true', help='every recipe')
    parser.add_argument('--size', nargs=2, type=int, metavar=('WIDTH', 'HEIGHT'), help="default: the paper's")
    parser.add_argument('--json', action='store_true', help='for machines: parameters and FLOPs as whole numbers')
    args = parser.parse_args()
    if bool(args.config) == args.all:
        parser.error('give a config or --all')
    if args.size and min(args.size) < 1:
        parser.error(f'--size {args.size[0]} {args.size[1]}: give pixels, at least 1')
    return args


def count(path: str, options: dict, size: tuple[int, int] | None) -> dict:
    config = load_config(path, options)
    row = find_paper_result(config)
    counted = count_flops(
        config, tuple(size or (row.size if row else SIZES.get(config.get('default_scope'), (1280, 800))))
    )
    return {
        'config': str(path),
        'size': counted.size,
        'parameters': counted.parameters,
        'flops': counted.flops,
        'paper_parameters_m': row.params if row else None,
        'paper_gflops': row.gflops if row and row.size == counted.size else None,
    }


def main():
    args = parse_args()
    with exit_on_error():
        paths = [CONFIGS / f'{row.recipe}.py' for row in PAPER_RESULTS] if args.all else [args.config]
        with redirect_stdout(sys.stderr):  # libraries print as they are imported
            found = [count(path, args.cfg_options, args.size) for path in paths]
    if args.all:
        for entry, row in zip(found, PAPER_RESULTS):
            entry['config'] = row.recipe
    if args.json:
        print(json.dumps(found, indent=2))
        return
    header = ('config', 'size', 'parameters', 'paper', 'GFLOPs', 'paper')
    print(format_table(header, [_cells(entry) for entry in found]))


def _cells(entry: dict) -> tuple[str, ...]:
    return (
        entry['config'],
        '{}x{}'.format(*entry['size']),
        f'{entry["parameters"]:,}',
        f'{entry["paper_parameters_m"]}M' if entry['paper_parameters_m'] else '-',
        f'{entry["flops"] / 1e9:.2f}',
        f'{entry["paper_gflops"]}G' if entry['paper_gflops'] else '-',
    )


if __name__ == '__main__':
    main()
