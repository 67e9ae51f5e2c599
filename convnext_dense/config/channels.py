"""Adapt a config to other channels than RGB: reading, augmentation, drawing, backbone input."""

from collections.abc import Collection, Iterator

from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS

from ..channel_files import ChannelReader
from ..errors import UsageError, count
from ..models.convnext import ConvNeXt
from ..type_names import class_of, is_type, short_name
from .options import argument_names
from .tree import PIPELINE_KEYS, add_custom_imports, iter_dicts

CHANNEL_LOADER = 'LoadImageChannels'  # transform that reads the channels that the backbone takes
# Transforms that need colors, and all that need three channels (which grayscale images may repeat).
COLOR_TRANSFORMS = ('PhotoMetricDistortion', 'YOLOXHSVRandomAug', 'MixUp', 'CachedMixUp')
RGB_TRANSFORMS = (*COLOR_TRANSFORMS, 'Mosaic', 'CachedMosaic')
MODULES = ('convnext_dense.engine.channel_transforms', 'convnext_dense.engine.channel_visualization_hook')
DISTORTION, HOOK = 'RandomBrightnessContrast', 'ChannelVisualizationHook'
# Color transforms that are replaced by `DISTORTION`; the other `RGB_TRANSFORMS` are removed.
DISTORTIONS = ('PhotoMetricDistortion', 'YOLOXHSVRandomAug')


def channel_reader(config: Config) -> ChannelReader | None:
    """Return the channel reader of a config's test pipeline; None if it reads RGB."""
    for step in iter_dicts(config.get('test_dataloader') or {}):
        if short_name(step.get('type')) == CHANNEL_LOADER:
            return ChannelReader(**{name: step[name] for name in ChannelReader._fields})
    return None


def set_channels(config: Config, reader: ChannelReader) -> str:
    """Adapt a config to images with other channels than RGB.

    Args:
        config: Config; it is changed in place.
        reader: Reader of the images.

    Returns:
        One line that says what changed.

    Raises:
        UsageError: If the backbone cannot take these channels, or its pretrained weights cannot be adapted to them.
    """
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in reader._asdict().items()}
    replaced, removed = set(), set()
    for part in map(config.get, PIPELINE_KEYS):
        for step in iter_dicts(part):
            type_ = step.get('type')
            if is_type(type_, TRANSFORMS, 'LoadImageFromFile'):
                step.clear()
                step.update(type=CHANNEL_LOADER, **settings)
            elif is_type(type_, TRANSFORMS, *DISTORTIONS):
                step.clear()
                step.update(type=DISTORTION)
                replaced.add(short_name(type_))
            elif is_type(type_, TRANSFORMS, 'Pad') and isinstance(step.get('pad_val'), dict):
                step['pad_val']['img'] = 0.0  # the mean
        removed |= set(_remove_transforms(part, RGB_TRANSFORMS))
    _set_preprocessor(config.model)
    stem = _set_input(config.model, len(reader.channels))
    hook = (config.get('default_hooks') or {}).get('visualization')
    if hook:
        config.default_hooks['visualization'] = dict(type=HOOK, reader=settings)
    add_custom_imports(config, *MODULES)
    line = f'{count(len(reader.channels), "input channel")}, normalized by their mean and std{stem}'
    if replaced:
        line += f', {DISTORTION} for {", ".join(sorted(replaced))}'
    return line + _describe_removed(removed)


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
        removed |= set(_remove_transforms(part, unsuitable))
    line = (
        '1 input channel: images are read as grayscale' if n == 1 else f'{n} input channels: images are read unchanged'
    )
    if means:
        line += f', normalized with mean {preprocessor.mean[0]:.2f} and std {preprocessor.std[0]:.2f}'
    return line + _describe_removed(removed)


def _set_preprocessor(model: dict) -> None:
    """Remove normalization, which the reader does, and the reordering of channels."""
    preprocessor = model.get('data_preprocessor') or {}
    for key in ('mean', 'std'):
        preprocessor.pop(key, None)
    for key in ('bgr_to_rgb', 'rgb_to_bgr'):
        if key in preprocessor:
            preprocessor[key] = False


def _set_input(model: dict, num_channels: int) -> str:
    """Set the input channels of the backbone; return a note on its pretrained stem for the log."""
    backbone = model.get('backbone') or {}
    if backbone.get('in_channels', 3) == num_channels:
        return ''
    cls = class_of(backbone.get('type'), MODELS)
    if cls is None or 'in_channels' not in argument_names(cls):
        raise UsageError(
            f'the backbone {short_name(backbone.get("type"))} takes RGB alone: choose three channels by --channels, or '
            'another recipe'
        )
    backbone['in_channels'] = num_channels
    if not (backbone.get('init_cfg') or {}):
        return ''
    if not issubclass(cls, ConvNeXt):
        raise UsageError(
            f'the pretrained weights of {short_name(backbone.get("type"))} are for RGB and are adapted for ConvNeXt '
            'alone: choose three channels by --channels, or train without them by --cfg-options '
            'model.backbone.init_cfg=None'
        )
    if num_channels == 1:
        return ', the pretrained stem summed over RGB'
    return f', the pretrained stem repeats RGB times 3/{num_channels}, as in timm'


def _describe_removed(names: Collection[str]) -> str:
    """Return the end of a line that names the transforms that were removed; '' if none were."""
    return f', without {", ".join(sorted(names))}, which need{"s" * (len(names) == 1)} RGB' if names else ''


def _remove_transforms(value: object, names: tuple[str, ...]) -> Iterator[str]:
    """Remove the transforms of these types from all lists in a part of a config, and yield their names."""
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for item in [*items]:
        if isinstance(value, list) and isinstance(item, dict) and is_type(item.get('type'), TRANSFORMS, *names):
            value.remove(item)
            yield str(short_name(item['type']))
        yield from _remove_transforms(item, names)
