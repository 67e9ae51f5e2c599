"""Adapt a config to images with other channels than RGB: reading, augmentation, drawing, backbone input."""

from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS

from ..channel_files import ChannelReader
from ..errors import UsageError, count
from ..models.convnext import ConvNeXt
from ..type_names import class_of, is_type, short_name
from .inputs import CHANNEL_LOADER, RGB_TRANSFORMS, describe_removed, remove_transforms
from .options import argument_names
from .tree import PIPELINE_KEYS, add_custom_imports, iter_dicts

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
        removed |= set(remove_transforms(part, RGB_TRANSFORMS))
    _set_preprocessor(config.model)
    stem = _set_input(config.model, len(reader.channels))
    hook = (config.get('default_hooks') or {}).get('visualization')
    if hook:
        config.default_hooks['visualization'] = dict(type=HOOK, reader=settings)
    add_custom_imports(config, *MODULES)
    line = f'{count(len(reader.channels), "input channel")}, normalized by their mean and std{stem}'
    if replaced:
        line += f', {DISTORTION} for {", ".join(sorted(replaced))}'
    return line + describe_removed(removed)


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
