#!/usr/bin/env python
"""Check a data set: report what it holds, what is wrong, and what training would do about it. Changes nothing.

With --fix, what can be used is also written as a clean data set of its own; with --tile, in tiles. With --pictures, it
is drawn.

Exits with 0 if everything can be used, with 1 if something would be dropped or is an error, with 2 if there is no data
set to check.
"""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import environment  # noqa: F401

from convnext_dense.cli.arguments import ArgumentParser
from convnext_dense.cli.exit import exit_on_error
from convnext_dense.config.image_size import add_image_size_argument, set_image_size
from convnext_dense.config.load import load_config
from convnext_dense.datasets.custom import RECIPES, add_data_arguments, detect_tasks, parse_request, read_data
from convnext_dense.datasets.files import is_below
from convnext_dense.datasets.request import CheckedDataset, DatasetRequest
from convnext_dense.datasets.tiles import add_tile_arguments
from convnext_dense.datasets.write_dataset import check_output_folder, check_tile_options, write_clean, write_tiles
from convnext_dense.errors import UsageError
from convnext_dense.type_names import TASKS


def parse_args():
    parser = ArgumentParser(description=__doc__)
    add_data_arguments(parser, strict=False)
    parser.add_argument(
        '--task', choices=('detection', 'segmentation'), help='check only one task of a data set for both'
    )
    add_tile_arguments(parser, 'write the data set')
    parser.add_argument('--out', metavar='FOLDER', help='with --tile: folder of the data set in tiles')
    parser.add_argument('--fix', metavar='FOLDER', help='write what can be used as COCO json, or as pairs of PNG masks')
    parser.add_argument(
        '--pictures', metavar='FOLDER', help='draw images before and after augmentation, classes, sizes and anchors'
    )
    text = 'with --pictures: recipe that would be trained (default: Cascade Mask R-CNN or UperNet, ConvNeXt-T)'
    parser.add_argument('--config', help=text)
    add_image_size_argument(parser)
    parser.add_argument('--json', action='store_true', help='print JSON')
    args = parser.parse_args()
    if not any((args.data, args.train_ann, args.val_ann, args.train_masks, args.val_masks)):
        parser.error('give --data PATH')
    if args.out and args.tile is None:
        parser.error('--out needs --tile SIZE')
    if args.fix and args.tile is not None:
        parser.error('--fix and --tile: give one of them')
    if not args.pictures and (args.config or args.image_size):
        parser.error(f'--{"config" if args.config else "image-size"} needs --pictures FOLDER')
    return args


def _write(args, data: CheckedDataset) -> list[str]:
    """Write what is asked for besides the report; what was written, one line each."""
    if args.tile is not None or args.fix or args.pictures:
        data.report.raise_if_errors()
    lines = []
    if args.tile is not None:
        lines += write_tiles(data, args.tile, args.overlap, args.out)
    if args.fix:
        lines += write_clean(data, args.fix)
    if args.pictures:
        from convnext_dense.inference.dataset_pictures import write_pictures  # with mmdet or mmseg, which take seconds

        config = load_config(args.config or str(Path(__file__).parents[1] / RECIPES[data.task]), {})
        if TASKS.get(config.get('default_scope')) != data.task:
            raise UsageError(
                f'--config {args.config} is not for {data.task}: give a recipe such as {RECIPES[data.task]}'
            )
        set_image_size(config, args.image_size)
        lines += write_pictures(config, data, args.pictures)
    return lines


def _read(request: DatasetRequest, tasks: list[str]) -> dict[str, CheckedDataset]:
    """Read and check a data set for each task."""
    data, errors = {}, []
    for task in tasks:
        try:
            data[task] = read_data(request, task, ('train', 'val', 'test'))
        except UsageError as error:
            errors.append(error)
    if errors and data:
        raise UsageError(f'{errors[0]}; --task {next(iter(data))} checks the rest') from errors[0]
    if errors:
        raise errors[0]
    return data


def main():
    args = parse_args()
    with exit_on_error(), redirect_stdout(sys.stderr):  # libraries print as they are imported
        request = parse_request(args)
        tasks = [args.task] if args.task else detect_tasks(request)
        if len(tasks) > 1 and args.format:  # of boxes
            tasks = ['detection']
        if len(tasks) > 1 and (args.classes or args.ignore_labels is not None):  # which are of masks, most often
            tasks = ['segmentation']
        if args.tile is not None:
            check_tile_options(args.tile, args.overlap, args.out)
        if args.fix:
            check_output_folder('--fix', args.fix)
        out = args.fix or args.out
        if out and args.data and is_below(out, args.data):
            raise UsageError(f"'{out}' lies in the data set, whose images would be others then: choose another folder")
        option = '--tile' if args.tile is not None else '--fix' if args.fix else '--config' if args.config else None
        if option and len(tasks) > 1:
            raise UsageError(f'{option}: {args.data} is for {" and ".join(tasks)}: choose one of them with --task')
        data = _read(request, tasks)
        reports = {task: each.report for task, each in data.items()}
        written = {task: _write(args, each) for task, each in data.items()}
    if args.json:
        print(json.dumps({task: report.as_data() for task, report in reports.items()}, indent=2))
    else:
        print('\n\n'.join('\n'.join([task, *report.lines(), *written[task]]) for task, report in reports.items()))
    sys.exit(int(any(report.problems for report in reports.values())))


if __name__ == '__main__':
    main()
