"""Runs sent to TensorBoard or Weights & Biases, by mmengine's visualization backends."""

import importlib
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import VISBACKENDS
from mmengine.visualization import WandbVisBackend

from ..errors import UsageError
from ..type_names import is_type
from .literal import parse_config_literal
from .recipe import recipe_id
from .tree import as_list
from .work_dir import TIMESTAMP_GLOB, read_log_text

# What each needs to be imported.
TRACKERS = {'tensorboard': 'torch.utils.tensorboard', 'wandb': 'wandb'}
BACKENDS = {'tensorboard': 'TensorboardVisBackend', 'wandb': 'WandbVisBackend'}  # of mmengine


@VISBACKENDS.register_module(name=['NoCodeWandbVisBackend', 'RunWandbVisBackend'])  # old configs name the second one
class NoCodeWandbVisBackend(WandbVisBackend):
    """W&B backend that does not upload source code.

    mmengine's `WandbVisBackend` logs every .py file below the working directory, including virtual environments; this
    one logs only the config.
    """

    def _init_env(self) -> None:
        wandb = importlib.import_module('wandb')
        with _wandb_errors(wandb):
            super()._init_env()

    def add_config(self, config: Config, **kwargs) -> None:
        """Log the config, and no code."""
        self.experiment.config.update(config.to_dict(), allow_val_change=True)


RunWandbVisBackend = NoCodeWandbVisBackend  # its name before


def add_trackers(config: Config, names: Iterable[str], resumed: bool = False) -> None:
    """Add 'tensorboard' or 'wandb' to where a config's numbers go; what it names itself stays as it is. A run of W&B
    is named after the work dir, in a project named after the recipe, and a resumed one goes on.

    Raises:
        UsageError: the package is not installed, or W&B is online and nobody is logged in.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        try:
            module = importlib.import_module(TRACKERS[name])
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
        if not any(is_type(backend['type'], VISBACKENDS, BACKENDS[name]) for backend in backends):
            backends.append(dict(type=BACKENDS[name]) if name == 'tensorboard' else _wandb_cfg(config, resumed))
    config.visualizer.vis_backends = backends


@contextmanager
def _wandb_errors(wandb) -> Iterator[None]:
    """What W&B cannot do as a UsageError: nobody is logged in, no network."""
    try:
        yield
    except wandb.Error as error:
        line = str(error).strip().splitlines()[0].rstrip('.')
        raise UsageError(f'--loggers wandb: {line}; WANDB_MODE=offline keeps the run here, for wandb sync') from error


def _wandb_cfg(config: Config, resumed: bool) -> dict:
    init = dict(name=Path(config.work_dir).name, id=secrets.token_hex(4), resume='allow')
    if resumed:
        init['id'] = _previous_run_id(Path(config.work_dir)) or init['id']
    if 'WANDB_PROJECT' not in os.environ:
        init['project'] = '-'.join(recipe_id(config.filename))
    # W&B counts calls; mmengine gives it each call's iteration.
    axis = [dict(name='iter'), dict(name='*', step_metric='iter')]
    return dict(type='NoCodeWandbVisBackend', init_kwargs=init, define_metric_cfg=axis)


def _previous_run_id(work_dir: Path) -> str | None:
    """The id in W&B of the run that a work dir holds, by the configs that mmengine keeps of each start."""
    for start in sorted(work_dir.glob(TIMESTAMP_GLOB), reverse=True):
        try:
            config = parse_config_literal(read_log_text(start / 'vis_data/config.py'))
        except UsageError:  # cut short when the run was
            continue
        for backend in (config.get('visualizer') or {}).get('vis_backends') or []:
            if 'id' in (backend.get('init_kwargs') or {}):
                return backend.init_kwargs.id
    return None
