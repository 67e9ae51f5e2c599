"""What ended a run, in one line with the fix."""

import copy
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress

import torch
from mmengine.dist import get_world_size

from ..errors import LIBRARY_PACKAGES, one_line, package_of_frame
from ..models.convnext import ConvNeXt

PEER_LOST_MESSAGE = 'another process of the run is gone'
WORKER_DIED_RE = r'(?:DataLoader worker \(pid.*?\)|Pin memory thread) (exited unexpectedly|is killed by signal: \w+)'
CONNECTION_LOST_RE = (
    'Connection closed by peer|Connection reset by peer|Broken pipe|Socket Timeout|Timed out waiting|Socket closed'
)
CONNECTION_ERRORS = (ConnectionError, TimeoutError)


def diagnose(error: Exception, model: torch.nn.Module | None = None, shape: tuple | None = None) -> str | None:
    """What ended a run, in one line with the way out, for errors that torch words for its developers; else None.

    Args:
        model: the model that was trained.
        shape: (N, C, H, W) of its last batch.
    """
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        with suppress(Exception):  # advice, which may itself want memory, must not hide the cause
            return f'out of memory{_memory_advice(model, shape)}'
        return 'out of memory'
    worker = re.search(WORKER_DIED_RE, text)
    if worker or _is_worker_disconnect(error):
        sign = worker[1] if worker else text or 'end of file'
        return (
            f'a process that reads data was ended from outside ({sign}), most often for want of memory: '
            'fewer train_dataloader.num_workers, more shared memory (/dev/shm), or more memory for the job'
        )
    # No OSError comes from another process of the run: torch has errors of its own.
    of_run = isinstance(error, torch.distributed.DistError) or re.search(CONNECTION_LOST_RE, text)
    if get_world_size() > 1 and of_run and not isinstance(error, OSError):
        return PEER_LOST_MESSAGE
    lost = next(
        (e for e in _iter_causes(error) if isinstance(e, CONNECTION_ERRORS) or re.search(CONNECTION_LOST_RE, str(e))),
        None,
    )
    if lost is None:
        return None
    whose = next((f' of {package}' for package in _iter_packages(error) if package not in LIBRARY_PACKAGES), '')
    return (
        f'a connection{whose} was lost ({type(lost).__name__}: {one_line(lost)}): see whether what it leads to is '
        'there; --resume goes on from the last checkpoint, --debug shows the traceback'
    )


def _iter_causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, the one that it came of, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _iter_packages(error: BaseException) -> Iterator[str]:
    """Whose code an error passed through, from the outermost call on, without Python's own."""
    packages = (package_of_frame(frame) for frame, _ in traceback.walk_tb(error.__traceback__))
    return (package for package in packages if package not in sys.stdlib_module_names)


def _is_worker_disconnect(error: Exception) -> bool:
    """Whether a connection to a process that reads data was lost: torch's loader passes that on as it is where the
    process is gone, but not yet seen as dead."""
    frames = traceback.extract_tb(error.__traceback__)
    lost = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))  # the last: its socket
    return lost and any(frame.name == '_try_get_data' for frame in frames)


def _memory_advice(model: torch.nn.Module | None, shape: tuple | None) -> str:
    """What would save memory, and how much of what the backbone keeps for its backward pass."""
    backbone = next((m for m in model.modules() if isinstance(m, ConvNeXt)), None) if model is not None else None
    if backbone is None or shape is None:
        return ''
    now = saved_activation_bytes(backbone, shape)
    knobs = {'--amp-dtype bfloat16 (on a GPU)': 0.5}
    if shape[0] > 1:
        knobs[f'train_dataloader.batch_size={shape[0] // 2} (batches are added up to the same total)'] = 0.5
    ways = [f'{name} {_format_gb(share * now)}' for name, share in knobs.items()]
    if not backbone.with_cp:
        saved = {scope: now - saved_activation_bytes(backbone, shape, scope) for scope in ('mlp', 'block')}
        ways = [
            f'model.backbone.with_cp=True model.backbone.cp_scope={scope} {_format_gb(size)}'
            for scope, size in saved.items()
        ] + ways
    images = ' x '.join(str(n) for n in shape)
    return (
        f' with a batch of {images}: of the {_format_gb(now)} that the backbone keeps, {", ".join(ways)} would be saved'
    )


def saved_activation_bytes(backbone: ConvNeXt, shape: tuple, cp_scope: str | None = None) -> int:
    """Bytes that a backbone, in its plain form, keeps for its backward pass of fp32 images N x C x H x W, with
    activation checkpointing of `cp_scope` where given. Nothing is computed."""
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
    if cp_scope is not None:
        twin.with_cp, twin.cp_scope = True, cp_scope
    own = {p.untyped_storage()._cdata for p in twin.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = twin(torch.empty(shape, device='meta'))
    del outputs
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)


def _format_gb(size: float) -> str:
    return f'{size / 2**30:.2f} GB'
