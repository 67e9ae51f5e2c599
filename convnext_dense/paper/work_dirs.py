"""What work dirs hold: how far each run is, what it reached, and where it departs from its recipe."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from mmengine.config import Config

from ..checkpoints.io import load_checkpoint
from ..config.literal import parse_config_literal
from ..config.recipe import accumulative_counts, training_length, training_precision
from ..config.value_types import COUNT, DICT, TEXT, find_wrong_types
from ..config.work_dir import TIMESTAMP_GLOB, read_log_text
from ..errors import UsageError
from .departures import diff_from_recipe
from .results import (
    RELEASED_TOLERANCE,
    RETRAIN_TOLERANCE,
    TOTAL_BATCH,
    PaperResult,
    find_paper_result,
    to_paper_metrics,
)

SCALARS = 'vis_data/scalars.json'
COUNTS = ('step', 'epoch', 'iter')  # of a record, whole numbers
MAX_COUNT = 2**53
# What the parts of a config that are looked into here have to be, where they are there.
WRITTEN = dict.fromkeys(
    ('train_cfg', 'model', 'optim_wrapper', 'optim_wrapper.optimizer', 'train_dataloader', 'default_hooks',
     'default_hooks.logger', 'auto_scale_lr', 'model.backbone', 'visualizer'), DICT._replace(optional=True),
) | dict.fromkeys(
    ('train_cfg.max_epochs', 'train_cfg.max_iters', 'optim_wrapper.accumulative_counts', 'train_dataloader.batch_size'),
    COUNT._replace(optional=True),
) | {'default_scope': TEXT._replace(optional=True)}  # fmt: skip
TESTS = 'test'  # the folder in a run's own where tools/test.py works


@dataclass
class EvalRecord:
    """A test by tools/test.py: its figures, its config, and the checkpoint's file name without its ending."""

    figures: dict[str, float]
    config: Config
    checkpoint: str

    @property
    def row(self) -> PaperResult | None:
        return find_paper_result(self.config)

    @property
    def released(self) -> bool:
        """Whether it is the paper's authors' model that was tested."""
        return self.row is not None and self.checkpoint == self.row.released


@dataclass
class TrainingRun:
    """A training, or tests of one model of other origin. `done` and `length` are epochs, or updates where the config
    counts iterations; `evaluations` are the figures found in training by step; `processes` is None where no log says
    it; `written` is when a training's log last grew; `problems` say what could not be read; `starts` are the folders of
    its logs in order, each with its config."""

    folder: Path
    config: Config = field(default_factory=Config)
    done: float = 0
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    tests: list[EvalRecord] = field(default_factory=list)
    processes: int | None = None
    written: datetime | None = None
    problems: list[str] = field(default_factory=list)
    starts: list[tuple[Path, Config]] = field(default_factory=list)

    @property
    def row(self) -> PaperResult | None:
        return find_paper_result(self.config)

    @property
    def length(self) -> float:
        return training_length(self.config)

    @property
    def trained(self) -> bool:
        """Whether a training was started here, not tests alone."""
        return self.written is not None

    @property
    def finished(self) -> bool:
        return self.done >= self.length > 0

    @property
    def precision(self) -> str:
        return training_precision(self.config)

    @property
    def total_batch(self) -> int | None:
        images = (self.config.get('train_dataloader') or {}).get('batch_size', 0)
        return self.processes and self.processes * images * accumulative_counts(self.config)

    @property
    def final_checkpoint(self) -> str:
        train_cfg = self.config.get('train_cfg') or {}
        return f'epoch_{train_cfg["max_epochs"]}' if 'max_epochs' in train_cfg else f'iter_{train_cfg.get("max_iters")}'

    def last(self, figure: str) -> float | None:
        return next((e[figure] for _, e in sorted(self.evaluations.items(), reverse=True) if figure in e), None)

    def best(self, figure: str) -> float | None:
        return max((e[figure] for e in self.evaluations.values() if figure in e), default=None)

    def test(self, figure: str) -> EvalRecord | None:
        """The latest test that gave this figure."""
        return next((test for test in reversed(self.tests) if figure in test.figures), None)

    def departures(self) -> list[str]:
        """In what this run is not its row's recipe."""
        row = self.row
        changed = diff_from_recipe(self.config, row)
        changed += ['precision'] if self.precision != row.precision else []
        return changed + (['batch'] if self.total_batch not in (None, TOTAL_BATCH) else [])

    def result(self, figure: str) -> float | None:
        """What this run reached: tested or evaluated at its end, or the test of a model of other origin."""
        test = self._test_of_the_end(figure)
        return test.figures[figure] if test else self.last(figure) if self.finished else None

    def verdict(self, figure: str) -> tuple[float | None, str]:
        """The difference of our result to the paper's figure, and whether a faithful run may differ so: 'inside',
        'below' or 'above'; '' where that cannot be said."""
        row, ours, test = self.row, self.result(figure), self._test_of_the_end(figure)
        if ours is None or row is None:
            return None, ''
        difference = round(round(ours, 1) - row.figures[figure], 1)
        released = test is not None and test.released
        if not released and (not self.finished or self.departures()):
            return difference, ''
        margin = RELEASED_TOLERANCE if released else RETRAIN_TOLERANCE[figure]
        return difference, 'inside' if abs(difference) <= margin else 'below' if difference < 0 else 'above'

    def _test_of_the_end(self, figure: str) -> EvalRecord | None:
        test = self.test(figure)
        return test if test and (not self.trained or test.checkpoint == self.final_checkpoint) else None


def find_runs(folders: Iterable[str | Path]) -> list[TrainingRun]:
    """The runs in and below these folders, by path.

    Raises:
        UsageError: a folder is not there.
    """
    found = set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UsageError(f"no folder '{folder}': give work dirs, such as work_dirs")
        for start in folder.rglob(TIMESTAMP_GLOB):
            if start.is_dir():
                tests = start.parent.name == TESTS and not (start / SCALARS).exists()
                found.add(start.parent.parent if tests else start.parent)
    return [run for folder in sorted(found) for run in read_runs(folder)]


def read_runs(folder: Path) -> list[TrainingRun]:
    """What one work dir holds, whatever state it is in: its training, and each model of other origin that was tested
    there. What cannot be read is said in `problems`."""
    run, tests = TrainingRun(folder), []
    for start in [*sorted((folder / TESTS).glob(TIMESTAMP_GLOB)), *sorted(folder.glob(TIMESTAMP_GLOB))]:
        if (start / f'{start.name}.json').exists():
            tests += _read_test(run, start)
        elif start.parent == folder:
            _read_training(run, start)
    _check_last_checkpoint(run)
    others: dict[tuple, TrainingRun] = {}
    for test in tests:
        if run.trained and test.row is run.row and not test.released:
            run.tests.append(test)
        else:
            origin = (test.row and test.row.recipe, test.checkpoint)
            others.setdefault(origin, TrainingRun(folder / TESTS, test.config)).tests.append(test)
    return [*([run] if run.trained or run.problems else []), *others.values()]


def _read_training(run: TrainingRun, start: Path) -> None:
    run.config = _read_config(run, start) or run.config
    run.written = datetime.fromtimestamp(max(file.stat().st_mtime for file in [start, *start.rglob('*')]))
    processes = re.search(r'GPU number: (\d+)', read_log_text(start / f'{start.name}.log'))
    run.processes = int(processes[1]) if processes else run.processes
    if not (start / SCALARS).exists():
        run.problems.append(f'{start.name}: no log of any iteration')
        return
    run.starts.append((start, run.config))
    counts_epochs, lost = 'max_epochs' in (run.config.get('train_cfg') or {}), []
    for record in read_records(start / SCALARS, run.problems):
        figures, step = to_paper_metrics(record), record.get('step', 0)
        lost += [f'{name} {value} at step {step}' for name, value in figures.items() if not math.isfinite(value)]
        if figures:  # what a resumed run does again replaces what it went back behind
            run.evaluations = {s: e for s, e in run.evaluations.items() if s < step} | {step: _finite(figures)}
        if counts_epochs:
            run.done = step if figures else max(run.done, record.get('epoch', 1) - 1)
        else:
            run.done = step / accumulative_counts(run.config)
        if not math.isfinite(record.get('loss') or 0):
            lost.append(f'loss {record["loss"]} at step {step}')
    if lost:
        run.problems.append(lost[0] + (f' and in {len(lost) - 1} records more' if len(lost) > 1 else ''))


def read_records(scalars: Path, problems: list[str]) -> Iterator[dict[str, float]]:
    """What was logged, line by line: numbers by their names. Lines that are cut short, and what is no number, are said
    in `problems`."""
    for i, line in enumerate(read_log_text(scalars).splitlines(), 1):
        try:
            record = dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            problems.append(f'log cut short at line {i}')
            continue
        numbers = {key: value for key, value in record.items() if _is_number(value, key in COUNTS)}
        strange = [key for key, value in record.items() if key not in numbers and value is not None]
        if strange:
            problems.append(f'{strange[0]!r:.40} is no number at line {i} of the log')
        yield numbers


def _finite(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _is_number(value: object, counts: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if isinstance(value, float):
        return not counts
    return 0 <= value < MAX_COUNT if counts else abs(value) < MAX_COUNT


def _read_test(run: TrainingRun, start: Path) -> list[EvalRecord]:
    try:
        found = json.loads(read_log_text(start / f'{start.name}.json'))
        figures = to_paper_metrics({key: value for key, value in found.items() if _is_number(value, False)})
        run.problems += [f'{start.name}: {name} {value}' for name, value in figures.items() if not math.isfinite(value)]
        figures = _finite(figures)
    except (ValueError, TypeError, AttributeError, RecursionError):
        run.problems.append(f'{start.name}.json cut short')
        return []
    config = _read_config(run, start) or Config()
    if 'module' in config.get('model', {}):  # a multi-scale test
        config.model = config.model.module
        figures = {f'{name} multi-scale': value for name, value in figures.items()}
    return [EvalRecord(figures, config, Path(str(config.get('load_from'))).stem)]


def _read_config(run: TrainingRun, start: Path) -> Config | None:
    """The config of a start of a tool: our test's own, or the one that mmengine keeps beside its pictures."""
    file = next((f for f in (start / 'config.py', start / 'vis_data/config.py') if f.exists()), None)
    try:
        config = file and parse_config_literal(read_log_text(file))
    except UsageError:
        run.problems.append(f'{start.name}: config.py cannot be read')
        return None
    strange = next((place for place, *_ in find_wrong_types(config, WRITTEN)), None) if config else None
    if strange:
        run.problems.append(f'{start.name}: config.py has no {strange} as mmengine writes it')
        return None
    return config


def _check_last_checkpoint(run: TrainingRun) -> None:
    pointer = run.folder / 'last_checkpoint'
    if not pointer.exists():
        return
    name = Path(read_log_text(pointer).strip()).name  # the folder may have moved since
    epoch = re.fullmatch(r'epoch_(\d+)\.pth', name)
    if epoch:
        run.done = max(run.done, int(epoch[1]))
    if not name or not (run.folder / name).is_file():
        run.problems.append(f'{name or "last_checkpoint"} is missing')
        return
    try:
        load_checkpoint(run.folder / name)
    except UsageError:
        run.problems.append(f'{name} cannot be read: half written or damaged')
