"""Tests on a GPU run in processes of their own, which see the GPUs that the other tests hide."""

from functools import cache

import pytest
import torch

from helpers.gpu import call_with_gpu


@cache
def _gpu_is_available() -> bool:
    return call_with_gpu(torch.cuda.is_available)


@pytest.fixture
def run_on_gpu():
    """`run_on_gpu(function, *args)` returns what a module-level function returns in a process that sees the GPUs."""
    if not _gpu_is_available():
        pytest.skip('no CUDA GPU')
    return call_with_gpu
