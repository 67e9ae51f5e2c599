"""Backbones whose input is not RGB: how images are read and normalized."""

from collections.abc import Iterator

from mmengine.config import Config
from mmengine.registry import TRANSFORMS

from ..type_names import is_type, short_name
from .tree import iter_dicts

# Where pipelines stand beside those of the data sets; a hook may put its own in their place.
EXTRA_PIPELINE_KEYS = ('custom_hooks', 'default_hooks', 'tta_pipeline')
# Steps of a pipeline that take colours, and those that make images of three channels, of which grey ones are not all.
COLOR_TRANSFORMS = ('PhotoMetricDistortion', 'YOLOXHSVRandomAug', 'MixUp', 'CachedMixUp')
RGB_TRANSFORMS = (*COLOR_TRANSFORMS, 'Mosaic', 'CachedMosaic')


def adapt_input_channels(config: Config) -> str | None:
    """Fit a config whose backbone takes other inputs than RGB: images are read as grey or as they are, and normalised
    by the mean of RGB's values (mmengine's preprocessors take one value or three), if they are at all.

    Returns one line that says so; None where there is nothing to do.
    """
    n = config.model.get('backbone', {}).get('in_channels', 3)
    preprocessor = config.model.get('data_preprocessor') or {}
    means = len(preprocessor.get('mean') or [])
    if n == 3 or means not in (0, 3):
        return None
    for key in ('mean', 'std') if means else ():
        preprocessor[key] = [sum(preprocessor[key]) / 3]
    if 'bgr_to_rgb' in preprocessor:
        preprocessor.bgr_to_rgb = False
    unfit = COLOR_TRANSFORMS if n == 1 else RGB_TRANSFORMS
    parts = [
        config.get(part) for part in ('train_dataloader', 'val_dataloader', 'test_dataloader', *EXTRA_PIPELINE_KEYS)
    ]
    left_out = {}
    for part in parts:
        for settings in iter_dicts(part):
            if is_type(settings.get('type'), TRANSFORMS, 'LoadImageFromFile'):
                settings['color_type'] = 'grayscale' if n == 1 else 'unchanged'
        left_out |= dict.fromkeys(_remove_transforms(part, unfit))
    line = f'{n} input channel{"s" if n > 1 else ""}: read as {"grey" if n == 1 else "they are"}'
    if means:
        line += f', normalised by {preprocessor.mean[0]:.2f} and {preprocessor.std[0]:.2f}'
    if left_out:
        line += f', without {", ".join(sorted(left_out))}, which need{"s" * (len(left_out) == 1)} RGB'
    return line


def _remove_transforms(value, names: tuple[str, ...]) -> Iterator[str]:
    """Take the steps of these types out of all lists in a config's value, and give their names."""
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for item in [*items]:
        if isinstance(value, list) and isinstance(item, dict) and is_type(item.get('type'), TRANSFORMS, *names):
            value.remove(item)
            yield str(short_name(item['type']))
        yield from _remove_transforms(item, names)
