"""From parsed arguments to a runner: the ordered steps by which the command line changes a config."""

import argparse
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import Runner

from ..checkpoints.exported_files import is_exported, read_exported
from ..checkpoints.hub import download
from ..config.batch_size import scale_batch, set_accumulation
from ..config.channels import adapt_input_channels
from ..config.class_balance import balance_classes
from ..config.evaluation import multiscale_factors, set_multiscale, set_prediction_output, set_report, set_visualization
from ..config.image_size import set_image_size
from ..config.launch import check_launcher, is_rank0, world_size_from_env
from ..config.load import load_config
from ..config.lr_finder import set_lr_find
from ..config.mixed_images import set_copy_paste, set_mosaic
from ..config.options import overridden_options
from ..config.preflight import check_data, check_pretrained
from ..config.resume import check_resume, checkpoint_config, set_resume
from ..config.schedule import scale_schedule
from ..config.schedule_fit import fit_schedule
from ..config.trackers import add_trackers
from ..config.training import set_checkpoint_retention, set_max_unreadable, set_precision
from ..config.training_aids import freeze_backbone, scale_backbone_lr, set_early_stopping, set_ema, set_negatives
from ..config.training_set import count_training_images
from ..config.work_dir import default_work_dir
from ..datasets.configure import check_classes
from ..datasets.custom import DatasetRequest, apply_custom_data, parse_request
from ..engine.build import compile_backbones, make_runner
from ..engine.console import survive_closed_stdout
from ..engine.work_dir_lock import lock_work_dir
from ..errors import Notice, UsageError
from ..inference.checkpoint_config import check_exported_fits, dataset_classes
from ..inference.exported import ExportedModel
from ..inference.sessions import session_class, session_device
from ..paper.results import to_paper_metrics


@dataclass
class PreparedRun:
    """A run that is ready to be built.

    Attributes:
        config: The config, with the changes that the command line asks for.
        checkpoint: Path of the checkpoint to resume or test; None for a new training.
        notices: Lines to log once the runner, and with it the log file, exists.
        options: The settings of `--cfg-options` by dotted key, without a leading plus.
        request: The custom data set that the arguments name, if any.
    """

    config: Config = field(default_factory=Config)
    checkpoint: str | None = None
    notices: list[Notice] = field(default_factory=list)
    options: dict[str, object] = field(default_factory=dict)
    request: DatasetRequest | None = None


# What a step returns: nothing, a line, or several; a line without a level is logged as info.
Lines = None | str | Notice | Iterable[str | Notice]


class Step(NamedTuple):
    """One of the steps that make a config what a run needs.

    Attributes:
        name: Name of the step, to which `after` of other steps refers.
        apply: Function that changes or checks the run according to the arguments, and returns lines for the log.
        after: Names of the steps that have to come before this one.
    """

    name: str
    apply: Callable[[PreparedRun, argparse.Namespace], Lines]
    after: tuple[str, ...] = ()


def prepare(args: argparse.Namespace, steps: Iterable[Step]) -> PreparedRun:
    """Apply the steps of a tool (`TRAIN_STEPS` or `TEST_STEPS`) in order to the config that its arguments name.

    Raises:
        UsageError: If the config, an argument, or a file that they name cannot be used.
    """
    run = PreparedRun()
    for step in steps:
        lines = step.apply(run, args) or ()
        for line in [lines] if isinstance(lines, str | Notice) else lines:
            run.notices.append(line if isinstance(line, Notice) else Notice(line))
    return run


def build_runner(run: PreparedRun, compile_blocks: bool = False) -> Runner:
    """Build the runner of a prepared run, with compiled blocks of the backbone if wanted, and log the notices.

    Raises:
        UsageError: If the config cannot be built, or the checkpoint does not fit its model.
    """
    runner = make_runner(run.config, run.checkpoint)
    for message, level in run.notices:
        print_log(message, logger='current', level=level)
    if compile_blocks:
        compile_backbones(runner.model)
    return runner


def _load(run: PreparedRun, args: argparse.Namespace, required: tuple[str, ...], subfolder: str = '') -> None:
    """Load the config, and set its launcher, its work dir (or a subfolder) and the requested data set."""
    survive_closed_stdout()
    if args.launcher == 'mpi':
        os.environ.setdefault('LOCAL_RANK', os.environ.get('OMPI_COMM_WORLD_LOCAL_RANK', '0'))
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    options = args.cfg_options | _options_of_flags(args)
    run.config = config = load_config(args.config, options, required)
    run.options = {key.removeprefix('+'): value for key, value in options.items()}
    check_launcher(config, args.launcher)
    config.launcher = args.launcher
    work_dir = args.work_dir or config.get('work_dir') or default_work_dir(args.config)
    config.work_dir = os.path.join(work_dir, subfolder).rstrip('/')
    run.request = parse_request(args)
    if os.path.realpath(args.config) == os.path.realpath(os.path.join(config.work_dir, os.path.basename(args.config))):
        raise UsageError(
            f'{config.work_dir} contains the config itself, which its copy would overwrite: choose another --work-dir'
        )


# Arguments that set a config key, as `--cfg-options KEY=VALUE` does.
FLAG_KEYS = {'batch_size': 'train_dataloader.batch_size', 'seed': 'randomness.seed'}


def _options_of_flags(args: argparse.Namespace) -> dict[str, int]:
    options = {}
    if getattr(args, 'accumulate', None) and args.no_auto_batch:
        raise UsageError('--accumulate and --no-auto-batch: give one of them')
    for flag, key in FLAG_KEYS.items():
        value = getattr(args, flag, None)
        if value is None:
            continue
        if {key, f'+{key}'} & set(args.cfg_options):
            raise UsageError(f'--{flag.replace("_", "-")} and --cfg-options {key}: give one of them')
        options[key] = value
    return options


def _set_accumulation(run: PreparedRun, args: argparse.Namespace) -> Lines:
    return set_accumulation(run.config, world_size_from_env(args.launcher), args.accumulate)


def _add_loggers(run: PreparedRun, args: argparse.Namespace) -> None:
    if not args.dry_run and not args.lr_find:  # these runs are not tracked
        add_trackers(run.config, args.loggers, args.resume is not None)


# Argument -> what it does to the config if it is set.
TRAINING_AIDS = dict(early_stop=set_early_stopping, ema=set_ema, freeze=freeze_backbone)
TRAINING_AIDS |= dict(backbone_lr=scale_backbone_lr, negatives=set_negatives)


def _apply_training_aids(run: PreparedRun, args: argparse.Namespace) -> None:
    for name, function in TRAINING_AIDS.items():
        _apply(name, function)(run, args)


def _apply(name: str, function: Callable[..., Lines]) -> Callable[[PreparedRun, argparse.Namespace], Lines]:
    """Return a step that passes the config, and the value if it is no switch, to a function if an argument is set."""

    def apply(run: PreparedRun, args: argparse.Namespace) -> Lines:
        value = getattr(args, name)
        if value is None or value is False:
            return None
        return function(run.config) if value is True else function(run.config, value)

    return apply


def _check_data_files(run: PreparedRun, splits: tuple[str, ...]) -> None:
    if not run.request:
        check_data(run.config, splits)


def _find_checkpoint_to_resume(run: PreparedRun, args: argparse.Namespace) -> Lines:
    resumes = args.resume is not None or run.config.get('resume')
    run.checkpoint = set_resume(run.config, args.resume)
    if resumes and not run.checkpoint:
        return _warnings(f'{run.config.work_dir} contains no checkpoint; training starts from the beginning')


def _find_checkpoint_to_test(run: PreparedRun, args: argparse.Namespace) -> None:
    run.checkpoint = str(download(args.checkpoint))


def _check_exported(run: PreparedRun, args: argparse.Namespace) -> None:
    """Refuse options that an exported model does not support."""
    if not is_exported(run.checkpoint):
        return
    read_exported(run.checkpoint)
    options = [option for option in ('multiscale', 'compile') if getattr(args, option)]
    options += ['image-size'] if args.image_size else []
    options += ['launcher'] if args.launcher != 'none' else []
    options += [f'cfg-options {key}' for key in run.options if key.split('.')[0] in ('model', 'data_preprocessor')]
    if options:
        raise UsageError(f'--{options[0]} does not work with an exported model: leave it out, or test the checkpoint')
    session_class(run.checkpoint).import_package(run.checkpoint)
    session_device(run.checkpoint, None)


def _use_model(run: PreparedRun, args: argparse.Namespace) -> Lines:
    """Set the checkpoint to load, or replace the model by the exported one."""
    if not is_exported(run.checkpoint):
        run.config.load_from = run.checkpoint
        return None
    exported = read_exported(run.checkpoint)
    check_exported_fits(exported, run.config)
    run.config.model = dict(type=ExportedModel.__name__, file=os.path.abspath(run.checkpoint), model=run.config.model)
    run.config.load_from = run.checkpoint = None
    names = dataset_classes(run.config)
    if names and names != exported.meta.classes:
        return _warnings(f'{exported.path} names its classes otherwise than the data set: compare their order')
    return None


def _use_test_data(run: PreparedRun, args: argparse.Namespace) -> Lines:
    smallest_scale = min(multiscale_factors(run.config)) if args.multiscale else 1
    return apply_custom_data(run.config, run.request, ('test',), run.options, run.checkpoint, smallest_scale)


def _visualize(run: PreparedRun, args: argparse.Namespace) -> None:
    folder = args.show_dir and os.path.abspath(args.show_dir)
    set_visualization(run.config, folder, args.show, args.wait_time, run.options)


def _fit_schedule(run: PreparedRun, args: argparse.Namespace) -> Lines:
    if not run.request or args.no_auto_schedule:
        return None
    record = (checkpoint_config(run.checkpoint) or {}).get('schedule_fit') if run.checkpoint else None
    num_images = count_training_images(run.config)
    if not num_images or (run.checkpoint and not record):  # a resumed run whose schedule was not fitted
        return None
    has_length = args.epochs is not None or args.iters is not None
    has_batch = args.no_auto_batch or bool(args.accumulate)
    world_size = world_size_from_env(args.launcher)
    return fit_schedule(run.config, num_images, world_size, run.options, has_length, has_batch, record)


def _scale_batch(run: PreparedRun, args: argparse.Namespace) -> Lines:
    return scale_batch(run.config, world_size_from_env(args.launcher), args.no_auto_batch, run.options)


def _compare_with_checkpoint(run: PreparedRun, args: argparse.Namespace) -> Lines:
    has_length = args.epochs is not None or args.iters is not None
    return _warnings(check_resume(run.config, run.checkpoint, has_length, args.override))


def _set_lr_find(run: PreparedRun, args: argparse.Namespace) -> None:
    if not args.lr_find:
        return
    if run.checkpoint or args.resume is not None:
        raise UsageError('--lr-find is for the start of a training: leave out --resume')
    set_lr_find(run.config, world_size_from_env(args.launcher))


def _report_overridden(run: PreparedRun, args: argparse.Namespace) -> Lines:
    return _warnings(*overridden_options(run.config, run.options))


def _warnings(*lines: str | None) -> list[Notice]:
    return [Notice(line, logging.WARNING) for line in lines if line]


# Why a step comes after others:
# - data: the image size decides which images are too small; grayscale input and EXIF orientation share the setting
#   `color_type`; the prepared annotations are written into the locked work dir; their classes must be the checkpoint's.
# - schedule: the data may remove parts of the model, which must not be scaled.
# - balance: the frequency of a class depends on the training images.
# - mosaic: it is off in the last epochs, so the length must be known. It excludes copy-paste, because an image is mixed
#   only once.
# - fit: depends on the number of images and on the length that the user sets.
# - batch: accumulation multiplies the final length and everything else that counts iterations.
# - compare: the checkpoint is compared with the settings that the run will really have.
# - overridden: reports the options that do not hold in the final config.
# - lr_find: removes schedule and checkpoints, whatever the options say.
TRAIN_STEPS = (
    Step('config', partial(_load, required=('model', 'train_dataloader', 'train_cfg', 'optim_wrapper'))),
    Step('image_size', lambda run, args: set_image_size(run.config, args.image_size), after=('config',)),
    Step('aids', _apply_training_aids, after=('config',)),
    Step('inputs', lambda run, args: adapt_input_channels(run.config), after=('config',)),
    Step('precision', lambda run, args: set_precision(run.config, args.amp_dtype), after=('config',)),
    Step('loggers', _add_loggers, after=('config',)),
    Step('data_files', lambda run, args: _check_data_files(run, ('train', 'val')), after=('config',)),
    Step('pretrained', lambda run, args: check_pretrained(run.config.model), after=('config',)),
    Step('resume', _find_checkpoint_to_resume, after=('config',)),
    Step(
        'lock', lambda run, args: lock_work_dir(run.config.work_dir) if is_rank0() else None, after=('config', 'resume')
    ),
    Step(
        'data',
        lambda run, args: apply_custom_data(run.config, run.request, ('train', 'val'), run.options, run.checkpoint),
        after=('image_size', 'aids', 'inputs', 'resume', 'lock'),
    ),
    Step('classes', lambda run, args: check_classes(run.config), after=('data',)),
    Step('schedule', lambda run, args: scale_schedule(run.config, args.epochs, args.iters, run.options), ('data',)),
    Step('balance', _apply('balance', balance_classes), after=('data',)),
    Step('mosaic', _apply('mosaic', set_mosaic), after=('data', 'schedule', 'balance')),
    Step('copy_paste', _apply('copy_paste', set_copy_paste), after=('data', 'mosaic')),
    Step('accumulation', _set_accumulation, after=('config',)),
    Step('fit', _fit_schedule, after=('data', 'schedule', 'balance', 'mosaic', 'copy_paste', 'accumulation')),
    Step('batch', _scale_batch, after=('aids', 'schedule', 'accumulation', 'fit')),
    Step('compare', _compare_with_checkpoint, after=('precision', 'resume', 'data', 'schedule', 'fit', 'batch')),
    Step('retention', _apply('max_keep_ckpts', set_checkpoint_retention), after=('config',)),
    Step('unreadable', _apply('max_unreadable', set_max_unreadable), after=('config',)),
    Step(
        'overridden',
        _report_overridden,
        after=('image_size', 'aids', 'precision', 'data', 'fit', 'batch', 'retention', 'unreadable'),
    ),
    Step('lr_find', _set_lr_find, after=('batch', 'retention', 'overridden')),
)
# - visualization: images that are not RGB have a hook of their own.
# - predictions: the data decide which evaluators there are.
# - report: replaces the metric that predictions are set at.
# - overridden: multi-scale testing moves the model into another one, and with it all keys of the options.
# - model: an exported one replaces that of the config, of which it has the last word on classes.
TEST_STEPS = (
    Step(
        'config',
        partial(_load, required=('model', 'test_dataloader', 'test_cfg', 'test_evaluator'), subfolder='test'),
    ),
    Step('checkpoint', _find_checkpoint_to_test),
    Step('image_size', lambda run, args: set_image_size(run.config, args.image_size), after=('config',)),
    Step('exported', _check_exported, after=('config', 'checkpoint')),
    Step('inputs', lambda run, args: adapt_input_channels(run.config), after=('config',)),
    Step('data_files', lambda run, args: _check_data_files(run, ('test',)), after=('config',)),
    Step('data', _use_test_data, after=('image_size', 'inputs', 'checkpoint')),
    Step('visualization', _visualize, after=('data',)),
    Step('predictions', _apply('out', set_prediction_output), after=('data',)),
    Step('report', lambda run, args: set_report(run.config, args.report), after=('data', 'predictions')),
    Step('overridden', _report_overridden, after=('image_size', 'data', 'visualization', 'predictions', 'report')),
    Step(
        'multiscale',
        lambda run, args: set_multiscale(run.config, run.options) if args.multiscale else None,
        after=('data', 'overridden'),
    ),
    Step('model', _use_model, after=('checkpoint', 'data', 'overridden', 'multiscale')),
)


def format_metrics(metrics: dict[str, float]) -> str:
    """Format the metrics of an evaluator in one line.

    It has box and mask AP (in percent, as in the paper) or mIoU; all metrics if there is none of these.
    """
    parts = [
        f'{name} {value:.2f}' if name == 'mIoU' else f'{name} {value:.1f}'
        for name, value in to_paper_metrics(metrics).items()
    ]
    parts += [f'{name} {metrics[name]:.2f}' for name in ('mAcc', 'aAcc') if name in metrics]
    return '  '.join(parts or (f'{key} {value}' for key, value in metrics.items()))
