"""LabelMe's JSON files become the COCO that they stand for: polygons to the last digit, boxes and areas as OpenCV and
pycocotools have them, circles as in LabelMe's own converter, masks pixel by pixel."""

import base64
import json
import math

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from convnext_dense.datasets import toy_shapes
from convnext_dense.datasets.cache import dataset_fingerprint
from convnext_dense.datasets.custom import DatasetRequest, apply_custom_data, detect_tasks
from helpers.datasets import check_dataset, copy_images, load_coco, load_recipe

SIZE = (80, 60)


def shape(label, points, kind='polygon', **more):
    return dict(label=label, points=points, shape_type=kind, group_id=None, flags={}) | more


def label_text(shapes, size=SIZE, name='a.png'):
    content = dict(version='5.4.1', flags={}, shapes=shapes, imagePath=name, imageData='QUJD' * 100)
    return json.dumps(content | dict(imageWidth=size[0], imageHeight=size[1]))


def write_split(toy_dataset, split, images, labels):
    copy_images(toy_dataset, split, images)
    labels.mkdir(parents=True, exist_ok=True)
    coco = load_coco(toy_dataset, split)
    names = {c['id']: c['name'] for c in coco['categories']}
    for image in coco['images']:
        annotations = (a for a in coco['annotations'] if a['image_id'] == image['id'])
        polygons = [(names[a['category_id']], a['segmentation']) for a in annotations]
        shapes = [
            shape(name, np.array(polygon).reshape(-1, 2).tolist(), group_id=number if len(parts) > 1 else None)
            for number, (name, parts) in enumerate(polygons)
            for polygon in parts
        ]
        text = label_text(shapes, (64, 64), image['file_name'])
        (labels / image['file_name']).with_suffix('.json').write_text(text)


LAYOUTS = {
    'beside, by split': {'train': ('train', 'train'), 'val': ('val', 'val')},
    'folders by split': {'train': ('train/images', 'train/labels'), 'val': ('val/images', 'val/labels')},
    'labels by split': {'train': ('images/train', 'jsons/train'), 'val': ('images/val', 'jsons/val')},
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_each_layout_is_read(layout, toy_dataset, tmp_path):
    for split, (images, labels) in LAYOUTS[layout].items():
        write_split(toy_dataset, split, tmp_path / images, tmp_path / labels)
    assert detect_tasks(DatasetRequest(str(tmp_path))) == ['detection']
    data, findings = check_dataset(tmp_path)
    assert not findings and data.has_masks and data.classes == sorted(toy_shapes.CLASSES)
    for split in ('train', 'val'):
        coco, content = load_coco(toy_dataset, split), data.splits[split]
        names = {c['id']: c['name'] for c in coco['categories']}
        stems = {i['id']: i['file_name'] for i in coco['images']}
        paths = {i['id']: i['file_name'].rsplit('/', 1)[1] for i in content['images']}
        expected = sorted(
            (stems[a['image_id']], names[a['category_id']], a['segmentation']) for a in coco['annotations']
        )
        annotations = sorted(
            content['annotations'],
            key=lambda a: (paths[a['image_id']], data.classes[a['category_id'] - 1], a['segmentation']),
        )
        assert len(annotations) == len(expected)
        for a, (stem, name, polygons) in zip(annotations, expected):
            assert (paths[a['image_id']], data.classes[a['category_id'] - 1]) == (stem, name)
            assert a['segmentation'] == polygons
            points = [np.array(polygon, np.float32).reshape(-1, 2) for polygon in polygons]
            (x1, y1), (x2, y2) = np.concatenate(points).min(0), np.concatenate(points).max(0)
            assert np.allclose(a['bbox'], [x1, y1, x2 - x1, y2 - y1], atol=1e-3)
            assert math.isclose(a['area'], sum(map(cv2.contourArea, points)), rel_tol=1e-3)


def write_set(root, texts):
    root.mkdir()
    for i, (stem, text) in enumerate(texts.items()):
        cv2.imwrite(str(root / f'{stem}.png'), np.full((*SIZE[::-1], 3), i, np.uint8))
        if text is not None:
            (root / f'{stem}.json').write_text(text)


def read_objects(root, shapes, other_shapes=()):
    """Return the annotations of two images with these shapes (by class), and the findings."""
    write_set(root, {'a': label_text([*shapes]), 'b': label_text([*(other_shapes or shapes)])})
    data, findings = check_dataset(root)
    return data, [a for content in data.splits.values() for a in content['annotations']], findings


SQUARE = [[10, 10], [30, 10], [30, 30], [10, 30]]


def test_rectangles_alone_are_boxes(tmp_path):
    data, annotations, findings = read_objects(tmp_path / 'set', [shape('cat', [[30, 40], [10, 20]], 'rectangle')])
    assert not data.has_masks and not findings
    assert [(a['bbox'], a['area']) for a in annotations] == [([10, 20, 20, 20], 400)] * 2


def test_rectangles_beside_polygons_have_masks(tmp_path):
    shapes = [shape('cat', [[30, 40], [10, 20]], 'rectangle'), shape('cat', SQUARE)]
    data, annotations, findings = read_objects(tmp_path / 'set', shapes)
    assert data.has_masks and not findings and len(annotations) == 4
    rectangle = next(a for a in annotations if a['bbox'] == [10, 20, 20, 20])
    assert coco_mask.area(coco_mask.frPyObjects(rectangle['segmentation'], 60, 80)).tolist() == [400]


@pytest.mark.parametrize('radius', [0.3, 1, 7.5, 25])
def test_circles_are_those_of_labelme(radius, tmp_path):
    annotation = read_objects(tmp_path / 'set', [shape('cat', [[40, 30], [40 + radius, 30]], 'circle')])[1][0]
    n = max(int(np.pi / np.arccos(1 - 1 / radius)), 12) if radius > 1 else 12  # as in labelme2coco.py
    angle = 2 * np.pi / n * np.arange(n)
    points = np.stack([40 + radius * np.sin(angle), 30 + radius * np.cos(angle)], 1)
    assert np.allclose(annotation['segmentation'], points.reshape(1, -1))
    assert 0.9 * np.pi * radius**2 < annotation['area'] < np.pi * radius**2


def png_text(mask):
    return base64.b64encode(cv2.imencode('.png', mask.astype(np.uint8))[1].tobytes()).decode()


def test_masks_are_read_pixel_by_pixel(tmp_path):
    part = np.random.RandomState(0).rand(20, 30) > 0.5
    full = np.zeros(SIZE[::-1], np.uint8)
    full[25:45, 10:40] = part
    _, annotations, findings = read_objects(
        tmp_path / 'set', [shape('cat', [[10, 25], [39, 44]], 'mask', mask=png_text(part))]
    )
    assert not findings and len(annotations) == 2
    for a in annotations:
        assert np.array_equal(coco_mask.decode(a['segmentation']), full)
        assert a['area'] == part.sum() and a['iscrowd'] == 0
        assert a['bbox'] == coco_mask.toBbox(coco_mask.encode(np.asfortranarray(full))).tolist()


def test_groups_are_one_object(tmp_path):
    second_part = [[50, 10], [70, 10], [70, 30], [50, 30]]
    mask = shape('cat', [[50, 10], [69, 29]], 'mask', mask=png_text(np.ones((20, 20))), group_id=2)
    shapes = [
        shape('cat', SQUARE, group_id=1), shape('cat', second_part, group_id=1), shape('dog', second_part, group_id=1),
        shape('cat', SQUARE, group_id=2), mask,
    ]  # fmt: skip
    data, annotations, findings = read_objects(tmp_path / 'set', shapes)
    assert not findings and data.classes == ['cat', 'dog']
    group = annotations[:3]
    assert [(a['bbox'], a['area']) for a in group] == [
        ([10, 10, 60, 20], 800), ([50, 10, 20, 20], 400), ([10, 10, 60, 20], 800),
    ]  # fmt: skip
    assert [len(a['segmentation']) for a in group[:2]] == [2, 1]
    assert coco_mask.area(group[2]['segmentation']) == 800


GOOD = shape('cat', SQUARE)
BAD = {  # a shape -> what is reported
    'a point': (shape('cat', [[1, 1]], 'point'), 'shape-without-area'),
    'a line': (shape('cat', [[1, 1], [9, 9]], 'line'), 'shape-without-area'),
    'no label': (shape('', SQUARE), 'label-without-name'),
    'a label that is no text': (shape(['cat'], SQUARE), 'label-without-name'),
    'to be ignored': (shape('__ignore__', SQUARE), 'ignored-region'),
    'no points': (shape('cat', []), 'label-not-numbers'),
    'words': (shape('cat', [['a', 'b']]), 'label-not-numbers'),
    'three numbers': (shape('cat', [[1, 2, 3], [4, 5, 6]]), 'label-not-numbers'),
    'not finite': (shape('cat', [[1, float('inf')], *SQUARE]), 'label-not-numbers'),
    'two points': (shape('cat', SQUARE[:2]), 'polygon-under-3-points'),
    'no mask': (shape('cat', SQUARE[:2], 'mask'), 'mask-format-unknown'),
    'no PNG': (shape('cat', SQUARE[:2], 'mask', mask='QUJD'), 'mask-format-unknown'),
    'no base64': (shape('cat', SQUARE[:2], 'mask', mask='!'), 'mask-format-unknown'),
    'a mask elsewhere': (shape('cat', [[500, 0]], 'mask', mask=png_text(np.ones((9, 9)))), 'mask-format-unknown'),
    'no shape': (5, 'label-without-name'),
}


@pytest.mark.parametrize('kind', BAD)
def test_bad_shapes_are_reported(kind, tmp_path):
    shape_dict, code = BAD[kind]
    _, annotations, findings = read_objects(tmp_path / 'set', [GOOD, shape_dict], [GOOD, shape_dict])
    assert [a['bbox'] for a in annotations] == [[10, 10, 20, 20]] * 2
    assert set(findings) - {'missing-mask'} == {code} and '.json:2' in findings[code].examples[0]


FILES = {  # the text of a JSON file -> what is reported
    'cut off': (label_text([GOOD])[:200], 'unreadable-label'),
    'no shapes': (json.dumps(dict(version='5', imagePath='c.png')), 'unreadable-label'),
    'a list': ('[]', 'unreadable-label'),
    'another size': (label_text([GOOD], (40, 30)), 'image-size-mismatch'),
    'none': (None, 'missing-label'),
}


@pytest.mark.parametrize('kind', FILES)
def test_bad_files_are_reported(kind, tmp_path):
    text, code = FILES[kind]
    write_set(tmp_path / 'set', {stem: label_text([GOOD]) for stem in 'abd'} | {'c': text})
    data, findings = check_dataset(tmp_path / 'set', val_fraction=0.5)
    assert set(findings) == {code} and findings[code].examples[0].startswith('c.')
    assert sum(len(content['images']) for content in data.splits.values()) == 3


def test_an_image_without_shapes_is_a_negative(tmp_path):
    write_set(tmp_path / 'set', {'a': label_text([GOOD]), 'b': label_text([GOOD]), 'c': label_text([])})
    findings = check_dataset(tmp_path / 'set')[1]
    assert findings['image-without-annotations'].examples == ['c.png']


def test_changed_files_are_read_again_and_others_are_not_watched(toy_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ('train', 'val'):
        write_split(toy_dataset, split, tmp_path / split, tmp_path / split)

    def classes():
        config = load_recipe('demo/mask_rcnn')
        config.work_dir = str(tmp_path / 'work_dirs/run')
        apply_custom_data(config, DatasetRequest('.'))
        return list(config.train_dataloader.dataset.metainfo.classes)

    assert classes() == sorted(toy_shapes.CLASSES)
    manifest = tmp_path / 'work_dirs/run/data/data.json'
    mtime = manifest.stat().st_mtime_ns
    classes()
    assert manifest.stat().st_mtime_ns == mtime  # what the run itself writes below the root counts for nothing
    (tmp_path / 'train/000001.json').write_text(label_text([shape('ring', SQUARE)], (64, 64)))
    assert 'ring' in classes()
    paths = [f'{tmp_path}/gone/*.json'], [f'{tmp_path}/val/*.txt']  # neither has a file
    assert len({dataset_fingerprint(('key',), each) for each in paths}) == 1
