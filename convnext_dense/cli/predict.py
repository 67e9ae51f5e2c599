"""The command tools/predict.py: check everything, then build the model, then predict."""

import argparse
import os
import signal
import sys
from collections.abc import Callable

import numpy as np

from ..checkpoints.exported_files import is_exported
from ..config.channels import channel_reader
from ..config.image_size import add_image_size_argument, set_image_size
from ..datasets.tiles import add_tile_arguments
from ..errors import RunInterrupted, UnreadableImageError, UsageError
from ..inference import video
from ..inference.batch_prediction import RunReport, predict_files
from ..inference.checkpoint_config import ModelSource, find_model
from ..inference.coco_writer import FORMATS
from ..inference.drawing import SCORE_THR
from ..inference.exported import check_exported_options
from ..inference.inputs import Inputs, find_inputs
from ..inference.mask_writer import MAX_CLASSES
from ..inference.model import AMP_DTYPES, Predictor, build_predictor, check_device, source_device
from ..inference.options import PredictOptions, class_indices
from ..inference.output import OutputFolder, open_folder
from ..inference.preprocessing import split_test_pipeline
from ..inference.sessions import session_class
from ..inference.views import check_scales
from .arguments import ArgumentParser
from .exit import printable

DETECTION_OPTIONS = ('score_thr', 'max_per_image')  # not for segmentation


def make_predict_parser(description: str) -> ArgumentParser:
    """Return the parser of tools/predict.py."""
    parser = ArgumentParser(description=description)
    parser.add_argument('checkpoint', help='.pth file, work dir, URL, released name, or exported .onnx, .xml or .pt2')
    parser.add_argument(
        'inputs',
        nargs='+',
        metavar='INPUT',
        help='image, folder, pattern, video, text file of paths (.txt), or - for paths on standard input',
    )
    parser.add_argument('--config', help='config of the model (default: that in the checkpoint, or of the recipe)')
    parser.add_argument('--out', default='predictions', metavar='DIR', help='folder for the results (%(default)s)')
    parser.add_argument(
        '--format',
        choices=FORMATS,
        default=FORMATS[0],
        help='detection: predictions.json as a COCO data set, or as the bare list of results (default: %(default)s)',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        metavar='SCORE',
        help='detection: least score (default: all that the model returns; 0.3 in pictures)',
    )
    parser.add_argument('--classes', nargs='+', metavar='NAME', help='only these classes')
    parser.add_argument('--max-per-image', type=int, metavar='N', help='detection: only the N best of an image')
    parser.add_argument('--device', help='such as cuda:1 or cpu (default: a GPU if there is one)')
    parser.add_argument('--batch-size', type=int, default=1, metavar='N', help='images of equal size at a time')
    parser.add_argument(
        '--amp-dtype', choices=tuple(AMP_DTYPES), default='float32', help='mixed precision (default: %(default)s)'
    )
    parser.add_argument(
        '--multiscale',
        action='store_true',
        help="several scales with and without flip: the paper's test (segmentation), merged boxes (detection)",
    )
    add_image_size_argument(parser)
    add_tile_arguments(parser, 'predict')
    parser.add_argument('--show', action='store_true', help='show each picture in a window; Esc ends that')
    parser.add_argument('--no-pictures', action='store_true', help='write no pictures')
    parser.add_argument('--resume', action='store_true', help='continue an earlier run in --out')
    return parser


def predict(args: argparse.Namespace) -> int:
    """Predict what the arguments of `make_predict_parser` name; return the exit code, 1 if an image was skipped.

    Raises:
        UsageError: If an argument cannot be used; this is known before the model is built.
    """
    options = PredictOptions(
        score_thr=args.score_thr,
        classes=args.classes,
        max_per_image=args.max_per_image,
        batch_size=args.batch_size,
        multiscale=args.multiscale,
        tile=args.tile,
        overlap=args.overlap,
    )
    show = _make_viewer() if args.show else None
    inputs = find_inputs(args.inputs, exclude=args.out)
    if not is_exported(args.checkpoint):
        check_device(args.device)
    source = find_model(args.checkpoint, args.config)
    device = source_device(source, args.device)
    _check_options(source, options, args)
    if inputs.videos and channel_reader(source.config):
        raise UsageError(f'{source.file} needs other channels than RGB, which videos do not have: leave the videos out')
    set_image_size(source.config, args.image_size)
    folder = open_folder(args.out, _settings(source, options, args), args.resume)
    for notice in (*inputs.notices, *source.notices):
        print(printable(notice), file=sys.stderr)
    output = OutputFolder(
        folder,
        source.task,
        source.classes,
        source.palette,
        args.format,
        pictures=not args.no_pictures,
        show=args.show,
        score_thr=SCORE_THR if args.score_thr is None else args.score_thr,
        description=f'predictions of {os.path.basename(source.file)}',
        color_type=split_test_pipeline(source.config)[0],
    )
    todo = Inputs(
        [file for file in inputs.images if not output.is_done(file)],
        [file for file in inputs.videos if not video.is_done(file, output)],
    )
    total, num_left = len(inputs.images + inputs.videos), len(todo.images + todo.videos)
    if num_left < total:
        print(f'{total - num_left:,} of {total:,} were predicted by an earlier run', file=sys.stderr)
    report = RunReport()
    if todo.images or todo.videos:
        predictor = build_predictor(source, device, args.amp_dtype)
        report = _run(predictor, todo, options, output, show)
    results = output.finish()
    print(_summary(report, source.task), ', '.join(results), sep=': ')
    return 1 if report.num_skipped else 0


def _check_options(source: ModelSource, options: PredictOptions, args: argparse.Namespace) -> None:
    if source.classes:
        class_indices(options.classes, source.classes)
    if source.task == 'segmentation':
        n = len(source.classes)
        if n > MAX_CLASSES:
            raise UsageError(f'the model has {n} classes: an indexed PNG holds at most {MAX_CLASSES}')
        unused = [f'--{name.replace("_", "-")}' for name in DETECTION_OPTIONS if getattr(options, name) is not None]
        unused += ['--format results'] if args.format != FORMATS[0] else []
        if unused:
            raise UsageError(f'{unused[0]} is for detection, {source.file} is a model for segmentation: leave it out')
    _, steps = split_test_pipeline(source.config)
    if options.multiscale:
        check_scales(steps)
    if source.exported:
        check_exported_options(source.exported, options, args.amp_dtype)
        if args.image_size:
            raise UsageError('--image-size is not for an exported model: export the checkpoint with another size')
        session_class(source.file).import_package(source.file)


def _settings(source: ModelSource, options: PredictOptions, args: argparse.Namespace) -> dict[str, object]:
    """The settings on which the results depend, by command-line name."""
    status = os.stat(source.file)
    values = {name: value for name, value in vars(options).items() if name != 'batch_size'}
    return {
        'checkpoint': os.path.abspath(source.file),
        'checkpoint_state': [status.st_size, status.st_mtime_ns],
        'config': args.config and os.path.abspath(args.config),
        'format': args.format,
        'amp_dtype': args.amp_dtype,
        **({'image_size': args.image_size} if args.image_size else {}),
        **values,
    }


def _run(
    predictor: Predictor,
    inputs: Inputs,
    options: PredictOptions,
    output: OutputFolder,
    show: Callable[[np.ndarray], None] | None,
) -> RunReport:
    report = RunReport()
    try:
        if inputs.images:
            output.number(inputs.images)
            report.add(predict_files(predictor, inputs.images, options, output, show))
        for file in inputs.videos:
            try:
                report.add(video.predict_video(predictor, file, options, output, show))
            except UnreadableImageError as error:
                print(printable(f'skipped {file.path}: {error}'), file=sys.stderr)
                report.num_skipped += 1
    except KeyboardInterrupt:
        raise RunInterrupted(
            f'interrupted; what is complete is in {output.path}: continue with --resume', signal.SIGINT
        ) from None
    return report


def _summary(report: RunReport, task: str) -> str:
    parts = [f'{report.num_done:,} images']
    if task == 'detection':
        parts.append(f'{report.num_detections:,} detections')
    if report.num_skipped:
        parts.append(f'{report.num_skipped:,} skipped')
    if report.num_done:
        rate, model_rate = report.num_done / report.seconds, report.num_done / max(report.model_seconds, 1e-9)
        parts.append(f'{rate:.1f} images/s (the model alone {model_rate:.1f})')
    return ', '.join(parts)


def _make_viewer() -> Callable[[np.ndarray], None]:
    """Return a function that shows a picture until a key is pressed; after Esc it shows no more.

    Raises:
        UsageError: If there is no display, or OpenCV was built without windows.
    """
    import cv2

    hint = 'leave --show out and look at the pictures in --out'
    if sys.platform == 'linux' and not (os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY')):
        raise UsageError(f'--show: there is no display: {hint}')
    window, is_open = 'predictions', True
    try:
        cv2.namedWindow(window, cv2.WINDOW_NORMAL)
    except cv2.error as error:
        raise UsageError(f'--show: this OpenCV opens no windows: {hint}') from error

    def show(picture: np.ndarray) -> None:
        nonlocal is_open
        if is_open:
            cv2.imshow(window, picture)
            is_open = cv2.waitKey(0) != 27
            if not is_open:
                cv2.destroyWindow(window)

    return show
