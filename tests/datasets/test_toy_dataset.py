"""The toy data set is read back by the libraries that read COCO and ADE20K, and its pixels are pinned by a hash."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from convnext_dense.datasets import toy_shapes
from convnext_dense.errors import UsageError

SMALL = dict(seed=0, train=3, val=2, size=128)
SHA256 = '20d4f05088b7447a2046e98cbc2295fb86d1730a129523ac71c0da78e3b3ac65'  # of pixels, JSON and names

# The module without the package around it, which imports torch; `main` ends the process.
STANDALONE_SCRIPT = """
import runpy, sys, types
package = types.ModuleType('convnext_dense')
package.__path__ = [sys.argv.pop(1)]
sys.modules['convnext_dense'] = package
runpy.run_module('convnext_dense.datasets.toy_shapes', run_name=sys.argv.pop(1), alter_sys=True)
print(*({'torch', 'mmengine', 'PIL', 'pycocotools', 'scipy'} & set(sys.modules)))
"""


def run_standalone(name, *args):
    folder = str(Path(toy_shapes.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, '-c', STANDALONE_SCRIPT, folder, name, *map(str, args)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def scenes(count, seed=1, size=128):
    return [toy_shapes.draw(np.random.RandomState([seed, 0, i]), size) for i in range(count)]


def decoded(polygons, mask):
    """Return the union of polygons as pycocotools fills them, which shares no code with the drawing."""
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *mask.shape))).astype(bool)


def files(root):
    return sorted(path for path in Path(root).rglob('*') if path.is_file())


def read_pixels(path):
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED).tobytes() if path.suffix == '.png' else path.read_bytes()


def sha256(root, read=Path.read_bytes):
    digest = hashlib.sha256()
    for path in files(root):
        digest.update(path.relative_to(root).as_posix().encode() + b'\0' + read(path))
    return digest.hexdigest()


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp('data') / 'shapes'
    assert toy_shapes.write(root, **SMALL)
    return root


def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, 'argv', ['shapes', *map(str, args)])
    code = toy_shapes.main()
    return code, *capsys.readouterr()


def test_pixels_and_annotations_match_the_pinned_hash(small):
    assert sha256(small, read_pixels) == SHA256


def test_only_numpy_and_opencv_are_imported(tmp_path, small):
    process = run_standalone('toy_shapes', tmp_path / 'unused')
    assert process.communicate() == ('\n', '')
    process = run_standalone('__main__', tmp_path / 'a/new/place', '--train', 3, '--val', 2)
    out, err = process.communicate()
    assert (process.returncode, err, out.count('\n')) == (0, '', 1)
    assert sha256(tmp_path / 'a/new/place') == sha256(small)


def test_images_without_labels_are_others(small, tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'unlabeled'
    args = (folder, '--unlabeled', 3, '--size', 64)
    assert run(monkeypatch, capsys, *args) == (0, f'drew 3 images without labels into {folder}\n', '')
    images = [read_pixels(path) for path in files(folder)]
    assert [path.name for path in files(folder)] == ['000001.png', '000002.png', '000003.png']
    assert not {*images} & {read_pixels(path) for path in files(small) if path.suffix == '.png'}
    code, _, error = run(monkeypatch, capsys, *args)
    assert code == 2 and 'File exists' in error
    assert [read_pixels(path) for path in files(folder)] == images


def test_layout(small):
    assert [path.relative_to(small).as_posix() for path in files(small)] == sorted(
        [
            'shapes.json',
            'annotations/instances_train.json',
            'annotations/instances_val.json',
            *(
                f'{folder}{split}/{i:06d}.png'
                for folder in ('', 'labels/')
                for split, count in (('train', 3), ('val', 2))
                for i in range(1, count + 1)
            ),
        ]
    )


@pytest.mark.parametrize(
    ('size', 'radius'),
    ((64, toy_shapes.RADIUS_RANGE), (128, toy_shapes.RADIUS_RANGE), (201, toy_shapes.RADIUS_RANGE), (128, (4, 50))),
)  # the last: small shapes would leave holes in large ones
def test_polygons_cover_exactly_the_visible_pixels(size, radius, monkeypatch):
    monkeypatch.setattr(toy_shapes, 'RADIUS_RANGE', radius)
    combinations = set()
    for scene in scenes(16, size=size):
        result = toy_shapes.coco_annotations(scene)
        assert len(result) == len(scene.categories) == len(scene.areas) == scene.instances.max()
        for k, annotation in enumerate(result, 1):
            visible = scene.instances == k
            np.testing.assert_array_equal(decoded(annotation['segmentation'], visible), visible)
            assert annotation['bbox'] == list(cv2.boundingRect(visible.astype(np.uint8)))
            assert annotation['area'] == visible.sum()
            assert annotation['category_id'] == scene.categories[k - 1] + 1
            combinations.add((annotation['category_id'], len(annotation['segmentation']) > 1))
    assert {category for category, _ in combinations} == set(range(1, 1 + len(toy_shapes.CLASSES)))
    assert {in_pieces for _, in_pieces in combinations} == {False, True}


@pytest.mark.parametrize('density', (0.2, 0.5, 0.8))
def test_outline_of_any_mask(density):
    rng = np.random.RandomState(0)
    for _ in range(20):
        mask = rng.random_sample((13, 17)) < density
        loops = toy_shapes.outline(mask)
        filled = [decoded([np.ravel(loop).tolist()], mask) for loop in loops]
        np.testing.assert_array_equal(np.logical_xor.reduce(filled), mask)
        pieces = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0] - 1
        holes = cv2.connectedComponents(np.pad(~mask, 1, constant_values=True).astype(np.uint8), connectivity=8)[0] - 2
        clockwise = [cv2.contourArea(np.array(loop, np.float32), oriented=True) > 0 for loop in loops]
        assert (sum(clockwise), len(loops) - sum(clockwise)) == (pieces, holes)
        for loop in loops:
            steps = np.diff([*loop, loop[0], loop[1]], axis=0)
            assert all((a == 0).sum() == 1 and a @ b == 0 for a, b in zip(steps, steps[1:]))  # a corner at each point


def test_outline_of_touching_pixels():
    assert toy_shapes.outline(np.eye(1)) == [[(1, 0), (1, 1), (0, 1), (0, 0)]]
    assert [len(loop) for loop in toy_shapes.outline(np.eye(3))] == [4, 4, 4]
    assert toy_shapes.outline(np.zeros((2, 2))) == []


def test_shapes_are_at_least_half_visible():
    fractions = [(scene.instances == k).sum() / area for scene in scenes(60) for k, area in enumerate(scene.areas, 1)]
    assert 0.5 <= min(fractions) < 0.6
    assert max(fractions) == 1
    assert 0.25 < np.mean([fraction < 1 for fraction in fractions]) < 0.6


def test_shapes_contrast_with_the_background():
    for scene in scenes(60):
        assert 2 <= len(scene.areas) <= 5
        ground = scene.image[scene.instances == 0].mean(0)
        for k in range(1, 1 + len(scene.areas)):
            assert np.abs(scene.image[scene.instances == k].mean(0) - ground).sum() > 60


def test_classes_differ_in_hue():
    result = [
        (category, scene.image[scene.instances == k].mean(0))
        for scene in scenes(100, size=64)
        for k, category in enumerate(scene.categories, 1)
    ]
    assert np.bincount([category for category, _ in result]).min() > len(result) / 8
    for category, mean in result:
        assert np.abs(mean - toy_shapes.CLASS_COLORS).sum(1).argmin() == category


def test_files_match_the_drawn_scenes(small, capsys):
    for split, number, count in (('train', 0, 3), ('val', 1, 2)):
        coco = COCO(str(small / f'annotations/instances_{split}.json'))
        assert [category['name'] for category in coco.loadCats(coco.getCatIds())] == list(toy_shapes.CLASSES)
        assert (coco.getCatIds(), coco.getImgIds()) == ([1, 2, 3, 4], list(range(1, count + 1)))
        for i in coco.getImgIds():
            scene = toy_shapes.draw(np.random.RandomState([0, number, i]), 128)
            (info,) = coco.loadImgs([i])
            image = cv2.imread(str(small / split / info['file_name']), cv2.IMREAD_UNCHANGED)
            np.testing.assert_array_equal(image[..., ::-1], scene.image)
            assert image.shape == (info['height'], info['width'], 3)
            annotations = coco.loadAnns(coco.getAnnIds(imgIds=[i]))
            assert not any(annotation['iscrowd'] for annotation in annotations)
            labels = cv2.imread(str(small / 'labels' / split / info['file_name']), cv2.IMREAD_UNCHANGED)
            check_labels(labels, [(a['category_id'], coco.annToMask(a)) for a in annotations])


def check_labels(labels, instances):
    expected = np.ones_like(labels)
    for category, mask in instances:
        expected[mask > 0] = 1 + category
    inner = np.where(expected == 1, 1, 0)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    for label in np.unique(expected):
        inner |= label * cv2.erode((expected == label).astype(np.uint8), cross)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, inner)
    assert 0 < (labels == 0).mean() < 0.15


def test_masks_have_borders_only_between_labels():
    instances = np.array([[1, 1, 1, 0, 2, 3], [1, 1, 1, 0, 2, 3]], np.uint8)
    scene = toy_shapes.Scene(None, instances, [0, 4, 4], [6, 2, 2])
    np.testing.assert_array_equal(toy_shapes.segmentation_mask(scene), [[2, 2, 0, 1, 0, 6]] * 2)


def test_labels_palette_and_classes_agree():
    assert ('ground', *toy_shapes.CLASSES) == toy_shapes.LABEL_NAMES
    assert len({tuple(color) for color in toy_shapes.PALETTE}) == len(toy_shapes.PALETTE) == len(toy_shapes.LABEL_NAMES)


def test_images_depend_only_on_seed_split_and_index(small, tmp_path):
    toy_shapes.write(tmp_path / 'more', **{**SMALL, 'train': 5, 'val': 3})
    toy_shapes.write(tmp_path / 'other', **{**SMALL, 'seed': 1})
    images = {path.relative_to(small): path.read_bytes() for path in files(small) if path.suffix == '.png'}
    assert all((tmp_path / 'more' / name).read_bytes() == content for name, content in images.items())
    assert all((tmp_path / 'other' / name).read_bytes() != content for name, content in images.items())
    assert len(set(images.values())) == len(images)
    original, larger_dataset = (
        json.loads((root / 'annotations/instances_train.json').read_bytes()) for root in (small, tmp_path / 'more')
    )
    assert original['annotations'] == larger_dataset['annotations'][: len(original['annotations'])]


def test_existing_dataset_is_unchanged(small, monkeypatch, capsys):
    mtimes = {path: path.stat().st_mtime_ns for path in [small, *small.rglob('*')]}
    assert toy_shapes.write(small, **SMALL) is False
    code, out, err = run(monkeypatch, capsys, small, '--train', 3, '--val', 2)
    assert (code, err, out.count('\n')) == (0, '', 1)
    assert 'already' in out and str(small) in out
    assert {path: path.stat().st_mtime_ns for path in [small, *small.rglob('*')]} == mtimes


@pytest.mark.parametrize('change', (dict(seed=1), dict(train=4), dict(val=0), dict(size=96)))
def test_other_arguments_for_an_existing_dataset_are_an_error(small, change):
    digest = sha256(small)
    with pytest.raises(UsageError, match='remove it or choose another folder'):
        toy_shapes.write(small, **{**SMALL, **change})
    assert sha256(small) == digest


@pytest.mark.parametrize('content', (None, '', '[]', '{"format": 0, "seed": 0, "train": 3, "val": 2, "size": 128}'))
def test_other_folder_is_not_overwritten(tmp_path, content):
    if content is not None:
        (tmp_path / 'shapes.json').write_text(content)
    with pytest.raises(UsageError, match='is not this data set'):
        toy_shapes.write(tmp_path, **SMALL)
    assert len(files(tmp_path)) == (content is not None)


@pytest.mark.parametrize(
    ('place', 'options', 'word'),
    (
        ('new', ('--size', 63), 'size'),
        ('new', ('--size', 5000), 'size'),
        ('new', ('--train', -1), 'train'),
        ('new', ('--val', -1), 'val'),
        ('new', ('--seed', -1), 'seed'),
        ('new', ('--seed', 2**32), 'seed'),
        ('.', (), 'is not this data set'),
        ('file', (), 'is not this data set'),
        ('file/below', (), 'cannot be written'),
        ('x' * 300, (), 'cannot be written'),
    ),
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, place, options, word):
    (tmp_path / 'file').write_text('kept')
    code, out, err = run(monkeypatch, capsys, tmp_path / place, *options)
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert err.startswith('error: ') and word in err
    assert files(tmp_path) == [tmp_path / 'file'] and os.listdir(tmp_path) == ['file']


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    for error, raised in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, 'No space left'), UsageError)):
        monkeypatch.setattr(toy_shapes, 'coco_annotations', Mock(side_effect=error))
        with pytest.raises(raised):
            toy_shapes.write(tmp_path / 'new', **SMALL)
        assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name == 'nt', reason='no such signals')
@pytest.mark.parametrize('number', (signal.SIGINT, signal.SIGTERM))
def test_signal_leaves_nothing(tmp_path, number):
    process = run_standalone('__main__', tmp_path / 'new', '--train', 10000)
    deadline = time.monotonic() + 30
    while len(files(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert os.listdir(tmp_path) != ['new']
    process.send_signal(number)
    assert process.communicate(timeout=30) == ('', '')
    assert process.returncode == 128 + number
    assert os.listdir(tmp_path) == []


def test_empty_split_is_written(tmp_path):
    assert toy_shapes.write(tmp_path / 'new', train=1, val=0, size=64)
    assert json.loads((tmp_path / 'new/annotations/instances_val.json').read_bytes())['images'] == []
