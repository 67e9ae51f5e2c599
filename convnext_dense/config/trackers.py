"""Experiment trackers, from TensorBoard to Neptune, by mmengine's visualization backends."""

import importlib
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from mmengine.config import Config
from mmengine.registry import VISBACKENDS

from ..errors import UsageError
from ..mmengine_internals import OverridableWandbVisBackend
from ..type_names import is_type
from .literal import parse_config_literal
from .recipe import recipe_id
from .tree import as_list
from .work_dir import TIMESTAMP_GLOB, read_log_text

# Parts of a config that MLflow gets as parameters; the complete config is in the artifact config.py.
TRACKED_KEYS = ('model', 'optim_wrapper', 'param_scheduler', 'train_cfg', 'train_dataloader', 'total_batch')


class Tracker(NamedTuple):
    """An experiment tracker, which has the name of its package on PyPI.

    Attributes:
        modules: Modules that must be importable.
        backend: mmengine's visualization backend.
    """

    modules: tuple[str, ...]
    backend: str


TRACKERS = {
    'tensorboard': Tracker(('torch.utils.tensorboard',), 'TensorboardVisBackend'),
    'wandb': Tracker(('wandb',), 'WandbVisBackend'),
    'mlflow': Tracker(('mlflow',), 'MLflowVisBackend'),
    'clearml': Tracker(('clearml',), 'ClearMLVisBackend'),
    'dvclive': Tracker(('pygit2', 'dvclive'), 'DVCLiveVisBackend'),
    'aim': Tracker(('aim',), 'AimVisBackend'),
    'neptune': Tracker(('neptune',), 'NeptuneVisBackend'),
}


@VISBACKENDS.register_module(name=['NoCodeWandbVisBackend', 'RunWandbVisBackend'])  # the second name is in old configs
class NoCodeWandbVisBackend(OverridableWandbVisBackend):
    """W&B backend that does not upload source code.

    mmengine's `WandbVisBackend` logs every .py file below the working directory, including virtual environments; this
    one logs only the config.
    """

    def start(self) -> None:
        """Import wandb and start its run; raise UsageError if it cannot start."""
        wandb = importlib.import_module('wandb')
        with _wandb_errors(wandb):
            super().start()

    def add_config(self, config: Config, **kwargs) -> None:
        """Log the config, but no code."""
        self.experiment.config.update(config.to_dict(), allow_val_change=True)


RunWandbVisBackend = NoCodeWandbVisBackend  # its name before


def add_trackers(config: Config, names: Iterable[str], resumed: bool = False) -> None:
    """Add experiment trackers to the visualization backends of a config.

    A run is named after its work dir, its project or experiment after the recipe.

    Args:
        config: Config; it is changed in place, except for the backends that it has already.
        names: Keys of `TRACKERS`.
        resumed: Whether the run is resumed; a W&B run then continues.

    Raises:
        UsageError: If the package of a tracker is not installed, or W&B is online and nobody is logged in.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        _check_installed(name)
    if not names:
        return
    config.visualizer = config.get('visualizer') or dict(type='Visualizer')
    backends = as_list(config.visualizer.get('vis_backends')) or [dict(type='LocalVisBackend')]
    for name in names:
        tracker = TRACKERS[name]
        if not any(is_type(backend['type'], VISBACKENDS, tracker.backend) for backend in backends):
            backends.append({'type': tracker.backend, **_backend_settings(config, resumed)[name]})
    config.visualizer.vis_backends = backends


def _check_installed(name: str) -> None:
    for module in TRACKERS[name].modules:
        try:
            imported = importlib.import_module(module)
        except ImportError as error:
            raise UsageError(f'--loggers {name}: {error}: run pip install {name}') from error
    if name == 'wandb' and os.environ.get('WANDB_MODE', 'online') == 'online':
        with _wandb_errors(imported):
            imported.login()


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


def _backend_settings(config: Config, resumed: bool) -> dict[str, dict]:
    """Return the arguments of each tracker's backend; a `type` among them names a subclass to use instead."""
    env, work_dir = os.environ, Path(config.work_dir)
    run, project = work_dir.name, '-'.join(recipe_id(config.filename))
    wandb_id = (_previous_run_id(work_dir) if resumed else None) or secrets.token_hex(4)
    wandb_project = {} if 'WANDB_PROJECT' in env else dict(project=project)
    # As in mmengine without arguments: offline, the data are kept in .neptune.
    neptune_mode = {} if {'NEPTUNE_API_TOKEN', 'NEPTUNE_PROJECT'} <= set(env) else dict(mode='offline')
    return {
        'tensorboard': {},
        'wandb': dict(
            type='NoCodeWandbVisBackend',
            init_kwargs=dict(name=run, id=wandb_id, resume='allow', **wandb_project),
            # W&B's own axis counts calls; mmengine logs the iteration of each call.
            define_metric_cfg=[dict(name='iter'), dict(name='*', step_metric='iter')],
        ),
        # mmengine ignores MLflow's own environment variables, and by default logs every setting and all files of the
        # work dir, which MLflow 3 refuses; mlflow.db is MLflow's own default.
        'mlflow': dict(
            tracking_uri=env.get('MLFLOW_TRACKING_URI') or 'sqlite:///mlflow.db',
            exp_name=env.get('MLFLOW_EXPERIMENT_NAME') or project,
            run_name=run,
            tracked_config_keys=[key for key in TRACKED_KEYS if key in config],
            artifact_suffix=('.py',),
        ),
        # By default ClearML uploads checkpoints as they are written, and the changes of the git repository.
        'clearml': dict(
            init_kwargs=dict(
                project_name=env.get('CLEARML_PROJECT') or project, task_name=run, auto_connect_frameworks=False
            ),
            artifact_suffix=('.py',),
        ),
        # By default DVCLive saves experiments as git references, and writes dvc.yaml into the current folder.
        'dvclive': dict(
            init_kwargs=dict(save_dvc_exp=False, dvcyaml=os.path.abspath(work_dir / 'dvc.yaml')),
            artifact_suffix=('.py',),
        ),
        'aim': dict(init_kwargs=dict(experiment=project)),
        'neptune': dict(init_kwargs=dict(name=run, tags=[project], source_files=[], **neptune_mode)),
    }


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
