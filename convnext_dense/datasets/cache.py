"""Checked data in a work dir: what training reads, and what tells that nothing has changed since."""

import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..engine.datasets import IMAGE_SUFFIXES
from ..errors import UsageError
from .diagnostics import Report
from .files import read_bytes, walk
from .request import CheckedDataset

CACHE_VERSION = 3  # of what is checked and written; a change counts it up
MAX_MANIFEST_BYTES = 2**28  # of what tells what was checked
MANIFEST = 'data.json'
BUSY_FILE = 'checking'  # a file that changes while data are checked
POLL_SECONDS, HEARTBEAT_SECONDS, STALE_SECONDS = (
    1,
    10,
    600,
)  # seconds: of looks for it, of its changes, and without one until it is given up
CACHED_FIELDS = ('task', 'root', 'classes', 'palette', 'turn', 'masks', 'settings', 'places')
LOCAL_RANK_VARIABLES = {'pytorch': 'LOCAL_RANK', 'slurm': 'SLURM_LOCALID', 'mpi': 'OMPI_COMM_WORLD_LOCAL_RANK'}


def load_cached(folder: str, key: tuple) -> tuple[CheckedDataset, dict[str, str]] | None:
    """The data that an earlier check left in `folder`, without their splits, and the file of each split; None where
    there are none, something else was asked for (`key`), or files have come, gone or changed since."""
    try:
        content = json.loads(read_bytes(Path(folder, MANIFEST), MAX_MANIFEST_BYTES))
        if content['of'] != dataset_fingerprint(key, content['places']):
            return None
        files = {split: os.path.join(folder, f'{split}.json') for split in content['splits']}
        if not all(map(os.path.isfile, files.values())):
            return None
        report = Report.from_data(content['report'])
        return CheckedDataset(**{key: content[key] for key in CACHED_FIELDS}, splits={}, report=report), files
    except (OSError, ValueError, TypeError, LookupError, RecursionError):  # not whole, or of others
        return None


def save_cache(folder: str, key: tuple, data: CheckedDataset) -> dict[str, str]:
    """Write the splits of checked data, and last what they are of. Returns the file of each split."""
    os.makedirs(folder, exist_ok=True)
    Path(folder, MANIFEST).unlink(missing_ok=True)  # while splits are written, it is of none
    files = {split: os.path.join(folder, f'{split}.json') for split in data.splits}
    for split, file in files.items():
        _write(file, data.splits[split])
    about = {key: getattr(data, key) for key in CACHED_FIELDS}
    about |= dict(of=dataset_fingerprint(key, data.places), splits=list(files), report=data.report.as_data())
    _write(os.path.join(folder, MANIFEST), about)
    return files


def wait_for_cache(folder: str, key: tuple) -> tuple[CheckedDataset, dict[str, str]]:
    """What the first process of this machine prepares; where that ends in an error, the launcher ends this one.

    Raises:
        UsageError: for some minutes nothing was heard of that process.
    """
    state, heard = None, time.monotonic()
    while True:
        now = _state(os.path.join(folder, MANIFEST)), _state(os.path.join(folder, BUSY_FILE))
        if now != state:  # else another look at all the data would find the same
            state, heard = now, time.monotonic()
            found = load_cached(folder, key)
            if found:
                return found
        if time.monotonic() - heard > STALE_SECONDS:
            raise UsageError(
                f'the first process of this machine has not been heard of for {STALE_SECONDS // 60} minutes while '
                f'it checked '
                'the data: see how it ended, or check them before with tools/check_data.py'
            )
        time.sleep(POLL_SECONDS)


@contextmanager
def hold_busy_file(folder: str) -> Iterator[None]:
    """Say every few seconds that this process checks the data that others wait for."""
    os.makedirs(folder, exist_ok=True)
    file, done = Path(folder, BUSY_FILE), threading.Event()

    def say():
        while True:
            with suppress(OSError):  # no room: the others wait a little less patiently
                file.write_text(str(time.time()))
            if done.wait(HEARTBEAT_SECONDS):
                return

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        file.unlink(missing_ok=True)


def is_local_rank0(launcher: str) -> bool:
    """Whether this is the process that does what is done once on each machine."""
    return os.environ.get(LOCAL_RANK_VARIABLES.get(launcher, ''), '0') == '0'


def dataset_fingerprint(key: tuple, places: Sequence[str]) -> str:
    """Of what was asked and of names, sizes and times of the files at these places: files, and images in folders."""
    digest = hashlib.sha256(repr((CACHE_VERSION, key)).encode())
    for place in sorted(places):
        if not os.path.isdir(place):
            digest.update(_state(place))
        for at, names in walk(place):
            for name in names:
                if name.lower().endswith(IMAGE_SUFFIXES):
                    digest.update(_state(os.path.join(at, name)))
    return digest.hexdigest()


def _state(path: str) -> bytes:
    try:
        stat = os.stat(path)
        state = f'{path} {stat.st_size} {stat.st_mtime_ns}\n'
    except (OSError, ValueError):
        state = f'{path} is not there\n'
    return state.encode('utf-8', 'surrogatepass')  # names need not be UTF-8


def _write(file: str, content: object) -> None:
    handle, aside = tempfile.mkstemp(dir=os.path.dirname(file), prefix=f'{os.path.basename(file)}.')
    with open(handle, 'w') as out:
        json.dump(content, out, separators=(',', ':'))
    os.replace(aside, file)
