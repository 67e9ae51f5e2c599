"""Read a checkpoint safely, recognise it, rename, match and report, or raise."""

import pickle
import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from ..errors import UsageError
from .formats import FORMATS, NORMS, TRUNK
from .zoo import fetch

WRAPPERS = ('model', 'state_dict')  # the keys under which checkpoints keep their weights
PREFIX = re.compile(r'^(module\.|_orig_mod\.)+')  # what DistributedDataParallel and torch.compile put before names


def read(file: str | Path) -> dict:
    """What a checkpoint file holds, without running any code from it; tensors stay on disk until they are used.

    Raises:
        UsageError: it cannot be read so.
    """
    try:
        with _allowing_history():
            content = torch.load(file, map_location='cpu', weights_only=True, mmap=_is_zip(file))
    except Exception as error:  # a damaged file can end the reader in any way
        raise UsageError(
            f'{file} cannot be read safely as a checkpoint ({_reason(error)}): download or save it again'
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f'{file} holds a {type(content).__name__}: a checkpoint is a dict of tensors')
    return content


def weights_of(checkpoint: dict) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, out of their wrapper and without wrappers' prefixes."""
    for key in WRAPPERS:
        if isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    return {
        PREFIX.sub('', str(name)): tensor for name, tensor in checkpoint.items() if isinstance(tensor, torch.Tensor)
    }


def check_same(model: nn.Module, file: str | Path, parts: tuple[str, ...] = ('',)) -> None:
    """Raise UsageError unless the checkpoint, as mmengine's runner is going to load it, has exactly the names and
    shapes of `model`, or of those parts of it whose names start so."""
    checkpoint = read(file)
    found = checkpoint.get('state_dict', checkpoint)  # as the runner: no other wrapper, and one prefix
    theirs = {re.sub(r'^module\.', '', str(name)): tuple(getattr(value, 'shape', ())) for name, value in found.items()}
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = _differences(*({n: s for n, s in names.items() if n.startswith(parts)} for names in (ours, theirs)))
    if problems:
        raise UsageError(f'{file} does not fit the config: {problems}; give the config that it was trained with')


def load_backbone(backbone: nn.Module, source: str | Path) -> str:
    """Fill a ConvNeXt from a known name, a path or a URL, and return the report, one line. Raises as `match`."""
    weights, report = match(backbone, source)
    backbone.load_state_dict(weights, strict=False)
    return report


def match(backbone: nn.Module, source: str | Path) -> tuple[dict[str, torch.Tensor], str]:
    """The weights that a known name, a path or a URL holds for a ConvNeXt, by its names, and the report, one line.

    Only the output norms may stay at their initial values, since ImageNet weights have none. What the file holds
    beyond the trunk (its classifier, stages that `out_indices` leaves unbuilt) is ignored.

    Raises:
        UsageError: the file cannot be had, read or recognised; a tensor of the trunk is missing, has another shape or
            is unknown.
    """
    file = fetch(str(source))
    weights = weights_of(read(file))
    source_format = next((f for f in FORMATS if f.recognise(weights.keys())), None)
    if source_format is None:
        raise UsageError(
            f'{file}: no ConvNeXt weights by the names in it ({", ".join(list(weights)[:3]) or "none"}, '
            f'...): known are {", ".join(f.title for f in FORMATS)}'
        )
    renamed = {source_format.rename(name): tensor for name, tensor in weights.items()}
    renamed.pop(None, None)
    ours = backbone.state_dict()
    theirs = {name: tensor for name, tensor in renamed.items() if not _is_unbuilt(name, backbone)}
    left = {name for name in ours if NORMS.fullmatch(name) and name not in theirs}
    problems = _differences(
        {n: tuple(t.shape) for n, t in ours.items() if n not in left}, {n: tuple(t.shape) for n, t in theirs.items()}
    )
    if problems:
        raise UsageError(
            f'{file} does not fit ConvNeXt with depths {backbone.depths} and channels '
            f'{backbone.channels}: {problems}; give the arch of the file or the weights of this arch'
        )
    return theirs, (
        f'{source} ({source_format.title}): {len(theirs)} of {len(ours)} backbone tensors loaded, {len(left)} left '
        f'at initial value (output norms), {len(weights) - len(theirs)} ignored'
    )


@WEIGHT_INITIALIZERS.register_module()
class PretrainedConvNeXt:
    """mmengine's initializer behind `init_cfg=dict(type='Pretrained', checkpoint=...)` of our backbone."""

    def __init__(self, checkpoint: str | None = None, **unknown):
        if not isinstance(checkpoint, str) or unknown:
            raise UsageError(
                f'init_cfg of ConvNeXt takes checkpoint=(a known name, a path or a URL) alone, not '
                f'{", ".join(unknown) or checkpoint!r}: prefixes and wrappers are found in the file'
            )
        self.checkpoint = checkpoint

    def __call__(self, module: nn.Module) -> None:
        print_log(load_backbone(module, self.checkpoint), logger='current')
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=f'loaded from {self.checkpoint}')


def _differences(ours: dict[str, tuple], theirs: dict[str, tuple], most: int = 3) -> str:
    """What keeps two sets of names and shapes from being equal, shortly; empty where nothing does."""
    reshaped = [f'{n} is {theirs[n]}, not {ours[n]}' for n in ours if n in theirs and ours[n] != theirs[n]]
    missing = [n for n in ours if n not in theirs]
    unknown = [n for n in theirs if n not in ours]
    parts = [
        (f'{len(names)} of another shape', names) if kind == 'shape' else (f'{len(names)} {kind}', names)
        for kind, names in (('missing', missing), ('unknown', unknown), ('shape', reshaped))
        if names
    ]
    return '; '.join(
        f'{title} ({", ".join(names[:most])}{", ..." if len(names) > most else ""})' for title, names in parts
    )


def _is_unbuilt(name: str, backbone: nn.Module) -> bool:
    """Whether a tensor belongs to a stage or an output norm of the arch that `out_indices` leaves out."""
    built, depth = len(backbone.stages), len(backbone.depths)
    trunk = TRUNK.match(name)
    if trunk:
        return built <= int(trunk[2]) < depth
    return bool(NORMS.fullmatch(name)) and int(name.split('.')[0][4:]) not in backbone.out_indices


def _is_zip(file: str | Path) -> bool:
    """Only files in torch's zip format, the default since 1.6, can be mapped."""
    with open(file, 'rb') as f:
        return f.read(4) == b'PK\x03\x04'


def _reason(error: Exception) -> str:
    """The line of an error that says what is wrong: torch's advice around it would have the file's code run."""
    refused = re.search(r'Unsupported (global|class|operand)[^\n]*?(?= was not|\n|$)', str(error))
    lines = [refused[0]] if refused else str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _allowing_history() -> Iterator[None]:
    """Let torch's safe reading accept what checkpoints of mmengine and of the original hold beside weights, no more."""
    core = np._core if hasattr(np, '_core') else np.core
    types = [
        HistoryBuffer,
        core.multiarray._reconstruct,
        core.multiarray.scalar,
        np.ndarray,
        np.dtype,
        type(np.dtype(np.float64)),
        type(np.dtype(np.int64)),
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


def _method_of_history(owner: type, name: str):
    """Stands in for `getattr`, by which a pickled HistoryBuffer names its methods."""
    if owner is HistoryBuffer and name in ('min', 'max', 'current', 'mean'):
        return getattr(owner, name)
    raise pickle.UnpicklingError(f'Unsupported global: attribute {name}')


_method_of_history.__module__ = 'builtins'
_method_of_history.__name__ = _method_of_history.__qualname__ = 'getattr'
