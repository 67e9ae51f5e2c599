"""What is kept of a prediction."""

from collections.abc import Sequence

import torch
from mmengine.structures import BaseDataElement


def select_instances(
    sample: BaseDataElement,
    score_thr: float | None = None,
    labels: Sequence[int] | None = None,
    max_per_image: int | None = None,
) -> BaseDataElement:
    """Drop detections by score, class and number, in place.

    Args:
        sample: With `pred_instances`.
        score_thr: Least score; None for any.
        labels: Indices of classes; None for all.
        max_per_image: Number of detections at most, those with the highest scores; None for any.

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
