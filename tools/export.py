#!/usr/bin/env python
"""Export a checkpoint as one file for ONNX Runtime, OpenVINO or PyTorch, and prove it equal to the model."""

import environment  # noqa: F401

from convnext_dense.cli.exit import exit_on_error
from convnext_dense.cli.export import export, make_export_parser


def main():
    args = make_export_parser(__doc__).parse_args()
    with exit_on_error():
        export(args)


if __name__ == '__main__':
    main()
