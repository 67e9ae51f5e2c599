"""Formats of other programs become the COCO that they stand for: the same images, classes and boxes as the COCO file of
the same objects, and masks with the same pixels."""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from convnext_dense.datasets.custom import DatasetRequest, apply_custom_data, detect_tasks, read_data
from convnext_dense.errors import UsageError
from helpers.box_formats import (
    FORMATS,
    as_createml,
    as_image_folder,
    as_panoptic,
    as_supervisely,
    as_via_1,
    box_of,
    decode,
    objects_of,
    supervisely_bitmap,
)
from helpers.datasets import check_dataset, load_recipe, write_json
from helpers.files import error_message

BOXES_ONLY = ('CreateML', 'ImageFolder')


@pytest.mark.parametrize('write', FORMATS, ids=lambda write: write.__name__)
def test_each_format_is_read(write, toy_dataset, tmp_path):
    write(toy_dataset, tmp_path)
    mtimes = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    assert detect_tasks(DatasetRequest(str(tmp_path)))[0] == 'detection'
    data, findings = check_dataset(tmp_path)
    assert {f.code for f in findings.values() if f.action in ('error', 'dropped')} == set()
    assert f': {FORMATS[write]}, layout ' in data.report.facts[0]
    assert data.has_masks != (FORMATS[write] in BOXES_ONLY)
    actual = {split: objects_in(data, split) for split in ('train', 'val')}
    if 'random validation split' in data.report.facts[0]:
        compare(actual['train'] | actual['val'], dict(objects_of(toy_dataset, 'train')), data.has_masks)
    else:
        for split in actual:
            compare(actual[split], dict(objects_of(toy_dataset, split)), data.has_masks)
    assert mtimes == {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}


def objects_in(data, split):
    """Return the class and the annotation of the objects of each image, by its name."""
    content = data.splits[split]
    names = {i['id']: Path(i['file_name']).name for i in content['images']}
    objects = {name: [] for name in names.values()}
    for a in content['annotations']:
        objects[names[a['image_id']]].append((data.classes[a['category_id'] - 1], a))
    return objects


def compare(actual, expected, has_masks):
    assert actual.keys() == expected.keys()
    for name, objects in actual.items():
        assert sorted(label for label, _ in objects) == sorted(label for label, _ in expected[name])
        remaining = list(expected[name])
        for label, a in objects:
            box = min((each for each in remaining if each[0] == label), key=lambda each: distance(a, each[1]))
            remaining = [each for each in remaining if each is not box]
            if isinstance(a.get('segmentation'), dict):  # some pixels are under other objects
                pixels = coco_mask.decode(a['segmentation'])
                assert not pixels[~decode([box[1].ravel().tolist()])].any()
                assert a['area'] == pixels.sum() and a['bbox'] == coco_mask.toBbox(a['segmentation']).tolist()
                continue
            assert np.allclose(a['bbox'], box_of(box[1]), atol=1e-3) and a['iscrowd'] == 0
            if has_masks:
                assert np.array_equal(decode(a['segmentation']), decode([box[1].ravel().tolist()]))
                assert np.isclose(a['area'], cv2.contourArea(box[1].astype(np.float32)), rtol=1e-3)


def distance(annotation, polygon):
    return np.abs(np.subtract(annotation['bbox'], box_of(polygon))).sum()


def write_images(root, *names, size=(80, 60)):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / name), np.full((*size[::-1], 3), number, np.uint8))


def annotations_of(root, **request):
    data, findings = check_dataset(root, **request)
    return data, [a for content in data.splits.values() for a in content['annotations']], findings


# VIA


def via(shape, **attributes):
    return dict(shape_attributes=shape, region_attributes=attributes)


RECT = dict(name='rect', x=10, y=20, width=30, height=15)


def write_via(root, regions):
    write_images(root, 'a.png', 'b.png')
    write_json({n: dict(filename=n, size=1, regions=regions) for n in ('a.png', 'b.png')}, root / 'via.json')


def test_entries_without_an_image_or_a_shape_are_reported(tmp_path):
    write_via(tmp_path, [via(RECT, name='cat'), 'no region'])
    content = json.loads((tmp_path / 'via.json').read_text())
    write_json(content | dict(c=dict(filename=None, regions=[]), d='no image'), tmp_path / 'via.json')
    _, annotations, findings = annotations_of(tmp_path)
    assert len(annotations) == 2
    assert findings['image-without-id-or-name'].examples == ['via.json: entry 3', 'via.json: entry 4']
    assert findings['shape-without-area'].count == 2


def test_class_attribute_of_other_labels_is_refused(toy_dataset):
    with pytest.raises(UsageError, match='--class-attribute is for labels of VIA, which .* has not: leave it out'):
        check_dataset(toy_dataset, class_attribute='kind')


ANGLE = np.linspace(0, 2 * np.pi, 400)


@pytest.mark.parametrize(
    ('shape', 'points'),
    {
        'circle': (
            dict(name='circle', cx=40, cy=30, r=20), np.stack([40 + 20 * np.cos(ANGLE), 30 + 20 * np.sin(ANGLE)], 1)
        ),
        'ellipse': (
            dict(name='ellipse', cx=40, cy=30, rx=24, ry=8, theta=0.5),
            np.stack([24 * np.cos(ANGLE), 8 * np.sin(ANGLE)], 1)
            @ np.array([[np.cos(0.5), np.sin(0.5)], [-np.sin(0.5), np.cos(0.5)]])
            + [40, 30],
        ),
        'closed polyline': (
            dict(name='polyline', all_points_x=[5, 40, 5, 5], all_points_y=[5, 5, 30, 7]),
            np.array([[5, 5], [40, 5], [5, 30]]),
        ),
    }.values(),
    ids=['circle', 'ellipse', 'closed polyline'],
)  # fmt: skip
def test_shapes_of_via(shape, points, tmp_path):
    write_via(tmp_path, [via(shape, name='cat')])
    _, annotations, findings = annotations_of(tmp_path)
    assert not findings and len(annotations) == 2
    drawn = cv2.fillPoly(np.zeros((60, 80), np.uint8), [np.round(points).astype(int)], 1).astype(bool)
    mask = decode(annotations[0]['segmentation'], (80, 60))
    assert (drawn & mask).sum() / (drawn | mask).sum() > 0.85
    assert np.isclose(annotations[0]['area'], cv2.contourArea(points.astype(np.float32)), rtol=0.05)
    assert np.allclose(annotations[0]['bbox'], box_of(points), atol=1)


def test_rectangles_alone_are_boxes_and_circles_beside_them_are_masks(tmp_path):
    write_via(tmp_path / 'a', [via(RECT, name='cat')])
    data, annotations, _ = annotations_of(tmp_path / 'a')
    assert not data.has_masks and [(a['bbox'], a['area']) for a in annotations] == [([10, 20, 30, 15], 450)] * 2
    write_via(tmp_path / 'b', [via(RECT, name='cat'), via(dict(name='circle', cx=9, cy=9, r=5), name='cat')])
    data, annotations, _ = annotations_of(tmp_path / 'b')
    assert data.has_masks and decode(annotations[0]['segmentation'], (80, 60)).sum() == 450


def test_class_attribute_of_via(tmp_path):
    write_via(tmp_path / 'a', [via(RECT, kind='car', colour='red'), via(RECT | dict(x=1), kind='bus', colour='red')])
    line = error_message(check_dataset, tmp_path / 'a')
    assert (
        "regions have the attributes kind, colour: say which one is the class, such as --class-attribute 'kind'" in line
    )
    assert check_dataset(tmp_path / 'a', class_attribute='kind')[0].classes == ['bus', 'car']
    request = DatasetRequest(str(tmp_path / 'a'), class_attribute='shade')
    assert "'shade': regions have kind, colour" in error_message(read_data, request, 'detection', ('train',))
    write_via(tmp_path / 'd', [via(RECT, kind='car'), via(RECT | dict(x=1), kinds='car')])  # spelled in two ways
    assert check_dataset(tmp_path / 'd')[0].classes == ['car']
    write_via(tmp_path / 'b', [via(RECT), via(RECT | dict(x=1), note='')])
    data, annotations, findings = annotations_of(tmp_path / 'b', classes='object=balloon')
    assert data.classes == ['balloon'] and len(annotations) == 4 and findings['class-attribute-missing'].count == 1
    ticked = [via(RECT, kind=dict(car=True, bus=False)), via(RECT, kind=dict(car=False)), via(RECT | dict(x=1), kind=3)]
    write_via(tmp_path / 'c', ticked)
    data, annotations, findings = annotations_of(tmp_path / 'c')
    assert data.classes == ['3', 'car'] and len(annotations) == 4 and set(findings) == {'label-without-name'}


BAD_VIA = {
    'a point': (dict(name='point', cx=1, cy=2), 'shape-without-area'),
    'a line': (dict(name='polyline', all_points_x=[1, 9, 9], all_points_y=[1, 9, 1]), 'shape-without-area'),
    'no shape': (None, 'shape-without-area'),
    'no name': (dict(name=[]), 'shape-without-area'),
    'words': (dict(name='rect', x='1', y=2, width=3, height=4), 'label-not-numbers'),
    'unpaired': (dict(name='polygon', all_points_x=[1, 9, 9], all_points_y=[1, 9]), 'label-not-numbers'),
    'two points': (dict(name='polygon', all_points_x=[1, 9], all_points_y=[1, 9]), 'polygon-under-3-points'),
}


@pytest.mark.parametrize('kind', BAD_VIA)
def test_bad_regions_are_reported(kind, tmp_path):
    triangle = dict(name='polygon', all_points_x=[1, 30, 1], all_points_y=[1, 1, 30])
    write_via(tmp_path, [via(triangle, name='cat'), via(BAD_VIA[kind][0], name='cat')])
    _, annotations, findings = annotations_of(tmp_path)
    assert len(annotations) == 2 and set(findings) - {'missing-mask'} == {BAD_VIA[kind][1]}


# CreateML and ImageFolder


def test_numeric_classes_get_numbered_names(toy_dataset, tmp_path):
    as_image_folder(toy_dataset, tmp_path)
    labels = sorted(
        {label for split in ('train', 'val') for _, each in objects_of(toy_dataset, split) for label, _ in each}
    )
    for file in tmp_path.glob('*/metadata.jsonl'):
        text = file.read_text()
        for number, label in enumerate(labels):
            text = text.replace(f'"{label}"', str(number))
        file.write_text(text)
    data, findings = check_dataset(tmp_path)
    assert data.classes == [f'class {i}' for i in range(len(labels))] and set(findings) == {'class-names-missing'}


def test_bad_rows_and_boxes(tmp_path):
    write_images(tmp_path, 'a.png', 'b.png')
    valid = dict(bbox=[[10, 20, 30, 15]], categories=['cat'])
    rows = [
        dict(file_name='a.png', objects=valid), dict(file_name='b.png', objects=valid), dict(objects=valid),
        dict(file_name='c.png', objects=valid),
        dict(file_name='a.png', objects=dict(bbox=[[1, 2]], categories=['cat'])),
        dict(file_name='a.png', objects=dict(bbox=[[1, 2, 3, 4]], categories=[])),
    ]  # fmt: skip
    (tmp_path / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    _, annotations, findings = annotations_of(tmp_path, val_fraction=0.5)
    assert len(annotations) == 2
    expected = {'image-without-id-or-name', 'missing-image', 'label-not-numbers', 'label-without-name'}
    assert set(findings) == expected | {'duplicate-file-name'}
    (tmp_path / 'metadata.jsonl').write_text(json.dumps(rows[0]) + '\n{"file_name": ')
    assert 'metadata.jsonl: line 2 is not valid' in error_message(check_dataset, tmp_path)


def test_bad_objects_of_createml(tmp_path):
    write_images(tmp_path, 'a.png', 'b.png')
    valid = dict(label='cat', coordinates=dict(x=25, y=27.5, width=30, height=15))
    huge = dict(x=10**400, y=2, width=3, height=4)  # which no float holds
    invalid = [dict(valid, label=''), dict(valid, coordinates=dict(x=1, y=2)), dict(label='cat'), 5]
    invalid.append(dict(valid, coordinates=huge))
    write_json([dict(image=n, annotations=[valid, *invalid]) for n in ('a.png', 'b.png')], tmp_path / 'labels.json')
    _, annotations, findings = annotations_of(tmp_path)
    assert [a['bbox'] for a in annotations] == [[10, 20, 30, 15]] * 2
    assert set(findings) == {'label-without-name', 'label-not-numbers'}


def test_fractions_instead_of_pixels(toy_dataset, tmp_path):
    as_createml(toy_dataset, tmp_path)
    for file in tmp_path.glob('*/*.json'):
        entries = json.loads(file.read_text())
        for item in (item for entry in entries for item in entry['annotations']):
            item['coordinates'] = {side: value / 64 for side, value in item['coordinates'].items()}
        write_json(entries, file)
    data, findings = check_dataset(tmp_path)
    finding = findings['most-boxes-as-fractions']
    assert finding.count == len(data.splits['val']['annotations']) and finding.action == 'error'
    line = error_message(data.report.raise_if_errors)
    assert 'most-boxes-as-fractions' in line and 'as fractions of the sides of the image; write pixels' in line


# Supervisely


def figure(kind, name='cat', **fields):
    return dict(classTitle=name, geometryType=kind, tags=[]) | fields


def write_supervisely(root, figures, size=(80, 60)):
    write_images(root, 'ds/img/a.png', 'ds/img/a.jpg', size=size)
    content = dict(tags=[], size=dict(height=size[1], width=size[0]), objects=figures)
    for name in ('a.png', 'a.jpg'):  # names that differ in their suffix alone
        write_json(content, root / f'ds/ann/{name}.json')
    write_json(dict(classes=[dict(title='cat')]), root / 'meta.json')


def test_figures_of_supervisely(tmp_path):
    part = np.random.RandomState(0).rand(20, 30) > 0.5
    ring = dict(exterior=[[10, 10], [40, 10], [40, 40], [10, 40]], interior=[[[20, 20], [30, 20], [30, 30], [20, 30]]])
    figures = [
        figure('rectangle', points=dict(exterior=[[10, 20], [39, 34]], interior=[])),
        figure('bitmap', bitmap=supervisely_bitmap(part, 10, 25)),
        figure('polygon', points=ring),
    ]
    write_supervisely(tmp_path, figures)
    data, annotations, findings = annotations_of(tmp_path)
    assert not findings and data.has_masks and len(annotations) == 6
    box, bitmap, polygon = annotations[:3]
    assert box['bbox'] == [10, 20, 30, 15]  # the last pixel is part of it
    full = np.zeros((60, 80), np.uint8)
    full[25:45, 10:40] = part
    assert np.array_equal(coco_mask.decode(bitmap['segmentation']), full) and bitmap['area'] == part.sum()
    hole = np.zeros((60, 80), np.uint8)
    hole[10:40, 10:40] = 1
    hole[20:30, 20:30] = 0
    assert np.array_equal(coco_mask.decode(polygon['segmentation']), hole) and polygon['area'] == 800


BAD_FIGURES = {
    'a line': (figure('line', points=dict(exterior=[[1, 1], [9, 9]])), 'shape-without-area'),
    'no name': (figure('rectangle', '', points=dict(exterior=[[1, 1], [9, 9]])), 'label-without-name'),
    'one corner': (figure('rectangle', points=dict(exterior=[[1, 1]])), 'label-not-numbers'),
    'words': (figure('polygon', points=dict(exterior=[['a', 1], [9, 9]])), 'label-not-numbers'),
    'no bitmap': (figure('bitmap'), 'mask-format-unknown'),
    'no PNG': (figure('bitmap', bitmap=dict(data='QUJD', origin=[1, 1])), 'mask-format-unknown'),
    'a bitmap elsewhere': (figure('bitmap', bitmap=supervisely_bitmap(np.ones((2, 2)), 99, 1)), 'mask-format-unknown'),
}


@pytest.mark.parametrize('kind', BAD_FIGURES)
def test_bad_figures_are_reported(kind, tmp_path):
    valid_figure = figure('rectangle', points=dict(exterior=[[10, 20], [39, 34]]))
    write_supervisely(tmp_path, [valid_figure, BAD_FIGURES[kind][0]])
    _, annotations, findings = annotations_of(tmp_path)
    assert len(annotations) == 2 and set(findings) == {BAD_FIGURES[kind][1]}


# COCO panoptic


def test_panoptic_crowds_stuff_and_broken_pngs(toy_dataset, tmp_path):
    as_panoptic(toy_dataset, tmp_path)
    file = tmp_path / 'annotations/panoptic_train2017.json'
    content = json.loads(file.read_text())
    infos = [info for a in content['annotations'] for info in a['segments_info'] if info['category_id'] != 99]
    infos[0]['iscrowd'] = 1
    content['annotations'][1]['segments_info'].append(dict(id=5, category_id=infos[0]['category_id'], iscrowd=0))
    last_annotation = content['annotations'][-1]
    (tmp_path / 'annotations/panoptic_train2017' / last_annotation['file_name']).write_bytes(b'no PNG')
    write_json(content, file)
    data, findings = check_dataset(tmp_path)
    assert 'ground' not in data.classes
    expected = len(infos) - sum(info['category_id'] != 99 for info in last_annotation['segments_info'])
    annotations = data.splits['train']['annotations']
    assert len(annotations) == expected and sum(a['iscrowd'] for a in annotations) == 1
    assert findings['segment-without-pixels'].examples == ['000002.png: 5']
    assert findings['unreadable-mask'].examples == [last_annotation['file_name']]


def test_pngs_elsewhere_are_found(toy_dataset, tmp_path):
    as_panoptic(toy_dataset, tmp_path)
    (tmp_path / 'segments').mkdir()
    for split in ('train', 'val'):
        os.rename(tmp_path / f'annotations/panoptic_{split}2017', tmp_path / f'segments/{split}')
        shutil.copytree(tmp_path / f'segments/{split}', tmp_path / f'panoptic_semseg_{split}')  # as panopticapi makes
        for path in (tmp_path / f'panoptic_semseg_{split}').iterdir():
            cv2.imwrite(str(path), np.zeros((64, 64), np.uint8))
    data = check_dataset(tmp_path)[0]
    assert len(data.splits['train']['annotations'])
    assert {Path(i['file_name']).parent.name for i in data.splits['train']['images']} == {'train2017'}
    json_file = tmp_path / 'annotations/panoptic_train2017.json'
    content = json.loads(json_file.read_text())
    del content['annotations'][0]['file_name']
    write_json(content, json_file)
    assert check_dataset(tmp_path, 'segmentation')[0].splits['train']
    for file in tmp_path.glob('segments/*/*'):
        file.rename(file.with_suffix('.x'))
    for file in tmp_path.glob('val2017/*'):
        file.unlink()
    assert 'its PNGs (such as 000002.png) are not in' in error_message(check_dataset, tmp_path)


# Choosing


def test_two_formats_in_one_folder(toy_dataset, tmp_path):
    as_via_1(toy_dataset, tmp_path)
    as_createml(toy_dataset, tmp_path)
    data, findings = check_dataset(tmp_path)
    assert ': VIA, layout' in data.report.facts[0]
    assert findings['other-format'].examples == ['CreateML: --format createml']
    assert ': CreateML, layout' in check_dataset(tmp_path, format='createml')[0].report.facts[0]


def test_several_files_are_listed_with_the_flag_that_chooses(toy_dataset, tmp_path):
    as_via_1(toy_dataset, tmp_path)
    file = tmp_path / 'train/via_region_data.json'
    (tmp_path / 'train/via_export.json').write_text(file.read_text())  # the same bytes are the same file
    assert ', layout train/via_export.json, val/via_region_data.json' in check_dataset(tmp_path)[0].report.facts[0]
    (tmp_path / 'train/via_export.json').write_text(file.read_text().replace('1234', '1235'))
    line = error_message(check_dataset, tmp_path)
    assert 'train/via_export.json and train/via_region_data.json could both be those of the train split' in line
    assert f'--train-ann {tmp_path}/train/via_export.json' in line
    files = dict(train=str(file), val=str(tmp_path / 'val/via_region_data.json'))
    data = read_data(DatasetRequest(ann_files=files), 'detection', ('train', 'val'))
    assert len(data.splits['val']['images']) == 3


@pytest.mark.parametrize('write', FORMATS, ids=lambda write: write.__name__)
def test_links_within_a_data_set_change_nothing(write, toy_dataset, tmp_path):
    write(toy_dataset, tmp_path)
    original = check_dataset(tmp_path)[0]
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    for number, folder in enumerate(folders):
        (folder / 'up').symlink_to('..')
        (folder / 'itself').symlink_to('.')
        if folder.name not in ('train', 'val'):  # images of another split
            (folder / 'other').symlink_to(folders[number - 1])
    (tmp_path / 'loop').symlink_to('loop')
    linked = check_dataset(tmp_path)[0]
    assert linked.classes == original.classes
    for split in ('train', 'val'):
        assert len(linked.splits[split]['annotations']) == len(original.splits[split]['annotations'])


def test_ten_thousand_classes_and_names_that_repeat(tmp_path):
    write_images(tmp_path, 'images/a.png', 'images/b.png')
    for name in ('a', 'b'):
        (tmp_path / 'labels').mkdir(exist_ok=True)
        (tmp_path / f'labels/{name}.txt').write_text('9999 0.5 0.5 0.5 0.5\n0 0.2 0.2 0.1 0.1\n')
    names = [f'n{i}' for i in range(9999)] + ['n0']
    (tmp_path / 'data.yaml').write_text(f'train: images\nnames: {names}\n')
    data, findings = check_dataset(tmp_path)
    assert len(data.classes) == 9999 and {a['category_id'] for a in data.splits['train']['annotations']} == {1}
    assert findings['duplicate-category-name'].examples == ['n0'] and all(map(len, data.report.lines()))
    assert findings['class-never-annotated'].count == 9998 and len(findings['class-never-annotated'].examples) == 3
    (tmp_path / 'data.yaml').write_text(f'train: images\nnames: {[*names[:-1], "last"]}\n')
    data = check_dataset(tmp_path)[0]
    assert len(data.classes) == 10_000 and data.report.facts[-1].startswith('10,000 classes: n0, n1')


def test_files_and_folders_by_flags(toy_dataset, tmp_path):
    as_supervisely(toy_dataset, tmp_path)
    os.rename(tmp_path / 'train/img', tmp_path / 'photos')
    request = DatasetRequest(
        ann_files=dict(train=str(tmp_path / 'train/ann')), image_dirs=dict(train=str(tmp_path / 'photos'))
    )
    data = read_data(request, 'detection', ('train', 'val'))
    assert sum(len(content['images']) for content in data.splits.values()) == 5
    request = DatasetRequest(ann_files=dict(train=str(tmp_path / 'photos')))
    assert 'the folder holds no labels of one of YOLO, Pascal VOC, LabelMe, Supervisely' in error_message(
        read_data, request, 'detection', ('train',)
    )


def test_panoptic_pngs_become_segmentation_masks(toy_dataset, tmp_path, monkeypatch):
    as_panoptic(toy_dataset, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert detect_tasks(DatasetRequest('.')) == ['detection', 'segmentation']
    config = load_recipe('demo/upernet')
    config.work_dir = str(tmp_path / 'run')
    apply_custom_data(config, DatasetRequest('.'))
    dataset = config.val_dataloader.dataset
    names = list(dataset.metainfo.classes)
    content = json.loads((tmp_path / 'annotations/panoptic_val2017.json').read_text())
    assert names == [c['name'] for c in content['categories']]
    labels = {c['id']: names.index(c['name']) for c in content['categories']}
    pairs = json.loads(Path(dataset.ann_file).read_text())
    assert len(pairs) == 3
    for image, mask in pairs:
        stem = Path(image).stem
        a = next(a for a in content['annotations'] if a['file_name'] == f'{stem}.png')
        bgr = cv2.imread(str(tmp_path / f'annotations/panoptic_val2017/{stem}.png')).astype(int)
        ids = bgr[..., 2] + 256 * bgr[..., 1] + 65536 * bgr[..., 0]
        expected = np.full(ids.shape, 255)
        for info in a['segments_info']:
            expected[ids == info['id']] = labels[info['category_id']]
        assert np.array_equal(cv2.imread(str(Path(dataset.data_root, mask)), cv2.IMREAD_UNCHANGED), expected)
        assert Path(image).parts[-2] == 'val2017'
