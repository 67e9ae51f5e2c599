"""Merge the detections of several views of an image, or of its tiles."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

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


@dataclass
class Detections:
    """Detections in pixels of the image.

    Attributes:
        boxes: (N, 4) xyxy in pixels, float32.
        scores: (N,), float32.
        labels: Class indices, (N,).
        masks: N masks; None for a model without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[CroppedMask] | None = None

    @classmethod
    def from_instances(cls, instances: InstanceData, left: int = 0, top: int = 0) -> 'Detections':
        """Convert mmdet's detections in an image, or in a part of it whose upper left pixel is (left, top)."""
        boxes = instances.bboxes.float().cpu().numpy().reshape(-1, 4) + np.float32([left, top, left, top])
        masks = None
        if 'masks' in instances:
            masks = [CroppedMask.from_bitmap(np.asarray(mask.cpu()), left, top) for mask in instances.masks]
        return cls(boxes, instances.scores.float().cpu().numpy(), instances.labels.cpu().numpy(), masks)

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, indices: np.ndarray) -> 'Detections':
        masks = None if self.masks is None else [self.masks[i] for i in indices]
        return Detections(self.boxes[indices], self.scores[indices], self.labels[indices], masks)

    @staticmethod
    def concatenate(parts: Sequence['Detections']) -> 'Detections':
        """Concatenate at least one set of detections."""
        masks = None if parts[0].masks is None else [mask for part in parts for mask in part.masks]
        return Detections(
            *(np.concatenate([getattr(p, n) for p in parts]) for n in ('boxes', 'scores', 'labels')), masks
        )

    def to_instances(self, masks: torch.Tensor | list[dict] | None) -> InstanceData:
        """Convert to mmdet's InstanceData, with masks as a tensor (N, H, W) or as COCO RLEs."""
        names = ('boxes', 'scores', 'labels')
        boxes, scores, labels = (torch.from_numpy(np.ascontiguousarray(getattr(self, name))) for name in names)
        return InstanceData(bboxes=boxes, scores=scores, labels=labels, **({} if masks is None else dict(masks=masks)))


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
        views.append(Detections.from_instances(sample.pred_instances))
        if sample is not first_sample:
            del sample.pred_instances
    size = first_sample.ori_shape[:2]
    view_ids = np.repeat(np.arange(len(views)), [len(view) for view in views])
    detections = Detections.concatenate(views)
    keep = nms(detections, iou_thr)[:max_per_image]
    merged, masks = detections[keep], None
    if merged.masks is not None:
        voted = [_vote(detections, view_ids, i, iou_thr) for i in keep]
        bitmaps = [mask.bitmap((0, 0, size[1], size[0])).astype(bool) for mask in voted]
        masks = torch.from_numpy(np.stack(bitmaps) if bitmaps else np.zeros((0, *size), bool)).to(device)
    first_sample.pred_instances = merged.to_instances(masks).to(device)
    return first_sample


def detector_limits(model) -> tuple[float, int | None]:
    """Return the NMS threshold of an mmdet detector and its maximum number of detections per image (None if unset)."""
    test_cfg = getattr(model, 'test_cfg', None) or {}
    test_cfg = test_cfg.get('rcnn') or test_cfg
    return float((test_cfg.get('nms') or {}).get('iou_threshold', IOU_THR)), test_cfg.get('max_per_img')


def nms(detections: Detections, iou_thr: float) -> np.ndarray:
    """Return the indices (k,) that class-wise NMS keeps, by descending score."""
    from mmcv.ops import batched_nms

    if not len(detections):
        return np.zeros(0, np.int64)
    boxes, scores, labels = (torch.from_numpy(getattr(detections, n)) for n in ('boxes', 'scores', 'labels'))
    return batched_nms(boxes, scores, labels, dict(type='nms', iou_threshold=iou_thr))[1].numpy()


def _vote(detections: Detections, view_ids: np.ndarray, index: int, iou_thr: float) -> CroppedMask:
    """Return the mask by a weighted majority vote of the views with a detection of the same object (the best each)."""
    ious = box_ious(detections.boxes[index : index + 1], detections.boxes)[0]
    ious[detections.labels != detections.labels[index]] = 0
    ious[index] = 1
    members = []
    for view in np.unique(view_ids[ious >= iou_thr]):
        in_view = np.flatnonzero(view_ids == view)
        members.append(in_view[ious[in_view].argmax()])
    weights = detections.scores[members]
    return combine([detections.masks[i] for i in members], weights, max(weights.sum() / 2, 1e-3))


def box_ious(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the IoUs (N, M) of boxes (N, 4) and (M, 4) xyxy; 0 for empty boxes."""
    inter = intersections(a, b)
    union = box_areas(a)[:, None] + box_areas(b)[None] - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def intersections(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the intersection areas (N, M) of boxes (N, 4) and (M, 4) xyxy."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return (high - low).clip(0).prod(2)


def box_areas(boxes: np.ndarray) -> np.ndarray:
    """Return the areas (N,) of boxes (N, 4) xyxy."""
    return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1)


@dataclass
class TileDetections:
    """Detections of one tile.

    Attributes:
        window: Left, top, right and bottom of the tile in the image.
        detections: Detections in pixels of the image.
        is_cut: Whether a box touches an edge of the tile that is not an edge of the image, (N,).
    """

    window: tuple[int, int, int, int]
    detections: Detections
    is_cut: np.ndarray

    @classmethod
    def from_instances(
        cls, instances: InstanceData, window: tuple[int, int, int, int], size: tuple[int, int]
    ) -> 'TileDetections':
        """Convert detections in pixels of the tile at `window` of an image of size (H, W)."""
        detections = Detections.from_instances(instances, *window[:2])
        ends = np.array([window[0] > 0, window[1] > 0, window[2] < size[1], window[3] < size[0]])
        distance = np.abs(detections.boxes - np.float32(window))
        return cls(window, detections, (ends & (distance <= cut_margin(window))).any(1))


def cut_margin(window: Sequence[int]) -> float:
    """Return the distance in pixels to the edge of a tile within which an object may be cut off."""
    return max(MIN_CUT_MARGIN, CUT_MARGIN * max(window[2] - window[0], window[3] - window[1]))


def merge_tiles(tiles: Sequence[TileDetections], iou_thr: float = IOU_THR) -> Detections:
    """Merge the detections of overlapping tiles, so that each object is detected once, and completely.

    Two detections of a class in different tiles are the same object if they agree where the tiles overlap. If a tile
    shows the object completely, that detection is used; otherwise, box and mask are the union over the tiles. A
    fragment that agrees with no other detection is dropped if it lies inside one. Class-wise NMS comes last.

    Args:
        tiles: Detections of at least one tile.
        iou_thr: IoU from which two detections agree.

    Returns:
        The detections by descending score.
    """
    starts = np.cumsum([0, *(len(tile.detections) for tile in tiles)])
    detections = Detections.concatenate([tile.detections for tile in tiles])
    is_cut = np.concatenate([tile.is_cut for tile in tiles])
    groups = _Groups(len(detections))
    for a, b in _neighbors(tiles):
        for i, j in _matches(tiles[a], tiles[b], iou_thr):
            groups.join(starts[a] + i, starts[b] + j)
    members = groups.members()
    merged = _merge_groups(detections, is_cut, members)
    is_fragment = np.array([len(group) == 1 and is_cut[group[0]] for group in members], bool)
    merged = merged[np.flatnonzero(~_is_covered(merged, is_fragment))]
    return merged[nms(merged, iou_thr)]


class _Groups:
    """Disjoint sets of the indices 0 to n - 1 (union-find)."""

    def __init__(self, n: int):
        self.parent = list(range(n))

    def root(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        self.parent[self.root(j)] = self.root(i)

    def members(self) -> list[list[int]]:
        groups = defaultdict(list)
        for i in range(len(self.parent)):
            groups[self.root(i)].append(i)
        return list(groups.values())


def _neighbors(tiles: Sequence[TileDetections]) -> Iterator[tuple[int, int]]:
    """Pairs of tiles that overlap or share an edge, and have detections."""
    windows = np.array([tile.window for tile in tiles])
    low = np.maximum(windows[:, None, :2], windows[None, :, :2])
    high = np.minimum(windows[:, None, 2:], windows[None, :, 2:])
    side = high - low
    touch = (side >= 0).all(2) & (side > 0).any(2)  # not at a corner alone
    for a, b in zip(*np.nonzero(np.triu(touch, 1))):
        if len(tiles[a].detections) and len(tiles[b].detections):
            yield a, b


def _matches(a: TileDetections, b: TileDetections, iou_thr: float) -> list[tuple[int, int]]:
    """Return pairs of indices of detections in two tiles that are the same object; each has at most one partner."""
    region = np.array([*np.maximum(a.window, b.window)[:2], *np.minimum(a.window, b.window)[2:]])
    margin = max(cut_margin(a.window), cut_margin(b.window))
    parts = [_clip(tile.detections.boxes, region, margin) for tile in (a, b)]
    agreement = box_ious(*parts)
    both_whole = ~(a.is_cut[:, None] | b.is_cut[None])
    agreement = np.where(both_whole, box_ious(a.detections.boxes, b.detections.boxes), agreement)
    agreement[a.detections.labels[:, None] != b.detections.labels[None]] = 0
    if a.detections.masks is not None:
        for i, j in zip(*np.nonzero((agreement >= MIN_MASK_CHECK) & (agreement < iou_thr) & ~both_whole)):
            masks = a.detections.masks[i], b.detections.masks[j]
            agreement[i, j] = max(agreement[i, j], overlap(*masks, region))
    rows, columns = np.nonzero(agreement >= iou_thr)
    scores = a.detections.scores[rows] * b.detections.scores[columns]
    pairs, used = [], (set(), set())
    for k in np.argsort(-scores, kind='stable'):
        i, j = int(rows[k]), int(columns[k])
        if i not in used[0] and j not in used[1]:
            pairs.append((i, j))
            used[0].add(i)
            used[1].add(j)
    return pairs


def _clip(boxes: np.ndarray, region: np.ndarray, margin: float) -> np.ndarray:
    """Clip boxes (N, 4) to the overlap of two tiles.

    If the overlap is hardly wider than a line, boxes near it are only compared along the line.
    """
    low, high = np.maximum(boxes[:, :2], region[:2]), np.minimum(boxes[:, 2:], region[2:])
    for axis in range(2):
        start, end = region[axis], region[axis + 2]
        if end - start < 2 * margin:
            is_near = (boxes[:, axis] <= end + margin) & (boxes[:, axis + 2] >= start - margin)
            low[:, axis], high[:, axis] = 0, is_near
    return np.concatenate([low, high], 1)


def _merge_groups(detections: Detections, is_cut: np.ndarray, groups: Sequence[Sequence[int]]) -> Detections:
    """Merge each group into one detection: the best complete one, or the union of all parts, with the highest score."""
    best = np.zeros(len(groups), np.int64)
    boxes, masks = np.zeros((len(groups), 4), np.float32), []
    scores = np.zeros(len(groups), np.float32)
    for g, group in enumerate(groups):
        scores[g] = detections.scores[group].max()
        chosen = [i for i in group if not is_cut[i]] or list(group)
        if not is_cut[chosen[0]]:
            chosen = [max(chosen, key=lambda i: detections.scores[i])]
        best[g] = chosen[0]
        boxes[g, :2], boxes[g, 2:] = detections.boxes[chosen, :2].min(0), detections.boxes[chosen, 2:].max(0)
        if detections.masks is not None:
            parts = [detections.masks[i] for i in chosen]
            masks.append(unite(parts) if len(parts) > 1 else parts[0])
    return Detections(boxes, scores, detections.labels[best], None if detections.masks is None else masks)


def _is_covered(detections: Detections, is_fragment: np.ndarray) -> np.ndarray:
    """Whether a fragment lies inside a larger detection of its class, (N,) of bool."""
    covered = np.zeros(len(detections), bool)
    areas = box_areas(detections.boxes)
    for i in np.flatnonzero(is_fragment):
        larger = (detections.labels == detections.labels[i]) & (areas > areas[i])
        larger &= detections.scores >= MIN_COVER_SCORE * detections.scores[i]
        inter = intersections(detections.boxes[i : i + 1], detections.boxes[larger])[0]
        covered[i] = bool((inter >= FRAGMENT_THR * max(areas[i], 1e-6)).any())
    return covered
