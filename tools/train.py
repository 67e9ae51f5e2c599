#!/usr/bin/env python
"""Train a recipe: detection and segmentation alike, with the recipe's total batch size on any number of GPUs."""

import environment  # noqa: F401

from convnext_dense.cli.arguments import integer, make_run_parser
from convnext_dense.cli.exit import exit_on_error
from convnext_dense.cli.prepare import TRAIN_STEPS, build_runner, prepare
from convnext_dense.config.trackers import TRACKERS
from convnext_dense.config.training_aids import add_training_aids
from convnext_dense.datasets.custom import add_data_arguments
from convnext_dense.engine.dry_run import dry_run, heartbeat
from convnext_dense.engine.lr_finder import NUM_STEPS, find_lr
from convnext_dense.inference.drawing import draw_ground_truth


def parse_args():
    parser = make_run_parser(__doc__)
    trial = parser.add_mutually_exclusive_group()
    trial.add_argument(
        '--dry-run',
        action='store_true',
        help='check everything, draw two batches, measure time and memory of an iteration, and end; nothing is saved',
    )
    trial.add_argument(
        '--lr-find',
        action='store_true',
        help=f'train {NUM_STEPS} steps with a rising learning rate, plot the loss, suggest a learning rate, and end',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='last',
        metavar='CHECKPOINT',
        help='resume from this checkpoint, or from the last one in the work dir; auto: or start a new run',
    )
    parser.add_argument(
        '--override',
        action='store_true',
        help='with --resume: use lr, weight decay and schedules of the config instead of those in the checkpoint',
    )
    parser.add_argument(
        '--amp-dtype',
        choices=('float16', 'bfloat16', 'float32'),
        help="training precision (default: the recipe's); float32 disables mixed precision",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        '--epochs',
        type=int,
        help='train for this many epochs; warmup, decay steps and evaluation interval are scaled proportionally',
    )
    length.add_argument('--iters', type=int, help='the same in iterations, for iteration-based recipes')
    parser.add_argument(
        '--batch-size', type=integer(1), metavar='N', help='images per GPU and iteration; accumulation follows from it'
    )
    parser.add_argument(
        '--accumulate', type=integer(1), metavar='K', help='iterations per optimizer step, with the images per GPU'
    )
    parser.add_argument('--seed', type=integer(0, 2**32 - 1), metavar='N', help='seed of the run (default: random)')
    parser.add_argument('--max-keep-ckpts', type=int, metavar='N', help='keep the last N checkpoints and the best one')
    parser.add_argument(
        '--max-unreadable',
        metavar='N',
        help='maximum number or percentage of unreadable training images to replace by others (default: 0.1%%)',
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
    parser.add_argument(
        '--no-auto-schedule',
        action='store_true',
        help='with --data: do not fit total batch, length, warmup and evaluation interval to the number of images',
    )
    add_training_aids(parser)
    add_data_arguments(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    with exit_on_error(), heartbeat(args.dry_run):
        runner = build_runner(prepare(args, TRAIN_STEPS), args.compile)
        if args.dry_run:
            dry_run(runner, draw_ground_truth)
        elif args.lr_find:
            find_lr(runner)
        else:
            runner.train()


if __name__ == '__main__':
    main()
