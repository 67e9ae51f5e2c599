#!/usr/bin/env python
"""Train a recipe: detection and segmentation alike, with the recipe's total batch on any number of GPUs."""

import logging

import environment  # noqa: F401
from mmengine.logging import print_log

from convnext_dense.cli.arguments import make_run_parser
from convnext_dense.cli.exit import exit_on_error
from convnext_dense.cli.prepare import load_run_config
from convnext_dense.config.batch_size import scale_batch
from convnext_dense.config.hooks import set_checkpoint_retention, set_max_unreadable
from convnext_dense.config.launch import world_size_from_env
from convnext_dense.config.options import overridden_options
from convnext_dense.config.precision import set_precision
from convnext_dense.config.preflight import check_data, check_pretrained
from convnext_dense.config.resume import check_resume, set_resume
from convnext_dense.config.schedule import scale_schedule
from convnext_dense.config.trackers import TRACKERS, add_trackers
from convnext_dense.config.work_dir import hold_work_dir
from convnext_dense.datasets.custom import add_data_arguments, apply_custom_data, check_classes, parse_request
from convnext_dense.engine.build import compile_backbones, make_runner


def parse_args():
    parser = make_run_parser(__doc__)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='last',
        metavar='CHECKPOINT',
        help='go on from this checkpoint, or from the last one in the work dir; auto: begin where there is no run yet',
    )
    parser.add_argument(
        '--override',
        action='store_true',
        help='with --resume: take lr, weight decay and schedules as they are now, not as the checkpoint holds them',
    )
    parser.add_argument(
        '--amp-dtype',
        choices=('float16', 'bfloat16', 'float32'),
        help="precision of training (default: the recipe's); float32 is full precision",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        '--epochs', type=int, help='another length, with the shares of warmup, steps and evaluation kept'
    )
    length.add_argument('--iters', type=int, help='the same for recipes that count iterations')
    parser.add_argument('--max-keep-ckpts', type=int, metavar='N', help='keep the last N checkpoints, and the best one')
    parser.add_argument(
        '--max-unreadable',
        metavar='N',
        help='training images that may turn out unreadable and be replaced: a number or a share (default: 0.1%%)',
    )
    parser.add_argument(
        '--loggers',
        nargs='+',
        choices=tuple(TRACKERS),
        default=[],
        help='additional loggers; local logs are always written',
    )
    parser.add_argument(
        '--no-auto-batch',
        action='store_true',
        help='do not adapt images per GPU, gradient accumulation and iterations to the total batch size of the recipe',
    )
    add_data_arguments(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    with exit_on_error():
        config = load_run_config(args, ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper'))
        request = parse_request(args)
        set_precision(config, args.amp_dtype)
        add_trackers(config, args.loggers, args.resume is not None)
        if not request:
            check_data(config, ('train', 'val'))
        check_pretrained(config.model)
        checkpoint = set_resume(config, args.resume)
        hold_work_dir(config)
        data = apply_custom_data(config, request, ('train', 'val'), args.cfg_options, checkpoint)
        check_classes(config)
        length = scale_schedule(config, args.epochs, args.iters, args.cfg_options)
        fitted = scale_batch(config, world_size_from_env(args.launcher), args.no_auto_batch, args.cfg_options)
        resumed = check_resume(config, checkpoint, length is not None, args.override)
        set_checkpoint_retention(config, args.max_keep_ckpts)
        set_max_unreadable(config, args.max_unreadable)
        runner = make_runner(config, checkpoint)
        for line in data:
            print_log(line, logger='current')
        for line in [*overridden_options(config, args.cfg_options), *([resumed] if resumed else [])]:
            print_log(line, logger='current', level=logging.WARNING)
        if args.compile:
            compile_backbones(runner.model)
        if length:
            print_log(length, logger='current')
        if fitted:
            line, warn = fitted
            print_log(line, logger='current', level=logging.WARNING if warn else logging.INFO)
        runner.train()


if __name__ == '__main__':
    main()
