"""Fixtures of all tests: tools as a user starts them, the toy data set; and the markers `unit` and `integration`.

This module imports neither torch nor the package: with pytest-xdist, the process that only starts the workers loads it.
"""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.gpu import hide_gpus
from helpers.markers import is_integration
from helpers.paths import ROOT
from helpers.processes import PRELOADED, WITHOUT_WORKERS, ToolProcess

os.environ['TRITON_INTERPRET'] = '1'  # read when Triton is imported: its kernels run on the CPU
hide_gpus()  # the same tests on every machine: only those in tests/gpu see its GPUs, in processes of their own
# Tests run in parallel, one process per core: threads of each would only get in each other's way.
os.environ['OMP_NUM_THREADS'] = '1'


@pytest.hookimpl(tryfirst=True)  # before pytest itself deselects by `-m`
def pytest_collection_modifyitems(items):
    """Give every test exactly one of the markers `unit` and `integration`; one that it has already stays."""
    import torch

    torch.set_num_threads(1)
    for item in items:
        if not any(item.iter_markers('unit')) and not any(item.iter_markers('integration')):
            item.add_marker('integration' if is_integration(item) else 'unit')


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Keep the garbage collector from all modules and tests, which mmengine starts for each data set that it builds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # or extension modules report leaks


@pytest.fixture(scope='session')
def tool_context():
    """A forkserver that has imported the tools' modules, which takes seconds."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOADED)
    return context


@pytest.fixture
def run_tool(tool_context, tmp_path, tmp_path_factory):
    """Run a tool in an empty folder, as a user would; returns the finished process."""

    def run(tool: str, *args, timeout: float = 300, **env) -> subprocess.CompletedProcess:
        read_at_startup = {name for name in env if name.startswith(('PYTHON', 'LC_'))} - {'PYTHONPATH'}
        if read_at_startup or Path(tool).is_absolute():  # another project's tool does not import what ours do
            command = [sys.executable, ROOT / 'tools' / tool, *map(str, args)]
            settings = dict(cwd=tmp_path, text=True, capture_output=True, timeout=timeout)
            return subprocess.run(command, **settings, env={**os.environ, **env})
        logs = tmp_path_factory.mktemp('tool')
        out, err = logs / 'stdout', logs / 'stderr'
        process = ToolProcess(tool_context, tool, args, out, {**os.environ, **env}, err, str(tmp_path))
        code = process.wait(timeout)
        return subprocess.CompletedProcess([tool, *args], code, out.read_text(), err.read_text())

    return run


@pytest.fixture(scope='session')
def start_tool(tool_context):
    """Start a tool beside the test: `start_tool(log, tool, *args, **env)`."""

    def start(log: Path, tool: str, *args, **env) -> ToolProcess:
        return ToolProcess(tool_context, tool, args, Path(log), env)

    return start


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    from convnext_dense.datasets import toy_shapes

    folder = tmp_path_factory.mktemp('data') / 'shapes'
    toy_shapes.write(folder, train=8, val=4, size=64)
    return str(folder)


@pytest.fixture(scope='module')
def short():
    """Options with which a demo recipe runs in seconds."""
    return ['train_dataloader.batch_size=4', *WITHOUT_WORKERS]


@pytest.fixture
def parse(monkeypatch):
    """The arguments of a tool, as it parses them itself."""

    def parse(tool: str, *args):
        monkeypatch.syspath_prepend(str(ROOT / 'tools'))
        monkeypatch.setattr(sys, 'argv', [tool, *map(str, args)])
        monkeypatch.setenv('LOCAL_RANK', '0')
        return runpy.run_path(str(ROOT / 'tools' / tool))['parse_args']()

    return parse
