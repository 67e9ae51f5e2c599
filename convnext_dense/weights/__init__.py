"""Any ConvNeXt checkpoint -> this backbone, or an error that says why not."""

from .loading import PretrainedConvNeXt, load_backbone, match, open_checkpoint
from .reading import read
from .zoo import URLS, fetch

__all__ = ['URLS', 'PretrainedConvNeXt', 'fetch', 'load_backbone', 'match', 'open_checkpoint', 'read']
