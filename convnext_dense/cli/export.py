"""What tools/export.py does: load the model, write the file, prove it equal, and only then put it into its place."""

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path

from ..checkpoints.exported_files import is_exported
from ..errors import UsageError
from ..export.check import INT8, check_file, compare_file
from ..export.files import WRITERS, files_of, onnx_to_openvino, write_onnx
from ..export.program import ExportOptions, Traced, trace
from ..export.quantize import MAX_IMAGES, calibration_inputs, quantize
from ..inference.checkpoint_config import RECIPES_BY_RELEASED, find_model
from ..inference.inputs import find_inputs
from ..inference.model import Predictor, build_predictor, check_device
from .arguments import ArgumentParser


def make_export_parser(description: str) -> ArgumentParser:
    """Return the parser of tools/export.py."""
    parser = ArgumentParser(description=description)
    parser.add_argument('checkpoint', help='.pth file, work dir, URL or name of a released checkpoint')
    parser.add_argument('out', metavar='OUT', help=f'file to write, by its suffix: {", ".join(WRITERS)}')
    parser.add_argument('--config', help='config of the model (default: that in the checkpoint, or of the recipe)')
    parser.add_argument('--size', type=int, nargs=2, metavar=('H', 'W'), help='fixed size of the images (default: any)')
    parser.add_argument(
        '--input-dtype', choices=('uint8', 'float32'), default='uint8', help='of the images (default: %(default)s)'
    )
    parser.add_argument(
        '--raw',
        action='store_true',
        help='leave normalization, padding and the resizing of results out: images are as the data preprocessor of the '
        'model returns them',
    )
    parser.add_argument(
        '--masks',
        choices=('image', 'box'),
        default='image',
        help='detection: masks in the size of the image, or probabilities of 28 x 28 in the box (default: %(default)s)',
    )
    parser.add_argument('--logits', action='store_true', help='segmentation: return logits, not the segmentation mask')
    parser.add_argument(
        '--int8',
        nargs='+',
        metavar='IMAGE',
        help=f'ONNX and OpenVINO: 8-bit integers, calibrated on these images or folders (the first {MAX_IMAGES})',
    )
    parser.add_argument('--half', action='store_true', help='weights and maps in float16')
    parser.add_argument(
        '--no-check', action='store_true', help='do not run the file beside the model (default: keep it only if equal)'
    )
    return parser


def export(args: argparse.Namespace) -> None:
    """Export what the arguments of `make_export_parser` name.

    Raises:
        UsageError: If an argument cannot be used, or the file does not compute what the model does; no file is written
            then.
    """
    out = Path(args.out)
    if out.suffix not in WRITERS:
        raise UsageError(f'{out}: give a file that ends in {", ".join(WRITERS)}')
    report = out.with_name(f'{out.name}.check.json')
    existing = next((file for file in [*files_of(out), report] if os.path.lexists(file)), None)
    if existing:
        raise UsageError(f'{existing} exists: remove it, or give another name')
    if not out.parent.is_dir():
        raise UsageError(f'there is no folder {out.parent}: make it, or give another path')
    if args.size and not 32 <= min(args.size) <= max(args.size) <= 8192:
        raise UsageError(f'--size {args.size[0]} {args.size[1]}: give two sizes from 32 to 8192')
    size = tuple(args.size) if args.size else None
    options = ExportOptions('raw' if args.raw else args.input_dtype, size, args.masks, args.logits, args.half)
    if is_exported(args.checkpoint):
        raise UsageError(f'{args.checkpoint} is exported already: give the checkpoint that it was made from')
    if args.int8 and (args.half or out.suffix == '.pt2'):
        raise UsageError('--int8 is for .onnx and .xml files without --half')
    calibration = [file.path for file in find_inputs(args.int8).images] if args.int8 else []
    source = find_model(args.checkpoint, args.config)
    predictor = build_predictor(source, check_device('cpu'), optimized=False)
    traced = trace(predictor, options, recipe=_recipe(args))
    with tempfile.TemporaryDirectory(dir=out.parent, prefix='.export-') as folder:
        path = Path(folder, out.name)
        if calibration:
            _write_int8(traced, path, calibration, predictor, options, not args.no_check)
        else:
            WRITERS[out.suffix](traced, path)
        print(f'{out.name}: {sum(f.stat().st_size for f in files_of(path) if f.exists()) / 2**20:.1f} MB')
        if not args.no_check:
            compare = partial(compare_file, tolerance=INT8) if calibration else check_file
            differences = [difference.known() for difference in compare(path, predictor, options)]
            Path(folder, report.name).write_text(json.dumps(differences, indent=1) + '\n')
        for file in Path(folder).iterdir():
            os.replace(file, out.parent / file.name)
    print(f'wrote {out}')


def _recipe(args: argparse.Namespace) -> str | None:
    config = Path(args.config).with_suffix('').parts[-2:] if args.config else ()
    return RECIPES_BY_RELEASED.get(args.checkpoint) or '/'.join(config) or None


def _write_int8(
    traced: Traced, path: Path, images: list[str], predictor: Predictor, options: ExportOptions, check: bool
) -> None:
    """Write the file in float32, prove it equal, and quantize it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, target = Path(folder, 'float32.onnx'), Path(folder, 'int8.onnx')
        write_onnx(traced, source)
        if check:
            print('in float32:')
            check_file(source, predictor, options)
        quantize(source, target, calibration_inputs(predictor, images, options))
        if path.suffix == '.xml':
            onnx_to_openvino(target, path, traced.meta)
        else:
            os.replace(target, path)
    print(
        f'in 8-bit integers, calibrated on {min(len(images), MAX_IMAGES)} images; tools/test.py says what that costs:'
    )
