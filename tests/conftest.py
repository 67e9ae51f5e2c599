"""Shared by the tests: the package's folder, small models and made weights."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
os.environ['CUDA_VISIBLE_DEVICES'] = ''  # the same tests on every machine
# Tests run side by side, a process a core: threads of each would only get in each other's way.
os.environ['OMP_NUM_THREADS'] = '1'
torch.set_num_threads(1)


def made_weights(shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
    """Values that follow from a parameter's name and shape, as the reference features were made with."""
    weights = {}
    for name, shape in shapes.items():
        r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        if name.endswith('gamma'):
            r = 0.5 + 0.1 * r
        elif len(shape) == 1:
            is_norm = name.endswith('weight') and ('norm' in name or name.startswith('downsample'))
            r = 0.1 * r + is_norm
        else:
            r = r / np.sqrt(np.prod(shape[1:]))
        weights[name] = torch.from_numpy(np.asarray(r, np.float32))
    return weights


@pytest.fixture
def run_tool(tmp_path):
    """Run a tool in an empty folder, as a user would; returns the finished process."""

    def run(tool: str, *args, timeout: float = 300, **env) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, ROOT / 'tools' / tool, *map(str, args)],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=timeout,
            env={**os.environ, **env},
        )

    return run
