"""Read work dirs: progress of each run, its metrics, and its deviations from its recipe."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from mmengine.config import Config

from ..checkpoints.io import load_checkpoint
from ..config.literal import parse_config_literal
from ..config.recipe import counts_epochs, training_length, training_precision
from ..config.value_types import COUNT, DICT, TEXT, find_wrong_types
from ..config.work_dir import TIMESTAMP_GLOB, read_log_text
from ..engine.checkpoint_hook import LAST_CKPT_FILE
from ..errors import UsageError
from .recipe_diff import diff_from_recipe
from .results import RELEASED_TOLERANCE, RETRAIN_TOLERANCE, PaperResult, find_paper_result, to_paper_metrics
from .session import SCALARS_FILE, Session, is_number

# Expected types of the parts of a config that are read here; all are optional.
CONFIG_TYPES = dict.fromkeys(
    ('train_cfg', 'model', 'optim_wrapper', 'optim_wrapper.optimizer', 'train_dataloader', 'default_hooks',
     'default_hooks.logger', 'auto_scale_lr', 'model.backbone', 'visualizer'), DICT._replace(optional=True),
) | dict.fromkeys(
    ('train_cfg.max_epochs', 'train_cfg.max_iters', 'optim_wrapper.accumulative_counts', 'train_dataloader.batch_size'),
    COUNT._replace(optional=True),
) | {'default_scope': TEXT._replace(optional=True)}  # fmt: skip
EVAL_DIR = 'test'  # folder of tools/test.py in a work dir


@dataclass
class EvalRecord:
    """A test by tools/test.py.

    Attributes:
        metrics: Metrics in percent, by the paper's names.
        config: Config of the test.
        checkpoint: File name of the tested checkpoint without suffix.
    """

    metrics: dict[str, float]
    config: Config
    checkpoint: str

    @property
    def paper_result(self) -> PaperResult | None:
        """The paper's result for this recipe; None if the config is not a recipe."""
        return find_paper_result(self.config)

    @property
    def is_released(self) -> bool:
        """Whether the checkpoint is the one that the paper's authors released."""
        return self.paper_result is not None and self.checkpoint == self.paper_result.released


@dataclass
class TrainingRun:
    """A training, or tests of a model that was not trained in this work dir.

    Attributes:
        work_dir: The work dir.
        config: Config of its last session.
        done: Finished epochs, or optimizer steps if the training is iteration-based.
        progress: `done` plus the fraction of the current epoch.
        evaluations: Metrics of the evaluations during training, by step.
        eval_records: Tests by tools/test.py.
        last_logged: Time of the last change of the training's logs; None without a training.
        issues: Problems while reading, one sentence each.
        sessions: Sessions of the training with logged iterations, in order.
        world_size: Number of processes; None if unknown.
        total_batch: Images per optimizer step; None if unknown.
    """

    work_dir: Path
    config: Config = field(default_factory=Config)
    done: float = 0
    progress: float = 0
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    eval_records: list[EvalRecord] = field(default_factory=list)
    last_logged: datetime | None = None
    issues: list[str] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    world_size: int | None = None
    total_batch: int | None = None

    @property
    def paper_result(self) -> PaperResult | None:
        """The paper's result for this recipe; None if the config is not a recipe."""
        return find_paper_result(self.config)

    @property
    def length(self) -> float:
        """Length of the training in epochs, or in optimizer steps if it is iteration-based."""
        return training_length(self.config)

    @property
    def unit(self) -> str:
        """Unit of `length`: 'epochs' or 'optimizer steps'."""
        return 'epochs' if counts_epochs(self.config) else 'optimizer steps'

    @property
    def has_training(self) -> bool:
        """Whether a training was started here, not only tests."""
        return self.last_logged is not None

    @property
    def is_finished(self) -> bool:
        """Whether the training reached its length."""
        return self.done >= self.length > 0

    @property
    def precision(self) -> str:
        """'float32', 'float16' or 'bfloat16'."""
        return training_precision(self.config)

    @property
    def final_checkpoint(self) -> str:
        """File name without suffix of the checkpoint at the end of the training."""
        train_cfg = self.config.get('train_cfg') or {}
        return f'epoch_{train_cfg["max_epochs"]}' if self.unit == 'epochs' else f'iter_{train_cfg.get("max_iters")}'

    def last(self, metric: str) -> float | None:
        """Return the metric at the last evaluation during training, in percent."""
        return next((e[metric] for _, e in sorted(self.evaluations.items(), reverse=True) if metric in e), None)

    def best(self, metric: str) -> float | None:
        """Return the best value of the metric during training, in percent."""
        return max((e[metric] for e in self.evaluations.values() if metric in e), default=None)

    def last_test(self, metric: str) -> EvalRecord | None:
        """Return the last test that has this metric."""
        return next((record for record in reversed(self.eval_records) if metric in record.metrics), None)

    def final(self, metric: str) -> float | None:
        """Return the metric of the finished training, or of a tested model of other origin, in percent."""
        record = self._final_test(metric)
        return record.metrics[metric] if record else self.last(metric) if self.is_finished else None

    def deviations(self) -> list[str]:
        """List the settings in which the training differs from the recipe of its paper result."""
        deviations = diff_from_recipe(self.config, self.paper_result)
        deviations += ['precision'] if self.precision != self.paper_result.precision else []
        return deviations + (['batch'] if self.total_batch not in (None, self.paper_result.total_batch) else [])

    def compare_to_paper(self, metric: str) -> tuple[float | None, str]:
        """Compare the final metric with the paper's.

        Args:
            metric: Name of the metric, such as 'box AP'.

        Returns:
            This metric minus the paper's in percentage points (None if one is missing), and 'within tolerance', 'below'
            or 'above' ('' if the training differs from the recipe or is not finished).
        """
        paper, value, record = self.paper_result, self.final(metric), self._final_test(metric)
        if value is None or paper is None or metric not in paper.metrics:
            return None, ''
        difference = round(round(value, 1) - paper.metrics[metric], 1)
        is_released = record is not None and record.is_released
        if not is_released and (not self.is_finished or self.deviations()):
            return difference, ''
        tolerance = RELEASED_TOLERANCE if is_released else RETRAIN_TOLERANCE[metric]
        if abs(difference) <= tolerance:
            return difference, 'within tolerance'
        return difference, 'below' if difference < 0 else 'above'

    def _final_test(self, metric: str) -> EvalRecord | None:
        record = self.last_test(metric)
        is_final = record and (not self.has_training or record.checkpoint == self.final_checkpoint)
        return record if is_final else None


def find_runs(folders: Iterable[str | Path]) -> list[TrainingRun]:
    """Read all runs in and below folders.

    Args:
        folders: Work dirs, or folders that contain them.

    Returns:
        The runs, sorted by path.

    Raises:
        UsageError: If a folder does not exist.
    """
    work_dirs = set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UsageError(f"no folder '{folder}': give work dirs, such as work_dirs")
        for log_dir in folder.rglob(TIMESTAMP_GLOB):
            if log_dir.is_dir():
                is_test = log_dir.parent.name == EVAL_DIR and not (log_dir / SCALARS_FILE).exists()
                work_dirs.add(log_dir.parent.parent if is_test else log_dir.parent)
    return [run for work_dir in sorted(work_dirs) for run in read_runs(work_dir)]


def read_runs(work_dir: Path) -> list[TrainingRun]:
    """Read a work dir in any state.

    Args:
        work_dir: The work dir. Problems while reading are listed in the `issues` of its run.

    Returns:
        The training, if there is one, and one run for each model of other origin that was tested there.
    """
    run, eval_records = TrainingRun(work_dir), []
    for log_dir in [*sorted((work_dir / EVAL_DIR).glob(TIMESTAMP_GLOB)), *sorted(work_dir.glob(TIMESTAMP_GLOB))]:
        if (log_dir / f'{log_dir.name}.json').exists():
            eval_records += _read_test(run, log_dir)
        elif log_dir.parent == work_dir:
            _read_training(run, log_dir)
    _check_last_checkpoint(run)
    runs_of_origin: dict[tuple, TrainingRun] = {}
    for record in eval_records:
        if run.has_training and record.paper_result is run.paper_result and not record.is_released:
            run.eval_records.append(record)
        else:
            origin = (record.paper_result and record.paper_result.recipe, record.checkpoint)
            other_run = runs_of_origin.setdefault(origin, TrainingRun(work_dir / EVAL_DIR, record.config))
            other_run.eval_records.append(record)
    return [*([run] if run.has_training or run.issues else []), *runs_of_origin.values()]


def _read_training(run: TrainingRun, log_dir: Path) -> None:
    run.config = _read_config(run, log_dir) or run.config
    session = Session(log_dir, run.config, run.issues)
    files = [log_dir, *log_dir.rglob('*')]
    run.last_logged = datetime.fromtimestamp(max(file.stat().st_mtime for file in files))
    run.world_size = session.facts.world_size or run.world_size
    run.total_batch = run.world_size and run.world_size * session.facts.batch_size * session.facts.accumulation_steps
    if not (log_dir / SCALARS_FILE).exists():
        run.issues.append(f'{log_dir.name}: no iteration was logged')
        return
    run.sessions.append(session)
    non_finite = []
    for record in session.records:
        metrics, step = to_paper_metrics(record), record.get('step', 0)
        non_finite += [f'{name} {value} at step {step}' for name, value in metrics.items() if not math.isfinite(value)]
        if not math.isfinite(record.get('loss') or 0):
            non_finite.append(f'loss {record["loss"]} at step {step}')
        if metrics:  # evaluations that a resumed run repeats replace the earlier ones
            run.evaluations = {s: e for s, e in run.evaluations.items() if s < step} | {step: _finite(metrics)}
        _update_progress(run, session, record, is_evaluation=bool(metrics))
    if non_finite:
        more = f' and in {len(non_finite) - 1} more records' if len(non_finite) > 1 else ''
        run.issues.append(non_finite[0] + more)


def _update_progress(run: TrainingRun, session: Session, record: dict[str, float], is_evaluation: bool) -> None:
    if not session.by_epoch:
        run.done = run.progress = session.progress_at(record)
    elif is_evaluation:
        run.done = run.progress = record.get('step', 0)
    else:  # the epoch of a training record is not finished
        run.done = max(run.done, record.get('epoch', 1) - 1)
        run.progress = max(run.done, session.progress_at(record) if session.facts.iters_per_epoch else 0)


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _read_test(run: TrainingRun, log_dir: Path) -> list[EvalRecord]:
    try:
        content = json.loads(read_log_text(log_dir / f'{log_dir.name}.json'))
        metrics = to_paper_metrics({key: value for key, value in content.items() if is_number(value)})
        run.issues += [f'{log_dir.name}: {name} {value}' for name, value in metrics.items() if not math.isfinite(value)]
        metrics = _finite(metrics)
    except (ValueError, TypeError, AttributeError, RecursionError):
        run.issues.append(f'{log_dir.name}.json is truncated')
        return []
    config = _read_config(run, log_dir) or Config()
    if 'module' in config.get('model', {}):  # a multi-scale test
        config.model = config.model.module
        metrics = {f'{name} multi-scale': value for name, value in metrics.items()}
    return [EvalRecord(metrics, config, Path(str(config.get('load_from'))).stem)]


def _read_config(run: TrainingRun, log_dir: Path) -> Config | None:
    """Read the config of a session: from tools/test.py, or the one that mmengine writes next to its visualizations."""
    file = next((f for f in (log_dir / 'config.py', log_dir / 'vis_data/config.py') if f.exists()), None)
    try:
        config = file and parse_config_literal(read_log_text(file))
    except UsageError:
        run.issues.append(f'{log_dir.name}: config.py cannot be read')
        return None
    wrong_key = next((key for key, *_ in find_wrong_types(config, CONFIG_TYPES)), None) if config else None
    if wrong_key:
        run.issues.append(f'{log_dir.name}: config.py has no valid {wrong_key}')
        return None
    return config


def _check_last_checkpoint(run: TrainingRun) -> None:
    pointer = run.work_dir / LAST_CKPT_FILE
    if not pointer.exists():
        return
    name = Path(read_log_text(pointer).strip()).name  # the work dir may have been moved since
    epoch = re.fullmatch(r'epoch_(\d+)\.pth', name)
    if epoch:
        run.done = max(run.done, int(epoch[1]))
        run.progress = max(run.progress, run.done)
    if not name or not (run.work_dir / name).is_file():
        run.issues.append(f'{name or LAST_CKPT_FILE} is missing')
        return
    try:
        load_checkpoint(run.work_dir / name)
    except UsageError:
        run.issues.append(f'{name} cannot be read: it is truncated or damaged')
