"""mmdet's one-stage detectors in the padded form of `boxes`, by the way their heads come to results."""

import torch
from mmdet.models import GFLHead, PAAHead, SingleStageDetector, TOODHead, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from torch import nn

from ..errors import UsageError
from ..ops.export_ops import NO_SCORE, box_iou
from .boxes import (
    best_detections,
    best_of_level,
    by_class,
    decode,
    drop_small,
    flatten_map,
    require,
    require_nms,
    take,
)

METHODS = ('predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process')


class OneStage(nn.Module):
    """Of images to boxes, scores and labels, as BaseDenseHead predicts.

    Raises:
        UsageError: If the head is of a class whose computation is not known here.
    """

    mask_form: str | None = None
    heads: tuple[type, ...] = (GFLHead, BaseDenseHead)
    methods = METHODS
    needs_nms_pre = True

    def __init__(self, model: SingleStageDetector):
        super().__init__()
        require(model, (SingleStageDetector,), ('predict', 'extract_feat'))
        self.model, self.head, self.test_cfg = model, model.bbox_head, model.bbox_head.test_cfg
        if isinstance(self.head, TOODHead):
            raise UsageError(
                'TOODHead cannot be exported: its deform_sampling is deform_conv2d of mmcv.ops, which torch.export '
                'does not know'
            )
        require(self.head, self.heads, self.methods)
        require_nms(self.test_cfg)
        if self.needs_nms_pre and self.test_cfg.get('nms_pre', -1) <= 0:
            raise UsageError(f'{type(self.head).__name__} without nms_pre cannot be exported: set it in test_cfg')

    def forward(self, images: torch.Tensor, shape: tuple[int, int], scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Detect, as `TwoStage` does."""
        boxes, scores, labels, *_ = self.candidates(self.maps(images), shape, scale)
        return best_detections(boxes, scores, labels, self.test_cfg)

    def maps(self, images):
        """What the head returns, as a list by level of each of its maps."""
        return to_float(self.head(self.model.extract_feat(images)))

    def candidates(self, maps, shape, scale):
        """Boxes (N, n, 4), scores, labels and priors of maps of scores, deltas and, of some heads, score factors.

        After these a list, by level, of which priors they come from.
        """
        levels = [self._best_of_level(level, *x) for level, x in enumerate(zip(self.priors(maps), *maps))]
        *parts, indices = zip(*levels)
        priors, deltas, scores, labels = (torch.cat(part, 1) for part in parts)
        boxes = decode(self.head.bbox_coder, priors, deltas, shape) * scale
        return boxes, drop_small(boxes, scores, self.test_cfg), labels, priors, indices

    def priors(self, maps, **options):
        """Priors of each level, for all its cells."""
        sizes = [x.shape[-2:] for x in maps[0]]
        return self.head.prior_generator.grid_priors(sizes, device=maps[0][0].device, **options)

    def _best_of_level(self, level, priors, cls_score, deltas, factors=None):
        """Priors, deltas, scores, labels and indices of the best `nms_pre` pairs of a prior and a class."""
        head = self.head
        scores = self._activate(flatten_map(cls_score, head.cls_out_channels))
        classes = scores.shape[2]
        scores = torch.where(scores > self.test_cfg.get('score_thr', 0), scores, NO_SCORE).flatten(1)
        scores, indices = best_of_level(scores, self.test_cfg.nms_pre)
        labels, indices = indices % classes, indices // classes
        priors = take(priors[None].expand(scores.shape[0], -1, -1), indices)
        priors_per_cell = cls_score.shape[1] // head.cls_out_channels
        deltas = take(flatten_map(deltas, deltas.shape[1] // priors_per_cell), indices)
        if isinstance(head, GFLHead):  # a distribution of each distance
            deltas = head.integral(deltas.flatten(0, 1)).reshape(*deltas.shape[:2], 4)
            priors, deltas = head.anchor_center(priors), deltas * head.prior_generator.strides[level][0]
        if factors is not None:
            factors = flatten_map(factors, 1).flatten(1).sigmoid().gather(1, indices)
            scores = torch.where(scores > NO_SCORE, scores * factors, NO_SCORE)
        return priors, deltas, scores, labels, indices

    def _activate(self, logits):
        head = self.head
        if getattr(head.loss_cls, 'custom_cls_channels', False):
            return head.loss_cls.get_activation(logits)
        if head.use_sigmoid_cls or isinstance(head, GFLHead):
            return logits.sigmoid()
        return logits.softmax(-1)[..., :-1]


def to_float(maps):
    """Lists of maps in float32."""
    return [[x.float() for x in level_maps] for level_maps in maps]


class YOLOX(OneStage):
    """As YOLOXHead predicts: of each prior the best class, and of these all that NMS leaves."""

    heads, needs_nms_pre = (YOLOXHead,), False

    def forward(self, images, shape, scale):
        """Detect, as `TwoStage` does."""
        head, cfg, maps = self.head, self.test_cfg, self.maps(images)
        channels = head.cls_out_channels, 4, 1
        logits, deltas, objectness = (
            torch.cat([flatten_map(x, n) for x in level_maps], 1) for level_maps, n in zip(maps, channels)
        )
        scores, labels = logits.sigmoid().max(2)
        scores = scores * objectness[..., 0].sigmoid()
        boxes = head._bbox_decode(torch.cat(self.priors(maps, with_stride=True)), deltas) * scale
        scores = torch.where(scores >= cfg.score_thr, scores, NO_SCORE)
        return best_detections(boxes, scores, labels, dict(nms=cfg.nms))


class PAA(OneStage):
    """As PAAHead predicts: NMS of all classes of the best priors, then score voting."""

    heads, methods = (PAAHead,), (*METHODS, 'score_voting')

    def forward(self, images, shape, scale):
        """Detect, as `TwoStage` does."""
        head, cfg, maps = self.head, self.test_cfg, self.maps(images)
        levels = [self._best_of_level(*x) for x in zip(self.priors(maps), *maps)]
        priors, deltas, scores = (torch.cat(parts, 1) for parts in zip(*levels))
        candidates = decode(head.bbox_coder, priors, deltas, shape) * scale
        scores = torch.where(scores > cfg.score_thr, scores, NO_SCORE)
        boxes, best_scores, labels = best_detections(*by_class(candidates[:, :, None], scores), cfg)
        if head.with_score_voting:
            boxes = _vote(boxes, labels, candidates, scores)
        return boxes, best_scores, labels

    def _best_of_level(self, priors, cls_score, deltas, factors):
        """Priors, deltas and scores by class of the best `nms_pre` priors."""
        scores = flatten_map(cls_score, self.head.cls_out_channels).sigmoid()
        scores = (scores * flatten_map(factors, 1).sigmoid()).sqrt()
        best, indices = best_of_level(scores.amax(2), self.test_cfg.nms_pre)
        scores = torch.where((best > NO_SCORE)[..., None], take(scores, indices), NO_SCORE)
        priors = priors[None].expand(scores.shape[0], -1, -1)
        return take(priors, indices), take(flatten_map(deltas, 4), indices), scores


def _vote(boxes, labels, candidates, scores):
    """Boxes (N, K, 4) as means of the candidates (N, n, 4) that overlap them, by IoU and score (N, n, classes)."""
    indices = labels.clamp(min=0)[..., None].expand(-1, -1, scores.shape[1])
    votes = scores.transpose(1, 2).gather(1, indices)
    iou = box_iou(boxes[:, :, None], candidates[:, None])
    votes = torch.where((iou > 0.01) & (votes > NO_SCORE), torch.exp(-((1 - iou) ** 2) / 0.025) * votes, 0)
    total = votes.sum(2, keepdim=True)
    return torch.where(total > 0, votes @ candidates / total, boxes)  # a box without an area overlaps none
