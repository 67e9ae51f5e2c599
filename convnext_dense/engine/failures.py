"""Diagnose what ended a run, on which rank, in one line with a hint."""

import copy
import re
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch
from mmengine.dist import get_rank, get_world_size

from ..errors import LIBRARY_PACKAGES, one_line, package_of_frame
from ..models.convnext import ConvNeXt
from .atomic_files import write_atomic

PEER_LOST_MESSAGE = 'lost connection to another rank'
WORKER_DIED_RE = r'(?:DataLoader worker \(pid.*?\)|Pin memory thread) (exited unexpectedly|is killed by signal: \w+)'
CONNECTION_LOST_RE = (
    'Connection closed by peer|Connection reset by peer|Broken pipe|Socket Timeout|Timed out waiting|Socket closed'
)
RANK_ERROR_FILE = 'ended_rank_{}.txt'  # in the log folder: why a rank ended
RANK_ERROR_GRACE_S = 5  # seconds in which other ranks may write theirs


def diagnose(error: Exception, model: torch.nn.Module | None = None, input_shape: tuple | None = None) -> str | None:
    """Explain an error that ended a run.

    Args:
        error: The error, with its traceback.
        model: The model that was trained, for advice on memory.
        input_shape: Shape (N, C, H, W) of its last batch, for the same.

    Returns:
        One line with the cause and a hint; None if the error is neither out of memory, nor a dead DataLoader worker,
        nor a lost connection, whose own messages help little.
    """
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        with suppress(Exception):  # advice, which may itself run out of memory, must not hide the cause
            return f'out of memory{_memory_advice(model, input_shape)}'
        return 'out of memory'
    worker = re.search(WORKER_DIED_RE, text)
    if worker or _is_worker_disconnect(error):
        sign = worker[1] if worker else text or 'end of file'
        return (
            f'a DataLoader worker was killed ({sign}), usually because the machine ran out of memory: use fewer '
            'train_dataloader.num_workers, more shared memory (/dev/shm) or more memory for the job'
        )
    # An OSError never comes from another rank: torch has its own errors.
    from_peer = isinstance(error, torch.distributed.DistError) or re.search(CONNECTION_LOST_RE, text)
    if get_world_size() > 1 and from_peer and not isinstance(error, OSError):
        return PEER_LOST_MESSAGE
    return _diagnose_connection(error)


def _diagnose_connection(error: Exception) -> str | None:
    """Explain an error that comes from a lost connection, such as to a storage or a tracker; None for other errors."""
    cause = error
    while not isinstance(cause, (ConnectionError, TimeoutError)) and not re.search(CONNECTION_LOST_RE, str(cause)):
        cause = cause.__cause__ or cause.__context__
        if cause is None:
            return None
    packages = (package_of_frame(frame) for frame, _ in traceback.walk_tb(error.__traceback__))
    owner = next((f' of {p}' for p in packages if p not in LIBRARY_PACKAGES and p not in sys.stdlib_module_names), '')
    return (
        f'a connection{owner} was lost ({type(cause).__name__}: {one_line(cause)}): check that the other end is up; '
        '--resume continues from the last checkpoint, --debug shows the traceback'
    )


def _is_worker_disconnect(error: Exception) -> bool:
    """Whether the connection to a DataLoader worker was lost.

    torch passes the error on unchanged if the worker has ended but is not yet known to be dead.
    """
    is_disconnect = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))  # the last: its socket
    calls = (frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__))
    return is_disconnect and '_try_get_data' in calls


def _memory_advice(model: torch.nn.Module | None, input_shape: tuple | None) -> str:
    """Settings that save memory, and how much of the backbone's saved activations each of them saves."""
    backbone = next((m for m in model.modules() if isinstance(m, ConvNeXt)), None) if model is not None else None
    if backbone is None or input_shape is None:
        return ''
    size = saved_activation_bytes(backbone, input_shape)
    fractions = {'--amp-dtype bfloat16 (on a GPU)': 0.5}
    if input_shape[0] > 1:
        fractions[f'train_dataloader.batch_size={input_shape[0] // 2} (with gradient accumulation)'] = 0.5
    hints = [f'{name} {_format_gb(fraction * size)}' for name, fraction in fractions.items()]
    if not backbone.with_cp:
        saved = {scope: size - saved_activation_bytes(backbone, input_shape, scope) for scope in ('mlp', 'block')}
        with_cp = 'model.backbone.with_cp=True model.backbone.cp_scope'
        hints = [f'{with_cp}={scope} {_format_gb(n)}' for scope, n in saved.items()] + hints
    shape = ' x '.join(str(n) for n in input_shape)
    return (
        f' with a batch of {shape}: of the {_format_gb(size)} that the backbone keeps, {", ".join(hints)} can be saved'
    )


def saved_activation_bytes(backbone: ConvNeXt, input_shape: tuple, cp_scope: str | None = None) -> int:
    """Return the memory of the activations that a backbone saves for its backward pass. Nothing is computed.

    Args:
        backbone: The backbone. Its reference implementation in float32 is assumed.
        input_shape: Shape (N, C, H, W) of the images.
        cp_scope: Scope of activation checkpointing, 'block' or 'mlp'; None for the backbone's own setting.

    Returns:
        Bytes.
    """
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[id(storage)] = storage  # kept alive so that no other storage gets its id
        return tensor

    # Copied to the meta device tensor by tensor, because this runs when memory is full.
    memo = {
        id(p): torch.nn.Parameter(torch.empty_like(p, device='meta'), p.requires_grad) for p in backbone.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device='meta') for b in backbone.buffers()}
    twin = copy.deepcopy(backbone, memo).train()
    if cp_scope is not None:
        twin.with_cp, twin.cp_scope = True, cp_scope
    parameters = [p.untyped_storage() for p in twin.parameters()]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = twin(torch.empty(input_shape, device='meta'))
    del outputs
    param_ids = set(map(id, parameters))
    return sum(storage.nbytes() for key, storage in storages.items() if key not in param_ids)


def _format_gb(size: float) -> str:
    return f'{size / 2**30:.2f} GB'


def collect_rank_errors(folder: Path, message: str | None, error: Exception) -> str | None:
    """Explain what ended a distributed run: which rank failed first, and why.

    Each rank writes its error to the log folder; those that only lost the connection to another one read that one's.

    Args:
        folder: The log folder, which all ranks share.
        message: The diagnosis of this rank's error, None if there is none.
        error: This rank's error.

    Returns:
        One line; None if this rank failed first and its error has no diagnosis.
    """
    with suppress(OSError):
        write_atomic(folder / RANK_ERROR_FILE.format(get_rank()), (message or one_line(error)).encode())
    if message != PEER_LOST_MESSAGE:
        return message and f'rank {get_rank()}: {message}'
    time.sleep(RANK_ERROR_GRACE_S)
    messages = {int(path.stem.split('_')[-1]): path.read_text() for path in folder.glob(RANK_ERROR_FILE.format('*'))}
    causes = [f'rank {rank}: {text}' for rank, text in sorted(messages.items()) if text != PEER_LOST_MESSAGE]
    missing_ranks = [str(rank) for rank in range(get_world_size()) if rank not in messages]
    if not causes and missing_ranks:
        causes = [f'rank {" and ".join(missing_ranks)} exited without an error message (killed or out of memory)']
    return f'{PEER_LOST_MESSAGE}: {causes[0]}' if causes else PEER_LOST_MESSAGE
