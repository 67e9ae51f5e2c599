#!/usr/bin/env python
"""Check a data set: report what it holds, what is wrong, and what training would do about it. Changes nothing.

With --tile, what can be used is also written in tiles, as a data set of its own.

Exits with 0 if everything can be used, with 1 if something would be dropped or is an error, with 2 if there is no data
set to check.
"""

import json
import sys
from contextlib import redirect_stdout

import environment  # noqa: F401

from convnext_dense.cli.arguments import ArgumentParser
from convnext_dense.cli.exit import exit_on_error
from convnext_dense.datasets.custom import add_data_arguments, detect_tasks, parse_request, read_data
from convnext_dense.datasets.tiles import add_tile_arguments
from convnext_dense.datasets.write_tiles import check_tile_options, write_tiles
from convnext_dense.errors import UsageError


def parse_args():
    parser = ArgumentParser(description=__doc__)
    add_data_arguments(parser, strict=False)
    parser.add_argument(
        '--task', choices=('detection', 'segmentation'), help='check only one task of a data set for both'
    )
    add_tile_arguments(parser, 'write the data set')
    parser.add_argument('--out', metavar='FOLDER', help='with --tile: folder of the data set in tiles')
    parser.add_argument('--json', action='store_true', help='print JSON')
    args = parser.parse_args()
    if not any((args.data, args.train_ann, args.val_ann, args.train_masks, args.val_masks)):
        parser.error('give --data PATH')
    if args.out and args.tile is None:
        parser.error('--out needs --tile SIZE')
    return args


def main():
    args = parse_args()
    with exit_on_error(), redirect_stdout(sys.stderr):  # libraries print as they are imported
        request = parse_request(args)
        tasks = [args.task] if args.task else detect_tasks(request)
        if len(tasks) > 1 and (args.classes or args.ignore is not None):  # names of the classes of masks, most often
            tasks = ['segmentation']
        if args.tile is not None:
            check_tile_options(args.tile, args.overlap, args.out)
            if len(tasks) > 1:
                raise UsageError(f'--tile: {args.data} is for {" and ".join(tasks)}: choose one of them with --task')
        data = {task: read_data(request, task, ('train', 'val', 'test')) for task in tasks}
        reports = {task: each.report for task, each in data.items()}
        tiles = []
        if args.tile is not None:
            reports[tasks[0]].raise_if_errors()
            tiles = write_tiles(data[tasks[0]], args.tile, args.overlap, args.out)
    if args.json:
        print(json.dumps({task: report.as_data() for task, report in reports.items()}, indent=2))
    else:
        print('\n\n'.join('\n'.join([task, *report.lines(), *tiles]) for task, report in reports.items()))
    sys.exit(int(any(report.problems for report in reports.values())))


if __name__ == '__main__':
    main()
