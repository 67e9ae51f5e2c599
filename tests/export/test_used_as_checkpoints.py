"""Exported demo models where checkpoints go: tools/predict.py, `load_model` and tools/test.py return the same."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from convnext_dense import load_model
from convnext_dense.cli import predict as tool
from convnext_dense.datasets import toy_shapes
from convnext_dense.export.files import onnx_to_openvino, write_onnx, write_pt2
from convnext_dense.export.program import ExportOptions, trace
from helpers.checkpoints import draw_photo, save_checkpoint
from helpers.datasets import predictions_as_labels, run
from helpers.paths import ROOT
from helpers.processes import WITHOUT_WORKERS
from helpers.tools import WITH

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('openvino')
SUFFIXES = ('.onnx', '.xml')


@pytest.fixture(scope='module')
def segmentors(tmp_path_factory):
    """The checkpoint of a demo segmentor, and its exported files, by suffix."""
    folder = tmp_path_factory.mktemp('upernet')
    paths = {suffix: folder / f'upernet{suffix}' for suffix in ('.pth', '.onnx', '.xml', '.pt2')}
    save_checkpoint('upernet', paths['.pth'])
    traced = trace(load_model(paths['.pth'], device='cpu'), ExportOptions())
    write_onnx(traced, paths['.onnx'])
    write_pt2(traced, paths['.pt2'])
    onnx_to_openvino(paths['.onnx'], paths['.xml'], traced.meta)
    return paths


@pytest.fixture(scope='module')
def detectors(checkpoints, files):
    """The same of a demo detector."""
    return {'.pth': checkpoints['mask_rcnn'], **files('mask_rcnn')}


@pytest.fixture(scope='module')
def photos():
    rng = np.random.RandomState(5)
    return [draw_photo(rng, *size) for size in ((90, 120), (121, 67), (64, 200), (300, 150))]


@pytest.mark.parametrize('suffix', [*SUFFIXES, '.pt2'])
def test_detections_equal_the_checkpoint(suffix, detectors, photos):
    expected, actual = (
        load_model(detectors[s], device='cpu').predict(photos, channel_order='bgr', score_thr=0.01, batch_size=2)
        for s in ('.pth', suffix)
    )
    for a, b in zip(expected, actual):
        a, b = a.pred_instances, b.pred_instances
        assert len(a) > 20 and abs(len(a) - len(b)) <= 1
        distance = (a.bboxes[:, None] - b.bboxes[None]).abs().amax(2) / 1e-2
        distance = distance.maximum((a.scores[:, None] - b.scores[None]).abs() / 1e-4)
        distance[a.labels[:, None] != b.labels[None]] = np.inf
        nearest = distance.min(1)
        assert (nearest.values > 1).sum() <= 1  # one of scores that tie
        is_equal = nearest.values <= 1
        masks = a.masks[is_equal], b.masks[nearest.indices[is_equal]]
        overlap, union = (masks[0] & masks[1]).sum((1, 2)), (masks[0] | masks[1]).sum((1, 2))
        assert (union - overlap).sum() <= 1e-3 * union.sum() and (overlap >= 0.99 * union - 2).all()


@pytest.mark.parametrize('suffix', [*SUFFIXES, pytest.param('.pt2', marks=pytest.mark.slow)])
def test_segmentation_masks_equal_the_checkpoint(suffix, segmentors, photos):
    expected, actual = (
        load_model(segmentors[s], device='cpu').predict(photos, channel_order='bgr') for s in ('.pth', suffix)
    )
    equal = [(a.pred_sem_seg.data == b.pred_sem_seg.data).float() for a, b in zip(expected, actual)]
    assert sum(e.sum() for e in equal) >= 0.9999 * sum(e.numel() for e in equal)
    assert all(len(a.pred_sem_seg.data.unique()) > 1 for a in expected)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Eight images, whose labels are to be written: what the checkpoint itself finds, displaced."""
    toy_shapes.write(tmp_path / 'shapes', train=1, val=8, size=96)
    monkeypatch.setenv('SHAPES_ROOT', str(tmp_path / 'shapes'))
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'shapes'


def predict(*args):
    args = [*map(str, args), '--device', 'cpu', '--no-pictures']
    assert tool.predict(tool.make_predict_parser('').parse_args(args)) == 0


def measure(recipe, file, folder):
    """The metrics that tools/test.py writes."""
    options = [WITH, *WITHOUT_WORKERS, f'experiment_name=used_{recipe}_{file.suffix[1:]}', 'log_level=ERROR']
    assert run('test.py', ROOT / f'configs/demo/{recipe}.py', file, '--work-dir', folder, *options) == 0
    (path,) = (p for p in folder.rglob('*.json') if p.parent.name == p.stem)
    return json.loads(path.read_text())


def test_ap_equals_the_checkpoint(detectors, data, tmp_path):
    predict(detectors['.pth'], data / 'val', '--out', tmp_path / 'out')
    predictions = json.loads((tmp_path / 'out/predictions.json').read_text())
    predictions_as_labels(predictions, data / 'annotations/instances_val.json')
    metrics = {s: measure('mask_rcnn', detectors[s], tmp_path / f'run{s}') for s in ('.pth', *SUFFIXES)}
    for name in ('coco/bbox_mAP', 'coco/segm_mAP', 'coco/bbox_mAP_50'):
        assert metrics['.pth'][name] > 0.05
        for suffix in SUFFIXES:
            assert metrics[suffix][name] == pytest.approx(metrics['.pth'][name], abs=1e-3), (suffix, name)

    predict(detectors['.onnx'], data / 'val', '--out', tmp_path / 'exported')
    exported = json.loads((tmp_path / 'exported/predictions.json').read_text())
    assert exported['images'] == predictions['images'] and exported['categories'] == predictions['categories']
    areas = [
        sum(int(coco_mask.area(a['segmentation'])) for a in content['annotations'] if a['score'] > 0.05)
        for content in (predictions, exported)
    ]
    assert areas[0] == pytest.approx(areas[1], rel=1e-3)


def test_miou_equals_the_checkpoint(segmentors, data, tmp_path):
    predict(segmentors['.pth'], data / 'val', '--out', tmp_path / 'out')
    for path in (data / 'labels/val').iterdir():
        mask = np.asarray(Image.open(tmp_path / f'out/masks/{path.name}'))
        cv2.imwrite(str(path), np.roll(mask, 3, 1) + 1)
    metrics = {s: measure('upernet', segmentors[s], tmp_path / f'run{s}') for s in ('.pth', *SUFFIXES)}
    assert 20 < metrics['.pth']['mIoU'] < 99
    for suffix in SUFFIXES:
        assert metrics[suffix]['mIoU'] == pytest.approx(metrics['.pth']['mIoU'], abs=0.1)
    predict(segmentors['.onnx'], data / 'val', '--out', tmp_path / 'exported')
    for path in (tmp_path / 'exported/masks').iterdir():
        expected = np.asarray(Image.open(tmp_path / f'out/masks/{path.name}'))
        assert (np.asarray(Image.open(path)) == expected).mean() >= 0.999


def test_predict_tool_with_an_exported_model(run_tool, segmentors, data, tmp_path):
    """Which imports nothing but what the tool does."""
    config = ROOT / 'configs/demo/upernet.py'
    process = run_tool('test.py', config, segmentors['.onnx'], '--work-dir', 'run', WITH, *WITHOUT_WORKERS)
    assert process.returncode == 0 and 'mIoU' in process.stdout.splitlines()[-1], process.stderr
