"""Matching of detections and objects by pycocotools: AP, best thresholds and confusions by class."""

import contextlib
import io
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

MAX_DETS = [100, 1000]  # per image: of AP, as COCO has it, and of all counts
DEFAULT_THRESHOLD = 0.5  # of a class without a correct detection, for which no threshold is the best


class ClassResult(NamedTuple):
    """How well a class is detected; NaN where it has no objects.

    Attributes:
        name: Name of the class.
        num_objects: Number of its objects in the ground truth, without crowds.
        ap: Mean of AP at IoU 0.5, 0.55, ..., 0.95.
        ap50: AP at IoU 0.5.
        threshold: Score at which F1 is the highest, at IoU 0.5.
        precision: Precision of the detections with at least that score.
        recall: Recall of these detections.
        f1: F1 of these detections.
    """

    name: str
    num_objects: int
    ap: float
    ap50: float
    threshold: float
    precision: float
    recall: float
    f1: float


class Pair(NamedTuple):
    """Annotations of an object and the detection that matches it; either is None where it has no counterpart."""

    image_id: int
    gt: dict | None
    dt: dict | None

    @property
    def is_correct(self) -> bool:
        """Whether the classes agree."""
        return bool(self.gt and self.dt) and self.gt['category_id'] == self.dt['category_id']


def index_coco(images: Sequence[dict], categories: Sequence[dict], annotations: Sequence[dict]) -> COCO:
    """Build a COCO object without printing."""
    coco = COCO()
    coco.dataset = dict(images=list(images), categories=list(categories), annotations=list(annotations))
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def load_detections(gt: COCO, detections: Sequence[dict]) -> COCO:
    """Index detections in COCO's result format, which may be none."""
    if not detections:
        return index_coco(gt.dataset['images'], gt.dataset['categories'], [])
    with contextlib.redirect_stdout(io.StringIO()):
        return gt.loadRes(list(detections))


def evaluate_coco(
    gt: COCO,
    dt: COCO,
    category_ids: Sequence[int],
    iou_type: str,
    image_ids: Sequence[int],
    use_categories: bool = True,
) -> COCOeval:
    """Run pycocotools' evaluation over objects of all sizes, without printing.

    Args:
        gt: Ground truth.
        dt: Detections.
        category_ids: Ids of the classes.
        iou_type: 'bbox' or 'segm'.
        image_ids: Ids of the images that were tested.
        use_categories: Whether only objects and detections of the same class match.
    """
    evaluation = COCOeval(gt, dt, iou_type)
    params = evaluation.params
    params.catIds, params.imgIds, params.maxDets = list(category_ids), list(image_ids), list(MAX_DETS)
    params.areaRng, params.areaRngLbl, params.useCats = [[0, 1e10]], ['all'], int(use_categories)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        if use_categories:
            evaluation.accumulate()
    return evaluation


def class_results(evaluation: COCOeval) -> list[ClassResult]:
    """Return the results of all classes, in the order of their ids."""
    by_category = defaultdict(list)
    for image in filter(None, evaluation.evalImgs):
        by_category[image['category_id']].append(image)
    precision = np.where(evaluation.eval['precision'] < 0, np.nan, evaluation.eval['precision'])
    results = []
    for k, category_id in enumerate(evaluation.params.catIds):
        images = by_category[category_id]
        num_objects = int(sum(np.count_nonzero(image['gtIgnore'] == 0) for image in images))
        ap, ap50 = precision[:, :, k, 0, 0].mean(), precision[0, :, k, 0, 0].mean()
        name = evaluation.cocoGt.cats[category_id]['name']
        results.append(ClassResult(name, num_objects, float(ap), float(ap50), *_best_threshold(images, num_objects)))
    return results


def _best_threshold(images: Sequence[dict], num_objects: int) -> tuple[float, float, float, float]:
    """Return the score with the highest F1 at the first IoU, and precision, recall and F1 there."""
    if not num_objects:
        return (np.nan,) * 4
    scores = np.concatenate([image['dtScores'] for image in images])
    ignored = np.concatenate([image['dtIgnore'][0] for image in images]).astype(bool)
    is_correct = np.concatenate([image['dtMatches'][0] for image in images]).astype(bool)
    order = np.argsort(-scores[~ignored], kind='stable')
    scores, num_correct = scores[~ignored][order], np.cumsum(is_correct[~ignored][order])
    last_of_score = np.flatnonzero(np.diff(scores, append=-np.inf))  # equal scores are above a threshold together
    if not len(num_correct) or not num_correct[-1]:
        return np.nan, np.nan, 0.0, 0.0
    scores, num_correct, count = scores[last_of_score], num_correct[last_of_score], last_of_score + 1
    f1 = 2 * num_correct / (count + num_objects)
    best = int(f1.argmax())
    precision, recall = num_correct[best] / count[best], num_correct[best] / num_objects
    return tuple(map(float, (scores[best], precision, recall, f1[best])))


def match_at_thresholds(evaluation: COCOeval, results: Sequence[ClassResult]) -> list[Pair]:
    """Pair objects and detections at IoU 0.5 and the best score of each class.

    First those of the same class, as for AP; then what is left, whatever its class. Crowds, and the detections that
    they hold, are left out. The results are those of `class_results`.
    """
    thresholds = {
        category_id: DEFAULT_THRESHOLD if np.isnan(result.threshold) else result.threshold
        for category_id, result in zip(evaluation.params.catIds, results)
    }
    gt, dt, pairs, objects, detections = evaluation.cocoGt, evaluation.cocoDt, [], [], []
    for image in filter(None, evaluation.evalImgs):
        matched = set()
        rows = zip(image['dtIds'], image['dtScores'], image['dtMatches'][0], image['dtIgnore'][0])
        for dt_id, score, gt_id, is_ignored in rows:
            if score < thresholds[image['category_id']] or is_ignored:
                continue
            if gt_id:
                matched.add(gt_id)
                pairs.append(Pair(image['image_id'], gt.anns[gt_id], dt.anns[dt_id]))
            else:
                detections.append(dt.anns[dt_id])
        is_object = image['gtIgnore'] == 0
        objects += [gt.anns[i] for i, ok in zip(image['gtIds'], is_object) if ok and i not in matched]
    return pairs + _match_any_class(evaluation, objects, detections)


def _match_any_class(evaluation: COCOeval, objects: Sequence[dict], detections: Sequence[dict]) -> list[Pair]:
    params, dataset = evaluation.params, evaluation.cocoGt.dataset
    # Ids from 1 on: pycocotools takes 0 for no match.
    gt, dt = (
        index_coco(dataset['images'], dataset['categories'], [{**ann, 'id': i} for i, ann in enumerate(annotations, 1)])
        for annotations in (objects, detections)
    )
    matches = evaluate_coco(gt, dt, params.catIds, params.iouType, params.imgIds, use_categories=False)
    pairs = []
    for image in filter(None, matches.evalImgs):
        image_id, gt_ids = image['image_id'], image['dtMatches'][0].astype(int)
        for dt_id, gt_id in zip(image['dtIds'], gt_ids):
            pairs.append(Pair(image_id, objects[gt_id - 1] if gt_id else None, detections[dt_id - 1]))
        pairs += [Pair(image_id, objects[i - 1], None) for i in image['gtIds'] if i not in set(gt_ids)]
    return pairs


def confusion_matrix(pairs: Sequence[Pair], category_ids: Sequence[int]) -> np.ndarray:
    """Count the pairs of `match_at_thresholds` by class, in the order of the ids.

    Returns:
        Counts (C + 1, C + 1): rows are classes of objects, columns of detections; the last of either is the background.
    """
    index = {category_id: i for i, category_id in enumerate(category_ids)}
    matrix = np.zeros((len(index) + 1,) * 2, np.int64)
    for pair in pairs:
        row, column = (index[ann['category_id']] if ann else len(index) for ann in (pair.gt, pair.dt))
        matrix[row, column] += 1
    return matrix
