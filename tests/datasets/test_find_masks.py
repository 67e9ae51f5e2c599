"""Folders of images and segmentation masks with other names are found by what is in them, or are given."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from convnext_dense.datasets import toy_shapes
from convnext_dense.datasets.custom import DatasetRequest, detect_tasks, read_data
from convnext_dense.datasets.find_masks import find_mask_folders
from helpers.datasets import SEGMENTOR, class_map, copy_images, quick_options, run, write_masks
from helpers.files import error_message

TREES = {  # folders of images and masks by split
    'SegNet': {'train': ('train', 'trainannot'), 'val': ('val', 'valannot'), 'test': ('test', 'testannot')},
    'SegNet, further down': {'train': ('CamVid/train', 'CamVid/trainannot'), 'val': ('CamVid/val', 'CamVid/valannot')},
    'names of two words': {'train': ('train_images', 'train_masks'), 'val': ('val_images', 'val_masks')},
    'masks before the split': {'train': ('train', 'mask_train'), 'val': ('val', 'mask_val')},
    'original': {'all': ('original_image', 'segmentation_image')},
    'Original and GT': {'all': ('Original', 'GT')},
    'two trees': {'train': ('photos/train', 'annots/train'), 'val': ('photos/val', 'annots/val')},
    'split in one name': {'train': ('train/rgb', 'train/gt'), 'val': ('valid/rgb', 'valid/gt')},
    'names that say nothing': {'all': ('one', 'two')},
    'swapped order': {'all': ('zebra', 'aardvark')},
}


def write_tree(toy_dataset, root, tree):
    for split, (images, masks) in tree.items():
        source = 'train' if split in ('all', 'test') else split
        copy_images(toy_dataset, source, root / images)
        write_masks(toy_dataset, source, root / masks)
    (root / 'classes.txt').write_text('\n'.join(toy_shapes.LABEL_NAMES))


@pytest.mark.parametrize('kind', TREES)
def test_folders_are_found(kind, toy_dataset, tmp_path):
    write_tree(toy_dataset, tmp_path, TREES[kind])
    assert detect_tasks(DatasetRequest(str(tmp_path))) == ['segmentation']
    dirs_of_split = {split: dirs[:2] for split, dirs in find_mask_folders(tmp_path)[1].items()}
    assert dirs_of_split == {split: (tmp_path / a, tmp_path / b) for split, (a, b) in TREES[kind].items()}
    data = read_data(DatasetRequest(str(tmp_path)), 'segmentation', ('train', 'val'))
    assert not [d.code for d in data.report.problems] and data.classes == list(toy_shapes.LABEL_NAMES)
    for split, (images, masks) in TREES[kind].items():
        if split in data.splits:
            names = sorted(path.name for path in (tmp_path / images).iterdir())
            assert data.splits[split] == [[f'{images}/{name}', f'{masks}/{name}'] for name in names]


def test_trees_with_further_folders(toy_dataset, tmp_path):
    for split in ('train', 'val'):
        for place in ('ulm', 'bonn'):
            copy_images(toy_dataset, split, tmp_path / 'frames' / split / place, f'{place}_{{}}')
            write_masks(toy_dataset, split, tmp_path / 'classes' / split / place, name=f'{place}_{{}}')
    dirs = find_mask_folders(tmp_path)[1]
    assert {split: each[:2] for split, each in dirs.items()} == {
        split: (tmp_path / 'frames' / split, tmp_path / 'classes' / split) for split in ('train', 'val')
    }


def test_masks_beside_images(toy_dataset, tmp_path):
    copy_images(toy_dataset, 'train', tmp_path)
    write_masks(toy_dataset, 'train', tmp_path, name='{}_mask')
    (tmp_path / 'classes.txt').write_text('\n'.join(toy_shapes.LABEL_NAMES))
    data = read_data(DatasetRequest(str(tmp_path)), 'segmentation', ('train', 'val'))
    pairs = sorted(pair for pairs in data.splits.values() for pair in pairs)
    names = sorted(path.stem for path in (toy_dataset / 'train').iterdir())
    assert pairs == [[f'{name}.png', f'{name}_mask.png'] for name in names] and not data.report.problems


def test_gray_images(tmp_path):
    """Images of one channel have more values than masks."""
    rng = np.random.RandomState(0)
    for i in range(4):
        for folder, pixels in (('x', rng.randint(0, 256, (64, 64))), ('y', np.eye(64) * (i + 1))):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / folder / f'{i}.png')
    assert find_mask_folders(tmp_path)[1]['all'][:2] == (tmp_path / 'x', tmp_path / 'y')


def test_several_possibilities_are_listed(toy_dataset, tmp_path):
    write_tree(toy_dataset, tmp_path, {'train': ('train/images', 'train/coarse')})
    write_masks(toy_dataset, 'train', tmp_path / 'train/fine')
    line = error_message(detect_tasks, DatasetRequest(str(tmp_path)))
    assert 'several folders could be the train split; choose by' in line
    for masks in ('coarse', 'fine'):
        assert f'--train-images {tmp_path}/train/images --train-masks {tmp_path}/train/{masks}' in line


def write_images(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / name), np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8))


NO_MASKS = {
    'copies of images': ['images/a.png', 'images/b.png', 'large/a.png', 'large/b.png'],
    'one folder': ['images/a.png', 'images/b.png'],
    'other names': ['pictures/a.png', 'pictures/b.png', 'gt/c.png', 'gt/d.png'],
    'classes': ['cat/1.png', 'dog/1.png'],
    'splits': ['train/1.png', 'val/1.png'],
}


@pytest.mark.parametrize('kind', NO_MASKS)
def test_other_folders_are_not_masks(kind, tmp_path):
    write_images(tmp_path, *NO_MASKS[kind])
    assert find_mask_folders(tmp_path) is None
    assert str(tmp_path) in error_message(detect_tasks, DatasetRequest(str(tmp_path)))


def test_drawings_beside_boxes_are_no_masks(toy_dataset, tmp_path):
    """Such as COCO's panoptic PNGs; with boxes, masks are looked for in known layouts, or if these are asked for."""
    write_tree(toy_dataset, tmp_path, {'train': ('train', 'panoptic_train')})
    content = json.loads((toy_dataset / 'annotations/instances_train.json').read_text())
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'annotations/instances_train.json').write_text(json.dumps(content))
    request = DatasetRequest(str(tmp_path))
    assert detect_tasks(request) == ['detection']
    assert sum(map(len, read_data(request, 'segmentation', ('train', 'val')).splits.values())) == 5


GIVEN = {
    'both': ['--train-images', 'a/x', '--train-masks', 'b/y', '--val-images', 'a/v', '--val-masks', 'b/w'],
    'train': ['--train-images', 'a/x', '--train-masks', 'b/y'],
}


@pytest.mark.parametrize('kind', GIVEN)
def test_given_folders_train(kind, toy_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tree(toy_dataset, tmp_path, {'train': ('a/x', 'b/y'), 'val': ('a/v', 'b/w')})
    options = ['--classes', 'classes.txt', '--work-dir', 'run', '--cfg-options', *quick_options('given')]
    options = [*options, 'train_cfg.max_iters=1', 'train_cfg.val_interval=1']
    assert run('train.py', SEGMENTOR, *GIVEN[kind], *options) == 0
    written = {split: json.loads(Path(f'run/data/{split}.json').read_text()) for split in ('train', 'val')}
    assert all(a.replace('a/x', 'b/y').replace('a/v', 'b/w') == b for pairs in written.values() for a, b in pairs)
    assert {Path(image).parent.name for image, _ in written['val']} == ({'v'} if kind == 'both' else {'x'})
    assert len(written['train']) + len(written['val']) == (8 if kind == 'both' else 5)
    labels = np.asarray(Image.open(tmp_path / written['train'][0][1]))
    assert np.array_equal(labels, class_map(toy_dataset, 'train', Path(written['train'][0][0]).name))


BAD_OPTIONS = {
    'masks alone': (['--train-masks', 'a'], '--train-masks needs --train-images'),
    'images alone': (['--data', 'a', '--val-images', 'a'], '--val-images needs --val-ann or --val-masks'),
    'no folder': (['--train-images', 'a', '--train-masks', 'gone'], "--train-masks 'gone' is not a folder"),
    'two tasks': (['--train-ann', 'a.json', '--train-masks', 'a', '--train-images', 'a'], 'are for different tasks'),
    'names': (['--train-images', 'a', '--train-masks', 'a', '--classes', 'x', 'y'], 'for segmentation masks give one'),
}


@pytest.mark.parametrize('kind', BAD_OPTIONS)
def test_bad_options(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path, 'a/1.png')
    options, message = BAD_OPTIONS[kind]
    assert run('check_data.py', *options) == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_masks_of_another_folder_of_names(toy_dataset, tmp_path):
    """Names that match those of other splits decide nothing."""
    write_tree(toy_dataset, tmp_path, {'train': ('train/a', 'train/b'), 'val': ('val/a', 'val/b')})
    dirs_of_split = find_mask_folders(tmp_path)[1]
    assert {split: dirs.labels.parent.name for split, dirs in dirs_of_split.items()} == {'train': 'train', 'val': 'val'}
