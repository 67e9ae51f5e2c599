"""The work dir of a run: its name and its latest checkpoint."""

from pathlib import Path

from ..checkpoints.io import load_checkpoint
from ..engine.checkpoint_hook import LAST_CKPT_FILE
from ..engine.progress import load_partition
from .recipe import recipe_id

TIMESTAMP_GLOB = '[0-9]' * 8 + '_' + '[0-9]' * 6  # name of the log folder of a session


def find_resume_checkpoint(work_dir: Path) -> str | None:
    """Find the checkpoint from which the run in a work dir continues.

    Args:
        work_dir: The work dir, which may have been moved since the run.

    Returns:
        The checkpoint that `last_checkpoint` names. Without that file (after a kill during the first checkpoint), the
        complete checkpoint with the most iterations; None if there is none.
    """
    if (work_dir / LAST_CKPT_FILE).exists():
        path = (work_dir / LAST_CKPT_FILE).read_text().strip()
        moved = work_dir / Path(path).name
        return str(moved) if moved.exists() else path
    paths = sorted(work_dir.glob('*.pth'), key=lambda path: path.stat().st_mtime)  # the newest stays cached
    contents = {str(path): load_checkpoint(path) for path in paths}
    states = {p: c for p, c in contents.items() if 'optimizer' in c and load_partition(c.get('meta', {}))}
    iters = {p: c['meta']['iter'] for p, c in states.items()}
    return max(iters, key=iters.get, default=None)


def default_work_dir(config: str) -> Path:
    """Return work_dirs/cascade/convnext_t for .../configs/cascade/convnext_t.py; file names alone are not unique."""
    return Path('work_dirs', *recipe_id(config))


def read_log_text(file: Path) -> str:
    """Return the text of a log file; '' if it is missing."""
    return file.read_text(encoding='utf-8', errors='replace') if file.is_file() else ''
