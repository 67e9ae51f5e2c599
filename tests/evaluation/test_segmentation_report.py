"""The report of a segmentor's test, against IoUMetric and an independent count."""

import csv

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import PixelData
from mmseg.evaluation import IoUMetric

from convnext_dense.evaluation import segmentation_report
from convnext_dense.evaluation.segmentation_report import SegmentationReport

CLASSES = ('ground', 'a', 'b', 'never')


@pytest.fixture
def samples(tmp_path):
    """Eight images with an increasing number of wrong pixels; borders are ignored, and the whole last image."""
    rng = np.random.RandomState(0)
    samples = []
    for i in range(8):
        label = rng.randint(0, 3, (20, 30))
        pred = np.where(rng.rand(20, 30) < i / 10, rng.randint(0, 3, (20, 30)), label)
        label[:2] = 255
        if i == 7:
            label[:] = 255
        path = tmp_path / f'{i}.png'
        cv2.imwrite(str(path), rng.randint(0, 255, (20, 30, 3)))
        maps = dict(gt_sem_seg=label, pred_sem_seg=pred)
        samples.append({k: PixelData(data=torch.from_numpy(v)[None]) for k, v in maps.items()})
        samples[-1] = {k: dict(data=v.data) for k, v in samples[-1].items()} | dict(img_path=str(path))
    return samples


def run_metric(metric, samples):
    metric.dataset_meta = dict(classes=CLASSES)
    for i in range(0, len(samples), 2):
        metric.process({}, samples[i : i + 2])
    return metric.evaluate(len(samples))


def read_csv(file):
    with open(file, newline='') as stream:
        return list(csv.DictReader(stream))


def test_metric_writes_its_report(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(segmentation_report, 'NUM_WORST_IMAGES', 3)
    metric = SegmentationReport(report_dir=str(tmp_path / 'report'))
    metrics = run_metric(metric, samples)
    assert metrics == run_metric(IoUMetric(), samples)
    expected = np.zeros((4, 4), int)
    for sample in samples:
        for t, p in zip(sample['gt_sem_seg']['data'].flatten(), sample['pred_sem_seg']['data'].flatten()):
            if t != 255:
                expected[t, p] += 1
    rows = read_csv(tmp_path / 'report/confusion.csv')
    assert [[int(row[name]) for name in CLASSES] for row in rows] == expected.tolist()
    *classes, mean = read_csv(tmp_path / 'report/classes.csv')
    for k, row in enumerate(classes[:3]):
        n_correct = expected[k, k]
        assert float(row['IoU']) == pytest.approx(
            100 * n_correct / (expected[k].sum() + expected[:, k].sum() - n_correct)
        )
        assert float(row['Acc']) == pytest.approx(100 * n_correct / expected[k].sum())
        assert float(row['precision']) == pytest.approx(100 * n_correct / expected[:, k].sum())
    assert classes[3]['IoU'] == classes[3]['Acc'] == ''
    assert float(mean['IoU']) == pytest.approx(metrics['mIoU'], abs=0.006)
    images = read_csv(tmp_path / 'report/images.csv')
    names = [row['image'].split('/')[-1] for row in images]
    assert names == [f'{i}.png' for i in (6, 5, 4, 3, 2, 1, 0)]  # the ignored image is left out
    assert float(images[-1]['mIoU']) == 100
    pictures = sorted(path.name for path in (tmp_path / 'report/worst_images').iterdir())
    assert pictures == ['01_6.jpg', '02_5.jpg', '03_4.jpg']


def test_only_the_worst_images_keep_their_masks(samples, monkeypatch):
    monkeypatch.setattr(segmentation_report, 'NUM_WORST_IMAGES', 3)
    metric = SegmentationReport(report_dir='unused')
    metric.dataset_meta = dict(classes=CLASSES)
    for sample in [samples[i] for i in (6, 0, 2, 5, 1, 4, 3)]:
        metric.process({}, [sample])
    images_with_maps = [image.path.split('/')[-1] for _, image in metric.results if image.maps]
    assert images_with_maps == ['6.png', '5.png', '4.png']
