"""What detection needs beyond mmdet: under mixed precision, proposals, RoIs, their features and losses in fp32.

Under autocast mmdet makes anchors in the scores' dtype and casts RoIs to the features': in fp16 that is a grid of 1
pixel above 1024, in bf16 one of 2 to 8. The original kept all of that in fp32. Here what leaves a head's convolutions
and what enters RoIAlign is fp32, and mmdet's own code behind it then works in fp32. Importing this needs mmdet.
"""

import torch
from mmdet.models import ConvFCBBoxHead, FCNMaskHead, RPNHead, Shared2FCBBoxHead, SingleRoIExtractor
from mmengine.registry import MODELS


class FP32OutputMixin:
    """Mixin for heads: scores, box deltas or masks become fp32, whatever autocast computed them in."""

    def forward(self, *args, **kwargs):
        """Run the head and cast its outputs to fp32."""
        return _to_fp32(super().forward(*args, **kwargs))


@MODELS.register_module()
class FP32RPNHead(FP32OutputMixin, RPNHead):
    """mmdet's RPNHead with anchors, proposals and losses in fp32."""


@MODELS.register_module()
class FP32Shared2FCBBoxHead(FP32OutputMixin, Shared2FCBBoxHead):
    """mmdet's Shared2FCBBoxHead with boxes and losses in fp32."""


@MODELS.register_module()
class FP32ConvFCBBoxHead(FP32OutputMixin, ConvFCBBoxHead):
    """mmdet's ConvFCBBoxHead with boxes, also those of the next cascade stage, and losses in fp32."""


@MODELS.register_module()
class FP32FCNMaskHead(FP32OutputMixin, FCNMaskHead):
    """mmdet's FCNMaskHead with the loss in fp32."""


@MODELS.register_module()
class FP32RoIExtractor(SingleRoIExtractor):
    """mmdet's SingleRoIExtractor on fp32 maps: RoIs keep their coordinates, and the features come out as fp32."""

    def forward(self, feats, rois, roi_scale_factor=None):
        """Extract features of RoIs (n, 5) from fp32 maps (N, C, H, W)."""
        # mmcv's RoIAlign reads its input as contiguous without a check: any other layout gives it garbage.
        feats = [feat.float().contiguous() for feat in feats]
        return super().forward(feats, rois.float(), roi_scale_factor)


def _to_fp32(value):
    """Tensors, also in nested tuples and lists, as fp32."""
    if isinstance(value, (tuple, list)):
        return type(value)(_to_fp32(v) for v in value)
    return value.float() if isinstance(value, torch.Tensor) else value
