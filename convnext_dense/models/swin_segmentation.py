"""The Swin backbone of mmseg with strict weights and layer-wise lr decay. Importing this requires mmseg."""

from mmseg.models.backbones import SwinTransformer
from mmseg.registry import MODELS

from .swin import SwinMixin


@MODELS.register_module()
class StrictSwinTransformer(SwinMixin, SwinTransformer):
    """mmseg's SwinTransformer, whose pretrained weights load completely or raise an error."""
