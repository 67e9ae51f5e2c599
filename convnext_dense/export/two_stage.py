"""mmdet's two-stage detectors in the padded form of `boxes`: region proposals, RoI heads and masks of a batch."""

import torch
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

from ..ops.export_ops import NO_SCORE, pyramid_roi_align
from .boxes import (
    batched_nms,
    best_detections,
    best_of_level,
    by_class,
    decode,
    drop_small,
    flatten_map,
    require,
    require_nms,
    take,
    top_boxes,
)

# What leads from features to results.
METHODS = ('predict', 'predict_by_feat', '_predict_by_feat_single', 'predict_bbox', 'predict_mask', '_bbox_forward')
METHODS += ('_mask_forward', 'map_roi_levels', '_bbox_post_process', 'extract_feat', 'regress_by_class')


class TwoStage(nn.Module):
    """Of images to boxes, scores, labels and, where the model has them, masks of the boxes.

    Args:
        model: mmdet's TwoStageDetector.

    Raises:
        UsageError: If a part of it is of a class whose computation is not known here.
    """

    def __init__(self, model: TwoStageDetector):
        super().__init__()
        _require_parts(model)
        self.model, self.mask_form = model, 'box' if model.roi_head.with_mask else None
        self.rpn = RegionProposals(model.rpn_head, model.test_cfg.rpn)
        self.roi_head = (CascadeHead if isinstance(model.roi_head, CascadeRoIHead) else RoIHead)(model.roi_head)
        self.test_cfg = self.roi_head.test_cfg

    def forward(self, images: torch.Tensor, shape: tuple[int, int], scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Detect the objects of a batch of images.

        Args:
            images: (N, 3, H, W), as the data preprocessor returns them.
            shape: Height and width of the images without their padding.
            scale: (4,): factors of the coordinates of the results.

        Returns:
            Boxes (N, K, 4), scores (N, K) in descending order, labels (N, K) of int64, which are -1 where an image has
            fewer objects than K, and probabilities (N, K, h, w) of the masks in their boxes.
        """
        feats = self.model.extract_feat(images)
        proposals, proposal_scores = self.rpn(feats, shape)
        boxes, scores = self.roi_head.classify(feats, proposals, shape)
        is_candidate = (proposal_scores[..., None] > NO_SCORE) & (scores > self.test_cfg.score_thr)
        if not self.mask_form:  # mmdet scales boxes before NMS where there are no masks
            boxes = boxes * scale
        boxes, scores, labels = by_class(boxes, torch.where(is_candidate, scores, NO_SCORE))
        boxes, scores, labels = best_detections(boxes, scores, labels, self.test_cfg)
        if not self.mask_form:
            return boxes, scores, labels
        return boxes * scale, scores, labels, self.roi_head.segment(feats, boxes, labels.clamp(min=0))


def _require_parts(model):
    roi_head = model.roi_head
    require(model, (TwoStageDetector,), METHODS)
    require(model.rpn_head, (RPNHead,), METHODS)
    require(model.rpn_head.prior_generator, (AnchorGenerator,), METHODS)
    require(roi_head, (StandardRoIHead, CascadeRoIHead), METHODS)
    parts = dict(bbox_head=BBoxHead, bbox_roi_extractor=SingleRoIExtractor)
    if roi_head.with_mask:
        parts |= dict(mask_head=FCNMaskHead, mask_roi_extractor=SingleRoIExtractor)
    for name, known in parts.items():
        modules = getattr(roi_head, name)
        for module in modules if isinstance(roi_head, CascadeRoIHead) else [modules]:
            require(module, (known,), METHODS)
    for cfg in (model.test_cfg.rpn, model.test_cfg.rcnn):
        require_nms(cfg)


# ---- region proposals ------------------------------------------------------------------------------------------------


class RegionProposals(nn.Module):
    """mmdet's RPNHead for a batch: (N, n, 4) boxes with scores (N, n), -1 of those that are none."""

    def __init__(self, head: RPNHead, test_cfg: dict):
        super().__init__()
        self.head, self.test_cfg = head, test_cfg

    def forward(self, feats, shape):
        """Propose regions from the feature maps of images of this shape (H, W)."""
        head, cfg = self.head, self.test_cfg
        cls_scores, deltas = ([x.float() for x in maps] for maps in head(feats))
        priors = head.prior_generator.grid_priors([x.shape[-2:] for x in cls_scores], device=feats[0].device)
        levels = [_best_of_level(head, *level, cfg.nms_pre) for level in zip(cls_scores, deltas, priors)]
        priors, deltas, scores = (torch.cat(parts, 1) for parts in zip(*levels))
        boxes = decode(head.bbox_coder, priors, deltas, shape)
        scores = drop_small(boxes, scores, cfg)
        level_ids = torch.cat([torch.full_like(part[2], i) for i, part in enumerate(levels)], 1)
        return top_boxes(boxes, batched_nms(boxes, scores, level_ids, cfg.nms, cfg.max_per_img), cfg.max_per_img)


def _best_of_level(head, cls_score, deltas, priors, nms_pre):
    """Anchors, deltas and scores of the best `nms_pre` of a level."""
    scores = flatten_map(cls_score, head.cls_out_channels)
    scores = scores.sigmoid().squeeze(-1) if head.use_sigmoid_cls else scores.softmax(-1)[..., 0]
    deltas, priors = flatten_map(deltas, 4), priors.expand(scores.shape[0], -1, -1)
    if nms_pre <= 0:
        return priors, deltas, scores
    scores, indices = best_of_level(scores, nms_pre)
    return take(priors, indices), take(deltas, indices), scores


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
