"""What detection needs beyond mmdet: under mixed precision, proposals, RoIs, their features and losses in fp32.

Under autocast mmdet makes anchors in the scores' dtype and casts RoIs to the features': in fp16 that is a grid of 1
pixel above 1024, in bf16 one of 2 to 8. The original kept all of that in fp32. Here what leaves a head's convolutions
and what enters RoIAlign is fp32, and mmdet's own code behind it then works in fp32. The RoI extractors here also use
all cores of a CPU. Importing this needs mmdet.
"""

import torch
from mmcv.ops import RoIAlign
from mmdet.models import ConvFCBBoxHead, FCNMaskHead, RPNHead, Shared2FCBBoxHead, SingleRoIExtractor
from mmengine.registry import MODELS

from ..ops import box_ops, dispatch

MAX_COORDINATE = 1e6
dispatch.remember_methods(RoIAlign)


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
class CPURoIExtractor(SingleRoIExtractor):
    """mmdet's SingleRoIExtractor with a RoIAlign that uses all cores of a CPU, forward and backward.

    It is used where it can be, and equals mmcv's to rounding; elsewhere mmcv's runs.

    Attributes:
        channels_last (bool): Whether features come out in channels_last; set by `optimize`, before convolutions.
    """

    channels_last = False

    def forward(self, feats, rois, roi_scale_factor=None):
        """Extract features of RoIs (n, 5) from maps (N, C, H, W)."""
        out = self._forward_on_cpu(feats, rois, roi_scale_factor)
        if out is not None:
            return out
        # mmcv's RoIAlign reads its input as contiguous without a check: any other layout gives it garbage.
        return super().forward([feat.contiguous() for feat in feats], rois, roi_scale_factor)

    def _forward_on_cpu(self, feats, rois, roi_scale_factor):
        """None where mmcv's RoIAlign has to run."""
        layers, rois = self.roi_layers[: len(feats)], rois.float()
        if not all(type(layer) is RoIAlign for layer in layers) or not dispatch.may_replace(*layers):
            return None
        if not box_ops.supports_roi_align(feats, rois) or feats[0].shape[1] != self.out_channels:
            return None
        settings = {(*layer.output_size, layer.sampling_ratio, layer.aligned) for layer in layers}
        if len(settings) != 1 or any(layer.pool_mode != 'avg' or layer.use_torchvision for layer in layers):
            return None
        levels = self.map_roi_levels(rois, len(feats)) if len(feats) > 1 else rois.new_zeros(len(rois)).long()
        if roi_scale_factor is not None and len(feats) > 1:
            rois = self.roi_rescale(rois, roi_scale_factor)
        if not (rois.abs() < MAX_COORDINATE).all():  # NaN and others that mmdet finds no level for
            return None
        height, width, sampling_ratio, aligned = settings.pop()
        scales = [layer.spatial_scale for layer in layers]
        size, ratio = (height, width), max(sampling_ratio, 0)
        return box_ops.roi_align([*feats], rois, levels, scales, size, ratio, aligned, self.channels_last)


@MODELS.register_module()
class FP32RoIExtractor(CPURoIExtractor):
    """CPURoIExtractor on fp32 maps: RoIs keep their coordinates, and the features come out as fp32."""

    def forward(self, feats, rois, roi_scale_factor=None):
        """Extract features of RoIs (n, 5) from maps (N, C, H, W) of any dtype as fp32."""
        out = self._forward_on_cpu(feats, rois, roi_scale_factor)  # which reads bfloat16 as it is
        return super().forward([f.float() for f in feats], rois.float(), roi_scale_factor) if out is None else out


def _to_fp32(value):
    """Tensors, also in nested tuples and lists, as fp32."""
    if isinstance(value, (tuple, list)):
        return type(value)(_to_fp32(v) for v in value)
    return value.float() if isinstance(value, torch.Tensor) else value
