#!/usr/bin/env python
"""Parameters and FLOPs as the paper counts them, of one config or of every recipe, next to the paper's numbers.

Needs no data, no weights and no GPU. A multiply-accumulate counts as one; docs/recipes.md says what is counted.
"""

import json
import sys
from contextlib import redirect_stdout

import environment  # noqa: F401

from convnext_dense.cli.arguments import make_config_parser
from convnext_dense.cli.exit import exit_on_error
from convnext_dense.config.load import load_config
from convnext_dense.paper.flops import count_flops
from convnext_dense.paper.recipe_diff import CONFIGS
from convnext_dense.paper.results import RESULTS, find_paper_result
from convnext_dense.paper.tables import format_table

DEFAULT_SIZES = {'mmdet': (1280, 800), 'mmseg': (2048, 512)}  # (width, height) by scope, for other than the paper's


def parse_args():
    parser = make_config_parser(__doc__, nargs='?')
    parser.add_argument('--all', action='store_true', help='every recipe')
    parser.add_argument('--size', nargs=2, type=int, metavar=('WIDTH', 'HEIGHT'), help="default: the paper's")
    parser.add_argument('--json', action='store_true', help='print JSON: parameters and FLOPs as whole numbers')
    args = parser.parse_args()
    if bool(args.config) == args.all:
        parser.error('give a config or --all')
    if args.size and min(args.size) < 1:
        parser.error(f'--size {args.size[0]} {args.size[1]}: give pixels, at least 1')
    return args


def count(path: str, options: dict, size: tuple[int, int] | None) -> dict:
    config = load_config(path, options)
    result = find_paper_result(config)
    default = result.size if result else DEFAULT_SIZES.get(config.get('default_scope'), DEFAULT_SIZES['mmdet'])
    counted = {'counted': result.counted} if result else {}
    complexity = count_flops(config, tuple(size or default), **counted)
    return {
        'config': str(path),
        'size': complexity.size,
        'parameters': complexity.parameters,
        'flops': complexity.flops,
        'paper_parameters_m': result.params_m if result else None,
        'paper_gflops': result.gflops if result and result.size == complexity.size else None,
    }


def main():
    args = parse_args()
    with exit_on_error():
        paths = [CONFIGS / f'{result.recipe}.py' for result in RESULTS] if args.all else [args.config]
        with redirect_stdout(sys.stderr):  # libraries print while they are imported
            counts = [count(path, args.cfg_options, args.size) for path in paths]
    if args.all:
        for entry, result in zip(counts, RESULTS):
            entry['config'] = result.recipe
    if args.json:
        print(json.dumps(counts, indent=2))
        return
    header = ('config', 'size', 'parameters', 'paper', 'GFLOPs', 'paper')
    print(format_table(header, [_cells(entry) for entry in counts]))


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
