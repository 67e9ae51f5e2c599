"""From parsed arguments to the config of a run."""

import argparse
import os

from mmengine.config import Config
from mmengine.logging import print_log

from ..config.inputs import adapt_input_channels
from ..config.load import load_config
from ..config.preflight import check_launcher
from ..config.work_dir import default_work_dir
from ..engine.console import survive_closed_stdout
from ..errors import UsageError
from ..paper.results import to_paper_metrics


def load_run_config(args: argparse.Namespace, needed: tuple[str, ...], subfolder: str = '') -> Config:
    """The config of a command line that runs it, with its launcher and its work dir, or a folder in it.

    Raises:
        UsageError: as `load_config`; the launcher's variables are not set; the work dir's copy of the config would
            overwrite the config itself.
    """
    survive_closed_stdout()
    if args.launcher == 'mpi':
        os.environ.setdefault('LOCAL_RANK', os.environ.get('OMPI_COMM_WORLD_LOCAL_RANK', '0'))
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    config = load_config(args.config, args.cfg_options, needed)
    args.cfg_options = {key.removeprefix('+'): value for key, value in args.cfg_options.items()}
    check_launcher(config, args.launcher)
    config.launcher = args.launcher
    work_dir = args.work_dir or config.get('work_dir') or default_work_dir(args.config)
    config.work_dir = os.path.join(work_dir, subfolder).rstrip('/')
    if os.path.realpath(args.config) == os.path.realpath(os.path.join(config.work_dir, os.path.basename(args.config))):
        raise UsageError(
            f'{config.work_dir} holds the config itself, which its copy would overwrite: give a --work-dir'
        )
    fitted = adapt_input_channels(config)
    if fitted:
        print_log(fitted, logger='current')
    return config


def format_metrics(metrics: dict[str, float]) -> str:
    """An evaluation in a line: box and mask AP (percent, as the paper gives them) or mIoU, else all there is."""
    found = [
        f'{name} {value:.2f}' if name == 'mIoU' else f'{name} {value:.1f}'
        for name, value in to_paper_metrics(metrics).items()
    ]
    found += [f'{name} {metrics[name]:.2f}' for name in ('mAcc', 'aAcc') if name in metrics]
    return '  '.join(found or (f'{key} {value}' for key, value in metrics.items()))
