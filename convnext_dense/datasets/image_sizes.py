"""What a recipe's pipeline makes of the sizes of images: of long, thin ones a side becomes too short for it."""

from collections.abc import Iterator
from typing import NamedTuple

from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS

from ..config.tree import as_list, iter_dicts
from ..type_names import is_type

SPLITS = ('train', 'val', 'test')
STRIDE = 32  # of the backbone's last stage: of fewer pixels, and without padding, nothing is left there


class Limit(NamedTuple):
    """The smallest scales to which a split's images are resized with their ratio kept, as mmcv has them (two sides, in
    any order), and the pixels that have to be left of each side."""

    scales: tuple[tuple[int, int], ...] = ()
    least: int = 1


# Of the recipes of 512 x 512, and of COCO, where no config says it.
LIMITS = {
    'detection': {'train': Limit(((400, 1333),)), 'val': Limit(((1333, 800),)), 'test': Limit(((1333, 800),))},
    'segmentation': {
        'train': Limit(((1024, 256),)),
        'val': Limit(((2048, 512),), STRIDE),
        'test': Limit(((2048, 512),), STRIDE),
    },
}


def limits_of(config: Config, ratio: float = 1.0) -> dict[str, Limit]:
    """The limits of each split by the pipelines and the model of a config; `ratio` is the smallest of those by which
    a multi-scale test changes the test's scales."""
    limits = {}
    for split in SPLITS:
        steps = list(iter_dicts((config.get(f'{split}_dataloader') or {}).get('dataset')))
        hooks = config.get('custom_hooks') if split == 'train' else None  # which may have pipelines for later epochs
        scales = [scale for step in [*steps, *iter_dicts(hooks)] for scale in _scales(step)]
        if split == 'test':
            scales = [tuple(int(side * ratio) for side in scale) for scale in scales]
        pads = _pads(config.model.get('data_preprocessor') or {}, split, steps)
        is_ours = is_type((config.model.get('backbone') or {}).get('type'), MODELS, 'ConvNeXt')
        limits[split] = Limit(_smallest(scales), STRIDE if is_ours and not pads else 1)
    return limits


def too_thin(size: tuple[int, int], limit: Limit) -> tuple[str, str] | None:
    """The kind of problem of an image of a size, width and height, that is resized, and what comes of it; None where
    it has none."""
    sizes = [resized(size, scale) for scale in limit.scales] or [size]
    least = min(sizes, key=min)
    if min(least) >= limit.least:
        return None
    kind = 'image-resized-to-zero' if min(least) < 1 else 'image-below-stride'
    return kind, f'{size[0]} x {size[1]} becomes {least[0]} x {least[1]}'


def resized(size: tuple[int, int], scale: tuple[int, int]) -> tuple[int, int]:
    """What mmcv makes of a size within a scale, with the ratio kept."""
    factor = min(max(scale) / max(size), min(scale) / min(size))
    return int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)


def _scales(step: dict) -> Iterator[tuple[int, int]]:
    """The scales to which a step of a pipeline resizes images with their ratio kept, of a range the smallest."""
    kind = step.get('type')
    if kind is None or not step.get('keep_ratio'):
        return
    if is_type(kind, TRANSFORMS, 'RandomResize'):
        scale, (low, _) = step['scale'], step.get('ratio_range') or (1, 1)
        bounds = scale if isinstance(scale[0], (tuple, list)) else [scale]
        yield tuple(int(min(sides) * low) for sides in zip(*bounds))
    elif is_type(kind, TRANSFORMS, 'RandomChoiceResize', 'Resize'):
        scales = step.get('scales', step.get('scale'))
        for scale in scales if isinstance(scales, list) and not isinstance(scales[0], int) else [scales]:
            if scale:
                yield (scale, scale) if isinstance(scale, int) else tuple(scale)


def _smallest(scales: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Scales without those that hold another one."""
    scales = list(dict.fromkeys(scales))
    return tuple(scale for scale in scales if not any(_holds(scale, other) for other in scales))


def _holds(scale: tuple[int, int], other: tuple[int, int]) -> bool:
    mine, theirs = sorted(scale), sorted(other)
    return mine != theirs and mine[0] >= theirs[0] and mine[1] >= theirs[1]


def _pads(preprocessor: dict, split: str, steps: list[dict]) -> bool:
    """Whether images are padded to the stride before they come to the backbone."""
    own = preprocessor if split == 'train' else preprocessor.get('test_cfg') or {}
    sides = [*as_list(own.get('size')), own.get('size_divisor'), preprocessor.get('pad_size_divisor')]
    return any(side and side >= STRIDE for side in sides) or any(
        is_type(step.get('type'), TRANSFORMS, 'Pad') for step in steps if step.get('type')
    )
