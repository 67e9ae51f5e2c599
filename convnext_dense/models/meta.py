"""Building models on the meta device, where their parameters take no memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def meta_device() -> Iterator[None]:
    """Build the modules within on the meta device."""
    with torch.device('meta'), _LinspaceOnCPU():
        yield


class _LinspaceOnCPU(TorchFunctionMode):
    """Within `torch.device('meta')`, gives the rates of stochastic depth values: Swin's constructor reads them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **({'device': 'cpu'} if func is torch.linspace else {}), **(kwargs or {}))
