"""Filter predictions by score, class and number."""

from collections.abc import Sequence

import torch
from mmengine.structures import BaseDataElement

from .mask_writer import IGNORED


def select_instances(
    sample: BaseDataElement,
    score_thr: float | None = None,
    labels: Sequence[int] | None = None,
    max_per_image: int | None = None,
) -> BaseDataElement:
    """Drop detections by score, class and number, in place.

    Args:
        sample: Data sample with `pred_instances`.
        score_thr: Minimum score; None for any.
        labels: Class indices to keep; None for all.
        max_per_image: Maximum number of detections, those with the highest scores; None for no limit.

    Returns:
        The sample.
    """
    instances = sample.pred_instances
    keep = torch.ones_like(instances.labels, dtype=torch.bool)
    if score_thr is not None:
        keep &= instances.scores >= score_thr
    if labels is not None:
        keep &= torch.isin(instances.labels, torch.as_tensor(labels, device=instances.labels.device))
    indices = keep.nonzero().flatten()
    if max_per_image is not None and len(indices) > max_per_image:
        best = instances.scores[indices].argsort(descending=True, stable=True)[:max_per_image]
        indices = indices[best.sort().values]
    if len(indices) < len(keep):
        sample.pred_instances = instances[indices]
    return sample


def select_classes(sample: BaseDataElement, labels: Sequence[int]) -> BaseDataElement:
    """Set pixels of `pred_sem_seg` with other labels to 255, mmseg's ignore_index, in place; return the sample."""
    pred = sample.pred_sem_seg.data
    is_other = ~torch.isin(pred, torch.as_tensor(labels, dtype=pred.dtype, device=pred.device))
    sample.pred_sem_seg.data = pred.masked_fill(is_other, IGNORED)
    return sample
