"""What ended a run, in one line with the fix."""

import copy
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress

import torch
from mmengine.dist import get_world_size

from ..errors import LIBRARIES, last_line, package_of
from ..models.convnext import ConvNeXt

GONE = 'another process of the run is gone'
READER = r'(?:DataLoader worker \(pid.*?\)|Pin memory thread) (exited unexpectedly|is killed by signal: \w+)'
LOST = 'Connection closed by peer|Connection reset by peer|Broken pipe|Socket Timeout|Timed out waiting|Socket closed'
DROPPED = (ConnectionError, TimeoutError)


def cause_of(error: Exception, model: torch.nn.Module | None = None, shape: tuple | None = None) -> str | None:
    """What ended a run, in one line with the way out, for errors that torch words for its developers; else None.

    Args:
        model, shape: what was trained, and N x C x H x W of its last batch.
    """
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        with suppress(Exception):  # advice, which may itself want memory, must not hide the cause
            return f'out of memory{_knobs(model, shape)}'
        return 'out of memory'
    worker = re.search(READER, text)
    if worker or _while_reading(error):
        sign = worker[1] if worker else text or 'end of file'
        return (
            f'a process that reads data was ended from outside ({sign}), most often for want of memory: '
            'fewer train_dataloader.num_workers, more shared memory (/dev/shm), or more memory for the job'
        )
    # No OSError comes from another process of the run: torch has errors of its own.
    of_run = isinstance(error, torch.distributed.DistError) or re.search(LOST, text)
    if get_world_size() > 1 and of_run and not isinstance(error, OSError):
        return GONE
    lost = next((e for e in _behind(error) if isinstance(e, DROPPED) or re.search(LOST, str(e))), None)
    if lost is None:
        return None
    whose = next((f' of {package}' for package in _packages(error) if package not in LIBRARIES), '')
    return (
        f'a connection{whose} was lost ({type(lost).__name__}: {last_line(lost)}): see whether what it leads to is '
        'there; --resume goes on from the last checkpoint, --debug shows the traceback'
    )


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """The error, the one that it came of, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _packages(error: BaseException) -> Iterator[str]:
    """Whose code an error passed through, from the outermost call on, without Python's own."""
    packages = (package_of(frame) for frame, _ in traceback.walk_tb(error.__traceback__))
    return (package for package in packages if package not in sys.stdlib_module_names)


def _while_reading(error: Exception) -> bool:
    """Whether a connection to a process that reads data was lost: torch's loader passes that on as it is where the
    process is gone, but not yet seen as dead."""
    frames = traceback.extract_tb(error.__traceback__)
    lost = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))  # the last: its socket
    return lost and any(frame.name == '_try_get_data' for frame in frames)


def _knobs(model: torch.nn.Module | None, shape: tuple | None) -> str:
    """What would save memory, and how much of what the backbone keeps for its backward pass."""
    backbone = next((m for m in model.modules() if isinstance(m, ConvNeXt)), None) if model is not None else None
    if backbone is None or shape is None:
        return ''
    now = kept_bytes(backbone, shape)
    knobs = {'--amp-dtype bfloat16 (on a GPU)': 0.5}
    if shape[0] > 1:
        knobs[f'train_dataloader.batch_size={shape[0] // 2} (batches are added up to the same total)'] = 0.5
    ways = [f'{name} {_gb(share * now)}' for name, share in knobs.items()]
    if not backbone.with_cp:
        saved = {way: now - kept_bytes(backbone, shape, way) for way in ('mlp', True)}
        ways = [f'model.backbone.with_cp={way} {_gb(size)}' for way, size in saved.items()] + ways
    images = ' x '.join(str(n) for n in shape)
    return f' with a batch of {images}: of the {_gb(now)} that the backbone keeps, {", ".join(ways)} would be saved'


def kept_bytes(backbone: ConvNeXt, shape: tuple, with_cp: bool | str | None = None) -> int:
    """Bytes that a backbone, in its plain form, keeps for its backward pass of fp32 images N x C x H x W. Nothing is
    computed."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    # Copied onto the meta device, tensor by tensor: this is asked for when memory has run out.
    memo = {
        id(p): torch.nn.Parameter(torch.empty_like(p, device='meta'), p.requires_grad) for p in backbone.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device='meta') for b in backbone.buffers()}
    twin = copy.deepcopy(backbone, memo).train()
    if with_cp is not None:
        twin.with_cp = with_cp
    own = {p.untyped_storage()._cdata for p in twin.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = twin(torch.empty(shape, device='meta'))
    del outputs
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)


def _gb(size: float) -> str:
    return f'{size / 2**30:.2f} GB'
