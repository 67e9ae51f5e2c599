"""Which rank of a distributed run failed first, and why."""

import time
from contextlib import suppress
from pathlib import Path

from mmengine.dist import get_rank, get_world_size

from ..errors import one_line
from .atomic_files import write_atomic
from .failures import PEER_LOST_MESSAGE

RANK_ERROR_GRACE_S = 5  # seconds in which another process may say what ended it


def collect_rank_errors(folder: Path, line: str | None, error: Exception) -> str | None:
    """What ended a run of several processes: each leaves its cause in the log folder, and the ones that noticed no more
    than the end of another look for that one's."""
    own = folder / f'ended_rank_{get_rank()}.txt'
    with suppress(OSError):
        write_atomic(own, (line or one_line(error)).encode())
    if line != PEER_LOST_MESSAGE:
        return line and f'rank {get_rank()}: {line}'
    time.sleep(RANK_ERROR_GRACE_S)
    words = {int(path.stem.split('_')[-1]): path.read_text() for path in folder.glob('ended_rank_*.txt')}
    causes = [f'rank {rank}: {text}' for rank, text in sorted(words.items()) if text != PEER_LOST_MESSAGE]
    silent = [str(rank) for rank in range(get_world_size()) if rank not in words]
    if not causes and silent:
        causes = [f'rank {" and ".join(silent)} ended without a word: killed, or out of memory']
    return f'{PEER_LOST_MESSAGE}: {causes[0]}' if causes else PEER_LOST_MESSAGE
