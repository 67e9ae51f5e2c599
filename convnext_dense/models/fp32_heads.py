"""Detection heads with proposals, RoIs, RoI features and losses in fp32 under mixed precision.

Under autocast, mmdet creates anchors in the dtype of the scores and casts RoIs to that of the features: above 1024
pixels this rounds coordinates to 1 pixel in fp16, and to 2 to 8 pixels in bf16. The original code kept them in fp32.
Here, the outputs of the heads' convolutions and the inputs of RoIAlign are fp32, so that mmdet's code after them works
in fp32. The RoI extractors also use all cores of a CPU. Importing this module requires mmdet.
"""

import torch
from mmcv.ops import RoIAlign
from mmdet.models import ConvFCBBoxHead, FCNMaskHead, RPNHead, Shared2FCBBoxHead, SingleRoIExtractor
from mmengine.registry import MODELS

from ..ops import box_ops, dispatch

MAX_COORDINATE = 1e6
dispatch.remember_methods(RoIAlign)


class FP32OutputMixin:
    """Mixin for heads that casts scores, box deltas or masks to fp32 under autocast."""

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

    Its result equals mmcv's up to rounding. Where it is not supported, mmcv's RoIAlign runs.

    Attributes:
        channels_last (bool): Whether to return features in channels_last; set by `optimize` if convolutions follow.
    """

    channels_last = False

    def forward(self, feats, rois, roi_scale_factor=None):
        """Extract features of RoIs (n, 5) from feature maps (N, C, H, W)."""
        out = self._forward_on_cpu(feats, rois, roi_scale_factor)
        if out is not None:
            return out
        # mmcv's RoIAlign assumes contiguous input without a check: any other memory format gives garbage.
        return super().forward([feat.contiguous() for feat in feats], rois, roi_scale_factor)

    def _forward_on_cpu(self, feats, rois, roi_scale_factor):
        """Return the features; None if mmcv's RoIAlign has to run."""
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
        if not (rois.abs() < MAX_COORDINATE).all():  # NaN and others for which mmdet finds no level
            return None
        height, width, sampling_ratio, aligned = settings.pop()
        scales = [layer.spatial_scale for layer in layers]
        size, ratio = (height, width), max(sampling_ratio, 0)
        return box_ops.roi_align([*feats], rois, levels, scales, size, ratio, aligned, self.channels_last)


@MODELS.register_module()
class FP32RoIExtractor(CPURoIExtractor):
    """CPURoIExtractor on fp32 feature maps: RoIs keep their precision, and the RoI features are fp32."""

    def forward(self, feats, rois, roi_scale_factor=None):
        """Extract fp32 features of RoIs (n, 5) from feature maps (N, C, H, W) of any dtype."""
        out = self._forward_on_cpu(feats, rois, roi_scale_factor)  # accepts bfloat16
        return super().forward([f.float() for f in feats], rois.float(), roi_scale_factor) if out is None else out


def _to_fp32(value):
    """Cast tensors, also in nested tuples and lists, to fp32."""
    if isinstance(value, (tuple, list)):
        return type(value)(_to_fp32(v) for v in value)
    return value.float() if isinstance(value, torch.Tensor) else value
