"""Boxes of a batch in the padded form of exported detectors: boxes that a model would drop have a score of -1."""

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UsageError
from ..models.optimize import nms as faster_nms
from ..ops.export_ops import NO_SCORE, nms_mask, soft_nms

# Which options of mmcv's NMS are known, and their defaults; `split_thr` changes no result.
NMS_OPTIONS = dict(iou_threshold=None, class_agnostic=False, split_thr=None)
SOFT_NMS_OPTIONS = dict(NMS_OPTIONS, iou_threshold=0.3, sigma=0.5, min_score=1e-3, method='linear')
NMS_TYPES = {'nms': NMS_OPTIONS, faster_nms: NMS_OPTIONS, 'soft_nms': SOFT_NMS_OPTIONS}
ALL = 2**31 - 1  # boxes of an image at most, where there is no limit


def require(module: nn.Module, known: tuple[type, ...], methods: tuple[str, ...]) -> None:
    """Raise UsageError if a module is not of a known class, or of one that overrides what is known of it.

    Args:
        module: A part of a model.
        known: Classes, the most derived ones first.
        methods: Their methods that are written anew here, or that these rely on.
    """
    cls = type(module)
    base = next((base for base in known if isinstance(module, base)), None)
    if base is None:
        names = ' or '.join(cls.__name__ for cls in known)
        raise UsageError(f'{cls.__name__} cannot be exported: only {names} can')
    for name in methods:
        if getattr(cls, name, None) is not getattr(base, name, None):
            raise UsageError(f'{cls.__name__} cannot be exported: its {name} is not that of {base.__name__}')


def require_nms(test_cfg: dict) -> None:
    """Raise UsageError if a test_cfg has no NMS, or one that is not known."""
    cfg = test_cfg.get('nms') or {}
    kind = cfg.get('type', 'nms')
    options = NMS_TYPES.get(kind)
    if options is None or not cfg:
        name = kind if isinstance(kind, str) else getattr(kind, '__name__', kind)
        raise UsageError(f'NMS of type {name if cfg else None} cannot be exported: only nms and soft_nms can')
    unknown = {*cfg} - {'type', *options}
    if unknown:
        raise UsageError(f'NMS with {", ".join(sorted(unknown))} cannot be exported: only with {", ".join(options)}')


def batched_nms(
    boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor, cfg: dict, max_output: int
) -> torch.Tensor:
    """Suppress boxes that overlap others of their group, as mmcv's `batched_nms` does.

    Args:
        boxes: (N, n, 4).
        scores: (N, n), -1 of boxes that are none.
        groups: (N, n), such as labels.
        cfg: NMS config of the model.
        max_output: Boxes of an image that stay at most.

    Returns:
        Scores (N, n), which soft-NMS lowers, and -1 of boxes that go.
    """
    options = {**NMS_TYPES[cfg.get('type', 'nms')], **cfg}
    if not options['class_agnostic']:  # those of a group are moved away from those of the others
        furthest = torch.where((scores > NO_SCORE)[..., None], boxes, 0).amax((1, 2))[:, None]
        boxes = boxes + (groups.to(boxes) * (furthest + 1))[..., None]
    settings = options['iou_threshold'], NO_SCORE / 2, max_output
    if 'method' in options:
        return soft_nms(boxes, scores, *settings, options['method'], options['sigma'], options['min_score'])
    return torch.where(nms_mask(boxes, scores, *settings), scores, NO_SCORE)


def decode(coder: nn.Module, priors: torch.Tensor, deltas: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Boxes (..., 4) of priors (..., 2 or 4) and deltas (..., 4), clipped to the image where the coder does so."""
    boxes = coder.decode(priors.reshape(-1, priors.shape[-1]), deltas.reshape(-1, 4), max_shape=shape)
    return boxes.reshape(deltas.shape)


def take(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows (N, k, ...) of values (N, n, ...) by indices (N, k)."""
    shape = values.shape[2:]
    return values.gather(1, indices.reshape(*indices.shape, *[1] * len(shape)).expand(-1, -1, *shape))


def flatten_map(maps: torch.Tensor, channels: int) -> torch.Tensor:
    """Of a feature map (N, A * channels, H, W) a row for each of its priors, (N, H * W * A, channels)."""
    return maps.permute(0, 2, 3, 1).reshape(maps.shape[0], -1, channels)


def best_of_level(scores: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `limit` of scores (N, n) and their indices, which are 0 where there is no score.

    Filled up, so that there are always as many: shapes behind this do not depend on the size of the image.
    """
    scores, indices = F.pad(scores, (0, limit), value=NO_SCORE).topk(limit)
    return scores, torch.where(scores > NO_SCORE, indices, 0)


def by_class(boxes: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes (N, n, classes or 1, 4) and scores (N, n, classes) as boxes (N, n * classes, 4), scores and labels."""
    n, _, classes = scores.shape
    boxes = boxes.expand(-1, -1, classes, 4).reshape(n, -1, 4)
    scores = scores.reshape(n, -1)
    labels = torch.arange(classes, device=scores.device).repeat(scores.shape[1] // classes)[None].expand(n, -1)
    return boxes, scores, labels


def drop_small(boxes: torch.Tensor, scores: torch.Tensor, test_cfg: dict) -> torch.Tensor:
    """Scores (N, n) in which boxes (N, n, 4) of at most `min_bbox_size` have none."""
    limit = test_cfg.get('min_bbox_size', -1)
    if limit < 0:
        return scores
    return torch.where((boxes[..., 2:] - boxes[..., :2]).amin(-1) > limit, scores, NO_SCORE)


def top_boxes(boxes: torch.Tensor, scores: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `limit` of boxes (N, n, 4) with their scores (N, n)."""
    scores, indices = scores.topk(min(limit, scores.shape[1]))
    return take(boxes, indices), scores


def best_detections(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, test_cfg: dict, *rows: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The best boxes after NMS of each class.

    Args:
        boxes: (N, n, 4).
        scores: (N, n), -1 of boxes that are none.
        labels: (N, n).
        test_cfg: With `nms` and, where the number of boxes has a limit, `max_per_img`.
        *rows: (N, n, C), whatever else belongs to the boxes.

    Returns:
        Of K boxes, the most that an image has: boxes (N, K, 4), scores (N, K) in descending order, labels (N, K), which
        are -1 where an image has fewer, and rows (N, K, C).
    """
    limit, n = test_cfg.get('max_per_img'), scores.shape[1]
    scores = batched_nms(boxes, scores, labels, test_cfg['nms'], ALL if limit is None else limit)
    scores, indices = scores.topk(n if limit is None else min(limit, n))
    most = (scores > NO_SCORE).sum(1).amax(0).clamp(min=1).item()  # of an image: masks are made of these alone
    torch._check(most <= scores.shape[1])
    scores, indices = scores[:, :most], indices[:, :most]
    is_box = scores > NO_SCORE
    boxes = take(boxes, indices) * is_box[..., None]
    labels = torch.where(is_box, labels.gather(1, indices), -1)
    return boxes, scores.clamp(min=0), labels, *(take(x, indices) for x in rows)
