"""Merge the detections of several views of an image, or of its tiles."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from mmengine.structures import BaseDataElement, InstanceData

from .cropped_mask import CroppedMask, combine, overlap, unite

IOU_THR = 0.5  # minimum IoU of detections of one object
MIN_MASK_CHECK = 0.1  # box IoU in the overlap of two tiles below which masks are not compared
FRAGMENT_THR = 0.75  # minimum fraction of a fragment that lies inside another detection
MIN_COVER_SCORE = 0.5  # minimum score of that detection, relative to the fragment's
CUT_MARGIN = 0.01  # fraction of a tile's side; a box this near to an edge of its tile may be cut there
MIN_CUT_MARGIN = 4  # pixels


def to_detections(instances: InstanceData, left: int = 0, top: int = 0) -> InstanceData:
    """Return mmdet's detections on the CPU, with masks as `CroppedMask`.

    Those in a part of an image, whose upper left pixel is (left, top), come out in pixels of the image.
    """
    boxes = instances.bboxes.float().cpu() + torch.tensor([left, top, left, top])
    detections = InstanceData(bboxes=boxes, scores=instances.scores.float().cpu(), labels=instances.labels.cpu())
    if 'masks' in instances:
        detections.masks = [CroppedMask.from_bitmap(mask.cpu().numpy(), left, top) for mask in instances.masks]
    return detections


def merge_detections(
    samples: Iterable[BaseDataElement], iou_thr: float = IOU_THR, max_per_image: int | None = None
) -> BaseDataElement:
    """Merge the detections of several views of an image.

    Boxes are the same as with mmdet's `DetTTAModel`: class-wise NMS over all views. Each mask is a vote, weighted by
    score, of the views whose detections it is or suppresses.

    Args:
        samples: Data samples of the views, in pixels of the image; only one of them is held in memory at a time.
        iou_thr: IoU from which two boxes of a class belong to one object.
        max_per_image: Maximum number of detections, those with the highest scores; None for no limit.

    Returns:
        The data sample of the first view, with the merged detections.
    """
    first_sample, views, device = None, [], None
    for sample in samples:
        first_sample, device = first_sample or sample, sample.pred_instances.bboxes.device
        views.append(to_detections(sample.pred_instances))
        if sample is not first_sample:
            del sample.pred_instances
    size = first_sample.ori_shape[:2]
    view_ids = torch.repeat_interleave(torch.tensor([len(view) for view in views]))
    detections = InstanceData.cat(views)
    keep = nms(detections, iou_thr)[:max_per_image]
    merged = detections[keep]
    if 'masks' in detections:
        masks = [_vote(detections, view_ids, i, iou_thr).bitmap((0, 0, size[1], size[0])) for i in keep.tolist()]
        merged.masks = torch.from_numpy(np.stack(masks) if masks else np.zeros((0, *size), np.uint8)).bool()
    first_sample.pred_instances = merged.to(device)
    return first_sample


def detector_limits(model) -> tuple[float, int | None]:
    """Return the NMS threshold of an mmdet detector and its maximum number of detections per image (None if unset)."""
    test_cfg = getattr(model, 'test_cfg', None) or {}
    test_cfg = test_cfg.get('rcnn') or test_cfg
    return float((test_cfg.get('nms') or {}).get('iou_threshold', IOU_THR)), test_cfg.get('max_per_img')


def nms(detections: InstanceData, iou_thr: float) -> torch.Tensor:
    """Return the indices (k,) that class-wise NMS keeps, by descending score."""
    from mmcv.ops import batched_nms

    if not len(detections):
        return torch.zeros(0, dtype=torch.long)
    config = dict(type='nms', iou_threshold=iou_thr)
    return batched_nms(detections.bboxes, detections.scores, detections.labels, config)[1]


def _vote(detections: InstanceData, view_ids: torch.Tensor, index: int, iou_thr: float) -> CroppedMask:
    """Return the mask by a weighted majority vote of the views with a detection of the same object (the best each)."""
    ious = _overlaps(detections.bboxes[index : index + 1], detections.bboxes)[0]
    ious[detections.labels != detections.labels[index]] = 0
    ious[index] = 1
    views = view_ids[ious >= iou_thr].unique()
    members = [torch.where(view_ids == view, ious, -1).argmax().item() for view in views]
    weights = detections.scores[members].numpy()
    return combine([detections.masks[i] for i in members], weights, max(weights.sum() / 2, 1e-3))


def _overlaps(a: torch.Tensor, b: torch.Tensor, mode: str = 'iou') -> torch.Tensor:
    """Return IoUs (N, M) of boxes (N, 4) and (M, 4), or with 'iof' the fractions of the first that they cover."""
    from mmdet.structures.bbox import bbox_overlaps

    return bbox_overlaps(a, b, mode)


def to_tile_detections(
    instances: InstanceData, window: tuple[int, int, int, int], size: tuple[int, int]
) -> InstanceData:
    """Return mmdet's detections in a tile of an image of size (H, W) in pixels of the image, as `to_detections` does.

    They have the tile's `window` (left, top, right, bottom), and `is_cut`: whether a box touches an edge of the tile
    that is not an edge of the image.
    """
    left, top, right, bottom = window
    detections = to_detections(instances, left, top)
    ends = torch.tensor([left > 0, top > 0, right < size[1], bottom < size[0]])
    distance = (detections.bboxes - torch.tensor(window)).abs()
    detections.is_cut = (ends & (distance <= cut_margin(window))).any(1)
    detections.set_metainfo(dict(window=window))
    return detections


def cut_margin(window: Sequence[int]) -> float:
    """Return the distance in pixels to the edge of a tile within which an object may be cut off."""
    return max(MIN_CUT_MARGIN, CUT_MARGIN * max(window[2] - window[0], window[3] - window[1]))


def merge_tiles(tiles: Sequence[InstanceData], iou_thr: float = IOU_THR) -> InstanceData:
    """Merge the detections of overlapping tiles, so that each object is detected once, and completely.

    Two detections of a class in different tiles are the same object if they agree where the tiles overlap. If a tile
    shows the object completely, that detection is used; otherwise, box and mask are the union over the tiles. A
    fragment that agrees with no other detection is dropped if it lies inside one. Class-wise NMS comes last.

    Args:
        tiles: Detections of at least one tile, from `to_tile_detections`.
        iou_thr: IoU from which two detections agree.

    Returns:
        The detections by descending score.
    """
    starts = np.cumsum([0, *map(len, tiles)])
    pairs = [
        (starts[a] + i, starts[b] + j)
        for a, b in _neighbors(tiles)
        for i, j in _matches(tiles[a], tiles[b], iou_thr).items()
    ]
    detections = InstanceData.cat(tiles)
    merged, parts = _merge_groups(detections, _connected(pairs, starts[-1]))
    keep = torch.from_numpy(np.flatnonzero(~_is_covered(merged)))
    keep = keep[nms(merged[keep], iou_thr)]
    merged = merged[keep]
    if 'masks' in detections:
        masks = ([detections.masks[i] for i in parts[k]] for k in keep.tolist())
        merged.masks = [unite(each) if len(each) > 1 else each[0] for each in masks]
    return merged


def _connected(pairs: Sequence[tuple[int, int]], n: int) -> list[np.ndarray]:
    """Return the sets of the indices 0 to n - 1 that pairs connect."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    if not n:
        return []
    rows, columns = np.reshape(pairs, (-1, 2)).astype(int).T
    labels = connected_components(coo_matrix((np.ones(len(rows)), (rows, columns)), (n, n)), directed=False)[1]
    return np.split(np.argsort(labels, kind='stable'), np.cumsum(np.bincount(labels))[:-1])


def _neighbors(tiles: Sequence[InstanceData]) -> Iterator[tuple[int, int]]:
    """Pairs of tiles that overlap or share an edge, and have detections."""
    windows = np.array([tile.window for tile in tiles])
    low = np.maximum(windows[:, None, :2], windows[None, :, :2])
    high = np.minimum(windows[:, None, 2:], windows[None, :, 2:])
    side = high - low
    touch = (side >= 0).all(2) & (side > 0).any(2)  # not at a corner alone
    return ((a, b) for a, b in zip(*np.nonzero(np.triu(touch, 1))) if len(tiles[a]) and len(tiles[b]))


def _matches(a: InstanceData, b: InstanceData, iou_thr: float) -> dict[int, int]:
    """Return which detections of one tile are which of another; each has at most one partner."""
    windows = torch.tensor([a.window, b.window])
    region = torch.cat([windows[:, :2].amax(0), windows[:, 2:].amin(0)])
    margin = max(cut_margin(a.window), cut_margin(b.window))
    agreement = _overlaps(_clip(a.bboxes, region, margin), _clip(b.bboxes, region, margin))
    both_whole = ~(a.is_cut[:, None] | b.is_cut)
    agreement = torch.where(both_whole, _overlaps(a.bboxes, b.bboxes), agreement)
    agreement[a.labels[:, None] != b.labels] = 0
    if 'masks' in a:
        unclear = (agreement >= MIN_MASK_CHECK) & (agreement < iou_thr) & ~both_whole
        for i, j in unclear.nonzero().tolist():
            agreement[i, j] = max(agreement[i, j], overlap(a.masks[i], b.masks[j], region.tolist()))
    pairs = (agreement >= iou_thr).nonzero()
    scores = a.scores[pairs[:, 0]] * b.scores[pairs[:, 1]]
    partners: dict[int, int] = {}
    for i, j in pairs[scores.argsort(descending=True, stable=True)].tolist():
        if i not in partners and j not in partners.values():
            partners[i] = j
    return partners


def _clip(boxes: torch.Tensor, region: torch.Tensor, margin: float) -> torch.Tensor:
    """Clip boxes (N, 4) to the overlap of two tiles.

    If the overlap is hardly wider than a line, boxes near it are only compared along the line.
    """
    low, high = torch.maximum(boxes[:, :2], region[:2]), torch.minimum(boxes[:, 2:], region[2:])
    for axis in range(2):
        start, end = region[axis], region[axis + 2]
        if end - start < 2 * margin:
            is_near = (boxes[:, axis] <= end + margin) & (boxes[:, axis + 2] >= start - margin)
            low[:, axis], high[:, axis] = 0, is_near.float()
    return torch.cat([low, high], 1)


def _merge_groups(detections: InstanceData, groups: Sequence[np.ndarray]) -> tuple[InstanceData, Sequence[np.ndarray]]:
    """Merge each group into one detection: the best complete one, or the union of all parts, with the highest score.

    Returns:
        The detections, without masks, and with `is_fragment`: whether one is a part that no other tile completes; and
        the indices of the detections that each is the union of.
    """
    boxes, scores, is_cut = (detections[name].numpy() for name in ('bboxes', 'scores', 'is_cut'))
    parts = []
    for group in groups:
        whole = group[~is_cut[group]]
        parts.append(whole[[scores[whole].argmax()]] if len(whole) else group)
    merged = InstanceData(
        bboxes=torch.tensor([[*boxes[i, :2].min(0), *boxes[i, 2:].max(0)] for i in parts]).reshape(-1, 4),
        scores=torch.tensor([scores[group].max() for group in groups]),
        labels=detections.labels[[i[0] for i in parts]],
        is_fragment=torch.tensor([len(group) == 1 and is_cut[group[0]] for group in groups], dtype=torch.bool),
    )
    return merged, parts


def _is_covered(detections: InstanceData) -> np.ndarray:
    """Whether a fragment lies inside a larger detection of its class, (N,) of bool."""
    boxes, scores, labels = (detections[name].numpy() for name in ('bboxes', 'scores', 'labels'))
    covered, areas = np.zeros(len(boxes), bool), (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for i in np.flatnonzero(detections.is_fragment):
        is_larger = (labels == labels[i]) & (areas > areas[i]) & (scores >= MIN_COVER_SCORE * scores[i])
        covers = _overlaps(detections.bboxes[i : i + 1], detections.bboxes[is_larger], 'iof')
        covered[i] = (covers >= FRAGMENT_THR).any()
    return covered
