"""Faster implementations for whole detectors and segmentors, with the same parameters, names and results.

`optimize` is called whenever a model is built, for training and testing. Nothing in it depends on device, dtype or
weights: the replaced modules check these in each forward pass, and fall back to the reference implementation.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from .convnext import OutputNorm
from .fused_conv2d import FusedConv2d, is_conv3x3

# Modules of mmdet and mmseg that accept any memory format, as do all modules of torch, mmcv.cnn and mmengine.
ANY_FORMAT = {
    *('DetDataPreprocessor', 'FasterRCNN', 'MaskRCNN', 'CascadeRCNN', 'FPN', 'RPNHead', 'StandardRoIHead'),
    *('CascadeRoIHead', 'SingleRoIExtractor', 'ConvFCBBoxHead', 'Shared2FCBBoxHead', 'Shared4Conv1FCBBoxHead'),
    *('FCNMaskHead', 'RoIAlign', 'SegDataPreProcessor', 'EncoderDecoder', 'UPerHead', 'PPM', 'FCNHead'),
}
CHECK_NMS_TYPE = {'GARPNHead'}  # heads of mmdet that require the NMS type to be a name
ANY_FORMAT_PACKAGES = ('torch.', 'mmengine.', 'mmcv.cnn.', 'convnext_dense.')


def optimize_for_inference(model: nn.Module) -> nn.Module:
    """Optimize a detector or segmentor with a ConvNeXt for inference, and set it to evaluation mode.

    Weights may be loaded before or after this call. Detections and segmentations stay the same, scores to 1e-4.

    Args:
        model: A model of mmdet or mmseg; it is changed in place.

    Returns:
        The model.
    """
    return optimize(model).eval()


def optimize(model: nn.Module) -> nn.Module:
    """Optimize a detector or segmentor with a ConvNeXt for training and inference.

    - If all modules after the backbone accept any memory format, feature maps on a CPU stay in channels_last; mmcv's
      RoIAlign, which does not accept it, gets contiguous feature maps.
    - On a CPU, mmdet's RoIAlign and NMS run in kernels of `ops`, on all cores. So do 3 x 3 convolutions, if the feature
      maps stay in channels_last.
    - In evaluation on a CPU, batch norms and ReLUs of heads are folded into their convolutions. UPerHead convolves
      feature maps before upsampling them, also in training.
    - mmseg's sliding windows are added up in place.

    Args:
        model: A model of mmdet or mmseg; it is changed in place. Modules of other classes are unchanged.

    Returns:
        The model.
    """
    channels_last = all(map(_reads_any_format, model.modules()))
    for module in [*model.modules()]:
        replacement = FusedConv2d if channels_last and is_conv3x3(module) else _faster_class(module)
        if replacement is not None:
            module.__class__ = replacement
    has_other_nms = any(type(module).__name__ in CHECK_NMS_TYPE for module in model.modules())
    for module in model.modules():
        if isinstance(module, OutputNorm):
            module.channels_last = channels_last
        for name in ('train_cfg', 'test_cfg'):
            if isinstance(vars(module).get(name), dict) and not has_other_nms:
                setattr(module, name, _with_faster_nms(vars(module)[name]))
    if channels_last:
        for extractor, has_convs in _roi_extractors(model):
            extractor.channels_last = has_convs
    return model


def _reads_any_format(module: nn.Module) -> bool:
    cls = type(module)
    if f'{cls.__module__}.'.startswith(ANY_FORMAT_PACKAGES) or '.losses.' in cls.__module__:
        return True
    return cls.__module__.startswith(('mmdet.', 'mmseg.', 'mmcv.')) and cls.__name__ in ANY_FORMAT


def _faster_class(module: nn.Module) -> type | None:
    """Return the faster class for a module; None if there is none for exactly its class.

    The imports succeed, because mmcv, mmdet or mmseg was imported to build the module.
    """
    cls = type(module)
    place = f'{cls.__module__}.{cls.__qualname__}'
    if place == 'mmcv.cnn.bricks.conv_module.ConvModule':
        from .fused_heads import FusedConvModule

        return FusedConvModule
    if place == 'mmseg.models.decode_heads.uper_head.UPerHead':
        from .fused_uper_head import FusedUPerHead

        return FusedUPerHead
    if place == 'mmseg.models.segmentors.encoder_decoder.EncoderDecoder':
        from .fused_segmentor import FusedEncoderDecoder

        return FusedEncoderDecoder
    if place == 'mmdet.models.roi_heads.roi_extractors.single_level_roi_extractor.SingleRoIExtractor':
        from .fp32_heads import CPURoIExtractor

        return CPURoIExtractor
    return None


def _roi_extractors(model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """Iterate over the RoI extractors with a choice of memory format, and whether a convolution follows them."""
    for module in model.modules():
        for kind in ('bbox', 'mask'):
            extractors, heads = (
                as_modules(getattr(module, f'{kind}_{part}', None)) for part in ('roi_extractor', 'head')
            )
            for extractor, head in zip(extractors, heads):
                if hasattr(type(extractor), 'channels_last'):
                    yield extractor, kind == 'mask' or getattr(head, 'num_shared_convs', 0) > 0


def as_modules(module: nn.Module | None) -> list[nn.Module]:
    """Return the modules of a ModuleList, or a single module, as a list; [] for None."""
    return [*module] if isinstance(module, nn.ModuleList) else [module] if isinstance(module, nn.Module) else []


# ---- NMS -------------------------------------------------------------------------------------------------------------


def nms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    iou_threshold: float,
    offset: int = 0,
    score_threshold: float = 0,
    max_num: int = -1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run mmcv's `nms`, on a CPU with a kernel of `ops`; `batched_nms` accepts it as the type in an NMS config.

    Args:
        boxes: Boxes (n, 4) as x1, y1, x2, y2.
        scores: Scores (n,).
        iou_threshold: IoU above which the box with the lower score is removed.
        offset: 1 if the width of a box is x2 - x1 + 1, otherwise 0.
        score_threshold: Boxes with at most this score are removed first; 0 for none.
        max_num: Maximum number of boxes to keep; -1 for all.

    Returns:
        The remaining boxes with scores (k, 5), by descending score, and their indices (k,).
    """
    from mmcv.ops import nms as mmcv_nms

    from ..ops import box_ops, dispatch

    if not (dispatch.may_replace() and isinstance(boxes, torch.Tensor) and box_ops.supports_nms(boxes, scores)):
        return mmcv_nms(boxes, scores, iou_threshold, offset, score_threshold, max_num)
    valid = (scores > score_threshold).nonzero().flatten() if score_threshold > 0 else None
    candidates = (boxes, scores) if valid is None else (boxes[valid], scores[valid])
    keep = box_ops.nms(*(t.detach() for t in candidates), float(iou_threshold), offset)
    keep = keep[:max_num] if max_num > 0 else keep
    keep = keep if valid is None else valid[keep]
    return torch.cat([boxes[keep], scores[keep, None]], 1), keep


def _with_faster_nms(cfg: dict) -> dict:
    """Return a copy of a train_cfg or test_cfg with the `nms` above in place of mmcv's."""
    if not any(isinstance(value, (dict, list, tuple)) for value in cfg.values()):
        return cfg
    cfg = copy.deepcopy(cfg)
    for nested in _dicts(cfg):
        if isinstance(nested.get('nms'), dict) and nested['nms'].get('type', 'nms') == 'nms':
            nested['nms']['type'] = nms
    return cfg


def _dicts(value) -> Iterator[dict]:
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from _dicts(child)
