"""RoIAlign over a pyramid and NMS of a batch as operators that a traced detector holds: on any device, for inference.

Results have shapes that follow from those of the inputs, which mmcv's operators lack. ONNX has operators that compute
the same (`convnext_dense.export.onnx_ops`).
"""

from collections.abc import Sequence

import torch

from . import box_ops
from .operators import LIBRARY, _define

# Which boxes (N, n, 4) stay, as (N, n) of bool: of those whose score (N, n) is above the threshold, by falling score,
# the first `max_output` of each image that overlap no earlier one by more than `iou_threshold`.
nms_mask = _define(
    'nms_mask(Tensor boxes, Tensor scores, float iou_threshold, float score_threshold, int max_output) -> Tensor'
)
# Features (n, C, h, w) of RoIs (n, 5), each from the map (N, C, H, W) of its level (n,).
pyramid_roi_align = _define(
    'pyramid_roi_align(Tensor[] feats, Tensor rois, Tensor levels, float[] spatial_scales, int[2] output_size, '
    'int sampling_ratio, bool aligned) -> Tensor'
)


def _nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Indices of the boxes (n, 4) that stay, by descending score."""
    if box_ops.supports_nms(boxes, scores):
        return box_ops.nms(boxes, scores, iou_threshold, 0)
    from mmcv.ops import nms

    return nms(boxes, scores, iou_threshold)[1]


def _nms_mask(
    boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, score_threshold: float, max_output: int
) -> torch.Tensor:
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for image, image_scores, image_keep in zip(boxes, scores, keep):
        candidates = (image_scores > score_threshold).nonzero().flatten()
        if len(candidates):
            indices = _nms(image[candidates].contiguous(), image_scores[candidates], iou_threshold)
            image_keep[candidates[indices[:max_output]]] = True
    return keep


def _pyramid_roi_align(
    feats: Sequence[torch.Tensor],
    rois: torch.Tensor,
    levels: torch.Tensor,
    spatial_scales: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
) -> torch.Tensor:
    if box_ops.supports_roi_align(feats, rois):
        settings = (spatial_scales, output_size, sampling_ratio, aligned, False)
        return box_ops.roi_align(feats, rois, levels, *settings).to(feats[0].dtype)
    from mmcv.ops import roi_align

    out = _empty_features(feats, rois, output_size)
    for level, (feat, scale) in enumerate(zip(feats, spatial_scales)):
        indices = (levels == level).nonzero().flatten()
        if len(indices):
            args = rois[indices], output_size, scale, sampling_ratio, 'avg', aligned
            out[indices] = roi_align(feat.contiguous().float(), *args).to(feat.dtype)  # RoIs need float32
    return out


def _empty_features(feats: Sequence[torch.Tensor], rois: torch.Tensor, output_size: Sequence[int], *_) -> torch.Tensor:
    return feats[0].new_empty(rois.shape[0], feats[0].shape[1], *output_size)


LIBRARY.impl(nms_mask, _nms_mask, 'CompositeExplicitAutograd')
LIBRARY.impl(pyramid_roi_align, _pyramid_roi_align, 'CompositeExplicitAutograd')
torch.library.register_fake(nms_mask, lambda boxes, scores, *_: torch.empty_like(scores, dtype=torch.bool), lib=LIBRARY)
torch.library.register_fake(
    pyramid_roi_align,
    lambda feats, rois, levels, scales, output_size, *_: _empty_features(feats, rois, output_size),
    lib=LIBRARY,
)
