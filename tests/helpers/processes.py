"""Tools started beside a test."""

import os
import runpy
import sys
from pathlib import Path

import torch

from helpers.paths import ROOT

# Options with which data are read in the tool's own process.
WITHOUT_WORKERS = [
    f'{split}_dataloader.{setting}'
    for split in ('train', 'val', 'test')
    for setting in ('num_workers=0', 'persistent_workers=False')
]

# What a training imports; a process forked from one that has it starts at once.
PRELOADED = ['convnext_dense.engine.runner', 'mmdet.models', 'mmdet.datasets', 'mmdet.evaluation', 'mmseg.models']
PRELOADED += ['mmseg.datasets', 'mmseg.evaluation', 'mmdet.visualization', 'mmseg.visualization', 'helpers.processes']


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
