"""Checkpoint files -> what they hold, without running any code from them."""

import copy
import json
import os
import re
import stat
from pathlib import Path

import torch

from ..errors import UsageError
from . import torch_files
from .unpickler import UnsafeCheckpointError

# Keys of what else a checkpoint holds, and of weights averaged over training.
NO_WEIGHTS_MESSAGE = re.compile(
    r'(?<![a-z])(optim|optimizers?|schedulers?|scaler)(?![a-z])|^(meta|message_hub)$', re.IGNORECASE
)
EMA_KEYS = re.compile('(?<![a-z])(ema|swa|avg|averaged?)(?![a-z])', re.IGNORECASE)
MAX_WRAPPER_DEPTH = 3  # of dicts in one another that are looked into
STATE_DICT_KEYS = (
    'state_dict',
    'model',
    'model_ema',
    'state_dict_ema',
)  # where checkpoints keep weights, the first one wins
# What DistributedDataParallel, torch.compile and activation checkpointing put before names and into them.
WRAPPER_PREFIX_RE = re.compile(r'(?<![^.])(module|_orig_mod|_checkpoint_wrapped_module)\.')
MAX_TEXT = 100_000_000  # bytes of a header or an index of safetensors
SHARD_INDEX_SUFFIX = '.index.json'  # ends the name of the file that says in which shard a tensor is
# What files that are no checkpoints begin with.
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


_cached: dict[str, object] = {}  # the checkpoint that was read last, which a run asks for several times


def load_checkpoint(file: str | Path, mapped: bool = True) -> dict:
    """What a checkpoint file (.pth and the like, .safetensors, or the index of sharded .safetensors) holds. The last
    one that was read is kept: who asks for it again, before `forget`, gets the same, which is not to be changed.

    Args:
        mapped: leave tensors on disk until they are used; False gives a copy of one's own, which stays as it is when
            the file is written again.

    Raises:
        UsageError: it is no checkpoint, is damaged, or would have to run code.
    """
    state = _file_state(file)
    if state is None or _cached.get('state') != state:
        _cached.update(content=_load_uncached(Path(file)), state=state)
    return _cached['content'] if mapped else copy.deepcopy(_cached['content'])


def clear_cache() -> None:
    """Let go of the checkpoint that was read last."""
    _cached.clear()


def _file_state(file: str | Path) -> tuple | None:
    """What tells a file from another one, and from itself when it is written again; None for shards, which are many."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    of_many = str(file).endswith(SHARD_INDEX_SUFFIX)
    return None if of_many else (os.path.abspath(file), found.st_ino, found.st_size, found.st_mtime_ns)


def _load_uncached(file: Path) -> dict:
    if file.exists() and not stat.S_ISREG(os.stat(file).st_mode) and not file.is_dir():
        raise UsageError(f'{file} is no regular file: give the file of a checkpoint')
    stranger = _foreign_file_type(file)
    if stranger:
        raise UsageError(f'{file} is {stranger}')
    try:
        content = _load_shards(file) if file.name.endswith(SHARD_INDEX_SUFFIX) else _load_file(file)
    except UsageError:
        raise
    except Exception as error:  # a damaged file can end a reader in any way
        fix = (getattr(error, 'fix', None) or 'download or save it again').format(file=file)
        raise UsageError(f'{file} cannot be read safely as a checkpoint ({_short_reason(error)}): {fix}') from error
    if not isinstance(content, dict):
        raise UsageError(f'{file} holds a {type(content).__name__}: a checkpoint is a dict of tensors')
    return content


def find_state_dicts(checkpoint: dict) -> dict[str, dict[str, torch.Tensor]]:
    """All dicts of tensors in a checkpoint, without what training wrappers add to the names, by the dotted keys under
    which they are: '' for the checkpoint itself. In the order in which they are taken: the usual keys first, then the
    checkpoint itself, then others, averages over training last."""
    found, left = {}, [('', checkpoint)]
    for place, content in left:
        tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
        if tensors:
            short = {WRAPPER_PREFIX_RE.sub('', name): value for name, value in tensors.items()}
            found[place] = short if len(short) == len(tensors) else tensors  # two models, one of them wrapped
        if place.count('.') < MAX_WRAPPER_DEPTH:
            inner = ((str(key), value) for key, value in content.items() if isinstance(value, dict))
            left += [
                (f'{place}.{key}'.lstrip('.'), value) for key, value in inner if not NO_WEIGHTS_MESSAGE.search(key)
            ]
    usual = [key for key in STATE_DICT_KEYS if key in found]
    others = sorted((key for key in found if key and key not in usual), key=lambda key: bool(EMA_KEYS.search(key)))
    return {key: found[key] for key in [*usual, *([''] if '' in found else []), *others]}


def _foreign_file_type(file: Path) -> str | None:
    """What a file is that cannot be a checkpoint."""
    if file.is_dir():
        return 'a folder: give a file in it'
    with open(file, 'rb') as f:
        start = f.read(32)
    if not start:
        return 'empty: download or save it again'
    if file.name.endswith(SHARD_INDEX_SUFFIX) or _is_safetensors(start):  # begins with a length, that is with any byte
        return None
    return next((name for magic, name in MAGIC_BYTES.items() if start.lstrip().startswith(magic)), None)


def _load_file(file: Path) -> dict:
    with open(file, 'rb') as f:
        start = f.read(32)
    if _is_safetensors(start):
        from safetensors.torch import load_file

        header, size = int.from_bytes(start[:8], 'little'), file.stat().st_size
        if header > min(size - 8, MAX_TEXT):
            raise UnsafeCheckpointError(
                f'its header should have {header:,} bytes, the file has {size:,}, the limit is {MAX_TEXT:,}'
            )
        return load_file(file)
    return torch_files.load(file)


def _load_shards(index: Path) -> dict:
    if index.stat().st_size > MAX_TEXT:
        raise UnsafeCheckpointError(f'an index has at most {MAX_TEXT:,} bytes')
    shards = json.loads(index.read_text())['weight_map']
    tensors = {}
    for name in sorted(set(shards.values())):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise UsageError(
                f"{index} names the shard '{name}', which is not beside it: get all files of the checkpoint"
            )
        shard, named = _load_file(index.parent / name), {tensor for tensor, own in shards.items() if own == name}
        if shard.keys() != named:
            other = sorted(shard.keys() ^ named)[0]
            raise UsageError(
                f'{index} and its shard {name} do not hold the same tensors ({other}): get all files again'
            )
        tensors.update(shard)
    return tensors


def _is_safetensors(start: bytes) -> bool:
    """By its first bytes: the length of a header, and the header, which is JSON."""
    return start[8:9] == b'{'


def _short_reason(error: Exception) -> str:
    """What is wrong, in one line."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()[:300]
