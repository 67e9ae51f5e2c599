"""Image sizes after the resize of a recipe's pipeline, in which a side of a long, thin image may become too short."""

from collections.abc import Iterator
from typing import NamedTuple

from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS

from ..config.tree import as_list, iter_dicts
from ..type_names import is_type
from . import SPLITS

STRIDE = 32  # of the backbone's last stage: without padding, nothing is left of fewer pixels


class ResizeLimit(NamedTuple):
    """What the resize of a split's pipeline must leave of an image.

    Attributes:
        scales (tuple[tuple[int, int], ...]): smallest scales of resizes that keep the ratio, as mmcv has them: two
            sides in pixels, in any order.
        min_side (int): pixels that must be left of each side.
    """

    scales: tuple[tuple[int, int], ...] = ()
    min_side: int = 1


# Limits of the ADE20K recipes of 512 x 512 and of the COCO recipes, for checks without a config.
DEFAULT_LIMITS = {
    'detection': {split: ResizeLimit(((400, 1333) if split == 'train' else (1333, 800),)) for split in SPLITS},
    'segmentation': {
        split: ResizeLimit(((1024, 256),)) if split == 'train' else ResizeLimit(((2048, 512),), STRIDE)
        for split in SPLITS
    },
}


def resize_limits(config: Config, ratio: float = 1.0) -> dict[str, ResizeLimit]:
    """Return the limit of each split of a config; `ratio` is the smallest scale factor of a multi-scale test."""
    limits = {}
    for split in SPLITS:
        steps = list(iter_dicts((config.get(f'{split}_dataloader') or {}).get('dataset')))
        hooks = config.get('custom_hooks') if split == 'train' else None  # they may have pipelines for later epochs
        scales = [scale for step in [*steps, *iter_dicts(hooks)] for scale in _min_scales(step)]
        if split == 'test':
            scales = [tuple(int(side * ratio) for side in scale) for scale in scales]
        pads = _pads_to_stride(config.model.get('data_preprocessor') or {}, split, steps)
        is_convnext = is_type((config.model.get('backbone') or {}).get('type'), MODELS, 'ConvNeXt')
        limits[split] = ResizeLimit(_drop_larger_scales(scales), STRIDE if is_convnext and not pads else 1)
    return limits


def too_thin(size: tuple[int, int], limit: ResizeLimit) -> tuple[str, str] | None:
    """Return a code and the sizes before and after, if a resize leaves too little of an image (W, H); else None."""
    sizes = [resized(size, scale) for scale in limit.scales] or [size]
    smallest = min(sizes, key=min)
    if min(smallest) >= limit.min_side:
        return None
    code = 'image-resized-to-zero' if min(smallest) < 1 else 'image-below-stride'
    return code, f'{size[0]} x {size[1]} becomes {smallest[0]} x {smallest[1]}'


def resized(size: tuple[int, int], scale: tuple[int, int]) -> tuple[int, int]:
    """Return the size after mmcv's resize to a scale with the ratio kept."""
    factor = min(max(scale) / max(size), min(scale) / min(size))
    return int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)


def _min_scales(step: dict) -> Iterator[tuple[int, int]]:
    """Iterate over the scales of a transform that resizes with the ratio kept; of a range the smallest."""
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


def _drop_larger_scales(scales: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return the scales that contain no other one."""

    def contains(a: tuple[int, int], b: tuple[int, int]) -> bool:
        a, b = sorted(a), sorted(b)
        return a != b and a[0] >= b[0] and a[1] >= b[1]

    scales = dict.fromkeys(scales)
    return tuple(scale for scale in scales if not any(contains(scale, smaller) for smaller in scales))


def _pads_to_stride(preprocessor: dict, split: str, steps: list[dict]) -> bool:
    """Return whether images are padded to the stride before they reach the backbone."""
    pad_cfg = preprocessor if split == 'train' else preprocessor.get('test_cfg') or {}
    sides = [*as_list(pad_cfg.get('size')), pad_cfg.get('size_divisor'), preprocessor.get('pad_size_divisor')]
    return any(side and side >= STRIDE for side in sides) or any(
        is_type(step.get('type'), TRANSFORMS, 'Pad') for step in steps if step.get('type')
    )
