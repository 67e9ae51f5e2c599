"""The Swin backbone of mmdet with strict weights and layer-wise lr decay. Importing this requires mmdet."""

from mmdet.models.backbones import SwinTransformer
from mmdet.registry import MODELS

from .swin import SwinMixin


@MODELS.register_module()
class StrictSwinTransformer(SwinMixin, SwinTransformer):
    """mmdet's SwinTransformer, whose pretrained weights load completely or raise an error."""
