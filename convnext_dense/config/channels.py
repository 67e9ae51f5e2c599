"""Images whose channels are not those of RGB: how a config reads, augments and draws them, and its backbone's input."""

from collections.abc import Iterator

from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS

from ..channel_files import ChannelReader
from ..errors import UsageError
from ..models.convnext import ConvNeXt
from ..type_names import class_of, is_type, short_name
from .inputs import CHANNEL_LOADER, EXTRA_PIPELINE_KEYS, RGB_TRANSFORMS
from .options import argument_names
from .tree import add_custom_imports, iter_dicts

MODULES = ('convnext_dense.engine.channel_transforms', 'convnext_dense.engine.channel_visualization_hook')
DISTORTION, HOOK = 'RandomBrightnessContrast', 'ChannelVisualizationHook'
# Transforms of colors that become `DISTORTION`; the others of `RGB_TRANSFORMS` are left out.
DISTORTIONS = ('PhotoMetricDistortion', 'YOLOXHSVRandomAug')
PIPELINE_KEYS = ('train_dataloader', 'val_dataloader', 'test_dataloader', *EXTRA_PIPELINE_KEYS)


def channel_reader(config: Config) -> ChannelReader | None:
    """Return how the test pipeline of a config reads channels; None if it reads RGB."""
    for step in iter_dicts(config.get('test_dataloader') or {}):
        if short_name(step.get('type')) == CHANNEL_LOADER:
            return ChannelReader(**{name: step[name] for name in ChannelReader._fields})
    return None


def set_channels(config: Config, reader: ChannelReader) -> str:
    """Adapt a config to images whose channels are not those of RGB.

    Args:
        config: changed in place.
        reader: how images are read.

    Returns:
        One line that says what changed.

    Raises:
        UsageError: the backbone cannot take these channels, or its pretrained weights cannot be adapted to them.
    """
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in reader._asdict().items()}
    replaced, removed = set(), set()
    for key in PIPELINE_KEYS:
        for steps in _pipelines(config.get(key)):
            for i, step in reversed([*enumerate(steps)]):
                kind = step.get('type') if isinstance(step, dict) else None
                if is_type(kind, TRANSFORMS, 'LoadImageFromFile'):
                    steps[i] = dict(type=CHANNEL_LOADER, **settings)
                elif is_type(kind, TRANSFORMS, *DISTORTIONS):
                    steps[i] = dict(type=DISTORTION)
                    replaced.add(short_name(kind))
                elif is_type(kind, TRANSFORMS, *RGB_TRANSFORMS):
                    del steps[i]
                    removed.add(short_name(kind))
                elif is_type(kind, TRANSFORMS, 'Pad') and isinstance(step.get('pad_val'), dict):
                    step['pad_val']['img'] = 0.0  # the mean
    _set_preprocessor(config.model)
    stem = _set_input(config.model, len(reader.channels))
    hook = (config.get('default_hooks') or {}).get('visualization')
    if hook:
        config.default_hooks['visualization'] = dict(type=HOOK, reader=settings)
    add_custom_imports(config, *MODULES)
    line = f'{len(reader.channels)} input channels, normalized by their mean and std{stem}'
    if replaced:
        line += f', {DISTORTION} for {", ".join(sorted(replaced))}'
    if removed:
        line += f', without {", ".join(sorted(removed))}, which need{"s" * (len(removed) == 1)} RGB'
    return line


def _set_preprocessor(model: dict) -> None:
    """Leave normalization to the reader, and the order of channels as it is."""
    preprocessor = model.get('data_preprocessor') or {}
    for key in ('mean', 'std'):
        preprocessor.pop(key, None)
    for key in ('bgr_to_rgb', 'rgb_to_bgr'):
        if key in preprocessor:
            preprocessor[key] = False


def _set_input(model: dict, num_channels: int) -> str:
    """Set the input channels of the backbone; return what is said of its pretrained stem."""
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


def _pipelines(value: object) -> Iterator[list]:
    """Iterate over the lists in a part of a config that hold transforms, the inner ones first."""
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from _pipelines(item)
    if isinstance(value, list):
        yield value
