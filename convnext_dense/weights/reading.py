"""Checkpoint files -> what they hold, without running any code from them."""

import json
import pickle
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from ..errors import UsageError

WRAPPERS = ('state_dict', 'model', 'model_ema', 'state_dict_ema')  # where checkpoints keep weights, the first one wins
# What DistributedDataParallel, torch.compile and activation checkpointing put before names and into them.
INSERTED = re.compile(r'(?<![^.])(module|_orig_mod|_checkpoint_wrapped_module)\.')
ZIP = b'PK\x03\x04'  # torch's own format since 1.6, the only one that can be mapped
INDEX = '.index.json'  # ends the name of the file that says in which shard a tensor is
# What files that are no checkpoints begin with.
STRANGERS = {
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


def read(file: str | Path, mapped: bool = True) -> dict:
    """What a checkpoint file (.pth and the like, .safetensors, or the index of sharded .safetensors) holds.

    Args:
        mapped: leave tensors on disk until they are used; not for those that stay in use when the file may be written
            again.

    Raises:
        UsageError: it is no checkpoint, is damaged, or would have to run code.
    """
    file = Path(file)
    stranger = _stranger(file)
    if stranger:
        raise UsageError(f'{file} is {stranger}')
    try:
        content = _read_shards(file) if file.name.endswith(INDEX) else _read_one(file, mapped)
    except UsageError:
        raise
    except Exception as error:  # a damaged file can end a reader in any way
        raise UsageError(
            f'{file} cannot be read safely as a checkpoint ({_reason(error)}): download or save it again'
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f'{file} holds a {type(content).__name__}: a checkpoint is a dict of tensors')
    return content


def weights_of(checkpoint: dict) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, out of their wrapper and without wrappers' prefixes."""
    for key in wrappers_of(checkpoint)[:1]:
        checkpoint = checkpoint[key]
    return {INSERTED.sub('', str(n)): tensor for n, tensor in checkpoint.items() if isinstance(tensor, torch.Tensor)}


def wrappers_of(checkpoint: dict) -> list[str]:
    """The keys under which a checkpoint keeps weights, the one that is taken first."""
    return [key for key in WRAPPERS if isinstance(checkpoint.get(key), dict)]


def _stranger(file: Path) -> str | None:
    """What a file is that cannot be a checkpoint."""
    if file.is_dir():
        return 'a folder: give a file in it'
    with open(file, 'rb') as f:
        start = f.read(32)
    if not start:
        return 'empty: download or save it again'
    if file.name.endswith(INDEX) or _is_safetensors(start):  # begins with a length, that is with any byte
        return None
    return next((name for magic, name in STRANGERS.items() if start.lstrip().startswith(magic)), None)


def _read_one(file: Path, mapped: bool = True) -> dict:
    with open(file, 'rb') as f:
        start = f.read(32)
    if _is_safetensors(start):
        from safetensors.torch import load_file

        return load_file(file)
    if start.startswith(ZIP):
        _check_sums(file)
    with _allowing_harmless():
        return torch.load(file, map_location='cpu', weights_only=True, mmap=mapped and start.startswith(ZIP))


def _check_sums(file: Path) -> None:
    """Check the sums that torch's own files hold and torch does not look at: of the values, and of what lies where."""
    with ZipFile(file) as archive:
        for record in archive.infolist():
            if record.CRC:
                with archive.open(record) as f:
                    while f.read(2**24):
                        pass


def _read_shards(index: Path) -> dict:
    shards = json.loads(index.read_text())['weight_map']
    tensors = {}
    for name in sorted(set(shards.values())):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise UsageError(
                f"{index} names the shard '{name}', which is not beside it: get all files of the checkpoint"
            )
        tensors.update(_read_one(index.parent / name))
    if tensors.keys() != shards.keys():
        lost = sorted(tensors.keys() ^ shards.keys())
        raise UsageError(f'{index} and its shards do not hold the same tensors ({lost[0]}, ...): get all files again')
    return tensors


def _is_safetensors(start: bytes) -> bool:
    """By its first bytes: the length of a header, and the header, which is JSON."""
    return start[8:9] == b'{'


def _reason(error: Exception) -> str:
    """What is wrong, in a line, without torch's advice to have the file's code run."""
    text = str(error).strip()
    told = re.search(r'WeightsUnpickler error: (.*?)(?= was not|\. Please|\n|$)', text) or re.search(r'[^\n]+', text)
    line = (told[1] if told and told.groups() else told[0]) if told else type(error).__name__
    return re.split(r'\.? (In PyTorch|This file can still be loaded|Re-running)', line)[0]


@contextmanager
def _allowing_harmless() -> Iterator[None]:
    """Let torch's safe reading accept what checkpoints of mmengine and of the original hold beside weights, no more."""
    core = np._core if hasattr(np, '_core') else np.core
    types = [
        HistoryBuffer,
        *_of_any_numpy(core.multiarray._reconstruct),
        *_of_any_numpy(core.multiarray.scalar),
        np.ndarray,
        np.dtype,
        *{type(np.dtype(code)) for code in '?bhilqBHILQefdFDSU'},
        _method_of_history,
        Namespace,  # the arguments that the original's training code saves beside the weights
    ]
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(types)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _of_any_numpy(function: Callable) -> Iterator[Callable]:
    """Stand in for a function of numpy's by the names that numpy 1 and numpy 2 write into files."""
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):

        def stand_in(*args):
            return function(*args)

        stand_in.__module__ = module
        stand_in.__name__ = stand_in.__qualname__ = function.__name__
        yield stand_in


def _method_of_history(owner: type, name: str):
    """Stands in for `getattr`, by which a pickled HistoryBuffer names its methods."""
    if owner is HistoryBuffer and name in ('min', 'max', 'current', 'mean'):
        return getattr(owner, name)
    raise pickle.UnpicklingError(f'Unsupported global: attribute {name}')


_method_of_history.__module__ = 'builtins'
_method_of_history.__name__ = _method_of_history.__qualname__ = 'getattr'
