"""Sizes of which a tracer knows no more than that they are positive."""

from collections.abc import Sequence

import torch


def with_unknown_size(images: torch.Tensor) -> torch.Tensor:
    """The same batch in sizes of which a tracer knows nothing, so that it cannot fix what it sees in the example."""
    n, _, height, width = images.shape
    if not isinstance(n, int):  # not by a shape: its number of pixels would give the tracer the equation for `n`
        images = images.index_select(0, torch.arange(unknown(n), device=images.device))
    return images.reshape(*images.shape[:2], unknown(height), unknown(width))


def unknown(n: int) -> int:
    """The same positive number, of which a tracer knows no more than that; one that is fixed stays."""
    return n if isinstance(n, int) else known_positive(torch.full((), n, dtype=torch.int64).item())


def known_positive(n: int) -> int:
    """Tell a tracer that a number is positive."""
    torch._check(n >= 1)
    return n


def known_size(output_size: torch.Tensor) -> list[int]:
    """Height and width (2,) of int64 as numbers that a tracer knows to be positive."""
    return [known_positive(n) for n in output_size.tolist()]


def to_tensor(sizes: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers, which a tracer may know by a symbol, as a tensor (n,)."""
    return torch.stack([torch.full((), n, dtype=dtype, device=device) for n in sizes])
