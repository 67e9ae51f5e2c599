"""Cache of a checked data set in the work dir: the files that training reads, and a fingerprint of their sources."""

import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

from ..errors import UsageError
from .diagnostics import Report
from .files import read_bytes, walk
from .layouts import MASK_FILE_SUFFIXES
from .request import CheckedDataset

CACHE_VERSION = 5  # increase it when the checks or the files that they write change
MAX_MANIFEST_BYTES = 2**28
MANIFEST = 'data.json'
BUSY_FILE = 'checking'  # rewritten while a process checks the data set
POLL_SECONDS = 1  # between two looks at the busy file
HEARTBEAT_SECONDS = 10  # between two writes of the busy file
STALE_SECONDS = 600  # after which a process that does not write is considered dead
CACHED_FIELDS = [field.name for field in fields(CheckedDataset) if field.name not in ('splits', 'report')]
LOCAL_RANK_VARIABLES = {'pytorch': 'LOCAL_RANK', 'slurm': 'SLURM_LOCALID', 'mpi': 'OMPI_COMM_WORLD_LOCAL_RANK'}


def load_cached(folder: str, key: tuple) -> tuple[CheckedDataset, dict[str, str]] | None:
    """Load the result of an earlier check, of which `key` says what was requested.

    Returns:
        The data set without its splits, and the file of each split; None if there is no cache, `key` differs, or
        files were added, removed or changed since.
    """
    try:
        content = json.loads(read_bytes(Path(folder, MANIFEST), MAX_MANIFEST_BYTES))
        if content['fingerprint'] != dataset_fingerprint(key, content['watched_paths']):
            return None
        files = {split: os.path.join(folder, f'{split}.json') for split in content['splits']}
        if not all(map(os.path.isfile, files.values())):
            return None
        report = Report.from_data(content['report'])
        return CheckedDataset(**{key: content[key] for key in CACHED_FIELDS}, splits={}, report=report), files
    except (OSError, ValueError, TypeError, LookupError, RecursionError):  # truncated, or written by something else
        return None


def save_cache(folder: str, key: tuple, data: CheckedDataset) -> dict[str, str]:
    """Write the splits of a checked data set, and last the manifest; return the file of each split."""
    os.makedirs(folder, exist_ok=True)
    Path(folder, MANIFEST).unlink(missing_ok=True)  # there is no manifest while splits are written
    files = {split: os.path.join(folder, f'{split}.json') for split in data.splits}
    for split, file in files.items():
        _write(file, data.splits[split])
    manifest = {name: getattr(data, name) for name in CACHED_FIELDS}
    fingerprint = dataset_fingerprint(key, data.watched_paths)
    manifest |= dict(fingerprint=fingerprint, splits=list(files), report=data.report.as_data())
    _write(os.path.join(folder, MANIFEST), manifest)
    return files


def wait_for_cache(folder: str, key: tuple) -> tuple[CheckedDataset, dict[str, str]]:
    """Wait until the local rank 0 has checked the data set. If that fails, the launcher ends this process.

    Raises:
        UsageError: rank 0 has shown no progress for `STALE_SECONDS`.
    """
    last_state, last_change = None, time.monotonic()
    while True:
        state = _file_state(os.path.join(folder, MANIFEST)), _file_state(os.path.join(folder, BUSY_FILE))
        if state != last_state:  # the fingerprint of the data set is expensive
            last_state, last_change = state, time.monotonic()
            cached = load_cached(folder, key)
            if cached:
                return cached
        if time.monotonic() - last_change > STALE_SECONDS:
            raise UsageError(
                f'the first process of this machine has shown no progress for {STALE_SECONDS // 60} minutes while '
                'checking the data set: see how it ended, or run tools/check_data.py before'
            )
        time.sleep(POLL_SECONDS)


@contextmanager
def hold_busy_file(folder: str) -> Iterator[None]:
    """Rewrite the busy file every few seconds, so that waiting processes know that this one is at work."""
    os.makedirs(folder, exist_ok=True)
    file, stop_event = Path(folder, BUSY_FILE), threading.Event()

    def heartbeat():
        while True:
            with suppress(OSError):  # if the disk is full, other processes may give up earlier
                file.write_text(str(time.time()))
            if stop_event.wait(HEARTBEAT_SECONDS):
                return

    thread = threading.Thread(target=heartbeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop_event.set()
        thread.join()
        file.unlink(missing_ok=True)


def dataset_fingerprint(key: tuple, paths: Sequence[str]) -> str:
    """Hash what was requested, and the states of files, of images in and below folders, and of `folder/*.suffix`."""
    digest = hashlib.sha256(repr((CACHE_VERSION, key)).encode())
    for path in sorted(paths):
        top, suffixes, depth = path, MASK_FILE_SUFFIXES, None
        if os.path.basename(path).startswith('*.'):
            top, suffixes, depth = os.path.dirname(path), os.path.splitext(path)[1], 1
        elif not os.path.isdir(path):
            digest.update(_file_state(path))
        for folder, names in walk(top, depth):
            for name in names:
                if name.lower().endswith(suffixes):
                    digest.update(_file_state(os.path.join(folder, name)))
    return digest.hexdigest()


def _file_state(path: str) -> bytes:
    try:
        stat = os.stat(path)
        state = f'{path} {stat.st_size} {stat.st_mtime_ns}\n'
    except (OSError, ValueError):
        state = f'{path} is missing\n'
    return state.encode('utf-8', 'surrogatepass')  # file names need not be UTF-8


def _write(file: str, content: object) -> None:
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(file), prefix=f'{os.path.basename(file)}.')
    with open(handle, 'w') as out:
        json.dump(content, out, separators=(',', ':'))
    os.replace(temporary, file)
