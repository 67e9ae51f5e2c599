"""The recipes as configs, and their learning rates."""

import copy
import os
from functools import cache

import torch
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope

from convnext_dense.paper.results import PAPER_RESULTS
from helpers.paths import ROOT

# Parameters and entries of the state dict, of the original's fine-tuned checkpoints.
SIZES = {
    'mask_rcnn/convnext_t': (48_095_376, 228),
    'cascade/convnext_t': (85_930_578, 334),
    'cascade/convnext_s': (107_565_138, 496),
    'cascade/convnext_b': (145_800_242, 496),
    'cascade/convnext_b_in22k': (145_800_242, 496),
    'cascade/convnext_l_in22k': (254_710_770, 496),
    'cascade/convnext_xl_in22k': (406_875_058, 496),
    'upernet/convnext_t': (60_242_636, 268),
    'upernet/convnext_s': (81_877_196, 430),
    'upernet/convnext_b': (122_102_956, 430),
    'upernet/convnext_b_in22k': (122_102_956, 430),
    'upernet/convnext_l_in22k': (234_994_796, 430),
    'upernet/convnext_xl_in22k': (391_140_396, 430),
}
SEGMENTATION = [result.recipe for result in PAPER_RESULTS if not result.is_detection]


@cache
def _read(name: str, roots: tuple[tuple[str, str], ...]) -> Config:
    return Config.fromfile(ROOT / 'configs' / f'{name}.py')


def load(name: str) -> Config:
    """A recipe, which is read once for all tests; the folders of its data sets are in the environment."""
    roots = sorted((key, value) for key, value in os.environ.items() if key.endswith('_ROOT'))
    config = copy.deepcopy(_read(name, tuple(roots)))
    init_default_scope(config.default_scope)
    return config


def lrs_over_iterations(config: Config, iterations: list[int], epoch_length: int | None = None) -> dict[int, float]:
    """The lr relative to its base before each of these iterations, by stepping mmengine's own schedulers.

    Their factors do not depend on the optimizer's steps, which take most of the time: the first one suffices for torch.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedulers = [PARAM_SCHEDULERS.build({**cfg, 'optimizer': optimizer}) for cfg in config.param_scheduler]
    lrs = {}
    optimizer.step()
    for iteration in range(max(iterations) + 1):
        if iteration in iterations:
            lrs[iteration] = optimizer.param_groups[0]['lr']
        for scheduler in schedulers:
            if not scheduler.by_epoch or (epoch_length and (iteration + 1) % epoch_length == 0):
                scheduler.step()
    return lrs
