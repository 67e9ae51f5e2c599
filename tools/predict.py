#!/usr/bin/env python
"""Predict images and videos: boxes and masks as COCO JSON, or segmentation as PNGs, and pictures."""

import sys

import environment  # noqa: F401

from convnext_dense.cli.exit import exit_on_error
from convnext_dense.cli.predict import make_predict_parser, predict


def main():
    args = make_predict_parser(__doc__).parse_args()
    with exit_on_error():
        sys.exit(predict(args))


if __name__ == '__main__':
    main()
