"""Tools that run in processes of their own."""

import os
import runpy
import sys
from pathlib import Path

from helpers.paths import ROOT

# Options to read data in the tool's own process.
WITHOUT_WORKERS = [
    f'{split}_dataloader.{setting}'
    for split in ('train', 'val', 'test')
    for setting in ('num_workers=0', 'persistent_workers=False')
]

# Modules that a training imports; a process forked after importing them starts fast.
PRELOADED = ['convnext_dense.engine.runner', 'mmdet.models', 'mmdet.datasets', 'mmdet.evaluation', 'mmseg.models']
PRELOADED += ['mmseg.datasets', 'mmseg.evaluation', 'mmdet.visualization', 'mmseg.visualization', 'helpers.processes']


def _main(tool: str, args: list[str], out: str, err: str, env: dict[str, str], cwd: str | None) -> None:
    import torch  # not with this module, which tests/conftest.py imports

    os.setsid()  # its own group, as a launcher's or a terminal's: signals to it reach its data workers too
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(1)
    if cwd:
        os.environ.clear()  # `env` is all that the tool sees
        os.chdir(cwd)
    os.environ.update(env)
    if not cwd and env.get('WORLD_SIZE'):  # mmengine's own start of a process group wants a GPU
        torch.distributed.init_process_group('gloo')
    # As for a script: its own folder comes first, and nothing of the tests is found.
    hidden = {'', str(ROOT), str(ROOT / 'tests'), str(ROOT / 'tools')}
    user_paths = [*filter(None, env.get('PYTHONPATH', '').split(os.pathsep))]
    sys.path[:] = [str(ROOT / 'tools'), *user_paths, *(path for path in sys.path if path not in hidden)]
    for path in user_paths:  # as Python does at startup
        if (Path(path) / 'sitecustomize.py').exists():
            runpy.run_path(str(Path(path) / 'sitecustomize.py'))
    sys.argv = [tool, *args]
    runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')


class ToolProcess:
    """A running tool; its output goes to `log`, its error output to `err` if that is given."""

    def __init__(self, context, tool: str, args, log: Path, env: dict[str, str], err: Path | None = None, cwd=None):
        self.log = log
        args, env = [*map(str, args)], {name: str(value) for name, value in env.items()}
        self.process = context.Process(target=_main, args=(tool, args, str(log), str(err or log), env, cwd))
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
