#!/usr/bin/env python
"""Train a recipe: detection and segmentation alike."""

from convnext_dense.commands import (
    build_runner,
    check_data,
    check_pretrained,
    load_run,
    one_line_errors,
    run_parser,
    set_precision,
    set_resume,
)


def parse_args():
    parser = run_parser(__doc__)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from this checkpoint, or from the last one in the work dir',
    )
    parser.add_argument(
        '--amp-dtype',
        choices=('float16', 'bfloat16', 'float32'),
        help="precision of training (default: the recipe's); float32 is full precision",
    )
    return parser.parse_args()


def main():
    args = parse_args()
    with one_line_errors():
        config = load_run(args)
        set_precision(config, args.amp_dtype)
        check_data(config, ('train', 'val'))
        check_pretrained(config.model)
        checkpoint = set_resume(config, args.resume)
        build_runner(config, checkpoint).train()


if __name__ == '__main__':
    main()
