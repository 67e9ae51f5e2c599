"""Build models on the meta device, where their parameters take no memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def meta_device() -> Iterator[None]:
    """Context manager in which modules are built on the meta device."""
    with torch.device('meta'), _LinspaceOnCPU():
        yield


class _LinspaceOnCPU(TorchFunctionMode):
    """Keeps results of torch.linspace on the CPU: Swin's constructor reads the values of its stochastic depth rates."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **({'device': 'cpu'} if func is torch.linspace else {}), **(kwargs or {}))
