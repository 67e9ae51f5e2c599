"""What work dirs hold: how far each run is, what it reached, and in which settings, read from mmengine's own logs."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from mmengine.config import Config

from .dumped import read_dumped
from .errors import UsageError
from .paper import (
    RELEASED,
    RETRAINED,
    TOTAL_BATCH,
    Row,
    accumulation_of,
    changed_settings,
    figures_of,
    precision_of,
    row_of,
    training_length,
)
from .weights.reading import read

TIMESTAMP = '[0-9]' * 8 + '_' + '[0-9]' * 6  # the folder of one start of a tool
TESTS = 'test'  # the folder in a run's own where tools/test.py works


@dataclass
class Test:
    """A test: its figures, the checkpoint's file name without its ending, and whether it was the multi-scale one."""

    figures: dict[str, float]
    checkpoint: str
    multiscale: bool


@dataclass
class Run:
    """A work dir. `done` and `length` are epochs, or updates where the config counts iterations; `evaluations` are the
    figures found in training, in order; `written` is when its log last grew; `problems` say what could not be read."""

    folder: Path
    config: Config = field(default_factory=Config)
    done: float = 0
    evaluations: list[dict[str, float]] = field(default_factory=list)
    tests: list[Test] = field(default_factory=list)
    processes: int = 1
    written: datetime | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def row(self) -> Row | None:
        return row_of(self.config)

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
        return precision_of(self.config)

    @property
    def total_batch(self) -> int:
        images = (self.config.get('train_dataloader') or {}).get('batch_size', 0)
        return self.processes * images * accumulation_of(self.config)

    def last(self, figure: str) -> float | None:
        return next((e[figure] for e in reversed(self.evaluations) if figure in e), None)

    def best(self, figure: str) -> float | None:
        return max((e[figure] for e in self.evaluations if figure in e), default=None)

    def test(self, figure: str) -> Test | None:
        """The latest test that gave this figure."""
        return next((test for test in reversed(self.tests) if figure in test.figures), None)

    def departures(self) -> list[str]:
        """In what this run is not its row's recipe."""
        row = self.row
        changed = changed_settings(self.config, row)
        changed += ['precision'] if self.precision != row.precision else []
        return changed + (['batch'] if self.total_batch != TOTAL_BATCH else [])

    def verdict(self, figure: str) -> tuple[float | None, str]:
        """The difference of our figure, tested or at the end of training, to the paper's, and whether a faithful run
        may differ so: 'inside', 'below' or 'above'; '' where that cannot be said."""
        row, test = self.row, self.test(figure)
        ours = test.figures[figure] if test else self.last(figure) if self.finished else None
        if ours is None or row is None:
            return None, ''
        difference = round(round(ours, 1) - row.figures[figure], 1)
        released = test is not None and test.checkpoint == row.released
        if not released and (not self.finished or self.departures()):
            return difference, ''
        margin = RELEASED if released else RETRAINED[figure]
        return difference, 'inside' if abs(difference) <= margin else 'below' if difference < 0 else 'above'


def find_runs(folders: Iterable[str | Path]) -> list[Run]:
    """The runs in and below these folders, by path.

    Raises:
        UsageError: a folder is not there.
    """
    found = set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UsageError(f"no folder '{folder}': give work dirs, such as work_dirs")
        for start in folder.rglob(TIMESTAMP):
            if start.is_dir():
                found.add(start.parent.parent if start.parent.name == TESTS else start.parent)
    return [read_run(folder) for folder in sorted(found)]


def read_run(folder: Path) -> Run:
    """One work dir, whatever state it is in: what cannot be read is said in `problems`."""
    run = Run(folder)
    tests = sorted((folder / TESTS).glob(TIMESTAMP))
    for start in [*tests, *sorted(folder.glob(TIMESTAMP))]:
        log = _text(start / f'{start.name}.log')
        result = start / f'{start.name}.json'
        if result.exists():
            _read_test(run, result, log)
        if start.parent == folder and not result.exists():
            _read_training(run, start, log)
        elif not run.config:
            _read_config(run, start / 'vis_data/config.py', *sorted(start.parent.glob('*.py')))
    _check_last_checkpoint(run)
    return run


def _read_training(run: Run, start: Path, log: str) -> None:
    _read_config(run, start / 'vis_data/config.py')
    run.written = datetime.fromtimestamp(max(file.stat().st_mtime for file in [start, *start.rglob('*')]))
    processes = re.search(r'GPU number: (\d+)', log)
    run.processes = int(processes[1]) if processes else 1
    scalars = start / 'vis_data/scalars.json'
    if not scalars.exists():
        run.problems.append(f'{start.name}: no log of any iteration')
        return
    counts_epochs = 'max_epochs' in (run.config.get('train_cfg') or {})
    for record in _records(scalars, run.problems):
        figures = figures_of(record)
        if figures:
            run.evaluations.append(figures)
        if counts_epochs:
            run.done = record['step'] if figures else record.get('epoch', 1) - 1
        elif 'step' in record:
            run.done = record['step'] / accumulation_of(run.config)
        if not math.isfinite(record.get('loss', 0)):
            run.problems.append(f'loss {record["loss"]} at step {record["step"]}')


def _records(scalars: Path, problems: list[str]) -> Iterator[dict]:
    for i, line in enumerate(_text(scalars).splitlines(), 1):
        try:
            yield json.loads(line)
        except ValueError:
            problems.append(f'log cut short at line {i}')


def _read_test(run: Run, result: Path, log: str) -> None:
    try:
        figures = figures_of(json.loads(_text(result)))
    except ValueError:
        run.problems.append(f'{result.name} cut short')
        return
    multiscale = "type='MultiScaleSegmentor'" in log
    if multiscale and 'mIoU' in figures:
        figures = {'mIoU multi-scale': figures['mIoU']}
    checkpoint = re.search(r"^load_from = '(.*)'", log, re.M)
    run.tests.append(Test(figures, Path(checkpoint[1]).stem if checkpoint else '', multiscale))


def _read_config(run: Run, *candidates: Path) -> None:
    file = next((file for file in candidates if file.exists()), None)
    if file is None:
        return
    try:
        config = read_dumped(_text(file))
    except UsageError:
        run.problems.append(f'{file.name} cannot be read')
        return
    if 'module' in config.get('model', {}):  # of a multi-scale test
        config.model = config.model.module
    run.config = config


def _check_last_checkpoint(run: Run) -> None:
    pointer = run.folder / 'last_checkpoint'
    if not pointer.exists():
        return
    name = Path(_text(pointer).strip()).name  # the folder may have moved since
    try:
        if not (run.folder / name).is_file():
            raise UsageError('is missing')
        read(run.folder / name)
    except UsageError as error:
        missing = str(error) == 'is missing'
        run.problems.append(f'{name or "last_checkpoint"} {error if missing else "is damaged"}')


def _text(file: Path) -> str:
    return file.read_text(encoding='utf-8', errors='replace') if file.is_file() else ''
