"""Load any ConvNeXt checkpoint into the backbone, or raise an error that says why it does not fit."""

from .hub import WEIGHT_URLS, download
from .io import load_checkpoint
from .pretrained import PretrainedConvNeXt, load_backbone, open_checkpoint, plan_load
from .swin import PretrainedSwin

__all__ = [
    'WEIGHT_URLS',
    'PretrainedConvNeXt',
    'PretrainedSwin',
    'download',
    'load_backbone',
    'load_checkpoint',
    'open_checkpoint',
    'plan_load',
]
