"""Where modules have moved: an import by an old path says the new one."""

import sys
from importlib.abc import MetaPathFinder

PACKAGE = __name__.partition('.')[0]
# Old module -> new one, relative to the package.
MOVED = {
    'backbone': 'models.convnext',
    'command_line': 'cli',
    'commands': 'config',
    'complexity': 'paper.flops',
    'config_types': 'type_names',
    'data': 'datasets',
    'detection': 'models.fp32_heads',
    'dumped': 'config.literal',
    'fast': 'ops',
    'fitting': 'config',
    'guarding': 'engine.health_hook',
    'kinds': 'config.value_types',
    'layer_decay': 'optim.layer_decay',
    'options': 'config.options',
    'plots': 'paper.curves',
    'resuming': 'config.resume',
    'running': 'engine.runner',
    'runs': 'paper.work_dirs',
    'sampling': 'engine',
    'saving': 'engine',
    'segmentation': 'models.multiscale_tta',
    'shapes': 'datasets.toy_shapes',
    'tables': 'paper.tables',
    'tracking': 'config.trackers',
    'weights': 'checkpoints',
}


class MovedModuleFinder(MetaPathFinder):
    """Raises an ImportError that names the new path of a module that has moved; finds nothing itself."""

    @classmethod
    def find_spec(cls, fullname: str, path=None, target=None) -> None:
        package, _, name = fullname.partition('.')
        if package == PACKAGE and name in MOVED:
            raise ImportError(f'{fullname} has moved: import {PACKAGE}.{MOVED[name]} instead', name=fullname)


def install() -> None:
    """Have imports by old paths raise an ImportError that names the new path."""
    if MovedModuleFinder not in sys.meta_path:
        sys.meta_path.insert(0, MovedModuleFinder)
