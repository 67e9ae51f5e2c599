"""A trained model as a program of `torch.export`, which is what each format is written from."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import mmengine
import numpy as np
import torch
from mmengine.config import Config
from torch import nn
from torch.export import Dim, ExportedProgram

from ..checkpoints.exported_meta import CHANNELS, ExportedMeta
from ..config.channels import channel_reader
from ..errors import UsageError, root_message
from ..inference.model import Predictor
from ..inference.preprocessing import innermost_dataset
from .swin import traceable_backbone

EXAMPLE_SIZE = 224, 288  # of the images that are traced: neither square nor small, and quick
CONFIG_KEYS = ('default_scope', 'custom_imports', 'model')


@dataclass(frozen=True)
class ExportOptions:
    """What an exported file takes and returns.

    Attributes:
        input: What `images` holds: 'uint8' or 'float32', RGB from 0 to 255, or 'raw': what the model's own data
            preprocessor returns. Of models of other channels than RGB, what is not raw is their values, as float32.
        size: Height and width of the images; None for any.
        masks: Detection: 'image' for masks in the size of the image, 'box' for the mask head's own.
        logits: Segmentation: whether the file returns `logits` in the place of `segmentation`.
        half: Whether weights and the feature maps of backbone, neck and heads are float16.
    """

    input: str = 'uint8'
    size: tuple[int, int] | None = None
    masks: str = 'image'
    logits: bool = False
    half: bool = False


class Traced(NamedTuple):
    """A model as a function of images.

    Attributes:
        module (nn.Module): The function.
        program (ExportedProgram): The same, traced.
        outputs (tuple[str, ...]): Names of what it returns.
        meta (ExportedMeta): What a file says of itself.
    """

    module: nn.Module
    program: ExportedProgram
    outputs: tuple[str, ...]
    meta: ExportedMeta


def trace(predictor: Predictor, options: ExportOptions, recipe: str | None = None) -> Traced:
    """Trace a model, which is on a CPU, for a file; the name of its recipe is for the metadata.

    Raises:
        UsageError: If a part of the model cannot be exported.
    """
    module = _exportable(predictor, options).eval()
    shape = 2, image_channels(predictor), *(options.size or EXAMPLE_SIZE)
    images = torch.zeros(shape, dtype=input_dtype(predictor, options))
    any_size = {} if options.size else {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    args, dynamic_shapes = (images,), ({0: Dim.DYNAMIC, **any_size},)
    if options.input != 'raw':
        args, dynamic_shapes = (images, torch.tensor(EXAMPLE_SIZE)), (*dynamic_shapes, None)
    with torch.no_grad(), quiet():
        try:
            program = torch.export.export(module, args, dynamic_shapes=dynamic_shapes, strict=False)
        except UsageError:
            raise
        except Exception as error:  # what user code can raise while torch traces it
            reason = custom_operators(module) or f'torch.export stops at: {root_message(error)[:300]}'
            raise UsageError(f'{type(predictor.model).__name__} cannot be exported, {reason}') from error
    return Traced(module, program, tuple(module.output_names), _meta(predictor, options, module, recipe))


def custom_operators(model: nn.Module) -> str:
    """Name the first module of mmcv's that has kernels of its own, which torch cannot trace; '' if there is none."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith('mmcv.ops.') and type(module).__name__ != 'RoIAlign':
            place = name.rpartition('model.')[2]
            return f'torch.export does not know {type(module).__name__} of mmcv.ops, which is its {place}'
    return ''


def image_channels(predictor: Predictor) -> int:
    """Number of channels of the images that a model takes."""
    reader = channel_reader(predictor.config)
    if reader:
        return len(reader.channels)
    if predictor.color_type == 'grayscale':
        return 1
    return predictor.config.model.get('backbone', {}).get('in_channels', 3)


def _exportable(predictor: Predictor, options: ExportOptions) -> nn.Module:
    model = traceable_backbone(copy.deepcopy(predictor.model).half() if options.half else predictor.model)
    shared = dict(raw=options.input == 'raw', reader=channel_reader(predictor.config))
    if predictor.task == 'segmentation':
        from .segmentor import ExportableSegmentor

        return ExportableSegmentor(model, logits=options.logits, **shared)
    from .detector import ExportableDetector

    return ExportableDetector(model, masks=options.masks, **shared)


def input_dtype(predictor: Predictor, options: ExportOptions) -> torch.dtype:
    """Type of the images that an exported file takes."""
    if options.input == 'raw':
        return torch.float16 if options.half else torch.float32
    return torch.float32 if options.input == 'float32' or channel_reader(predictor.config) else torch.uint8


def _meta(predictor: Predictor, options: ExportOptions, module: nn.Module, recipe: str | None) -> ExportedMeta:
    """The metadata; of the config what predictions need, without paths of data sets and weights."""
    config = predictor.config.to_dict()
    dataset = innermost_dataset(config['test_dataloader']['dataset'])
    dataset = {key: dataset[key] for key in ('type', 'pipeline') if key in dataset}
    config = {key: config[key] for key in CONFIG_KEYS if key in config} | dict(test_dataloader=dict(dataset=dataset))
    reader, preprocessor = channel_reader(predictor.config), predictor.model.data_preprocessor
    mean, std = (tuple(np.ravel(getattr(reader or preprocessor, name, ())).tolist()) for name in ('mean', 'std'))
    from .. import __version__

    return ExportedMeta(
        predictor.task,
        predictor.classes,
        Config(config).pretty_text,
        predictor.palette,
        CHANNELS if reader and options.input != 'raw' else options.input,
        options.size,
        options.masks if 'masks' in module.output_names else None,
        mean,
        std,
        recipe,
        dict(convnext_dense=__version__, torch=torch.__version__, mmengine=mmengine.__version__),
        image_channels(predictor),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings that torch, onnxscript and onnxruntime have for their own developers."""
    loggers = [logging.getLogger(name) for name in ('', 'torch', 'onnxscript', 'onnx_ir')]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
