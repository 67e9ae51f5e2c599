"""What one session (a start or a resume) of a training left in its log folder.

Facts come from `run.json`. Sessions of earlier versions and of mmdet's and mmseg's own tools have none: of these the
text log says what it can.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path

from mmengine.config import Config

from ..config.recipe import accumulative_counts
from ..config.work_dir import read_log_text
from ..engine.run_info import RUN_INFO_FILE, RunInfo, read_run_info
from ..errors import UsageError

SCALARS_FILE = 'vis_data/scalars.json'
COUNT_KEYS = ('step', 'epoch', 'iter')  # of a record; whole numbers
MAX_COUNT = 2**53
# The layers' learning rates in text logs: the table of this package's constructor, and what mmdet's constructor prints.
LR_TABLE = re.compile(r'\w+_wise lr decay, rate ([\d.e-]+):\n +id +lr +parameters\n((?: +\d+ +[\d.e+-]+ +[\d,]+\n)+)')
LR_GROUP = re.compile(r'"layer_(\d+)_(?:no_)?decay": \{.*?"lr_scale": ([\d.e+-]+)', re.DOTALL)
EPOCH_LINE = re.compile(r'Epoch\(train\) *\[ *\d+\]\[ *\d+/(\d+)\]')  # Epoch(train)  [3][ 50/7330]
GPU_LINE = re.compile(r'GPU number: (\d+)')


@dataclass
class Session:
    """One session of a training.

    Attributes:
        log_dir: Its log folder, `WORK_DIR/TIMESTAMP`.
        config: Its config.
        issues: What could not be read, one sentence each.
    """

    log_dir: Path
    config: Config
    issues: list[str] = field(default_factory=list)

    @cached_property
    def info(self) -> RunInfo | None:
        """Content of `run.json`; None where there is none."""
        try:
            info = read_run_info(self.log_dir)
            if info and min(info.world_size, info.batch_size, info.accumulation_steps, info.iters_per_epoch) < 1:
                raise UsageError(f'{self.log_dir / RUN_INFO_FILE} has a count below 1: remove it')
        except UsageError as error:
            self.issues.append(str(error))
            return None
        return info

    @cached_property
    def log_text(self) -> str:
        """The text log."""
        return read_log_text(self.log_dir / f'{self.log_dir.name}.log')

    @cached_property
    def records(self) -> list[dict[str, float]]:
        """The logged numbers in order, each record by name; [] where nothing was logged yet."""
        return list(read_records(self.log_dir / SCALARS_FILE, self.issues))

    @property
    def has_records(self) -> bool:
        """Whether there is a log of numbers."""
        return (self.log_dir / SCALARS_FILE).exists()

    @property
    def last_logged(self) -> datetime:
        """When its logs last grew."""
        files = [self.log_dir, *self.log_dir.rglob('*')]
        return datetime.fromtimestamp(max(file.stat().st_mtime for file in files))

    @property
    def by_epoch(self) -> bool:
        """Whether the length of the training is counted in epochs."""
        return 'max_epochs' in (self.config.get('train_cfg') or {})

    @property
    def world_size(self) -> int | None:
        """Number of processes; None where it is not known."""
        if self.info:
            return self.info.world_size
        gpus = GPU_LINE.search(self.log_text)
        return int(gpus[1]) if gpus else None

    @property
    def accumulation_steps(self) -> int:
        """Iterations per optimizer step."""
        return self.info.accumulation_steps if self.info else accumulative_counts(self.config)

    @property
    def batch_size(self) -> int:
        """Images per GPU and iteration; 0 where it is not known."""
        if self.info:
            return self.info.batch_size
        return (self.config.get('train_dataloader') or {}).get('batch_size', 0)

    @cached_property
    def iters_per_epoch(self) -> int | None:
        """Iterations of an epoch; None where neither `run.json` nor the text log has the number."""
        if self.info:
            return self.info.iters_per_epoch
        line = EPOCH_LINE.search(self.log_text)
        return max(int(line[1]), 1) if line else None

    @cached_property
    def min_iters_per_epoch(self) -> int:
        """`iters_per_epoch`, or the lowest number that fits the records."""
        records = [record for record in self.records if record.get('epoch') and record.get('step')]
        lowest = max((math.ceil(record['step'] / record['epoch']) for record in records), default=1)
        return self.iters_per_epoch or lowest

    @cached_property
    def lr_scales(self) -> dict[int, float]:
        """Learning rate scale of each layer id, in the order of the parameter groups; {} where it is not known."""
        if self.info:
            return self.info.layer_lr_scales
        return parse_lr_scales(self.log_text, (self.config.get('optim_wrapper') or {}).get('optimizer', {}).get('lr'))

    def progress_at(self, record: dict[str, float]) -> float:
        """Progress at a training record: epochs, or optimizer steps where the length is counted in iterations."""
        step = record.get('step', 0)
        if not self.by_epoch:
            return step / self.accumulation_steps
        epochs = step / self.min_iters_per_epoch
        epoch = record.get('epoch', math.ceil(epochs))
        return min(max(epochs, epoch - 1), epoch)


def read_records(scalars: Path, issues: list[str]) -> Iterator[dict[str, float]]:
    """Read the log of numbers that mmengine writes, one JSON object per line.

    Args:
        scalars: The file; one that does not exist has no records.
        issues: List to which truncated lines and values that are not numbers are added.

    Yields:
        The numbers of a line, by name.
    """
    for i, line in enumerate(read_log_text(scalars).splitlines(), 1):
        try:
            record = dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            issues.append(f'the log is truncated at line {i}')
            continue
        numbers = {key: value for key, value in record.items() if is_number(value, key in COUNT_KEYS)}
        invalid = [key for key, value in record.items() if key not in numbers and value is not None]
        if invalid:
            issues.append(f'{invalid[0]!r:.40} is not a number at line {i} of the log')
        yield numbers


def is_number(value: object, is_count: bool = False) -> bool:
    """Whether a value out of a JSON file is a number that a run may have logged, or a count."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if isinstance(value, float):
        return not is_count
    return 0 <= value < MAX_COUNT if is_count else abs(value) < MAX_COUNT


def parse_lr_scales(log: str, base_lr: float | None) -> dict[int, float]:
    """Parse the learning rate scale of each layer id from a text log.

    Args:
        log: The text log of a session.
        base_lr: Learning rate of the optimizer.

    Returns:
        Scales by layer id, in the order of the parameter groups; {} where the log does not hold them.
    """
    table = LR_TABLE.search(log)
    try:
        if not table:
            return {int(layer): float(scale) for layer, scale in LR_GROUP.findall(log)}
        return _scales_of_table(float(table[1]), table[2].splitlines(), base_lr)
    except (ValueError, ZeroDivisionError, OverflowError, TypeError):  # numbers that no run writes
        return {}


def _scales_of_table(rate: float, lines: Iterable[str], base_lr: float | None) -> dict[int, float]:
    lrs = {int(line.split()[0]): float(line.split()[1]) for line in lines}
    if rate == 1 or not base_lr:
        return dict.fromkeys(lrs, 1.0) if rate == 1 else {}
    # Learning rates in the table are rounded; the depth that they stand for is a whole number.
    return {layer: rate ** round(math.log(lr / base_lr) / math.log(rate)) for layer, lr in lrs.items()}
