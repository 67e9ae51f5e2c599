#!/usr/bin/env python
"""Evaluate a checkpoint as the recipe says: COCO's AP, or mIoU at a single scale or at many."""

import logging
import os

import environment  # noqa: F401
from mmengine.dist import is_main_process
from mmengine.logging import print_log

from convnext_dense.cli.arguments import run_parser
from convnext_dense.cli.exit import one_line_errors
from convnext_dense.cli.prepare import load_run, summary
from convnext_dense.config.multiscale import RATIOS, set_multiscale
from convnext_dense.config.options import overruled
from convnext_dense.config.outputs import set_out, set_pictures
from convnext_dense.config.preflight import check_data
from convnext_dense.datasets.custom import data_arguments, request_of, set_data
from convnext_dense.engine.build import build_runner, compile_backbones, local_checkpoint


def parse_args():
    parser = run_parser(__doc__)
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
    data_arguments(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    with one_line_errors():
        checkpoint = local_checkpoint(args.checkpoint)
        config = load_run(args, ('model', 'test_dataloader', 'test_cfg', 'test_evaluator'), 'test')
        request = request_of(args)
        if not request:
            check_data(config, ('test',))
        data = set_data(config, request, ('test',), args.cfg_options, checkpoint, min(RATIOS) if args.multiscale else 1)
        set_pictures(
            config, args.show_dir and os.path.abspath(args.show_dir), args.show, args.wait_time, args.cfg_options
        )
        set_out(config, args.out)
        changed = overruled(config, args.cfg_options)
        if args.multiscale:
            set_multiscale(config, args.cfg_options)
        config.load_from = checkpoint
        runner = build_runner(config, checkpoint)
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
            print(summary(metrics))


if __name__ == '__main__':
    main()
