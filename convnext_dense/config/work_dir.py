"""The work dir of a run: its name, its lock and its latest checkpoint."""

from pathlib import Path

from mmengine.config import Config

from ..checkpoints.io import load_checkpoint
from ..engine.checkpoint_hook import LAST_CKPT_FILE
from ..engine.progress import load_partition
from ..engine.work_dir_lock import lock_work_dir
from .preflight import is_rank0
from .recipe import recipe_id


def hold_work_dir(config: Config) -> None:
    """Keep the work dir for this run; UsageError where another one has it."""
    if is_rank0():
        lock_work_dir(config.work_dir)


def find_resume_checkpoint(work_dir: Path) -> str | None:
    """The checkpoint that a work dir's run goes on from: the one that `last_checkpoint` names, also where the work dir
    was moved since; without it, as a kill after the first checkpoint leaves it, the farthest of those written whole."""
    if (work_dir / LAST_CKPT_FILE).exists():
        named = (work_dir / LAST_CKPT_FILE).read_text().strip()
        here = work_dir / Path(named).name
        return str(here) if here.exists() else named
    found = {str(path): load_checkpoint(path) for path in work_dir.glob('*.pth')}
    reached = {p: c['meta']['iter'] for p, c in found.items() if 'optimizer' in c and load_partition(c.get('meta', {}))}
    return max(reached, key=reached.get, default=None)


def default_work_dir(config: str) -> Path:
    """work_dirs/cascade/convnext_t for .../configs/cascade/convnext_t.py: recipes share their file names."""
    return Path('work_dirs', *recipe_id(config))


TIMESTAMP_GLOB = '[0-9]' * 8 + '_' + '[0-9]' * 6  # the folder of one start of a tool


def read_log_text(file: Path) -> str:
    return file.read_text(encoding='utf-8', errors='replace') if file.is_file() else ''
