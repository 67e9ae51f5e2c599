"""Change the image size of a recipe; all sizes in its config are scaled in proportion."""

import argparse

from mmengine.config import Config
from mmengine.registry import TRANSFORMS

from ..errors import UsageError
from ..type_names import is_type
from .tree import PIPELINE_KEYS, iter_dicts

# Arguments of transforms and data preprocessors that are sizes of the resized image, in pixels.
SIZE_KEYS = ('scale', 'scales', 'img_scale', 'img_scales', 'crop_size', 'size', 'random_size_range', 'pad_size')
SIZE_KEYS += ('max_size',)
WINDOW_KEYS = ('crop_size', 'stride')  # in the test_cfg of a sliding window
MIN_SIZE = 32  # pixels: the stride of the last stage


def add_image_size_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--image-size`."""
    parser.add_argument(
        '--image-size',
        type=int,
        metavar='PIXELS',
        help="shorter side of the test scale; the recipe's other sizes, crops and windows are scaled in proportion",
    )


def set_image_size(config: Config, size: int | None) -> str | None:
    """Scale all image sizes of a config so that the shorter side of its test scale is `size`.

    Args:
        config: Config; it is changed in place.
        size: Shorter side of the test scale in pixels; None to keep the config's.

    Returns:
        One line for the log; None if nothing changed.

    Raises:
        UsageError: If the size is too small, or the test pipeline does not resize to a scale.
    """
    if size is None:
        return None
    if size < MIN_SIZE:
        raise UsageError(f'--image-size {size}: give at least {MIN_SIZE} pixels')
    scale = resize_scale(config)
    if scale is None:
        raise UsageError(
            "--image-size needs dict(type='Resize', scale=(long, short)) in the test pipeline of the config"
        )
    old = scale[1]
    if size == old:
        return None
    parts = [*map(config.get, (*PIPELINE_KEYS, 'test_pipeline')), config.model.get('data_preprocessor')]
    for part in {id(part): part for part in iter_dicts(parts)}.values():  # some configs hold the same dict twice
        _scale(part, SIZE_KEYS, size / old)
    if (config.model.get('test_cfg') or {}).get('mode') == 'slide':
        _scale(config.model.test_cfg, WINDOW_KEYS, size / old)
    return f'image size {size} instead of {old}: all sizes of the recipe times {size / old:.3g}'


def resize_scale(config: Config) -> tuple[int, int] | None:
    """Return the scale (long side, short side) of the test pipeline in pixels; None if it does not resize."""
    for loader in ('test_dataloader', 'val_dataloader'):
        for step in iter_dicts(config.get(loader)):
            scale = step.get('scale')
            if is_type(step.get('type'), TRANSFORMS, 'Resize') and scale:
                sides = scale if isinstance(scale, (tuple, list)) else (scale, scale)
                return int(max(sides)), int(min(sides))
    return None


def _scale(holder: dict, keys: tuple[str, ...], ratio: float) -> None:
    for key in keys:
        if key in holder:
            holder[key] = _scaled(holder[key], ratio)


def _scaled(value: object, ratio: float) -> object:
    """Scale a size, or each one in a sequence; fractions, such as of a relative crop, and -1 are kept."""
    if isinstance(value, (list, tuple)):
        return type(value)(_scaled(item, ratio) for item in value)
    is_size = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 1
    return max(1, round(value * ratio)) if is_size else value
