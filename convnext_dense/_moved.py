"""Where modules have moved: importing one by its old path raises an ImportError that names the new one."""

import sys
from importlib.abc import MetaPathFinder

PACKAGE = __name__.partition('.')[0]
# Old module -> where its parts are now, the main one first; relative to the package.
MOVED = dict(
    backbone='models.convnext', command_line='cli.exit cli.arguments',
    commands='cli.prepare config.load config.preflight config.work_dir engine.build', complexity='paper.flops',
    config_types='type_names', data='datasets.custom datasets.request datasets.configure',
    detection='models.fp32_heads', dumped='config.literal', fast='ops.dispatch ops.avx512 ops.onednn',
    fitting='config.batch_size config.schedule config.channels config.launch',
    guarding='engine.health_hook engine.failures', kinds='config.value_types', layer_decay='optim.layer_decay',
    options='config.options', plots='paper.curves', resuming='config.resume',
    running='engine.runner engine.loops engine.resume', runs='paper.work_dirs',
    sampling='engine.samplers engine.seeding engine.datasets',
    saving='engine.checkpoint_hook engine.atomic_files engine.progress',
    segmentation='models.multiscale_tta config.evaluation', shapes='datasets.toy_shapes', tables='paper.tables',
    tracking='config.trackers', weights='checkpoints checkpoints.hub checkpoints.convert',
)  # fmt: skip


class MovedModuleFinder(MetaPathFinder):
    """Finder that raises an ImportError with the new path of a module that has moved; it finds nothing itself."""

    def find_spec(self, fullname: str, path=None, target=None) -> None:
        """Raise ImportError for a module in `MOVED`."""
        package, _, name = fullname.partition('.')
        if package == PACKAGE and name in MOVED:
            new = ' or '.join(f'{PACKAGE}.{module}' for module in MOVED[name].split())
            raise ImportError(f'{fullname} has moved: import {new} instead', name=fullname)


sys.meta_path.insert(0, MovedModuleFinder())
