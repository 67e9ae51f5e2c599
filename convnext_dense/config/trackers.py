"""Experiment trackers: TensorBoard and Weights & Biases, by mmengine's visualization backends."""

import importlib
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from mmengine.config import Config
from mmengine.registry import VISBACKENDS

from ..errors import UsageError
from ..mmengine_internals import OverridableWandbVisBackend
from ..type_names import is_type
from .literal import parse_config_literal
from .recipe import recipe_id
from .tree import as_list
from .work_dir import TIMESTAMP_GLOB, read_log_text

# Name on the command line -> the module that must be installed, and mmengine's backend.
TRACKERS = {'tensorboard': ('torch.utils.tensorboard', 'TensorboardVisBackend'), 'wandb': ('wandb', 'WandbVisBackend')}


@VISBACKENDS.register_module(name=['NoCodeWandbVisBackend', 'RunWandbVisBackend'])  # old configs name the second one
class NoCodeWandbVisBackend(OverridableWandbVisBackend):
    """W&B backend that does not upload source code.

    mmengine's `WandbVisBackend` logs every .py file below the working directory, including virtual environments; this
    one logs only the config.
    """

    def start(self) -> None:
        """Import wandb and start its run; UsageError where it cannot."""
        wandb = importlib.import_module('wandb')
        with _wandb_errors(wandb):
            super().start()

    def add_config(self, config: Config, **kwargs) -> None:
        """Log the config, and no code."""
        self.experiment.config.update(config.to_dict(), allow_val_change=True)


RunWandbVisBackend = NoCodeWandbVisBackend  # its name before


def add_trackers(config: Config, names: Iterable[str], resumed: bool = False) -> None:
    """Add experiment trackers to the visualization backends of a config.

    A W&B run is named after the work dir, in a project named after the recipe; a resumed run continues it.

    Args:
        config: changed in place; backends that it has stay as they are.
        names: of `TRACKERS`.
        resumed: whether the run is resumed.

    Raises:
        UsageError: the package of a tracker is not installed, or W&B is online and nobody is logged in.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        try:
            module = importlib.import_module(TRACKERS[name][0])
        except ImportError as error:
            raise UsageError(f'--loggers {name}: {error}: run pip install {name}') from error
        if name == 'wandb' and os.environ.get('WANDB_MODE', 'online') == 'online':
            with _wandb_errors(module):
                module.login()
    if not names:
        return
    config.visualizer = config.get('visualizer') or dict(type='Visualizer')
    backends = as_list(config.visualizer.get('vis_backends')) or [dict(type='LocalVisBackend')]
    for name in names:
        if not any(is_type(backend['type'], VISBACKENDS, TRACKERS[name][1]) for backend in backends):
            backends.append(dict(type=TRACKERS[name][1]) if name == 'tensorboard' else _wandb_cfg(config, resumed))
    config.visualizer.vis_backends = backends


@contextmanager
def _wandb_errors(wandb: ModuleType) -> Iterator[None]:
    """Turn errors of W&B, such as a missing login or network, into a UsageError."""
    try:
        yield
    except wandb.Error as error:
        line = str(error).strip().splitlines()[0].rstrip('.')
        raise UsageError(
            f'--loggers wandb: {line}; set WANDB_MODE=offline to keep the run here and upload it later with wandb sync'
        ) from error


def _wandb_cfg(config: Config, resumed: bool) -> dict:
    init_kwargs = dict(name=Path(config.work_dir).name, id=secrets.token_hex(4), resume='allow')
    if resumed:
        init_kwargs['id'] = _previous_run_id(Path(config.work_dir)) or init_kwargs['id']
    if 'WANDB_PROJECT' not in os.environ:
        init_kwargs['project'] = '-'.join(recipe_id(config.filename))
    # W&B's own axis counts calls; mmengine logs the iteration of each call.
    axis = [dict(name='iter'), dict(name='*', step_metric='iter')]
    return dict(type='NoCodeWandbVisBackend', init_kwargs=init_kwargs, define_metric_cfg=axis)


def _previous_run_id(work_dir: Path) -> str | None:
    """Return the W&B id of the run in a work dir, from the configs that mmengine writes for each session."""
    for session in sorted(work_dir.glob(TIMESTAMP_GLOB), reverse=True):
        try:
            config = parse_config_literal(read_log_text(session / 'vis_data/config.py'))
        except UsageError:  # cut off where the session was killed
            continue
        for backend in (config.get('visualizer') or {}).get('vis_backends') or []:
            if 'id' in (backend.get('init_kwargs') or {}):
                return backend.init_kwargs.id
    return None
