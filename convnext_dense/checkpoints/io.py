"""Read checkpoint files in any format without running code from them."""

import copy
import json
import os
import re
from functools import lru_cache
from pathlib import Path

import torch

from ..errors import UsageError
from . import torch_files
from .unpickler import UnsafeCheckpointError

# Keys of other content of a checkpoint than weights, and of weights averaged over training.
NON_WEIGHT_KEY_RE = re.compile(
    r'(?<![a-z])(optim|optimizers?|schedulers?|scaler)(?![a-z])|^(meta|message_hub)$', re.IGNORECASE
)
EMA_KEY_RE = re.compile('(?<![a-z])(ema|swa|avg|averaged?)(?![a-z])', re.IGNORECASE)
MAX_NESTING = 3  # depth of nested dicts that are searched for weights
# Keys under which checkpoints keep weights; the first one is loaded.
STATE_DICT_KEYS = ('state_dict', 'model', 'model_ema', 'state_dict_ema')
# Parts of names that DistributedDataParallel, torch.compile and activation checkpointing insert.
WRAPPER_PREFIX_RE = re.compile(r'(?<![^.])(module|_orig_mod|_checkpoint_wrapped_module)\.')
MAX_INDEX_BYTES = 100_000_000  # of sharded safetensors, as safetensors itself limits a header
SHARD_INDEX_SUFFIX = '.index.json'  # suffix of the file that maps tensors to shards
# First bytes of files that are not checkpoints.
MAGIC_BYTES = {
    b'\x1f\x8b': 'a gzip archive: unpack it first',
    b'7z\xbc\xaf': 'a 7z archive: unpack it first',
    b'\xfd7zXZ': 'an xz archive: unpack it first',
    b'\x89HDF': 'an HDF5 file, of Keras or TensorFlow: convert it to PyTorch first',
    b'version https://git-lfs': 'a pointer of Git LFS, not the file itself: git lfs pull',
    b'<': 'a web page, not weights: the download went wrong, or needs a login',
    b'\x08': 'an ONNX or TensorFlow model: give the PyTorch weights that it was made from',
    b'\x93NUMPY': 'a NumPy array: a checkpoint is a dict of tensors',
    b'BZh': 'a bzip2 archive: unpack it first',
    b'{': 'JSON: give the weights themselves, or the .index.json of sharded ones',
}


MAX_CACHED = 2  # a run opens the pretrained weights and the checkpoint to resume, each several times


def load_checkpoint(path: str | Path, mmap: bool = True) -> dict:
    """Read a checkpoint without running code from it.

    The last `MAX_CACHED` checkpoints are cached until the file changes or `clear_cache` is called.

    Args:
        path: A file of `torch.save` or of safetensors, or the .index.json of sharded safetensors.
        mmap: Whether to leave tensors on disk until they are used; the result is shared and must not be changed. False
            returns a copy, which is independent of the file. Defaults to True.

    Returns:
        The content of the file, with tensors on the CPU.

    Raises:
        UsageError: If the file is not a checkpoint, is damaged, or could only be read by running code from it.
    """
    path = Path(path).absolute()
    is_sharded = path.name.endswith(SHARD_INDEX_SUFFIX)  # not cached: the state of the index does not cover the shards
    content = _load_uncached(path) if is_sharded else _load_cached(path, file_state(path))
    return content if mmap else copy.deepcopy(content)


def file_state(path: str | Path) -> tuple[int, ...]:
    """Return numbers that change when a file is replaced or written to."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(MAX_CACHED)
def _load_cached(path: Path, state: tuple[int, ...]) -> dict:
    return _load_uncached(path)


def clear_cache() -> None:
    """Release the cached checkpoints."""
    _load_cached.cache_clear()


def _load_uncached(path: Path) -> dict:
    if path.is_dir():
        raise UsageError(f'{path} is a folder: give a file in it')
    if not path.is_file():
        raise UsageError(f'{path} is not a regular file: give the file of a checkpoint')
    try:
        content = _load_shards(path) if path.name.endswith(SHARD_INDEX_SUFFIX) else _load_file(path)
    except (UsageError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # readers raise any exception for a damaged file
        fix = (getattr(error, 'fix', None) or 'download or save it again').format(file=path)
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()[:300]
        raise UsageError(f'{path} cannot be read safely as a checkpoint ({reason}): {fix}') from error
    if not isinstance(content, dict):
        raise UsageError(f'{path} contains a {type(content).__name__}: a checkpoint is a dict of tensors')
    return content


def find_state_dicts(checkpoint: dict) -> dict[str, dict[str, torch.Tensor]]:
    """Return all dicts of tensors in a checkpoint.

    Args:
        checkpoint: Content of the file.

    Returns:
        State dicts by dotted key ('' for the checkpoint itself), without the prefixes that training wrappers add to
        names. They are in order of preference: the usual keys, the checkpoint itself, other keys, and averages over
        training last.
    """
    state_dicts, queue = {}, [('', checkpoint)]
    for key, content in queue:
        tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
        if tensors:
            short = {WRAPPER_PREFIX_RE.sub('', name): value for name, value in tensors.items()}
            state_dicts[key] = short if len(short) == len(tensors) else tensors  # two models, one of them wrapped
        if key.count('.') < MAX_NESTING:
            children = ((str(name), value) for name, value in content.items() if isinstance(value, dict))
            queue += [
                (f'{key}.{name}'.lstrip('.'), value) for name, value in children if not NON_WEIGHT_KEY_RE.search(name)
            ]
    usual_keys = [key for key in STATE_DICT_KEYS if key in state_dicts]
    other_keys = sorted(
        (key for key in state_dicts if key and key not in usual_keys), key=lambda k: bool(EMA_KEY_RE.search(k))
    )
    return {key: state_dicts[key] for key in [*usual_keys, *([''] if '' in state_dicts else []), *other_keys]}


def _load_file(file: Path) -> dict:
    with open(file, 'rb') as f:
        start = f.read(32)
    if not start:
        raise UsageError(f'{file} is empty: download or save it again')
    if start[8:9] == b'{':  # safetensors: the length of its header, which it checks, and the header, which is JSON
        from safetensors.torch import load_file

        return load_file(file)
    for magic, file_type in MAGIC_BYTES.items():
        if start.lstrip().startswith(magic):
            raise UsageError(f'{file} is {file_type}')
    return torch_files.load(file)


def _load_shards(index: Path) -> dict:
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise UnsafeCheckpointError(f'an index has at most {MAX_INDEX_BYTES:,} bytes')
    shards = json.loads(index.read_text())['weight_map']
    tensors = {}
    for name in sorted(set(shards.values())):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise UsageError(
                f"{index} names the shard '{name}', which is not next to it: get all files of the checkpoint"
            )
        shard = _load_file(index.parent / name)
        expected = {tensor for tensor, shard_name in shards.items() if shard_name == name}
        if shard.keys() != expected:
            mismatched_name = sorted(shard.keys() ^ expected)[0]
            raise UsageError(
                f'{index} and its shard {name} do not contain the same tensors ({mismatched_name}): get all files again'
            )
        tensors.update(shard)
    return tensors
