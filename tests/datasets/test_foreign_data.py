"""Folders of unsupported formats are described by what they contain."""

import json
import os
import shutil

import cv2
import numpy as np
import pytest

from convnext_dense.datasets import toy_shapes
from convnext_dense.datasets.custom import DatasetRequest, detect_tasks, read_data
from helpers.datasets import check_dataset
from helpers.files import error_message

POINTER = f'version https://git-lfs.github.com/spec/v1\noid sha256:{"a" * 64}\nsize 12345\n'
KITTI = 'Car 0.00 0 -1.57 599.41 156.40 629.75 189.25 2.85 2.63 12.34 0.47 1.49 69.44 -1.56\n'
PANOPTIC = json.dumps(
    dict(
        images=[dict(id=1, file_name='a.jpg', width=8, height=8)],
        annotations=[dict(image_id=1, file_name='a.png', segments_info=[dict(id=1, category_id=1, area=9)])],
        categories=[dict(id=1, name='cat', isthing=1)],
    )
)


def write_files(root, *files):
    """Write images, and text files from (name, text)."""
    for name, text in (file if isinstance(file, tuple) else (file, None) for file in files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            cv2.imwrite(str(root / name), np.zeros((8, 8, 3), np.uint8))
        else:
            (root / name).write_text(text)


PAIRED = [f'{split}/{folder}/a.png' for split in ('train', 'val') for folder in ('images', 'labels')]
FOLDERS = {  # what lies in a folder -> what it is called
    'a pointer to JSON': (['a.jpg', ('coco.json', POINTER)], 'Git LFS pointers, such as coco.json: run git lfs'),
    'a pointer to an archive': ([('data.zip', POINTER)], 'Git LFS pointers, such as data.zip'),
    'an unfinished download': (['a.jpg', ('x.zip.crdownload', 'PK')], 'unfinished download (x.zip.crdownload)'),
    'a part of an archive': ([('data.zip.part', 'PK')], 'unfinished download (data.zip.part): finish it'),
    'a level too high': ([f'set/{name}' for name in PAIRED], 'holds a data set in its folder set: give '),
    'captions': (['a.jpg', ('annotations/captions_train.json', '{"annotations": [{"caption": "x"}]}')], 'captions ('),
    'keypoints': (['a.jpg', ('annotations/person_train.json', '{"annotations": [{"keypoints": []}]}')], 'keypoints ('),
    'KITTI': (['image_2/a.png', ('label_2/a.txt', KITTI)], 'KITTI boxes (label_2/a.txt)'),
    'DOTA': (['images/a.png', ('labelTxt/a.txt', 'gsd:1\n1 2 3 4 5 6 7 8 plane 0')], 'rotated boxes of DOTA'),
    'MOT': (['img1/a.jpg', ('gt/gt.txt', '1,1,1,1,1,1,1,1,1')], 'tracks of MOT'),
    'MATLAB': (['images/a.jpg', ('labels/a.mat', 'MATLAB 5.0')], 'NumPy or MATLAB'),
    'images and other texts': (['a.jpg', ('a.txt', '5 1 2 3 4'), ('b.txt', 'a b c d e')], 'images without annotations'),
    'images alone': (['train/a.jpg', 'val/a.jpg'], 'images without annotations'),
}


@pytest.mark.parametrize('kind', FOLDERS)
def test_unsupported_folders_are_described(kind, tmp_path):
    files, message = FOLDERS[kind]
    write_files(tmp_path, *files)
    assert message in error_message(detect_tasks, DatasetRequest(str(tmp_path)))


@pytest.mark.parametrize('folder', ['images', 'images/train', 'labels', 'labels/val'])
def test_the_wrong_level_is_named(folder, tmp_path, monkeypatch):
    for split in ('train', 'val'):
        write_files(tmp_path, f'images/{split}/a.jpg', (f'labels/{split}/a.txt', '0 0.5 0.5 0.5 0.5\n'))
    line = error_message(detect_tasks, DatasetRequest(str(tmp_path / folder)))
    assert line.endswith(f'give {tmp_path}')
    monkeypatch.chdir(tmp_path / folder)
    line = error_message(detect_tasks, DatasetRequest('.'))
    assert line.endswith(f'give {os.path.relpath(tmp_path)}')


def test_labels_above_are_not_looked_for_in_any_folder(tmp_path):
    write_files(tmp_path, 'a.jpg', ('a.txt', '0 0.5 0.5 0.5 0.5\n'), 'holiday/b.jpg')
    line = error_message(detect_tasks, DatasetRequest(str(tmp_path / 'holiday')))
    assert line.endswith('holds images without annotations')


@pytest.mark.parametrize('name', ['annotations/panoptic_train.json', 'annotations/instances_train.json', 'x.json'])
def test_panoptic_json_is_recognized(name, tmp_path):
    write_files(tmp_path, 'train/a.jpg', (name, PANOPTIC))
    for request in (dict(path=str(tmp_path)), dict(ann_files={'train': str(tmp_path / name)})):
        line = error_message(read_data, DatasetRequest(**request), 'detection', ('train', 'val'))
        assert f'{name}: its PNGs (such as a.png) are not in' in line
    line = error_message(read_data, DatasetRequest(str(tmp_path), format='coco'), 'detection', ('train', 'val'))
    assert 'holds no labels of this format' in line


@pytest.fixture
def dataset_root(tmp_path):
    toy_shapes.write(tmp_path / 'my_data', train=5, val=3, size=64)
    return tmp_path / 'my_data'


def test_lfs_pointers_of_images_are_reported(dataset_root):
    (dataset_root / 'train/000001.png').write_text(POINTER)
    (dataset_root / 'labels/train/000002.png').write_text(POINTER)
    findings = read_data(DatasetRequest(str(dataset_root)), 'detection', ('train', 'val')).report.diagnostics
    assert [(f.code, f.examples) for f in findings.values()] == [('git-lfs-pointer', ['000001.png'])]
    assert check_dataset(dataset_root, 'segmentation')[1]['git-lfs-pointer'].examples == ['000001.png', '000002.png']


def test_lfs_pointers_of_json_and_lists_are_errors(dataset_root):
    (dataset_root / 'annotations/instances_val.json').write_text(POINTER)
    line = error_message(read_data, DatasetRequest(str(dataset_root)), 'detection', ('train', 'val'))
    assert 'instances_val.json: is a Git LFS pointer' in line and 'git lfs pull' in line
    shutil.rmtree(dataset_root / 'annotations')
    (dataset_root / 'shapes.json').unlink()  # which would name the classes
    (dataset_root / 'classes.txt').write_text(POINTER)
    assert 'classes.txt: is a Git LFS pointer' in error_message(check_dataset, dataset_root, 'segmentation')
