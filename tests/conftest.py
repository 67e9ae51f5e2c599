"""Shared by the tests: the package's folder, small models and made weights."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
# Options with which data are read in the tool's own process.
WITHOUT_WORKERS = [
    f'{split}_dataloader.{setting}'
    for split in ('train', 'val', 'test')
    for setting in ('num_workers=0', 'persistent_workers=False')
]
sys.path.append(str(ROOT / 'tools'))  # tools that are run in this process find what they import beside them
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


# What a training imports; a process forked from one that has it starts at once.
PRELOADED = ['convnext_dense.engine.runner', 'mmdet.models', 'mmdet.datasets', 'mmdet.evaluation', 'mmseg.models']
PRELOADED += ['mmseg.datasets', 'mmseg.evaluation', 'mmdet.visualization', 'mmseg.visualization', 'conftest']


def _main(tool: str, args: list[str], log: str, env: dict[str, str]) -> None:
    os.setsid()  # its own group, as a launcher's or a terminal's: signals to it reach its data workers too
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(env)
    torch.set_num_threads(1)
    if env.get('WORLD_SIZE'):  # mmengine's own start of a process group wants a GPU
        torch.distributed.init_process_group('gloo')
    sys.argv = [tool, *args]
    runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')


class ToolProcess:
    """A tool at work, whose output goes to a file."""

    def __init__(self, context, tool: str, args, log: Path, env: dict[str, str]):
        self.log = log
        self.process = context.Process(target=_main, args=(tool, [*map(str, args)], str(log), env))
        self.process.start()
        self.pid = self.process.pid

    def wait(self, timeout: float = 300) -> int:
        """Its exit code; minus the signal that ended it."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(self.log.read_text())
        return self.process.exitcode

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ''


@pytest.fixture(scope='session')
def start_tool():
    """Start a tool beside the test: `start_tool(log, tool, *args, **env)`."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOADED)

    def start(log: Path, tool: str, *args, **env) -> ToolProcess:
        return ToolProcess(context, tool, args, Path(log), env)

    return start
