"""The report of a detector's test: cases by hand, and against an independent count."""

import csv

import cv2
import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from PIL import Image

from convnext_dense.evaluation import worst_images
from convnext_dense.evaluation.coco_matches import (
    class_results,
    confusion_matrix,
    evaluate_coco,
    index_coco,
    load_detections,
    match_at_thresholds,
)
from convnext_dense.evaluation.detection_report import DetectionReport, image_errors
from helpers.datasets import write_json

CATEGORIES = [dict(id=3, name='cat'), dict(id=7, name='dog'), dict(id=9, name='never, "there"')]
IDS = [3, 7, 9]


def objects(*rows):
    """Ground truth from (image, category, box) or with a fourth value for crowds."""
    return [
        dict(id=i, image_id=image, category_id=category, bbox=list(box), area=box[2] * box[3], iscrowd=int(bool(crowd)))
        for i, (image, category, box, *crowd) in enumerate(rows, 1)
    ]


def detections(*rows):
    return [
        dict(image_id=image, category_id=category, bbox=list(box), score=score) for image, category, box, score in rows
    ]


def evaluate(gt, dt, num_images=1):
    images = [dict(id=i, width=100, height=100, file_name=f'{i}.png') for i in range(num_images)]
    gt = index_coco(images, CATEGORIES, gt)
    return evaluate_coco(gt, load_detections(gt, dt), IDS, 'bbox', list(range(num_images)))


A, B, C, D, E = [0, 0, 20, 20], [40, 0, 20, 20], [0, 40, 20, 20], [40, 40, 20, 20], [75, 75, 20, 20]


def test_confusion_matrix_and_image_errors_by_hand():
    """Cats in A, B, C; a dog in D; a crowd of dogs in E. C is detected as a dog, B has two detections, D is missed."""
    gt = objects((0, 3, A), (0, 3, B), (0, 3, C), (0, 7, D), (0, 7, E, True))
    dt = detections((0, 3, A, 0.9), (0, 3, B, 0.8), (0, 3, B, 0.8), (0, 7, C, 0.7), (0, 7, E, 0.95), (0, 9, E, 0.6))
    evaluation = evaluate(gt, dt)
    cat, dog, never = class_results(evaluation)
    # Both detections of B have the same score and are counted together.
    assert (cat.num_objects, cat.threshold) == (3, 0.8)
    assert (cat.precision, cat.recall, cat.f1) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert (dog.num_objects, dog.f1, dog.recall) == (1, 0, 0) and np.isnan([dog.threshold, dog.precision]).all()
    assert (never.name, never.num_objects) == ('never, "there"', 0) and np.isnan(never[2:]).all()
    pairs = match_at_thresholds(evaluation, [cat, dog, never])
    matrix = confusion_matrix(pairs, IDS)
    assert matrix.tolist() == [
        [2, 1, 0, 0],  # A and B are correct, C is detected as a dog
        [0, 0, 0, 1],  # D is missed; the crowd and the dog detected in it are ignored
        [0, 0, 0, 0],
        [1, 0, 1, 0],  # the second detection of B; the class without objects, in the crowd
    ]
    assert image_errors(pairs) == (pytest.approx(4 / 9), 2, 1, 2, 1)


def test_correct_class_is_matched_before_a_higher_score():
    gt = objects((0, 3, A), (0, 7, B))
    dt = detections((0, 7, A, 0.9), (0, 3, A, 0.8), (0, 7, B, 0.85))
    evaluation = evaluate(gt, dt)
    matrix = confusion_matrix(match_at_thresholds(evaluation, class_results(evaluation)), IDS)
    assert matrix[0, 0] == 1 and matrix[3, 1] == 1  # not: A matched to the dog, and the cat a false positive


def test_no_detections_or_no_objects():
    evaluation = evaluate(objects((0, 3, A)), [])
    cat = class_results(evaluation)[0]
    assert (cat.ap, cat.f1, cat.recall) == (0, 0, 0)
    assert confusion_matrix(match_at_thresholds(evaluation, class_results(evaluation)), IDS)[0, 3] == 1
    assert image_errors([]) == (1.0, 0, 0, 0, 0)


def iou(a, b):
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / (a[2] * a[3] + b[2] * b[3] - inter)


def count_by_loop(gt, dt, category, threshold):
    """Correct detections, detections and objects of a class, by a loop over detections from the threshold on."""
    dt = [d for d in dt if d['category_id'] == category and d['score'] >= threshold]
    gt = [g for g in gt if g['category_id'] == category]
    unmatched, n_correct = list(gt), 0
    for d in sorted(dt, key=lambda d: -d['score']):
        candidates = [g for g in unmatched if g['image_id'] == d['image_id'] and iou(g['bbox'], d['bbox']) >= 0.5]
        if candidates:
            n_correct += 1
            unmatched.remove(max(candidates, key=lambda g: iou(g['bbox'], d['bbox'])))
    return n_correct, len(dt), len(gt)


def random_data(seed, n_images=6):
    rng = np.random.RandomState(seed)
    box = lambda: [*rng.uniform(0, 70, 2), *rng.uniform(10, 30, 2)]  # noqa: E731
    gt = objects(*[(int(rng.randint(n_images)), int(rng.choice([3, 7])), box()) for _ in range(30)])
    near_detections = [
        (g['image_id'], int(g['category_id'] if rng.rand() < 0.8 else rng.choice(IDS)), g['bbox'] + rng.normal(0, 2, 4))
        for g in gt
        for _ in range(rng.randint(3))
    ]
    rows = [*near_detections, *[(int(rng.randint(n_images)), int(rng.choice(IDS)), box()) for _ in range(20)]]
    return gt, detections(*[(i, c, [float(v) for v in b], round(float(rng.rand()), 2)) for i, c, b in rows])


@pytest.mark.parametrize('seed', range(4))
def test_best_threshold_and_confusions_equal_a_loop(seed):
    gt, dt = random_data(seed)
    evaluation = evaluate(gt, dt, 6)
    results = class_results(evaluation)
    matrix = confusion_matrix(match_at_thresholds(evaluation, results), IDS)
    n_used = 0
    for k, (category, result) in enumerate(zip(IDS[:2], results)):
        scores = {d['score'] for d in dt if d['category_id'] == category}
        f1s = {t: 2 * r / (n + m) for t in scores for r, n, m in [count_by_loop(gt, dt, category, t)]}
        assert result.f1 == pytest.approx(max(f1s.values())) and f1s[result.threshold] == max(f1s.values())
        n_correct, n_dt, n_gt = count_by_loop(gt, dt, category, result.threshold)
        assert (result.precision, result.recall, result.num_objects) == pytest.approx(
            (n_correct / n_dt, n_correct / n_gt, n_gt)
        )
        assert (matrix[k, k], matrix[:, k].sum(), matrix[k].sum()) == (n_correct, n_dt, n_gt)
        n_used += n_dt
    n_never = sum(d['category_id'] == 9 and d['score'] >= 0.5 for d in dt)
    assert matrix[:, :3].sum() == n_used + n_never and matrix[2].sum() == 0


@pytest.fixture
def coco_dataset(tmp_path):
    """Images, their COCO file and samples as a detector returns them, with boxes and masks; one file is missing."""
    gt, dt = random_data(5)
    images = []
    for i in range(6):
        cv2.imwrite(str(tmp_path / f'{i}.png'), np.full((100, 100, 3), 40 * i, np.uint8))
        images.append(dict(id=i, width=100, height=100, file_name=f'{i}.png'))
    for annotation in gt:
        x, y, w, h = annotation['bbox']
        annotation['segmentation'] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    write_json(dict(images=images, annotations=gt, categories=CATEGORIES), tmp_path / 'gt.json')
    samples = []
    for i in range(6):
        image_detections = [d for d in dt if d['image_id'] == i]
        boxes = torch.tensor([d['bbox'] for d in image_detections]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = torch.zeros(len(image_detections), 100, 100, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().long().clamp(0, 100)):
            mask[y1:y2, x1:x2] = True
        instances = dict(bboxes=boxes, scores=torch.tensor([d['score'] for d in image_detections]), masks=masks)
        instances['labels'] = torch.tensor([IDS.index(d['category_id']) for d in image_detections])
        samples.append(
            dict(img_id=i, img_path=str(tmp_path / f'{i}.png'), ori_shape=(100, 100), pred_instances=instances)
        )
    (tmp_path / '3.png').unlink()
    return tmp_path, samples


def run_metric(metric, samples):
    metric.dataset_meta = dict(classes=[category['name'] for category in CATEGORIES])
    for sample in samples:
        metric.process({}, [sample])
    return metric.evaluate(len(samples))


def read_csv(file):
    with open(file, newline='') as stream:
        return list(csv.DictReader(stream))


def test_metric_writes_its_report(coco_dataset, monkeypatch):
    folder, samples = coco_dataset
    lines = []
    monkeypatch.setattr(worst_images, 'print_log', lambda text, **_: lines.append(text))
    common = dict(ann_file=str(folder / 'gt.json'), metric=['bbox', 'segm'])
    metrics = run_metric(DetectionReport(report_dir=str(folder / 'report'), **common), samples)
    assert metrics == run_metric(CocoMetric(**common), samples)  # the metrics do not change
    for iou_type in ('bbox', 'segm'):
        *classes, mean = read_csv(folder / f'report/classes_{iou_type}.csv')
        assert [row['class'] for row in classes] == [category['name'] for category in CATEGORIES]
        assert float(mean['AP']) / 100 == pytest.approx(metrics[f'coco/{iou_type}_mAP'], abs=5.1e-4)
        assert float(mean['AP50']) / 100 == pytest.approx(metrics[f'coco/{iou_type}_mAP_50'], abs=5.1e-4)
        assert classes[2]['AP'] == ''
        for name in ('confusion', 'pr_curves'):
            width, height = Image.open(folder / f'report/{name}_{iou_type}.png').size
            assert width > 300 and height > 300
    images = read_csv(folder / 'report/images.csv')
    f1 = [float(row['F1']) for row in images]
    assert len(images) == 6 and f1 == sorted(f1)
    pictures = sorted(path.name for path in (folder / 'report/worst_images').iterdir())
    names = [row['image'].split('/')[-1].split('.')[0] for row in images]
    assert pictures == [f'{n:02}_{name}.jpg' for n, name in enumerate(names, 1) if name != '3']
    assert len(lines) == 1 and '3.png' in lines[0] and 'cannot be drawn' in lines[0]


def test_boxes_without_masks_and_no_detections(coco_dataset):
    folder, samples = coco_dataset
    empty = dict(bboxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.long))
    samples = [{**sample, 'pred_instances': empty} for sample in samples]
    report = folder / 'report'
    run_metric(DetectionReport(report_dir=str(report), ann_file=str(folder / 'gt.json'), metric='bbox'), samples)
    assert not (report / 'classes_segm.csv').exists()
    assert {row['recall'] for row in read_csv(report / 'classes_bbox.csv')[:2]} == {'0.0'}
    assert sum(int(row['missed']) for row in read_csv(report / 'images.csv')) == 30
