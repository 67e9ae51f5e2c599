#!/usr/bin/env python
"""Evaluate a checkpoint or an exported model as the recipe says: COCO's AP, or mIoU at a single scale or at many."""

import os

import environment  # noqa: F401
from mmengine.dist import is_main_process

from convnext_dense.cli.arguments import make_run_parser
from convnext_dense.cli.exit import exit_on_error
from convnext_dense.cli.prepare import TEST_STEPS, build_runner, format_metrics, prepare
from convnext_dense.datasets.custom import add_data_arguments
from convnext_dense.engine.summary_hook import describe_small_evaluation


def parse_args():
    parser = make_run_parser(__doc__)
    parser.add_argument('checkpoint', help='.pth file, URL, released name, or exported .onnx, .xml or .pt2')
    parser.add_argument(
        '--out', help='file or folder for the predictions: .pkl (detection), folder of PNGs (segmentation)'
    )
    parser.add_argument(
        '--multiscale',
        action='store_true',
        help='segmentation: multi-scale test of the paper (table 4): six scales, with and without flip, whole images',
    )
    parser.add_argument(
        '--report',
        nargs='?',
        const='',
        metavar='FOLDER',
        help='write results by class, confusion matrix, precision-recall curves and the worst images (default: a '
        'folder in the work dir)',
    )
    parser.add_argument('--show', action='store_true', help='show predictions next to the ground truth in a window')
    parser.add_argument('--show-dir', help='folder for visualizations of predictions next to the ground truth')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds that each visualization is shown')
    add_data_arguments(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    with exit_on_error():
        run = prepare(args, TEST_STEPS)
        runner = build_runner(run, args.compile)
        if is_main_process():  # next to the log and the metrics: what they were measured with
            run.config.dump(os.path.join(runner.log_dir, 'config.py'))
        metrics = runner.test()
        if is_main_process():
            small_size = describe_small_evaluation(runner.test_dataloader.dataset)
            print(format_metrics(metrics) + (f'  (from only {small_size})' if small_size else ''))


if __name__ == '__main__':
    main()
