"""mmdet's one-stage detectors in the padded form of `boxes`: those whose head predicts as BaseDenseHead does."""

import torch
from mmdet.models import GFLHead, SingleStageDetector
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from torch import nn

from ..errors import UsageError
from ..ops.export_ops import NO_SCORE
from .boxes import best_detections, best_of_level, decode, drop_small, flatten_map, require, require_nms, take

METHODS = ('predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process')


class OneStage(nn.Module):
    """Of images to boxes, scores and labels.

    Args:
        model: mmdet's SingleStageDetector.

    Raises:
        UsageError: If its head is of a class whose computation is not known here.
    """

    mask_form = None

    def __init__(self, model: SingleStageDetector):
        super().__init__()
        require(model, (SingleStageDetector,), ('predict', 'extract_feat'))
        self.model, self.head, self.test_cfg = model, model.bbox_head, model.bbox_head.test_cfg
        require(self.head, (GFLHead, BaseDenseHead), METHODS)
        require_nms(self.test_cfg)
        if self.test_cfg.get('nms_pre', -1) <= 0:
            raise UsageError(f'{type(self.head).__name__} without nms_pre cannot be exported: set it in test_cfg')

    def forward(self, images: torch.Tensor, shape: tuple[int, int], scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Detect, as `TwoStage` does."""
        head, feats = self.head, self.model.extract_feat(images)
        maps = [[x.float() for x in maps] for maps in head(feats)]  # scores, deltas and, of some heads, score factors
        priors = head.prior_generator.grid_priors([x.shape[-2:] for x in maps[0]], device=images.device)
        levels = [self._best_of_level(level, *x) for level, x in enumerate(zip(priors, *maps))]
        priors, deltas, scores, labels = (torch.cat(parts, 1) for parts in zip(*levels))
        boxes = decode(head.bbox_coder, priors, deltas, shape) * scale
        return best_detections(boxes, drop_small(boxes, scores, self.test_cfg), labels, self.test_cfg)

    def _best_of_level(self, level, priors, cls_score, deltas, factors=None):
        """Priors, deltas, scores and labels of the best `nms_pre` pairs of a prior and a class."""
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
        return priors, deltas, scores, labels

    def _activate(self, logits):
        head = self.head
        if getattr(head.loss_cls, 'custom_cls_channels', False):
            return head.loss_cls.get_activation(logits)
        if head.use_sigmoid_cls or isinstance(head, GFLHead):
            return logits.sigmoid()
        return logits.softmax(-1)[..., :-1]
