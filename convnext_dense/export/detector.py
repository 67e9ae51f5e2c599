"""mmdet's two-stage detectors as one traceable function of images, with results of padded shapes.

Region proposals, RoI heads and masks are mmdet's, written for a batch: where mmdet drops boxes, these are given a score
of -1 and stay, so that every shape follows from that of the images.
"""

import torch
import torch.nn.functional as F
from mmdet.models import (
    BBoxHead,
    CascadeRoIHead,
    FCNMaskHead,
    RPNHead,
    SingleRoIExtractor,
    StandardRoIHead,
    TwoStageDetector,
)
from mmdet.models.task_modules import AnchorGenerator
from torch import nn

from ..errors import UsageError
from ..models.optimize import nms as faster_nms
from ..ops.export_ops import nms_mask, pyramid_roi_align
from .preprocessing import Preprocess
from .sizes import known_size, with_unknown_size

NO_SCORE = -1.0  # of boxes that mmdet would have dropped


class ExportableDetector(nn.Module):
    """A two-stage detector as a function of images.

    Args:
        model: mmdet's model, in evaluation mode.
        raw: Whether images are as the data preprocessor returns them, and results are in their pixels.
        masks: 'image' for masks in the size of the image, 'box' for those of the mask head.

    Raises:
        UsageError: If a part of the model is of a class whose computation is not known here.
    """

    def __init__(self, model: nn.Module, raw: bool = False, masks: str = 'image'):
        super().__init__()
        check_detector(model)
        self.preprocess = nn.Identity() if raw else Preprocess(model.data_preprocessor)
        self.model, self.raw, self.masks = model, raw, masks
        self.rpn = RegionProposals(model.rpn_head, model.test_cfg.rpn)
        self.roi_head = (CascadeHead if isinstance(model.roi_head, CascadeRoIHead) else RoIHead)(model.roi_head)

    @property
    def output_names(self) -> list[str]:
        """Names of what `forward` returns."""
        return ['boxes', 'scores', 'labels', *(['masks'] if self.model.roi_head.with_mask else [])]

    def forward(self, images: torch.Tensor, output_size: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Detect the objects of a batch of images.

        Args:
            images: (N, 3, H, W), RGB from 0 to 255, uint8 or float32; with `raw` normalized and padded.
            output_size: (2,), int64: height and width of the images that these were resized from. Not with `raw`.

        Returns:
            Boxes (N, K, 4) as x1, y1, x2, y2 in pixels of `output_size`, scores (N, K) in descending order, labels
            (N, K) of int64, which are -1 where an image has fewer objects than K, and masks: (N, K, height, width) of
            bool, or probabilities (N, K, 28, 28) of each box.
        """
        images = with_unknown_size(images)
        shape = images.shape[-2:]
        dtype = next(self.model.parameters()).dtype
        feats = self.model.extract_feat(self.preprocess(images).to(dtype))
        proposals, proposal_scores = self.rpn(feats, shape)
        head, with_mask = self.roi_head, self.model.roi_head.with_mask
        boxes, scores = head.classify(feats, proposals, shape)
        scores = torch.where(proposal_scores[..., None] > NO_SCORE, scores, NO_SCORE)
        scale = None if self.raw else _scale(shape, output_size, boxes)
        if scale is not None and not with_mask:  # mmdet scales boxes before NMS where there are no masks
            boxes = boxes * scale
        boxes, scores, labels = select_boxes(boxes, scores, head.test_cfg)
        outputs = boxes, scores.clamp(min=0), torch.where(scores > NO_SCORE, labels, -1)
        if not with_mask:
            return outputs
        masks = head.segment(feats, boxes, labels)
        if scale is not None:
            boxes = boxes * scale
        if self.masks == 'image':
            size = images.shape[-2:] if self.raw else known_size(output_size)
            masks = paste_masks(masks, boxes, size) >= head.test_cfg.mask_thr_binary
        return boxes, *outputs[1:], masks


def check_detector(model: nn.Module) -> None:
    """Raise UsageError where a model has a part that `ExportableDetector` does not know."""
    kinds = [(model, (TwoStageDetector,))]
    if isinstance(model, TwoStageDetector):
        roi_head = model.roi_head
        cascade = isinstance(roi_head, CascadeRoIHead)
        kinds += [(model.rpn_head, (RPNHead,)), (model.rpn_head.prior_generator, (AnchorGenerator,))]
        kinds += [(roi_head, (StandardRoIHead, CascadeRoIHead))]
        for name, known in (('bbox_head', BBoxHead), ('bbox_roi_extractor', SingleRoIExtractor)):
            modules = getattr(roi_head, name)
            kinds += [(m, (known,)) for m in (modules if cascade else [modules])]
        if roi_head.with_mask:
            for name, known in (('mask_head', FCNMaskHead), ('mask_roi_extractor', SingleRoIExtractor)):
                modules = getattr(roi_head, name)
                kinds += [(m, (known,)) for m in (modules if cascade else [modules])]
    for module, known in kinds:
        if not isinstance(module, known) or _overrides(type(module), known):
            names = ' or '.join(cls.__name__ for cls in known)
            raise UsageError(f'{type(module).__name__} cannot be exported: only {names} can')
    for cfg in (model.test_cfg.rpn, model.test_cfg.rcnn):
        kind = cfg.nms.get('type', 'nms')
        if kind not in ('nms', faster_nms) or set(cfg.nms) - {'type', 'iou_threshold'}:
            name = kind if isinstance(kind, str) else getattr(kind, '__name__', kind)
            raise UsageError(f'NMS of type {name} cannot be exported: only nms with an iou_threshold can')


def _overrides(cls: type, known: tuple[type, ...]) -> bool:
    """Whether a class has its own way from features to results."""
    base = next(base for base in known if issubclass(cls, base))
    methods = ('predict', 'predict_by_feat', '_predict_by_feat_single', 'predict_bbox', 'predict_mask', '_bbox_forward')
    methods += ('_mask_forward', 'map_roi_levels', '_bbox_post_process', 'extract_feat', 'regress_by_class')
    return any(getattr(cls, name, None) is not getattr(base, name, None) for name in methods)


# ---- region proposals ------------------------------------------------------------------------------------------------


class RegionProposals(nn.Module):
    """mmdet's RPNHead for a batch: (N, n, 4) boxes with scores (N, n), -1 of those that are none."""

    def __init__(self, head: RPNHead, test_cfg: dict):
        super().__init__()
        self.head, self.test_cfg = head, test_cfg

    def forward(self, feats, shape):
        """Propose regions from the maps of images of this shape (H, W)."""
        head, cfg = self.head, self.test_cfg
        cls_scores, deltas = ([x.float() for x in maps] for maps in head(feats))
        priors = head.prior_generator.grid_priors([x.shape[-2:] for x in cls_scores], device=feats[0].device)
        levels = [_best_of_level(head, *level, cfg.nms_pre) for level in zip(cls_scores, deltas, priors)]
        priors, deltas, scores = (torch.cat(parts, 1) for parts in zip(*levels))
        boxes = decode(head.bbox_coder, priors, deltas, shape)
        if cfg.get('min_bbox_size', -1) >= 0:
            width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
            scores = torch.where((width > cfg.min_bbox_size) & (height > cfg.min_bbox_size), scores, NO_SCORE)
        level_ids = torch.cat([torch.full_like(part[2], i) for i, part in enumerate(levels)], 1)
        keep = nms_by_group(boxes, scores, level_ids, cfg.nms.iou_threshold, NO_SCORE / 2, cfg.max_per_img)
        return top_boxes(boxes, torch.where(keep, scores, NO_SCORE), cfg.max_per_img)


def _best_of_level(head, cls_score, deltas, priors, nms_pre):
    """Anchors, deltas and scores of the best `nms_pre` of a level."""
    n = cls_score.shape[0]
    scores = cls_score.permute(0, 2, 3, 1).reshape(n, -1, head.cls_out_channels)
    scores = scores.sigmoid().squeeze(-1) if head.use_sigmoid_cls else scores.softmax(-1)[..., 0]
    deltas = deltas.permute(0, 2, 3, 1).reshape(n, -1, 4)
    priors = priors[None].expand(n, -1, 4)
    if nms_pre <= 0:
        return priors, deltas, scores
    # Filled up, so that there are always as many: shapes behind this one do not depend on the size of the image.
    priors, deltas = (F.pad(x, (0, 0, 0, nms_pre)) for x in (priors, deltas))
    scores, indices = F.pad(scores, (0, nms_pre), value=NO_SCORE).topk(nms_pre)
    return _take(priors, indices), _take(deltas, indices), scores


# ---- RoI heads -------------------------------------------------------------------------------------------------------


class RoIHead(nn.Module):
    """mmdet's StandardRoIHead for a batch."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head, self.test_cfg = head, head.test_cfg

    def classify(self, feats, proposals, shape):
        """Boxes (N, n, classes or 1, 4) and scores (N, n, classes) of proposals (N, n, 4)."""
        head = self.head
        rois = to_rois(proposals)
        logits, deltas = (x.float() for x in head.bbox_head(extract(head.bbox_roi_extractor, feats, rois)))
        boxes = _decode_classes(head.bbox_head, rois, deltas, shape)
        scores = _class_scores(head.bbox_head, logits)
        n, k = proposals.shape[:2]
        return boxes.reshape(n, k, -1, 4), scores.reshape(n, k, -1)

    def segment(self, feats, boxes, labels):
        """Mask probabilities (N, K, h, w) of boxes (N, K, 4)."""
        head = self.head
        masks = head.mask_head(extract(head.mask_roi_extractor, feats, to_rois(boxes))).float().sigmoid()
        return _masks_of_labels(masks, boxes, labels)


class CascadeHead(RoIHead):
    """mmdet's CascadeRoIHead for a batch."""

    def classify(self, feats, proposals, shape):
        """Boxes (N, n, classes or 1, 4) of the last stage, and scores (N, n, classes) averaged over the stages."""
        head = self.head
        rois, logits = to_rois(proposals), []
        n, k = proposals.shape[:2]
        for stage in range(head.num_stages):
            bbox_head = head.bbox_head[stage]
            features = extract(head.bbox_roi_extractor[stage], feats, rois)
            stage_logits, deltas = (x.float() for x in bbox_head(features))
            logits.append(stage_logits)
            if stage < head.num_stages - 1:
                if bbox_head.custom_activation:
                    stage_logits = bbox_head.loss_cls.get_activation(stage_logits)
                labels = stage_logits[:, :-1].argmax(1)
                boxes = bbox_head.regress_by_class(rois[:, 1:], labels, deltas, dict(img_shape=shape))
                rois = torch.cat([rois[:, :1], boxes], 1)
        boxes = _decode_classes(bbox_head, rois, deltas, shape)
        scores = _class_scores(bbox_head, sum(logits) / len(logits))
        return boxes.reshape(n, k, -1, 4), scores.reshape(n, k, -1)

    def segment(self, feats, boxes, labels):
        """Mask probabilities (N, K, h, w) of boxes (N, K, 4), averaged over the stages."""
        head, rois = self.head, to_rois(boxes)
        stages = zip(head.mask_head, head.mask_roi_extractor)
        masks = [mask_head(extract(extractor, feats, rois)).float().sigmoid() for mask_head, extractor in stages]
        return _masks_of_labels(sum(masks) / len(masks), boxes, labels)


def to_rois(boxes: torch.Tensor) -> torch.Tensor:
    """RoIs (N * n, 5) of boxes (N, n, 4): the index of the image, then the box."""
    images = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
    return torch.cat([images[:, None, None].expand(-1, boxes.shape[1], 1), boxes], 2).reshape(-1, 5)


def extract(extractor: SingleRoIExtractor, feats: tuple[torch.Tensor, ...], rois: torch.Tensor) -> torch.Tensor:
    """Features of RoIs (n, 5), as mmdet's SingleRoIExtractor extracts them."""
    feats, layers = feats[: extractor.num_inputs], extractor.roi_layers
    levels = extractor.map_roi_levels(rois, len(feats)) if len(feats) > 1 else torch.zeros_like(rois[:, 0]).long()
    scales = [layer.spatial_scale for layer in layers]
    layer = layers[0]
    return pyramid_roi_align(feats, rois, levels, scales, layer.output_size, layer.sampling_ratio, layer.aligned)


def _decode_classes(bbox_head, rois, deltas, shape):
    classes = 1 if bbox_head.reg_class_agnostic else bbox_head.num_classes
    boxes = rois[:, None, 1:].expand(-1, classes, 4)
    return decode(bbox_head.bbox_coder, boxes, deltas.reshape(-1, classes, 4), shape)


def _class_scores(bbox_head, logits):
    if bbox_head.custom_cls_channels:
        return bbox_head.loss_cls.get_activation(logits)[:, :-1]
    return logits.softmax(-1)[:, :-1]


def _masks_of_labels(masks, boxes, labels):
    """Of masks (N * K, classes or 1, h, w) those of the labels, (N, K, h, w)."""
    labels = labels.reshape(-1, 1, 1, 1) if masks.shape[1] > 1 else torch.zeros_like(labels.reshape(-1, 1, 1, 1))
    masks = masks.gather(1, labels.expand(-1, 1, *masks.shape[2:]))
    return masks.reshape(*boxes.shape[:2], *masks.shape[2:])


# ---- boxes -----------------------------------------------------------------------------------------------------------


def decode(coder: nn.Module, boxes: torch.Tensor, deltas: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Boxes (..., 4) moved by deltas (..., 4), clipped to the image where the coder does so."""
    return coder.decode(boxes.reshape(-1, 4), deltas.reshape(-1, 4), max_shape=shape).reshape(deltas.shape)


def nms_by_group(boxes, scores, groups, iou_threshold, score_threshold, max_output):
    """Which boxes (N, n, 4) stay where only those of one group (N, n) suppress each other.

    As mmcv's batched_nms does, boxes of a group are moved away from those of the others.
    """
    candidates = scores > score_threshold
    furthest = torch.where(candidates[..., None], boxes, 0).amax((1, 2))[:, None]
    boxes = boxes + (groups.to(boxes) * (furthest + 1))[..., None]
    return nms_mask(boxes, scores, iou_threshold, score_threshold, max_output)


def select_boxes(boxes, scores, test_cfg):
    """The best boxes (N, K, 4) of all classes, their scores and labels (N, K), after NMS of each class.

    Args:
        boxes: (N, n, classes or 1, 4).
        scores: (N, n, classes).
        test_cfg: With `score_thr`, `nms` and `max_per_img`.
    """
    n, _, classes = scores.shape
    boxes = boxes.expand(-1, -1, classes, 4).reshape(n, -1, 4)
    scores = scores.reshape(n, -1)
    labels = torch.arange(classes, device=scores.device).repeat(scores.shape[1] // classes)[None].expand(n, -1)
    limit = test_cfg.max_per_img
    keep = nms_by_group(boxes, scores, labels, test_cfg.nms.iou_threshold, test_cfg.score_thr, limit)
    scores, indices = torch.where(keep, scores, NO_SCORE).topk(min(limit, scores.shape[1]))
    most = (scores > NO_SCORE).sum(1).amax(0).clamp(min=1).item()  # of an image: masks are made of these alone
    torch._check(most <= scores.shape[1])
    scores, indices = scores[:, :most], indices[:, :most]
    return _take(boxes, indices) * (scores > NO_SCORE)[..., None], scores, labels.gather(1, indices)


def top_boxes(boxes, scores, limit):
    """The best `limit` of boxes (N, n, 4) with their scores (N, n)."""
    scores, indices = scores.topk(min(limit, scores.shape[1]))
    return _take(boxes, indices), scores


def _take(boxes, indices):
    return boxes.gather(1, indices[..., None].expand(-1, -1, 4))


# ---- size of the image -----------------------------------------------------------------------------------------------


def _scale(shape, output_size, boxes):
    """Factors (4,) from pixels of the input to those of `output_size`."""
    size = torch.stack([boxes.new_full((), shape[1]), boxes.new_full((), shape[0])])
    return (output_size.flip(0).to(boxes) / size).repeat(2)


def paste_masks(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Masks (N, K, h, w) of boxes (N, K, 4) in images of a size: (N, K, height, width).

    Bilinear interpolation with zeros outside, as mmdet's with `grid_sample`, is a product with a matrix on each side.
    """
    rows = _interpolation(boxes[..., 1], boxes[..., 3], masks.shape[-2], size[0])
    columns = _interpolation(boxes[..., 0], boxes[..., 2], masks.shape[-1], size[1])
    return rows @ masks @ columns.transpose(-1, -2)


def _interpolation(start, end, n_source, n_target):
    """Weights (N, K, n_target, n_source) of the pixels of a mask in those of the image along one axis."""
    pixels = torch.arange(n_target, device=start.device, dtype=torch.float32) + 0.5
    positions = (pixels - start[..., None]) / (end - start).clamp(min=1e-6)[..., None] * n_source - 0.5
    sources = torch.arange(n_source, device=start.device, dtype=torch.float32)
    return (1 - (positions[..., None] - sources).abs()).clamp(min=0)
