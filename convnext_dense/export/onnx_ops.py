"""The operators of `ops.export_ops` in ONNX: NonMaxSuppression, and RoIAlign of each level."""

from collections.abc import Sequence

from onnxscript import ir
from onnxscript import opset18 as op

from ..ops.export_ops import nms_mask, pyramid_roi_align


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


TRANSLATIONS = {nms_mask: onnx_nms_mask, pyramid_roi_align: onnx_pyramid_roi_align}
