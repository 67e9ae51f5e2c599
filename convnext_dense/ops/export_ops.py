"""RoIAlign over a pyramid and NMS of a batch as operators that a traced detector holds: on any device, for inference.

Results have shapes that follow from those of the inputs, which mmcv's operators lack. ONNX has operators that compute
the same (`convnext_dense.export.onnx_ops`).
"""

from collections.abc import Sequence

import torch

from . import box_ops
from .operators import LIBRARY, _define

NO_SCORE = -1.0  # of boxes that are none

# Which boxes (N, n, 4) stay, as (N, n) of bool: of those whose score (N, n) is above the threshold, by falling score,
# the first `max_output` of each image that overlap no earlier one by more than `iou_threshold`.
nms_mask = _define(
    'nms_mask(Tensor boxes, Tensor scores, float iou_threshold, float score_threshold, int max_output) -> Tensor'
)
# Scores (N, n) after soft-NMS of boxes (N, n, 4): of those whose score is above the threshold, the one with the highest
# score is taken, up to `max_output` times, and the scores of the others are lowered by their overlap with it, or set to
# -1 where they fall below `min_score`. Those that are not taken have -1.
soft_nms = _define(
    'soft_nms(Tensor boxes, Tensor scores, float iou_threshold, float score_threshold, int max_output, str method, '
    'float sigma, float min_score) -> Tensor'
)
# Features (n, C, h, w) of RoIs (n, 5), each from the feature map (N, C, H, W) of its level (n,).
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


def _soft_nms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    iou_threshold: float,
    score_threshold: float,
    max_output: int,
    method: str,
    sigma: float,
    min_score: float,
) -> torch.Tensor:
    result = torch.full_like(scores, NO_SCORE)
    n_candidates = (scores > score_threshold).sum(1)
    count = int(n_candidates.max()) if n_candidates.numel() else 0
    left, order = scores.topk(count)
    left = torch.where(left > score_threshold, left, NO_SCORE)
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    taken, positions = torch.full_like(left, NO_SCORE), torch.arange(count, device=left.device)
    for _ in range(min(max_output, count)):
        score, index = left.max(1, keepdim=True)
        is_best = (positions == index) & (score > NO_SCORE)
        taken = torch.where(is_best, score, taken)
        iou = box_iou(boxes.gather(1, index[..., None].expand(-1, -1, 4)), boxes)
        if method == 'gaussian':
            weight = (-iou * iou / sigma).exp()
        else:
            weight = torch.where(iou >= iou_threshold, 1 - iou if method == 'linear' else 0, 1)
        lowered = left * weight
        left = torch.where((left > NO_SCORE) & (lowered >= min_score) & ~is_best, lowered, NO_SCORE)
    return result.scatter(1, order, taken)


def box_iou(box: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """IoU of boxes (..., 4), of which one may stand for many: (N, n) of (N, 1, 4) and (N, n, 4)."""
    overlap = torch.minimum(box[..., 2:], boxes[..., 2:]) - torch.maximum(box[..., :2], boxes[..., :2])
    overlap = overlap.clamp(min=0).prod(-1)
    area, areas = ((x[..., 2:] - x[..., :2]).prod(-1) for x in (box, boxes))
    return overlap / (area + areas - overlap).clamp(min=1e-12)


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
LIBRARY.impl(soft_nms, _soft_nms, 'CompositeExplicitAutograd')
LIBRARY.impl(pyramid_roi_align, _pyramid_roi_align, 'CompositeExplicitAutograd')
torch.library.register_fake(nms_mask, lambda boxes, scores, *_: torch.empty_like(scores, dtype=torch.bool), lib=LIBRARY)
torch.library.register_fake(soft_nms, lambda boxes, scores, *_: torch.empty_like(scores), lib=LIBRARY)
torch.library.register_fake(
    pyramid_roi_align,
    lambda feats, rois, levels, scales, output_size, *_: _empty_features(feats, rois, output_size),
    lib=LIBRARY,
)
