"""Adapt a config to a backbone with another number of input channels than three."""

from collections.abc import Collection, Iterator

from mmengine.config import Config
from mmengine.registry import TRANSFORMS

from ..type_names import is_type, short_name
from .tree import PIPELINE_KEYS, iter_dicts

CHANNEL_LOADER = 'LoadImageChannels'  # transform that reads the channels that the backbone takes
# Transforms that need colors, and all that need three channels (which grayscale images may repeat).
COLOR_TRANSFORMS = ('PhotoMetricDistortion', 'YOLOXHSVRandomAug', 'MixUp', 'CachedMixUp')
RGB_TRANSFORMS = (*COLOR_TRANSFORMS, 'Mosaic', 'CachedMosaic')


def adapt_input_channels(config: Config) -> str | None:
    """Adapt a config to a backbone with another number of input channels than three.

    Images are read as grayscale or unchanged. If they are normalized, it is with the average of the RGB values, because
    mmengine's preprocessors take one value or three.

    Args:
        config: Config; it is changed in place.

    Returns:
        One line for the log; None for RGB, or if the config was adapted before (also by `set_channels`).
    """
    n = config.model.get('backbone', {}).get('in_channels', 3)
    preprocessor = config.model.get('data_preprocessor') or {}
    means = len(preprocessor.get('mean') or [])
    if n == 3 or means not in (0, 3):
        return None
    if any(short_name(step.get('type')) == CHANNEL_LOADER for step in iter_dicts(config.get('test_dataloader') or {})):
        return None
    for key in ('mean', 'std') if means else ():
        preprocessor[key] = [sum(preprocessor[key]) / 3]
    if 'bgr_to_rgb' in preprocessor:
        preprocessor.bgr_to_rgb = False
    unsuitable = COLOR_TRANSFORMS if n == 1 else RGB_TRANSFORMS
    removed = set()
    for part in map(config.get, PIPELINE_KEYS):
        for transform in iter_dicts(part):
            if is_type(transform.get('type'), TRANSFORMS, 'LoadImageFromFile'):
                transform['color_type'] = 'grayscale' if n == 1 else 'unchanged'
        removed |= set(remove_transforms(part, unsuitable))
    line = (
        '1 input channel: images are read as grayscale' if n == 1 else f'{n} input channels: images are read unchanged'
    )
    if means:
        line += f', normalized with mean {preprocessor.mean[0]:.2f} and std {preprocessor.std[0]:.2f}'
    return line + describe_removed(removed)


def describe_removed(names: Collection[str]) -> str:
    """Return the end of a line that names the transforms that were removed; '' if none were."""
    return f', without {", ".join(sorted(names))}, which need{"s" * (len(names) == 1)} RGB' if names else ''


def remove_transforms(value: object, names: tuple[str, ...]) -> Iterator[str]:
    """Remove the transforms of these types from all lists in a part of a config, and yield their names."""
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for item in [*items]:
        if isinstance(value, list) and isinstance(item, dict) and is_type(item.get('type'), TRANSFORMS, *names):
            value.remove(item)
            yield str(short_name(item['type']))
        yield from remove_transforms(item, names)
