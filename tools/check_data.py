#!/usr/bin/env python
"""Check a data set: report what it holds, what is wrong, and what training would do about it. Changes nothing.

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


def parse_args():
    parser = ArgumentParser(description=__doc__)
    add_data_arguments(parser, strict=False)
    parser.add_argument(
        '--task', choices=('detection', 'segmentation'), help='check only one task of a data set for both'
    )
    parser.add_argument('--json', action='store_true', help='print JSON')
    args = parser.parse_args()
    if not args.data and not args.train_ann and not args.val_ann:
        parser.error('give --data PATH')
    return args


def main():
    args = parse_args()
    with exit_on_error(), redirect_stdout(sys.stderr):  # libraries print as they are imported
        request = parse_request(args)
        task = args.task or ('segmentation' if args.classes or args.ignore is not None else None)
        tasks = [task] if task else detect_tasks(request)
        reports = {task: read_data(request, task, ('train', 'val', 'test')).report for task in tasks}
    if args.json:
        print(json.dumps({task: report.as_data() for task, report in reports.items()}, indent=2))
    else:
        print('\n\n'.join('\n'.join([task, *report.lines()]) for task, report in reports.items()))
    sys.exit(int(any(report.problems for report in reports.values())))


if __name__ == '__main__':
    main()
