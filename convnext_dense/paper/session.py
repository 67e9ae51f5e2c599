"""The log folder of one session (a start or a resume) of a training.

Facts come from `run.json`. Sessions of earlier versions and of mmdet's and mmseg's own tools do not have that file;
their facts are parsed from the text log as far as possible.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mmengine.config import Config

from ..config.recipe import accumulative_counts, counts_epochs
from ..config.work_dir import read_log_text
from ..engine.progress import BatchSizes
from ..engine.run_info import RunInfo, read_run_info
from ..errors import UsageError

SCALARS_FILE = 'vis_data/scalars.json'
COUNT_KEYS = ('step', 'epoch', 'iter')  # integer keys of a record
MAX_COUNT = 2**53
# Learning rates by layer in text logs: the table of this package's constructor, and the output of mmdet's.
LR_TABLE = re.compile(r'\w+_wise lr decay, rate ([\d.e-]+):\n +id +lr +parameters\n((?: +\d+ +[\d.e+-]+ +[\d,]+\n)+)')
LR_GROUP = re.compile(r'"layer_(\d+)_(?:no_)?decay": \{.*?"lr_scale": ([\d.e+-]+)', re.DOTALL)
EPOCH_LINE = re.compile(r'Epoch\(train\) *\[ *\d+\]\[ *\d+/(\d+)\]')  # Epoch(train)  [3][ 50/7330]
GPU_LINE = re.compile(r'GPU number: (\d+)')


@dataclass(frozen=True)
class LoggedFacts(BatchSizes):
    """The facts of `RunInfo` that a text log and a config may contain; unknown sizes are None, or 0 for `batch_size`.

    Attributes:
        layer_lr_scales: Learning rate scale by layer id, in the order of the parameter groups; {} if unknown.
    """

    layer_lr_scales: dict[int, float]


@dataclass
class Session:
    """One session of a training.

    Attributes:
        log_dir: Log folder, `WORK_DIR/TIMESTAMP`.
        config: Config of the session.
        issues: Problems while reading, one sentence each.
    """

    log_dir: Path
    config: Config
    issues: list[str] = field(default_factory=list)

    @cached_property
    def facts(self) -> RunInfo | LoggedFacts:
        """Content of `run.json`; without it, the facts in the text log and the config."""
        try:
            info = read_run_info(self.log_dir)
        except UsageError as error:
            self.issues.append(str(error))
            info = None
        log = '' if info else read_log_text(self.log_dir / f'{self.log_dir.name}.log')
        return info or _parse_facts(log, self.config)

    @cached_property
    def records(self) -> list[dict[str, float]]:
        """The logged records in order, each with numbers by name; [] if nothing was logged yet."""
        return list(_read_records(self.log_dir / SCALARS_FILE, self.issues))

    @property
    def by_epoch(self) -> bool:
        """Whether the length of the training is counted in epochs."""
        return counts_epochs(self.config)

    @cached_property
    def min_iters_per_epoch(self) -> int:
        """`facts.iters_per_epoch`, or the smallest number that is consistent with the records."""
        records = [record for record in self.records if record.get('epoch') and record.get('step')]
        lowest = max((math.ceil(record['step'] / record['epoch']) for record in records), default=1)
        return self.facts.iters_per_epoch or lowest

    def progress_at(self, record: dict[str, float]) -> float:
        """Return the progress at a training record: epochs, or optimizer steps if the training is iteration-based."""
        step = record.get('step', 0)
        if not self.by_epoch:
            return step / self.facts.accumulation_steps
        epochs = step / self.min_iters_per_epoch
        epoch = record.get('epoch', math.ceil(epochs))
        return min(max(epochs, epoch - 1), epoch)


def _read_records(scalars: Path, issues: list[str]) -> Iterator[dict[str, float]]:
    """Yield the numbers of each line of mmengine's log of scalars, by name; what is none is added to `issues`."""
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
    """Whether a value from a JSON file is a number that a run may have logged (a non-negative integer for counts)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if isinstance(value, float):
        return not is_count
    return 0 <= value < MAX_COUNT if is_count else abs(value) < MAX_COUNT


def _parse_facts(log: str, config: Config) -> LoggedFacts:
    gpus, epoch = GPU_LINE.search(log), EPOCH_LINE.search(log)
    return LoggedFacts(
        world_size=int(gpus[1]) if gpus else None,
        batch_size=(config.get('train_dataloader') or {}).get('batch_size', 0),
        accumulation_steps=accumulative_counts(config),
        iters_per_epoch=max(int(epoch[1]), 1) if epoch else None,
        layer_lr_scales=parse_lr_scales(log, (config.get('optim_wrapper') or {}).get('optimizer', {}).get('lr')),
    )


def parse_lr_scales(log: str, base_lr: float | None) -> dict[int, float]:
    """Parse the learning rate scale of each layer id from a text log.

    Args:
        log: The text log of a session.
        base_lr: Learning rate of the optimizer.

    Returns:
        Scales by layer id, in the order of the parameter groups; {} if the log does not contain them.
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
    # Learning rates in the table are rounded, but the depth that they follow from is an integer.
    return {layer: rate ** round(math.log(lr / base_lr) / math.log(rate)) for layer, lr in lrs.items()}
