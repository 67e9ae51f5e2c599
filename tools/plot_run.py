#!/usr/bin/env python
"""Draw trainings: loss, lr by layer and AP or mIoU, of one run or several in one image.

Runs that are unfinished, resumed or broken are drawn as far as their logs go; so are runs of mmdet's and mmseg's tools.
"""

import argparse
from pathlib import Path

import environment  # noqa: F401

from convnext_dense.cli.arguments import ArgumentParser
from convnext_dense.cli.exit import exit_on_error
from convnext_dense.errors import UsageError
from convnext_dense.paper.curves import format_progress, plot, read_curves


def parse_args():
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='+', metavar='WORK_DIR', help='work dirs, or folders that hold them')
    parser.add_argument(
        '--out',
        metavar='FILE',
        help='a .png, .pdf or .svg, or a folder (default: run.png in the work dir, runs.png here for several)',
    )
    parser.add_argument(
        '--smooth',
        type=float,
        default=0.0,
        metavar='FACTOR',
        help='factor of an exponential moving average of the losses, such as 0.9 (default: 0, no smoothing)',
    )
    return parser.parse_args()


def main():
    args = parse_args()
    with exit_on_error():
        if not 0 <= args.smooth < 1:
            raise UsageError(f'--smooth {args.smooth}: give a number from 0 to below 1, such as 0.9')
        curves = read_curves(args.folders)
        name = 'run.png' if len(curves) == 1 else 'runs.png'
        file = args.out or (curves[0].run.work_dir / name if len(curves) == 1 else name)
        if Path(file).is_dir():
            file = Path(file, name)
        file = plot(curves, file, args.smooth)
        for each in curves:
            print('; '.join([f'{each.run.work_dir}: {format_progress(each.run)}', *each.run.issues]))
        print(file)


if __name__ == '__main__':
    main()
