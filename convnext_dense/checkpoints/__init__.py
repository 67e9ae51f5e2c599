"""Any ConvNeXt checkpoint -> this backbone, or an error that says why not."""

from .hub import URLS, fetch
from .io import read
from .pretrained import PretrainedConvNeXt, load_backbone, match, open_checkpoint

__all__ = ['URLS', 'PretrainedConvNeXt', 'fetch', 'load_backbone', 'match', 'open_checkpoint', 'read']
