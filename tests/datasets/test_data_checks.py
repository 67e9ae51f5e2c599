"""Each problem of a data set is reported under its code and handled as the report says; training can read the rest."""

import json
import os
import re
import shutil
from pathlib import Path

import cv2
import mmcv
import numpy as np
import pytest
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from pycocotools import mask as coco_mask

from convnext_dense.datasets.check_images import inspect_image
from convnext_dense.datasets.class_names import read_classes
from convnext_dense.datasets.coco_masks import decode_rle_runs
from convnext_dense.datasets.custom import DatasetRequest, apply_custom_data, read_data
from convnext_dense.datasets.diagnostics import ERROR, PROBLEM_ACTIONS, RULES
from convnext_dense.errors import UsageError
from helpers.datasets import (
    DETECTOR,
    TRAIN,
    VAL,
    as_folders,
    as_roboflow,
    check_dataset,
    edit_coco,
    load_recipe,
    renumber_categories,
    run,
    write_dataset,
)
from helpers.files import png_bytes


def set_first(**values):
    """Update the first annotation of train."""
    return edit_coco(lambda coco: coco['annotations'][0].update(values))


def without(key, part='annotations'):
    return edit_coco(lambda coco: coco[part][0].pop(key))


def truncate(path, fraction=0.5):
    def damage(root):
        data = (root / path).read_bytes()
        (root / path).write_bytes(data[: int(fraction * len(data))])

    return damage


def copied(path):
    """Replace an image by the first one of train."""
    return lambda root: shutil.copy(root / 'train/000001.png', root / path)


def as_jpeg(root, path, **options):
    """Replace a PNG by a JPEG, in train's JSON as well."""
    image = Image.open(root / path)
    (root / path).unlink()
    new = (root / path).with_suffix('.jpg')
    image.save(new, quality=90, **options)
    edit_coco(lambda coco: coco['images'][0].update(file_name=new.name))(root)
    return new


def truncated_jpeg(root):
    path = as_jpeg(root, 'train/000001.png')
    truncate(path.relative_to(root), 0.8)(root)


def exif_rotated_jpeg(root):
    """Rotate an image by EXIF; it is not square, and annotated as it is stored."""
    exif = Image.Exif()
    exif[274] = 6
    image = Image.open(root / 'train/000001.png').crop((0, 0, 64, 48))
    image.save(root / 'train/000001.jpg', exif=exif, quality=90)
    edit_coco(lambda coco: coco['images'][0].update(file_name='000001.jpg', height=48))(root)


def rle(change=lambda rle: rle, **extra):
    """Write the first mask as RLE."""

    def damage(coco):
        annotation = coco['annotations'][0]
        result = coco_mask.merge(coco_mask.frPyObjects(annotation['segmentation'], 64, 64))
        annotation['segmentation'] = change({'size': [64, 64], 'counts': result['counts'].decode()})
        annotation.update(extra)

    return edit_coco(damage)


def category_of_val_only(coco):
    coco['categories'].append(dict(id=9, name='star'))
    coco['annotations'][0]['category_id'] = 9


def renamed_category(root):
    """Rename a class in val."""
    edit_coco(lambda coco: coco['categories'][0].update(name='Disc'), VAL)(root)


def duplicate_category(coco):
    coco['categories'].append(dict(id=7, name='disc'))
    coco['annotations'][0]['category_id'] = 7


def moved_outside_root(root):
    (root.parent / 'secret').mkdir()
    shutil.move(root / 'train/000001.png', root.parent / 'secret/000001.png')
    edit_coco(lambda coco: coco['images'][0].update(file_name='../../secret/000001.png'))(root)


def in_place_of(path, make):
    """Replace a file by something else."""

    def damage(root):
        (root / path).unlink()
        make(root / path)

    return damage


def oversized_file(path):
    """Make a sparse file one byte over the limit."""
    path.touch()
    os.truncate(path, 2**30 + 1)


def huge_png(path):
    """Write a PNG whose header says 20,000 x 20,000 pixels."""
    path.write_bytes(png_bytes(20000, 20000))


def two_spellings_of_case(root):
    """Make two files whose names differ only in case."""
    shutil.copy(root / 'train/000001.png', root / 'train/000001.Png')
    (root / 'train/000001.png').rename(root / 'train/000001.PNG')


def text_id(coco):
    coco['images'][0]['id'] = 'first'
    for annotation in coco['annotations']:
        annotation['image_id'] = 'first' if annotation['image_id'] == 1 else annotation['image_id']


def corners(box):
    x, y, w, h = box
    return [x, y, x + w, y + h]


def first_as_corners(coco):
    box = [20, 20, 10, 10]
    polygon = [20, 20, 30, 20, 30, 30, 20, 30]
    coco['annotations'][0].update(bbox=corners(box), area=100, segmentation=[polygon])


def all_as_corners(coco):
    for annotation in coco['annotations']:
        annotation['bbox'] = corners(annotation['bbox'])


def duplicated(key, **values):
    """Append a copy of the first image or annotation with other values."""
    return edit_coco(lambda coco: coco[key].append({**coco[key][0], **values}))


def square(x, y, side=10):
    return [x, y, x + side, y, x + side, y + side, x, y + side]


DETECTION = {  # kind: what is done to the data, and what the report names
    'missing-image': (lambda root: (root / 'train/000001.png').unlink(), '000001.png'),
    'empty-file': (lambda root: (root / 'train/000001.png').write_bytes(b''), '000001.png'),
    'not-an-image': (lambda root: (root / 'train/000001.png').write_text('<html>' * 99), '000001.png'),
    'truncated-image': (truncate('train/000001.png'), '000001.png'),
    'name-case-mismatch': (lambda root: (root / 'train/000001.png').rename(root / 'train/000001.PNG'), '000001.PNG'),
    'exif-rotated-image': (exif_rotated_jpeg, '000001.jpg'),
    'duplicate-image': (copied('train/000002.png'), 'train/000002.png is train/000001.png'),
    'train-image-in-val': (copied('val/000001.png'), 'val/000001.png is train/000001.png'),
    'image-without-id-or-name': (without('file_name', 'images'), 'id 1'),
    'duplicate-image-id': (duplicated('images', file_name='000099.png'), '000099.png'),
    'duplicate-file-name': (duplicated('images', id=99), '000001.png'),
    'not-a-regular-file': (in_place_of('train/000001.png', os.mkfifo), '000001.png'),
    'file-too-large': (in_place_of('train/000001.png', oversized_file), '000001.png'),
    'image-too-large': (in_place_of('train/000001.png', huge_png), '000001.png'),
    'name-outside-root': (moved_outside_root, '../../secret/000001.png'),
    'name-spelling-mismatch': (
        lambda root: (root / 'train/000001.png').rename(root / 'train/%30%30%30%30%30%31.png'), '1.png is train/%30',
    ),
    'name-matched-by-suffix': (
        edit_coco(lambda c: c['images'][0].update(file_name='/home/me/train/000001.png')),
        '/home/me/train/000001.png is train/000001.png',
    ),
    'ambiguous-name': (two_spellings_of_case, '000001.png may be train/000001.PNG or train/000001.Png'),
    'image-size-mismatch': (edit_coco(lambda c: c['images'][0].update(width=65)), '65 x 64, its image 64 x 64'),
    'image-without-size': (without('width', 'images'), '000001.png'),
    'image-without-annotations': (
        edit_coco(lambda c: c.update(annotations=[a for a in c['annotations'] if a['image_id'] != 1])),
        'train/000001.png',
    ),
    'duplicate-category-id': (edit_coco(lambda c: c['categories'].append(dict(id=1, name='star'))), '1 (star)'),
    'category-without-id-or-name': (edit_coco(lambda c: c['categories'].append(dict(id=9))), "{'id': 9}"),
    'duplicate-category-name': (edit_coco(duplicate_category), 'disc'),
    'category-name-mismatch': (renamed_category, '1 is Disc, in train disc'),
    'category-without-class': (edit_coco(category_of_val_only, VAL), 'star'),
    'class-never-annotated': (edit_coco(lambda c: c['categories'].append(dict(id=9, name='star'))), 'star'),
    'category-id-gaps': (edit_coco(lambda c: c['categories'].append(dict(id=90, name='star'))), '5 ids up to 90'),
    'supercategory-not-text': (edit_coco(lambda c: c['categories'][0].update(supercategory=['a'])), 'disc'),
    'id-not-integer': (set_first(image_id='1'), "id 1: image_id '1'"),
    'image-id-renumbered': (edit_coco(text_id), 'first'),
    'orphan-annotation': (set_first(image_id=77), 'id 1: image 77'),
    'unknown-category': (set_first(category_id=77), 'id 1: category 77'),
    'not-an-annotation': (edit_coco(lambda c: c['annotations'].append('text')), 'number'),
    'duplicate-annotation': (duplicated('annotations', id=99), 'id 99'),
    'duplicate-annotation-id': (edit_coco(lambda c: c['annotations'][1].update(id=1)), 'id 1'),
    'box-from-mask': (without('bbox'), 'id 1'),
    'crowd': (rle(iscrowd=1), 'id 1'),
    'box-not-four-numbers': (set_first(bbox=[1, 2, 3]), 'id 1'),
    'box-not-finite': (set_first(bbox=[1, 2, float('nan'), 4]), 'id 1'),
    'box-without-area': (set_first(bbox=[1, 2, 0, 4]), 'id 1'),
    'box-below-one-pixel': (
        set_first(bbox=[1, 2, 0.5, 4], segmentation=[[1, 2, 1.5, 2, 1.5, 6, 1, 6]], area=2), 'id 1',
    ),
    'box-outside-image': (set_first(bbox=[64, 2, 10, 4]), 'id 1'),
    'box-far-outside-image': (set_first(bbox=[50, 2, 10**30, 4]), 'id 1'),
    'box-partly-outside-image': (
        set_first(bbox=[50, 2, 30, 4], segmentation=[[50, 2, 80, 2, 80, 6, 50, 6]], area=120),
        'id 1',
    ),
    'box-as-corners': (edit_coco(first_as_corners), 'id 1'),
    'most-boxes-as-corners': (edit_coco(all_as_corners), 'id 1'),
    'box-mask-unrelated': (set_first(bbox=[50, 50, 9, 9], segmentation=[square(5, 5)]), 'id 1'),
    'box-mask-mismatch': (set_first(bbox=[5, 5, 30, 30], segmentation=[square(5, 5)]), 'id 1'),
    'implausible-area': (set_first(area=10**400), 'id 1: 1000000'),
    'missing-area': (without('area'), 'id 1'),
    'missing-mask': (set_first(segmentation=[]), 'id 1'),
    'mask-format-unknown': (set_first(segmentation='abc'), 'id 1'),
    'polygon-under-3-points': (set_first(segmentation=[[1, 1, 20, 20]]), 'id 1'),
    'polygon-odd-length': (set_first(segmentation=[[1, 1, 20, 20, 5, 5, 5]]), 'id 1'),
    'polygon-not-numeric': (set_first(segmentation=[[1, 1, None, 20, 5, 5]]), 'id 1'),
    'polygon-outside-image': (set_first(segmentation=[square(70, 70)]), 'id 1'),
    'polygon-far-outside-image': (set_first(segmentation=[[*square(5, 5), 5, 1e12]]), 'id 1'),
    'polygon-outline-too-long': (set_first(segmentation=[[0, 0, 600, 5] * 9000]), 'id 1'),
    'polygon-not-nested': (set_first(segmentation=square(5, 5)), 'id 1'),
    'rle-size-mismatch': (rle(lambda rle: {**rle, 'size': [64, 65]}), 'id 1'),
    'rle-length-mismatch': (rle(lambda rle: {**rle, 'counts': rle['counts'][:-2]}), 'id 1'),
    'crowd-with-polygons': (set_first(iscrowd=1), 'id 1'),
    'iscrowd-as-text': (set_first(iscrowd='False'), "id 1: iscrowd 'False'"),
    'iscrowd-invalid': (set_first(iscrowd=2), 'id 1: iscrowd 2'),
    'nothing-to-evaluate': (edit_coco(lambda c: c.update(annotations=[]), VAL), 'val'),
    'nothing-to-train-on': (
        edit_coco(lambda c: c.update(annotations=c['annotations'][:1]) or drop_first_box(c)), 'train',
    ),
}  # fmt: skip


def drop_first_box(coco):
    coco['annotations'][0]['bbox'] = [0, 0, -1, 5]


def images_of(root, name='train'):
    return sorted((root / name).iterdir())


def change_labels(change, path='labels/train/000001.png'):
    """Change a segmentation mask, (H, W)."""

    def damage(root):
        labels = np.array(Image.open(root / path))
        changed = change(labels)
        assert cv2.imwrite(str(root / path), changed)

    return damage


def invalid_label(labels):
    labels[5, 5] = 77
    return labels


def without_crosses(root):
    for path in (root / 'labels/train').iterdir():
        labels = np.array(Image.open(path))
        cv2.imwrite(str(path), np.where(labels == 5, 1, labels))
    change_labels(lambda labels: np.where(np.arange(64) < 9, 5, labels).astype(np.uint8), 'labels/val/000001.png')(root)


def single_class_in_train(root):
    """Leave one class in train: ground."""
    for path in (root / 'labels/train').iterdir():
        cv2.imwrite(str(path), np.array(Image.open(path)).clip(0, 1))


def lossy_mask(root):
    path = root / 'labels/train/000001.png'
    Image.open(path).convert('L').save(path, format='JPEG')


def decomposed_mask_name(root):
    """Name an image in NFC and its mask in NFD."""
    (root / 'train/000001.png').rename(root / 'train/caf\u00e9.png')
    (root / 'labels/train/000001.png').rename(root / 'labels/train/cafe\u0301.png')


def two_unicode_forms(root):
    """Make two masks that match one image."""
    decomposed_mask_name(root)
    shutil.copy(root / 'labels/train/cafe\u0301.png', root / 'labels/train/Caf\u00e9.png')


def without_crosses_at_all(root):
    for split in ('train', 'val'):
        for path in (root / f'labels/{split}').iterdir():
            labels = np.array(Image.open(path))
            cv2.imwrite(str(path), np.where(labels == 5, 1, labels))


SEGMENTATION = {
    'empty-file': (lambda root: (root / 'train/000001.png').write_bytes(b''), '000001.png'),
    'truncated-image': (truncate('train/000001.png'), '000001.png'),
    'duplicate-stem': (
        lambda root: Image.open(root / 'train/000002.png').save(root / 'train/000001.jpg'),
        '000001.png',
    ),
    'unmatched-image': (lambda root: (root / 'labels/train/000001.png').unlink(), '000001.png'),
    'unmatched-mask': (lambda root: (root / 'train/000001.png').unlink(), '000001.png'),
    'unreadable-mask': (truncate('labels/train/000001.png'), '000001.png'),
    'not-a-regular-file': (in_place_of('labels/train/000001.png', os.mkfifo), '000001.png'),
    'file-too-large': (in_place_of('labels/train/000001.png', oversized_file), '000001.png'),
    'mask-too-large': (in_place_of('labels/train/000001.png', huge_png), '000001.png'),
    'mask-lossy-format': (lossy_mask, '000001.png'),
    'name-spelling-mismatch': (decomposed_mask_name, 'caf\u00e9 is cafe\u0301'),
    'ambiguous-name': (two_unicode_forms, 'caf\u00e9 may be Caf\u00e9 or cafe\u0301'),
    'single-class-in-train': (single_class_in_train, 'ground'),
    'mask-size-mismatch': (change_labels(lambda labels: labels[:60]), '64 x 60, its image 64 x 64'),
    'mask-all-ignored': (change_labels(lambda labels: labels * 0), '000001.png'),
    'mask-in-color': (change_labels(lambda labels: np.dstack([labels, labels + 1, labels])), '000001.png'),
    'mask-not-8-bit': (change_labels(lambda labels: labels.astype(np.uint16) * 300), '000001.png'),
    'label-out-of-range': (change_labels(invalid_label), 'label 77 is used and has no name (under 0.1 % of the'),
    'class-never-annotated': (without_crosses_at_all, 'cross'),
    'class-not-in-train': (without_crosses, 'cross'),
    'train-image-in-val': (copied('val/000001.png'), 'val/000001.png is train/000001.png'),
}  # fmt: skip
CASES = [('detection', kind) for kind in DETECTION] + [('segmentation', kind) for kind in SEGMENTATION]


@pytest.fixture
def dataset_root(toy_dataset, tmp_path):
    shutil.copytree(toy_dataset, tmp_path / 'my_data')
    return tmp_path / 'my_data'


def load_all(config):
    """Load all samples and annotations that training and evaluation read."""
    init_default_scope(config.default_scope)
    for split in ('train', 'val'):
        dataset = DATASETS.build(config[f'{split}_dataloader'].dataset)
        for i in range(len(dataset)):
            assert dataset.prepare_data(i) is not None
    if config.default_scope == 'mmdet':
        from mmdet.datasets.api_wrappers import COCO

        api = COCO(config.val_evaluator.ann_file)
        for annotation in api.dataset['annotations']:
            api.annToMask(annotation)


@pytest.mark.parametrize('task, kind', CASES)
def test_each_problem_is_reported_and_handled(dataset_root, monkeypatch, task, kind):
    monkeypatch.chdir(dataset_root.parent)
    damage, expected = dict(detection=DETECTION, segmentation=SEGMENTATION)[task][kind]
    clean = {
        (f.split, f.code)
        for f in read_data(DatasetRequest('my_data'), task, ('train', 'val')).report.diagnostics.values()
    }
    assert not clean
    damage(dataset_root)
    data = read_data(DatasetRequest('my_data'), task, ('train', 'val'))
    problems = {f.code: f for f in data.report.diagnostics.values()}
    assert kind in problems, data.report.lines()
    assert any(expected in example for example in problems[kind].examples), problems[kind]
    assert problems[kind].count == 1 or kind in ('missing-area', 'most-boxes-as-corners')
    line = next(line for line in data.report.lines() if kind in line)
    assert line.startswith(RULES[kind].action) and f' {problems[kind].split}: ' in line
    config = load_recipe('demo/mask_rcnn' if task == 'detection' else 'demo/upernet')
    if RULES[kind].action == ERROR:
        with pytest.raises(UsageError, match=f'^data set: .*{re.escape(kind)}'):
            apply_custom_data(config, DatasetRequest('my_data'))
        return
    assert any(kind in line for line in apply_custom_data(config, DatasetRequest('my_data')))
    load_all(config)
    if RULES[kind].action in PROBLEM_ACTIONS:
        with pytest.raises(UsageError, match='dropped'):
            apply_custom_data(config, DatasetRequest('my_data', strict=True))
    elif not data.report.problems:
        apply_custom_data(config, DatasetRequest('my_data', strict=True))


def test_each_code_is_tested():
    """Every code of `RULES` is tested here or in the tests named."""
    tested = {*DETECTION, *SEGMENTATION}
    tested_elsewhere = {
        'unreadable-image', 'image-below-32-pixels', 'category-id-mismatch', 'supercategory-as-class',
        'few-masks', 'mask-values-0-and-255', 'missing-box', 'single-class', 'git-lfs-pointer', 'mask-ignored',
        'image-resized-to-zero', 'image-below-stride', 'mask-single-row',
    }  # fmt: skip
    tested_elsewhere |= {  # test_labelme.py, test_voc.py, test_select_classes.py
        'class-not-selected', 'difficult', 'ignored-region', 'shape-without-area',
        'label-without-name', 'missing-label', 'other-format', 'pixels-from-one',
    }  # fmt: skip
    tested_elsewhere |= {'channels-read-as-rgb'}  # test_channels.py
    tested_elsewhere |= {  # test_label_studio.py, test_other_formats.py
        'class-attribute-missing', 'mask-of-segments', 'region-of-rotated-image', 'segment-without-pixels',
        'several-annotations', 'task-without-annotation', 'most-boxes-as-fractions',
    }  # fmt: skip
    tested_elsewhere |= {  # test_yolo.py
        'boxes-and-polygons', 'class-count-mismatch', 'class-index-out-of-range', 'class-names-missing',
        'coordinates-beyond-one', 'images-outside-folder', 'keypoints-ignored', 'label-not-numbers',
        'label-odd-polygon', 'label-sixth-number', 'label-too-short', 'label-with-commas', 'missing-split',
        'unmatched-label', 'unreadable-label',
    }  # fmt: skip
    tested_elsewhere |= {  # test_mask_encodings.py
        'color-not-in-table', 'mask-0-and-255', 'mask-array', 'mask-color-coded', 'mask-gray-as-color',
        'mask-instance-ids', 'mask-not-gray', 'mask-soft-edges', 'mask-thresholded',
    }  # fmt: skip
    tested_elsewhere |= {  # test_channels.py
        'channel-count-mismatch', 'constant-channel', 'fourth-channel', 'value-type-mismatch',
    }  # fmt: skip
    tested_elsewhere |= {'instances-of-one-class', 'mask-without-object'}  # test_instance_masks.py
    assert len(tested) >= 25 and set(RULES) == tested | tested_elsewhere
    assert all(re.fullmatch(r'[a-z0-9]+(-[a-z0-9]+)*', code) for code in RULES)


def test_masks_of_0_and_255_with_three_classes_are_an_error(tmp_path):
    for n in range(4):
        for folder, image in (('images', np.full((40, 40, 3), 60 * n)), ('labels', np.eye(40) * 255)):
            path = tmp_path / f'{folder}/train/{n}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), image.astype(np.uint8))
    (tmp_path / 'classes.txt').write_text('background\ncrack\npothole\n')
    codes = codes_of(read_data(DatasetRequest(str(tmp_path)), 'segmentation', ('train',)).report)
    assert 'mask-values-0-and-255' in codes and RULES['mask-values-0-and-255'].action == ERROR


def test_annotations_without_box_and_mask_are_dropped(toy_dataset, tmp_path):
    shutil.copytree(toy_dataset, tmp_path / 'my_data')
    edit_coco(lambda c: ([a.pop('segmentation') for a in c['annotations']], c['annotations'][0].pop('bbox')))(
        tmp_path / 'my_data'
    )
    data = read_data(DatasetRequest(str(tmp_path / 'my_data')), 'detection', ('train',))
    assert 'missing-box' in codes_of(data.report) and not data.has_masks
    n = len(json.loads((toy_dataset / TRAIN).read_text())['annotations'])
    assert len(data.splits['train']['annotations']) == n - 1


def codes_of(report):
    return {finding.code for finding in report.diagnostics.values()}


@pytest.mark.parametrize(
    'damage',
    [
        lambda c: [a.update(iscrowd=1) for a in c['annotations']],
        lambda c: [a.update(ignore=1) for a in c['annotations']],  # which mmdet leaves out
        lambda c: [a.update(bbox=[0.1, 0.1, 0.4, 0.4]) for a in c['annotations']],
    ],
    ids=['crowd', 'ignored', 'normalized'],
)
def test_dataset_without_trainable_annotations_is_an_error(damage, toy_dataset, tmp_path):
    shutil.copytree(toy_dataset, tmp_path / 'my_data')
    edit_coco(damage)(tmp_path / 'my_data')
    assert 'nothing-to-train-on' in codes_of(
        read_data(DatasetRequest(str(tmp_path / 'my_data')), 'detection', ('train',)).report
    )


@pytest.mark.parametrize(
    'name, text, names',
    [
        ('c.json', '{"cat": 1, "background": 0}', ['background', 'cat']),
        ('c.json', '{"0": "background", "1": "cat"}', ['background', 'cat']),
        ('c.json', '{"classes": {"cat": 1, "background": 0}}', ['background', 'cat']),
        ('c.json', '[{"id": 1, "name": "cat"}, {"id": 0, "name": "background"}]', ['background', 'cat']),
        ('c.txt', '0: background\n1: cat\n', ['background', 'cat']),
        ('c.txt', 'Nature::Tree\nNature::Road\n', ['Nature::Tree', 'Nature::Road']),
        ('c.txt', 'cat:128,0,0::\ndog:0,128,0:head:run\n', ['cat', 'dog']),
    ],
)
def test_class_names_are_sorted_by_label(name, text, names, tmp_path):
    (tmp_path / name).write_text(text)
    assert read_classes(tmp_path / name)[0] == names


def test_image_that_only_pillow_reads_is_unreadable(dataset_root):
    path = dataset_root / 'train/000001.png'
    Image.open(path).save(path, format='PCX')
    assert check_dataset(dataset_root)[1]['unreadable-image'].examples == ['000001.png']


def test_truncated_jpeg_is_detected_without_opencv(dataset_root, monkeypatch):
    """Some versions of OpenCV decode it without an error."""
    truncated_jpeg(dataset_root)
    monkeypatch.setattr(cv2, 'imdecode', lambda *_: np.zeros((64, 64, 3), np.uint8))
    assert inspect_image(str(dataset_root / 'train/000001.jpg')).problem == 'truncated-image'


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'tif', 'bmp'])
def test_image_size_and_exif_match_mmcv(tmp_path, suffix, orientation):
    """Training reads images rotated as EXIF says."""
    exif = Image.Exif()
    exif[274] = orientation
    path = str(tmp_path / f'x.{suffix}')
    Image.fromarray(np.zeros((37, 50, 3), np.uint8)).save(path, exif=exif)
    info, pixels = inspect_image(path), mmcv.imread(path)
    assert (info.height, info.width) == pixels.shape[:2]
    assert info.exif_swapped == (mmcv.imread(path, 'color_ignore_orientation').shape != pixels.shape)


def test_small_images_and_reordered_categories_are_reported(tmp_path):
    write_dataset(tmp_path / 'my_data', 3, sizes=((31, 64), (64, 64), (30, 30)))
    problem = check_dataset(tmp_path / 'my_data')[1]['image-below-32-pixels']
    assert problem.count == 2 and problem.examples == ['0.png (31 x 64)', '2.png (30 x 30)']
    edit_coco(lambda coco: coco.update(renumber_categories(coco)), 'annotations/val.json')(tmp_path / 'my_data')
    assert check_dataset(tmp_path / 'my_data')[1]['category-id-mismatch'].count == 3


def test_supercategory_without_annotations_is_no_class(toy_dataset, tmp_path):
    as_roboflow(toy_dataset, tmp_path / 'my_data')
    data, problems = check_dataset(tmp_path / 'my_data')
    assert problems['supercategory-as-class'].examples == ['shapes'] and 'shapes' not in data.classes
    edit_coco(lambda coco: coco['annotations'][0].update(category_id=0), 'train/_annotations.coco.json')(
        tmp_path / 'my_data'
    )
    assert check_dataset(tmp_path / 'my_data')[0].classes[0] == 'shapes'  # what is annotated is a class


def test_few_masks_are_ignored(dataset_root):
    def remove_masks(coco):
        for annotation in coco['annotations'][2:]:
            annotation['segmentation'] = []

    edit_coco(remove_masks)(dataset_root)
    data, problems = check_dataset(dataset_root)
    assert problems['few-masks'].count == 2 and not data.has_masks
    assert not any('segmentation' in annotation for annotation in data.splits['train']['annotations'])


def test_report_counts_and_limits_examples(dataset_root):
    for path in images_of(dataset_root):
        path.write_bytes(b'')
    with pytest.raises(UsageError, match='nothing-to-train-on'):
        apply_custom_data(load_recipe('demo/upernet'), DatasetRequest(str(dataset_root)))
    lines = check_dataset(dataset_root)[0].report.lines()
    names = ', '.join(f'00000{i}.png' for i in (1, 2, 3))
    assert f'dropped  train: empty-file, 5 ({names}, ...)' in lines


def test_exif_rotation_follows_the_annotated_sizes(dataset_root):
    """Annotated as rotated: nothing to do. As stored: all images are read as stored, in training too."""
    exif_rotated_jpeg(dataset_root)
    data, problems = check_dataset(dataset_root)
    assert not data.apply_exif and 'exif-rotated-image' in problems
    config = load_recipe('demo/mask_rcnn')
    config.work_dir = str(dataset_root.parent / 'run')
    apply_custom_data(config, DatasetRequest(str(dataset_root)))
    for split in ('train', 'val', 'test'):
        assert config[f'{split}_dataloader'].dataset.pipeline[0].color_type == 'color_ignore_orientation'
    load_all(config)
    edit_coco(lambda coco: coco['images'][0].update(width=48, height=64))(dataset_root)
    data, problems = check_dataset(dataset_root)
    assert data.apply_exif and 'exif-rotated-image' not in problems and data.splits['train']['images'][0]['width'] == 48


def test_decoded_rle_runs_match_pycocotools():
    rng = np.random.RandomState(0)
    for density in (0, 0.01, 0.5, 0.99, 1):
        mask = np.asfortranarray(rng.random_sample((57, 83)) < density, np.uint8)
        flat = mask.ravel('F')
        ends = np.flatnonzero(np.diff(np.r_[0, flat, 2]))
        runs = np.diff(np.r_[0, ends])
        assert decode_rle_runs(coco_mask.encode(mask)['counts'].decode()) == runs.tolist()


@pytest.mark.parametrize(
    'text, message',
    [
        ('{"images": [', 'instances_train.json is truncated or not valid JSON'),
        ('', 'instances_train.json is truncated or not valid JSON'),
        ('[1, 2]', 'it holds a list'),
        ('{"a": 1}', 'no list of images and annotations and categories (it has a)'),
        ('{"images": [], "annotations": []}', 'no list of categories'),
        ('{"images": [], "annotations": [], "categories": []}', 'has no categories'),
        ('{"images": [1, {}], "annotations": [2], "categories": [3]}', 'category-without-id-or-name, 1 (3)'),
    ],
)
def test_json_that_is_not_coco_is_an_error(dataset_root, text, message):
    (dataset_root / TRAIN).write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)):
        check_dataset(dataset_root)


UNSUPPORTED = {  # what is there -> what it is recognized as
    'data.yaml: it names no training images': {
        'data.yaml': 'names: [a]',
        'train/labels/1.txt': '',
        'train/images/1.jpg': '',
    },
    'LabelMe': {'1.json': '{"version": "5", "shapes": []}', '2.json': '{"shapes": []}', '1.jpg': ''},
    'a project of VIA 3 (via.json)': {'via.json': '{"project": {"vid_list": ["1"]}, "metadata": {}}', '1.jpg': ''},
    'TFRecords': {'train/a.tfrecord': 'x', 'train/b.tfrecord': 'x'},
    'labels in CSV': {'train/_annotations.csv': 'filename,width', 'train/1.jpg': ''},
    'one folder per class': {'train/cat/1.jpg': '', 'train/dog/1.jpg': ''},
    'one folder per class ': {'cat/1.jpg': '', 'dog/1.jpg': ''},
    'archives: unpack': {'data.zip': 'PK'},
    'images without annotations': {'1.jpg': '', '2.jpg': ''},
    'no known data set (its files end with .doc': {'a.doc': ''},
    'is an empty folder': {},
}


@pytest.mark.parametrize('kind', UNSUPPORTED)
def test_unsupported_formats_are_recognized(tmp_path, kind):
    (tmp_path / 'my_data').mkdir()
    for name, text in UNSUPPORTED[kind].items():
        (tmp_path / 'my_data' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'my_data' / name).write_text(text)
    for task in ('detection', 'segmentation'):
        with pytest.raises(UsageError, match=re.escape(kind.strip())):
            check_dataset(tmp_path / 'my_data', task)


def test_path_that_is_not_a_folder_is_an_error(tmp_path, dataset_root):
    (tmp_path / 'data.zip').write_text('PK')
    for path, message in (
        (tmp_path / 'gone', 'does not exist'),
        (tmp_path / 'data.zip', 'is an archive: unpack it'),
        (dataset_root / TRAIN, 'give its folder, or --train-ann'),
    ):
        with pytest.raises(UsageError, match=message):
            check_dataset(path)


def test_dataset_of_the_other_task_is_an_error(toy_dataset, tmp_path):
    as_roboflow(toy_dataset, tmp_path / 'boxes')
    as_folders(toy_dataset, tmp_path / 'maps')
    with pytest.raises(UsageError, match='holds boxes, but segmentation needs segmentation masks: .*cascade'):
        check_dataset(tmp_path / 'boxes', 'segmentation')
    with pytest.raises(UsageError, match=r'holds segmentation masks, but detection needs boxes: .*configs/upernet'):
        check_dataset(tmp_path / 'maps')


def test_masks_need_class_names(toy_dataset, tmp_path):
    as_folders(toy_dataset, tmp_path / 'my_data')
    (tmp_path / 'my_data/classes.txt').unlink()
    with pytest.raises(UsageError, match='does not name its classes: give --classes FILE'):
        check_dataset(tmp_path / 'my_data', 'segmentation')
    (tmp_path / 'few.txt').write_text('ground\ndisc\nsquare\ntriangle\n')
    problems = check_dataset(tmp_path / 'my_data', 'segmentation', classes=str(tmp_path / 'few.txt'))[1]
    assert '--ignore 4, or, if 0 is no class, --ignore 0' in problems['label-out-of-range'].examples[0]
    data, problems = check_dataset(
        tmp_path / 'my_data', 'segmentation', classes=str(tmp_path / 'few.txt'), ignore_labels=[0]
    )
    assert data.dataset_kwargs['reduce_zero_label'] and not problems
    data, problems = check_dataset(
        tmp_path / 'my_data', 'segmentation', classes=str(tmp_path / 'few.txt'), ignore_labels=[4]
    )
    assert data.dataset_kwargs == dict(reduce_zero_label=False, label_map=[[4, 255]]) and not problems
    (tmp_path / 'twice.txt').write_text('ground\nground\n')
    with pytest.raises(UsageError, match="names 'ground' twice"):
        check_dataset(tmp_path / 'my_data', 'segmentation', classes=str(tmp_path / 'twice.txt'))
    with pytest.raises(UsageError, match='no classes file .*ade20k, cityscapes, voc'):
        check_dataset(tmp_path / 'my_data', 'segmentation', classes='gone.txt')


@pytest.mark.parametrize(
    'name, text',
    [
        ('names.txt', '# of our lab\na b\n\nc\n'),
        ('names.txt', 'a b: 1, 2, 3\nc: 4,5,6\n'),
        ('names.txt', 'a b:1,2,3::\nc:4,5,6::\n'),
        ('names.txt', 'a b 1 2 3\nc 4 5 6\n'),
        ('names.json', '["a b", "c"]'),
        ('names.json', '{"a b": [1, 2, 3], "c": [4, 5, 6]}'),
        ('names.json', '[{"name": "a b", "color": "#010203"}, {"name": "c", "color": [4, 5, 6]}]'),
        ('names.csv', 'Pixel Value, Class\n0, a b\n1, c\n'),
    ],
)
def test_class_file_formats_are_parsed(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    names, colors = read_classes(tmp_path / name)
    assert names == ['a b', 'c']
    assert colors == ([[1, 2, 3], [4, 5, 6]] if '3' in text else None)


@pytest.mark.parametrize(
    'name, text', [('x.json', '{'), ('x.json', '5'), ('x.csv', 'a,b\n1,c'), ('x.txt', ''), ('x.json', '[3]')]
)
def test_invalid_class_file_is_an_error(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=name):
        read_classes(tmp_path / name)


def test_check_data_tool(dataset_root, capsys, monkeypatch):
    monkeypatch.chdir(dataset_root.parent)
    assert run('check_data.py', '--data', 'my_data') == 0
    out = capsys.readouterr().out
    assert out.startswith('detection\n') and '\n\nsegmentation\n' in out and out.count('no problems found') == 2
    (dataset_root / 'train/000001.png').write_bytes(b'')
    mtimes = {path: path.stat().st_mtime_ns for path in Path('.').rglob('*')}
    assert run('check_data.py', '--data', 'my_data', '--task', 'detection', '--json') == 1
    problems = json.loads(capsys.readouterr().out)
    assert problems['detection']['diagnostics'] == [
        dict(split='train', code='empty-file', action='dropped', count=1, examples=['000001.png'])
    ]
    assert {path: path.stat().st_mtime_ns for path in Path('.').rglob('*')} == mtimes
    assert run('check_data.py', '--data', 'gone') == 2
    assert capsys.readouterr().err == 'error: gone does not exist\n'
    assert run('check_data.py') == 2 and run('check_data.py', '--data', 'my_data', '--train-images', 'my_data') == 2


@pytest.mark.parametrize(
    'options, message',
    [
        (['--strict'], '--strict needs --data PATH'),
        (['--classes', 'voc'], '--classes needs --data PATH'),
        (['--val-fraction', '0.3'], '--val-fraction needs --data PATH'),
        (['--train-images', 'my_data'], '--train-images needs --train-ann or --train-masks'),
        (['--train-ann', f'my_data/{TRAIN}', '--train-images', 'gone'], "--train-images 'gone' is not a folder"),
        (['--train-ann', 'gone.json'], 'gone.json: No such file'),
        (
            ['--train-ann', f'my_data/{TRAIN}', '--val-fraction', '1.5'],
            '--val-fraction 1.5: give a fraction between 0 and 1',
        ),
        (
            ['--train-ann', f'my_data/{TRAIN}', '--train-images', 'my_data/annotations'],
            'none of its images (such as 000001.png)',
        ),
        (['--data', 'my_data', '--classes', 'voc'], "--classes: no class is called 'voc'"),
        (['--data', 'my_data', '--val-fraction', '0.2'], '--val-fraction is for a data set without a validation split'),
        (['--data', 'my_data/labels'], 'my_data/labels is a part of a data set: give my_data'),
    ],
)
def test_conflicting_arguments_are_errors(dataset_root, monkeypatch, capsys, options, message):
    monkeypatch.chdir(dataset_root.parent)
    assert run('train.py', DETECTOR, *options) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith('error: ') and message in line


INVALID_VALUES = (
    None,
    True,
    -1,
    0,
    1.5,
    float('nan'),
    float('inf'),
    10**30,
    '',
    '1',
    [],
    [[]],
    [None],
    {},
    {'a': 1},
    [[1, 2]],
)


def iter_paths(value, at=()):
    """Iterate over the key paths of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from iter_paths(item, (*at, key))


@pytest.mark.parametrize('seed', range(60))
def test_random_values_are_reported_or_one_error(dataset_root, monkeypatch, seed):
    """Three values of a COCO file are replaced: the rest can be loaded, or there is a one-line error."""
    monkeypatch.chdir(dataset_root.parent)
    rng = np.random.RandomState(seed)
    file = (TRAIN, VAL)[seed % 2]
    content = json.loads((dataset_root / file).read_text())
    content['images'], content['annotations'] = content['images'][:3], content['annotations'][:6]
    for _ in range(3):
        paths = [path_of_keys for path_of_keys in iter_paths(content) if len(path_of_keys) > 1]
        *path, last_key = paths[rng.randint(len(paths))]
        holder = content
        for key in path:
            holder = holder[key]
        if rng.randint(4) or isinstance(holder, list):
            holder[last_key] = INVALID_VALUES[rng.randint(len(INVALID_VALUES))]
        else:
            del holder[last_key]
    (dataset_root / file).write_text(json.dumps(content))
    config = load_recipe('demo/mask_rcnn')
    try:
        apply_custom_data(config, DatasetRequest('my_data'))
    except UsageError as error:
        assert '\n' not in str(error)
        return
    load_all(config)
