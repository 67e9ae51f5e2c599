"""RoIAlign over the levels of a feature pyramid, and NMS, as operators of `torch.ops.convnext_dense` for the CPU.

Both equal mmcv's: RoIAlign with average pooling to rounding (a bin's samples are added up by rows and columns), NMS
to the index. RoIAlign is linear in the feature maps; its gradient reaches these alone, as mmcv's does.
"""

from collections.abc import Sequence

import torch

from . import head_kernels
from .head_kernels import is_plain
from .operators import _below_autograd, _check, _define, needs_grad, register

DTYPES = (torch.float32, torch.bfloat16)
_ARGS = 'Tensor rois, Tensor levels, float[] spatial_scales, int[2] output_size, int sampling_ratio, bool aligned'

# Features of RoIs (n, 5), of which each is taken from one of the feature maps (N, C, H, W): (n, C, h, w) in float32.
roi_align = _define(f'roi_align(Tensor[] feats, {_ARGS}, bool channels_last) -> Tensor')
# Gradients of the feature maps, whose shapes are (images, C, heights[i], widths[i]), in float32, channels_last.
roi_align_backward = _define(
    f'roi_align_backward(Tensor grad, {_ARGS}, int images, int[] heights, int[] widths) -> Tensor[]'
)
# Indices of the boxes (n, 4) that stay, by descending score.
nms = _define('nms(Tensor boxes, Tensor scores, float iou_threshold, int offset) -> Tensor')


def supports_roi_align(feats: Sequence[torch.Tensor], rois: torch.Tensor) -> bool:
    """Whether `roi_align` runs on these feature maps (N, C, H, W) of a pyramid and RoIs (n, 5)."""
    if not feats or not all(map(is_plain, (*feats, rois))) or not head_kernels.available():
        return False
    shape, dtype = feats[0].shape[:2], feats[0].dtype
    if any(x.ndim != 4 or x.shape[:2] != shape or x.dtype != dtype or not x.numel() for x in feats):
        return False
    return dtype in DTYPES and shape[1] % head_kernels.CHANNEL_MULTIPLE == 0 and rois.dtype == torch.float32


def supports_nms(boxes: torch.Tensor, scores: torch.Tensor) -> bool:
    """Whether `nms` runs on these boxes (n, 4) and scores (n,)."""
    tensors = (boxes, scores)
    return all(map(is_plain, tensors)) and boxes.dtype == torch.float32 and head_kernels.available()


# ---- RoIAlign --------------------------------------------------------------------------------------------------------


def _check_rois(rois, levels, spatial_scales, output_size, sampling_ratio):
    _check(rois.ndim == 2 and rois.shape[1] == 5 and rois.dtype == torch.float32, 'rois must be (n, 5), float32')
    _check(levels.shape == rois.shape[:1] and levels.dtype == torch.int64, 'levels must be (n,), int64')
    _check(rois.device.type == levels.device.type == 'cpu', 'rois and levels must be on the CPU')
    _check(len(spatial_scales) > 0 and min(output_size) > 0, 'there must be a scale, and a size of the output')
    _check(head_kernels.available(), 'the kernels are not for this machine, or were not compiled')


def _run(kernel, maps, features, rois, levels, spatial_scales, output_size, sampling_ratio, aligned, channels_last):
    """Launch a kernel on feature maps in channels_last."""
    rois, levels = rois.contiguous(), levels.contiguous()
    head_kernels.launch(
        kernel,
        maps,
        spatial_scales,
        channels=maps[0].shape[1],
        n_rois=len(rois),
        out_height=output_size[0],
        out_width=output_size[1],
        sampling_ratio=sampling_ratio,
        aligned=aligned,
        bf16=maps[0].dtype == torch.bfloat16,
        channels_last=channels_last,
        rois=rois,
        roi_levels=levels,
        features=features,
    )


def _roi_align_cpu(feats, rois, levels, spatial_scales, output_size, sampling_ratio, aligned, channels_last):
    _check_rois(rois, levels, spatial_scales, output_size, sampling_ratio)
    _check(len(feats) == len(spatial_scales), 'there must be a scale for each feature map')
    _check(supports_roi_align(feats, rois), 'feats must be (N, C, H, W) of one N, C and dtype, float32 or bfloat16')
    out = _empty_features(feats, rois, output_size, channels_last)
    if len(rois):
        # Feature maps of levels without RoIs are not converted: the kernel does not read them.
        used = {*levels.unique().tolist()}
        maps = [x.contiguous(memory_format=torch.channels_last) if i in used else x for i, x in enumerate(feats)]
        settings = (rois, levels, spatial_scales, output_size, sampling_ratio, aligned, channels_last)
        _run('roi_align', maps, out, *settings)
    return out


def _empty_features(feats, rois, output_size, channels_last):
    n, channels, (height, width) = rois.shape[0], feats[0].shape[1], output_size
    shape = (n, height, width, channels) if channels_last else (n, channels, height, width)
    out = feats[0].new_empty(shape, dtype=torch.float32)
    return out.permute(0, 3, 1, 2) if channels_last else out


def _roi_align_fake(feats, rois, levels, spatial_scales, output_size, sampling_ratio, aligned, channels_last):
    return _empty_features(feats, rois, output_size, channels_last)


def _roi_align_backward_cpu(
    grad, rois, levels, spatial_scales, output_size, sampling_ratio, aligned, images, heights, widths
):
    _check_rois(rois, levels, spatial_scales, output_size, sampling_ratio)
    _check(len(heights) == len(widths) == len(spatial_scales), 'there must be a scale for each feature map')
    _check(grad.ndim == 4 and grad.shape[::2] == (len(rois), output_size[0]), 'grad must be (n, C, h, w)')
    _check(grad.shape[3] == output_size[1] and grad.dtype == torch.float32, 'grad must be (n, C, h, w) in float32')
    _check(grad.device.type == 'cpu' and not grad.is_neg(), 'grad must be on the CPU')
    grad = grad.contiguous(memory_format=torch.channels_last)
    grads = _empty_grads(grad, images, heights, widths)
    if not len(rois):
        return [g.zero_() for g in grads]
    settings = (rois, levels, spatial_scales, output_size, sampling_ratio, aligned, True)
    _run('roi_align_backward', grads, grad, *settings)
    return grads


def _empty_grads(grad, images, heights, widths):
    return [
        grad.new_empty(images, height, width, grad.shape[1]).permute(0, 3, 1, 2)
        for height, width in zip(heights, widths)
    ]


def _roi_align_backward_fake(
    grad, rois, levels, spatial_scales, output_size, sampling_ratio, aligned, images, heights, widths
):
    return _empty_grads(grad, images, heights, widths)


class _RoIAlignFunction(torch.autograd.Function):
    """Saves the RoIs and their levels alone: the features are linear in the feature maps."""

    @staticmethod
    def forward(ctx, n_levels, *args):
        feats, (rois, levels, *settings) = args[:n_levels], args[n_levels:]
        ctx.save_for_backward(rois, levels)
        ctx.settings, ctx.shapes, ctx.dtype = settings[:-1], [x.shape for x in feats], feats[0].dtype
        return _below_autograd(roi_align, feats, rois, levels, *settings)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rois, levels = ctx.saved_tensors
        images, heights, widths = ctx.shapes[0][0], [s[2] for s in ctx.shapes], [s[3] for s in ctx.shapes]
        grad = grad.float().resolve_neg()
        grads = roi_align_backward(grad, rois, levels, *ctx.settings, images, heights, widths)
        needs_grad = ctx.needs_input_grad[1 : 1 + len(grads)]
        grads = [g.to(ctx.dtype) if n else None for g, n in zip(grads, needs_grad)]
        return None, *grads, None, None, *[None] * (len(ctx.settings) + 1)


def _roi_align_autograd(feats, rois, levels, *settings):
    if needs_grad(*feats):
        return _RoIAlignFunction.apply(len(feats), *feats, rois, levels, *settings)
    return _below_autograd(roi_align, feats, rois, levels, *settings)


# ---- NMS -------------------------------------------------------------------------------------------------------------


def _nms_cpu(boxes, scores, iou_threshold, offset):
    _check(boxes.ndim == 2 and boxes.shape[1] == 4 and boxes.dtype == torch.float32, 'boxes must be (n, 4), float32')
    _check(scores.shape == boxes.shape[:1] and scores.device == boxes.device, 'scores must be (n,), on the CPU')
    _check(offset in (0, 1), 'offset must be 0 or 1')
    _check(head_kernels.available(), 'the kernels are not for this machine, or were not compiled')
    order = scores.sort(0, descending=True).indices  # the sort of mmcv, whose order of equal scores it gives
    keep = head_kernels.nms(boxes[order].t().contiguous(), iou_threshold, float(offset))
    return order[keep]


def _nms_fake(boxes, scores, iou_threshold, offset):
    size = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(size, dtype=torch.int64)


def _nms_autograd(boxes, scores, iou_threshold, offset):
    return _below_autograd(nms, boxes, scores, iou_threshold, offset)


register(
    {
        roi_align: (_roi_align_cpu, _roi_align_fake, _roi_align_autograd),
        roi_align_backward: (_roi_align_backward_cpu, _roi_align_backward_fake, None),
        nms: (_nms_cpu, _nms_fake, _nms_autograd),
    }
)
