#!/usr/bin/env python
"""Evaluate a checkpoint as the recipe says: COCO's AP, or mIoU at a single scale or at many."""

import logging
import os

import environment  # noqa: F401
from mmengine.dist import is_main_process
from mmengine.logging import print_log

from convnext_dense.cli.arguments import make_run_parser
from convnext_dense.cli.exit import exit_on_error
from convnext_dense.cli.prepare import format_metrics, load_run_config
from convnext_dense.config.multiscale import SCALE_FACTORS, set_multiscale
from convnext_dense.config.options import overridden_options
from convnext_dense.config.outputs import set_prediction_output, set_visualization
from convnext_dense.config.preflight import check_data
from convnext_dense.datasets.custom import add_data_arguments, apply_custom_data, parse_request
from convnext_dense.engine.build import compile_backbones, make_runner, resolve_checkpoint


def parse_args():
    parser = make_run_parser(__doc__)
    parser.add_argument('checkpoint', help='a .pth file, a URL or the name of a released checkpoint')
    parser.add_argument(
        '--out', help='where to keep the predictions: a .pkl file (detection), a folder of PNGs (segmentation)'
    )
    parser.add_argument(
        '--multiscale',
        action='store_true',
        help="segmentation: the paper's multi-scale test (table 4), six scales, plain and flipped, whole images",
    )
    parser.add_argument('--show', action='store_true', help='show predictions beside the truth in a window')
    parser.add_argument('--show-dir', help='folder for pictures of predictions beside the truth')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds a picture is shown')
    add_data_arguments(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    with exit_on_error():
        checkpoint = resolve_checkpoint(args.checkpoint)
        config = load_run_config(args, ('model', 'test_dataloader', 'test_cfg', 'test_evaluator'), 'test')
        request = parse_request(args)
        if not request:
            check_data(config, ('test',))
        data = apply_custom_data(
            config, request, ('test',), args.cfg_options, checkpoint, min(SCALE_FACTORS) if args.multiscale else 1
        )
        set_visualization(
            config, args.show_dir and os.path.abspath(args.show_dir), args.show, args.wait_time, args.cfg_options
        )
        set_prediction_output(config, args.out)
        changed = overridden_options(config, args.cfg_options)
        if args.multiscale:
            set_multiscale(config, args.cfg_options)
        config.load_from = checkpoint
        runner = make_runner(config, checkpoint)
        for line in data:
            print_log(line, logger='current')
        for line in changed:
            print_log(line, logger='current', level=logging.WARNING)
        if args.compile:
            compile_backbones(runner.model)
        if is_main_process():  # beside the log and the figures: what they are of
            config.dump(os.path.join(runner.log_dir, 'config.py'))
        metrics = runner.test()
        if is_main_process():
            print(format_metrics(metrics))


if __name__ == '__main__':
    main()
