"""The operators of `ops.export_ops` in ONNX: NonMaxSuppression, soft-NMS as a loop, and RoIAlign of each level."""

from collections.abc import Sequence

import onnxscript
from onnxscript import FLOAT, ir
from onnxscript import opset18 as op

from ..ops.export_ops import nms_mask, pyramid_roi_align, soft_nms


def onnx_nms_mask(boxes, scores, iou_threshold: float, score_threshold: float, max_output: int):
    """NonMaxSuppression of a single class; which indices it returns becomes a mask."""
    selected = op.NonMaxSuppression(
        boxes,
        op.Unsqueeze(scores, [1]),
        op.Constant(value_int=max_output),
        op.Constant(value_float=iou_threshold),
        op.Constant(value_float=score_threshold),
    )
    image_and_box = op.Gather(selected, [0, 2], axis=1)
    ones = op.Expand(op.Constant(value_int=1), op.Shape(selected, start=0, end=1))
    zeros = op.Expand(op.Constant(value_int=0), op.Shape(scores))
    return op.Cast(op.ScatterND(zeros, image_and_box, ones), to=ir.DataType.BOOL)


def onnx_soft_nms(
    boxes,
    scores,
    iou_threshold: float,
    score_threshold: float,
    max_output: int,
    method: str,
    sigma: float,
    min_score: float,
):
    """Soft-NMS; each method is the product of two weights, of which one is 1."""
    if method == 'gaussian':
        iou_threshold = 2.0  # of no box
    else:
        sigma = 1e30
    rest = 1.0 if method == 'linear' else 0.0
    return _soft_nms(boxes, scores, iou_threshold, score_threshold, max_output, rest, sigma, min_score)


@onnxscript.script()
def _soft_nms(
    boxes: FLOAT,
    scores: FLOAT,
    iou_threshold: float,
    score_threshold: float,
    max_output: int,
    rest: float,
    sigma: float,
    min_score: float,
) -> FLOAT:
    """As `export_ops._soft_nms`, step by step."""
    no_score, threshold = op.Constant(value_float=-1.0), op.Constant(value_float=score_threshold)
    axis1, axis2 = op.Constant(value_ints=[1]), op.Constant(value_ints=[2])
    n_candidates = op.ReduceSum(op.Cast(scores > threshold, to=7), axis1)
    count = op.Max(op.ReduceMax(op.Reshape(n_candidates, [-1])), axis1)
    left, order = op.TopK(scores, count, axis=1)
    left = op.Where(left > threshold, left, no_score)
    boxes = op.GatherElements(boxes, op.Expand(op.Unsqueeze(order, axis2), [1, 1, 4]), axis=1)
    top_left, bottom_right = op.Split(boxes, axis=2, num_outputs=2)
    areas = op.ReduceProd(bottom_right - top_left, axis2, keepdims=0)
    taken = op.Expand(no_score, op.Shape(left))
    positions = op.Range(op.Constant(value_int=0), op.Squeeze(count), op.Constant(value_int=1))
    for _ in range(op.Min(op.Squeeze(count), op.Constant(value_int=max_output))):
        index = op.ArgMax(left, axis=1, keepdims=1)
        is_best = op.And(positions == index, left > no_score)
        taken = op.Where(is_best, left, taken)
        box_index = op.Expand(op.Unsqueeze(index, axis2), [1, 1, 2])
        start = op.Max(op.GatherElements(top_left, box_index, axis=1), top_left)
        end = op.Min(op.GatherElements(bottom_right, box_index, axis=1), bottom_right)
        sides = op.Max(end - start, op.Constant(value_float=0.0))
        overlap = op.ReduceProd(sides, axis2, keepdims=0)
        union = op.GatherElements(areas, index, axis=1) + areas - overlap
        iou = overlap / op.Max(union, op.Constant(value_float=1e-12))
        step = op.Where(iou >= op.Constant(value_float=iou_threshold), (1.0 - iou) * op.Constant(value_float=rest), 1.0)
        lowered = left * step * op.Exp(-iou * iou / op.Constant(value_float=sigma))
        stays = op.And(op.And(left > no_score, op.Not(is_best)), lowered >= op.Constant(value_float=min_score))
        left = op.Where(stays, lowered, no_score)
    return op.ScatterElements(op.Expand(no_score, op.Shape(scores)), order, taken, axis=1)


def onnx_pyramid_roi_align(
    feats: Sequence,
    rois,
    levels,
    spatial_scales: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
):
    """RoIAlign of the RoIs of each level, put back into their order."""
    settings = dict(
        mode='avg',
        output_height=output_size[0],
        output_width=output_size[1],
        sampling_ratio=sampling_ratio,
        coordinate_transformation_mode='half_pixel' if aligned else 'output_half_pixel',
    )
    features, order = [], []
    for level, (feat, scale) in enumerate(zip(feats, spatial_scales)):
        indices = op.Squeeze(op.NonZero(op.Equal(levels, op.Constant(value_int=level))), [0])
        level_rois = op.Gather(rois, indices)
        images = op.Cast(op.Gather(level_rois, op.Constant(value_int=0), axis=1), to=ir.DataType.INT64)
        boxes = op.Gather(level_rois, [1, 2, 3, 4], axis=1)
        feat = op.Cast(feat, to=ir.DataType.FLOAT)  # RoIs need it
        features.append(op.RoiAlign(feat, boxes, images, spatial_scale=scale, **settings))
        order.append(indices)
    order = op.Concat(*order, axis=0)
    count = op.Shape(order)
    start, step = op.Constant(value_int=0), op.Constant(value_int=1)
    places = op.Range(start, op.Squeeze(count), step)
    inverse = op.ScatterElements(op.Expand(start, count), order, places)
    return op.CastLike(op.Gather(op.Concat(*features, axis=0), inverse), feats[0])


TRANSLATIONS = {soft_nms: onnx_soft_nms, nms_mask: onnx_nms_mask, pyramid_roi_align: onnx_pyramid_roi_align}
