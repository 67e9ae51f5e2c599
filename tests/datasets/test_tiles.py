"""A data set in tiles: nothing is lost or counted twice, and it is a data set like others."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from convnext_dense.datasets.custom import DatasetRequest, read_data
from convnext_dense.datasets.tiles import clip_annotations, clip_polygon, tile_windows
from convnext_dense.datasets.write_dataset import check_tile_options, write_tiles
from convnext_dense.errors import UsageError
from helpers.datasets import run, write_dataset, write_json

SIZE = (90, 130)
WINDOWS = tile_windows(SIZE, 40, 0)


def polygon_area(points):
    x, y = np.array(points[::2]), np.array(points[1::2])
    return abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def partition():
    """Tiles that share no pixel: tiles of even distances do not, unless the size is a multiple of theirs."""
    return [(x, y, min(x + 40, SIZE[1]), min(y + 40, SIZE[0])) for y in range(0, 90, 40) for x in range(0, 130, 40)]


def test_tiles_cover_an_image():
    covered = np.zeros(SIZE, int)
    for left, top, right, bottom in WINDOWS:
        assert right - left == bottom - top == 40
        covered[top:bottom, left:right] += 1
    assert covered.min() == 1
    assert tile_windows((30, 50), 100, 0.25) == [(0, 0, 50, 30)]


@pytest.mark.parametrize('seed', range(3))
def test_areas_and_counts_of_boxes_add_up(seed):
    rng = np.random.RandomState(seed)
    corner = rng.randint(0, (100, 60), (20, 2))
    boxes = [[*map(float, c), *map(float, rng.randint(1, 31, 2))] for c in corner]
    annotations = [dict(id=i, bbox=box, area=box[2] * box[3], category_id=1, iscrowd=0) for i, box in enumerate(boxes)]
    parts = [(w, part) for w in partition() for part in clip_annotations(annotations, w, SIZE, min_visible=0)]
    for i, (x, y, w, h) in enumerate(boxes):
        own_parts = [part for _, part in parts if part['id'] == i]
        assert sum(part['area'] for part in own_parts) == w * h
        n = (np.ceil((x + w) / 40) - x // 40) * (np.ceil((y + h) / 40) - y // 40)
        assert len(own_parts) == n
    for window, part in parts:
        x, y, w, h = part['bbox']
        assert x >= 0 and y >= 0 and x + w <= window[2] - window[0] and y + h <= window[3] - window[1]


@pytest.mark.parametrize('seed', range(6))
def test_polygons_are_clipped_exactly(seed):
    """Areas add up, and each part covers the pixels that the whole covers there, but for its edge."""
    rng = np.random.RandomState(seed)
    angle = np.sort(rng.uniform(0, 2 * np.pi, 12))
    radius = rng.uniform(12, 42, 12)  # a star, which tiles may cut into several parts
    polygon = np.stack([65 + radius * np.cos(angle), 45 + radius * np.sin(angle)], 1).ravel().tolist()
    parts = {window: clip_polygon(polygon, window) for window in partition()}
    assert sum(polygon_area(part) for part in parts.values() if part) == pytest.approx(polygon_area(polygon))
    full_mask = coco_mask.decode(coco_mask.frPyObjects([polygon], *SIZE))[..., 0]
    for left, top, right, bottom in parts:
        annotation = dict(bbox=[0, 0, *SIZE[::-1]], segmentation=[polygon], iscrowd=0)
        drawn = np.zeros((bottom - top, right - left), np.uint8)
        for part in clip_annotations([annotation], (left, top, right, bottom), SIZE, min_visible=0):
            rles = coco_mask.frPyObjects(part['segmentation'], bottom - top, right - left)
            drawn = coco_mask.decode(coco_mask.merge(rles))
        expected = full_mask[top:bottom, left:right]
        edge = cv2.dilate(expected, np.ones((3, 3))) - cv2.erode(expected, np.ones((3, 3)), borderValue=1)
        assert not ((drawn != expected) & (edge == 0)).any()


@pytest.mark.parametrize('compressed', [True, False])
def test_crowds_stay_crowds_with_all_their_pixels(compressed):
    bitmap = (np.random.RandomState(0).rand(*SIZE) < 0.3).astype(np.uint8, order='F')
    rle = coco_mask.encode(bitmap)
    rle['counts'] = rle['counts'].decode()
    if not compressed:
        flat = bitmap.ravel(order='F')
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
        rle['counts'] = np.diff(np.concatenate([[0], edges])).tolist()
    crowd = dict(bbox=[0, 0, *SIZE[::-1]], segmentation=rle, iscrowd=1, area=float(bitmap.sum()))
    total = 0
    for left, top, right, bottom in partition():
        (part,) = clip_annotations([crowd], (left, top, right, bottom), SIZE, min_visible=0.5)
        assert (coco_mask.decode(part['segmentation']) == bitmap[top:bottom, left:right]).all() and part['iscrowd'] == 1
        total += part['area']
    assert total == bitmap.sum()


def test_a_sliver_of_an_object_is_left_out():
    annotation = dict(bbox=[10.0, 10.0, 33.0, 10.0], iscrowd=0)
    assert [len([*clip_annotations([annotation], w, SIZE)]) for w in ((0, 0, 40, 40), (40, 0, 80, 40))] == [1, 0]
    assert len([*clip_annotations([annotation], (40, 0, 80, 40), SIZE, min_visible=0.09)]) == 1


@pytest.fixture
def large(tmp_path):
    """Images of 150 x 100 and 64 x 48 with objects of three classes, COCO json and masks; one image has no objects."""
    names = write_dataset(tmp_path / 'data', 3, sizes=((150, 100), (64, 48), (150, 100)))
    file = tmp_path / 'data/annotations/train.json'
    content = json.loads(file.read_text())
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] != 2]
    write_json(content, file)
    return tmp_path / 'data', names


def test_detection_is_written_and_read_again(large, tmp_path):
    root, names = large
    data = read_data(DatasetRequest(str(root)), 'detection', ('train', 'val'))
    out = tmp_path / 'tiles'
    lines = write_tiles(data, 80, 0.25, str(out))
    tiled_data = read_data(DatasetRequest(str(out)), 'detection', ('train', 'val'))
    assert not tiled_data.report.problems and tiled_data.classes == names == data.classes and tiled_data.has_masks
    for split in ('train', 'val'):
        split_data, tiled_split = data.splits[split], tiled_data.splits[split]
        sizes = [(image['height'], image['width']) for image in split_data['images']]
        assert len(tiled_split['images']) == sum(len(tile_windows(size, 80, 0.25)) for size in sizes)
        for image in tiled_split['images']:
            stem, left, top = image['file_name'].split('/')[-1].removesuffix('.png').rsplit('_', 2)
            source = next(
                i for i in split_data['images'] if i['file_name'].replace('/', '_').removesuffix('.png') == stem
            )
            source_image = cv2.imread(str(root / source['file_name']))
            window = np.s_[int(top) : int(top) + image['height'], int(left) : int(left) + image['width']]
            assert (cv2.imread(str(out / image['file_name'])) == source_image[window]).all()
            covered = mask_of(split_data, source)[window]
            assert (mask_of(tiled_split, image) != covered).mean() < 0.02  # slivers
    assert any('train: ' in line and 'tiles of 3 images' in line for line in lines)
    annotated = {a['image_id'] for a in tiled_data.splits['train']['annotations']}
    assert 0 < len(annotated) < len(tiled_data.splits['train']['images'])  # tiles without objects are there too


def mask_of(coco, image):
    masks = [a['segmentation'] for a in coco['annotations'] if a['image_id'] == image['id']]
    rles = [rle for mask in masks for rle in coco_mask.frPyObjects(mask, image['height'], image['width'])]
    empty = np.zeros((image['height'], image['width']), np.uint8)
    return coco_mask.decode(coco_mask.merge(rles)) if rles else empty


@pytest.mark.parametrize('ignore', [None, [0], [2]])
def test_segmentation_is_written_and_read_again(large, tmp_path, ignore):
    root, names = large
    if ignore == [0]:  # classes begin at 1
        (root / 'classes.txt').write_text('\n'.join(names[1:]))
    request = DatasetRequest(str(root), ignore_labels=ignore)
    data = read_data(request, 'segmentation', ('train', 'val'))
    out = tmp_path / 'tiles'
    write_tiles(data, 50, 0, str(out))
    tiled_data = read_data(DatasetRequest(str(out)), 'segmentation', ('train', 'val'))
    assert tiled_data.classes == data.classes
    for split in ('train', 'val'):
        for image, mask in data.splits[split]:
            labels = np.asarray(Image.open(root / mask))
            expected = np.where(np.isin(labels, ignore or []), 255, labels - (ignore == [0])).astype(np.uint8)
            if ignore == [2]:
                continue  # classes are numbered anew; their pixels are compared below
            tiles = list((out / 'masks' / split).glob(f'{image.replace("/", "_").removesuffix(".png")}_*.png'))
            assert len(tiles) == len(tile_windows(labels.shape, 50, 0))
            for tile in tiles:
                left, top = map(int, tile.stem.rsplit('_', 2)[1:])
                part = np.asarray(Image.open(tile))
                assert (part == expected[top : top + part.shape[0], left : left + part.shape[1]]).all()
        images = [path.stem for path in (out / 'images' / split).iterdir()]
        assert sorted(images) == sorted(path.stem for path in (out / 'masks' / split).iterdir())


def test_the_command_writes_a_data_set_that_the_command_accepts(large, tmp_path, capsys):
    root, _ = large
    out = tmp_path / 'tiles'
    assert run('check_data.py', '--data', root, '--tile', 80, '--out', out) == 2
    assert 'choose one of them with --task' in capsys.readouterr().err
    for args in (('--tile', 80, '--out', root / 'train/tiles'), ('--fix', root / 'clean')):
        assert run('check_data.py', '--data', root, '--task', 'detection', *args) == 2
        assert 'lies in the data set' in capsys.readouterr().err
    assert run('check_data.py', '--data', root, '--task', 'detection', '--tile', 80, '--out', out) == 0
    assert f'{out}: train: ' in capsys.readouterr().out
    assert run('check_data.py', '--data', out) == 0
    assert run('check_data.py', '--data', root, '--task', 'detection', '--tile', 80, '--out', out) == 2
    assert 'already exists' in capsys.readouterr().err


@pytest.mark.parametrize(
    'tile, overlap, out, words', [(0, 0, 'x', '--tile 0'), (9, 1, 'x', '--overlap 1'), (9, 0, None, '--out')]
)
def test_bad_options(tile, overlap, out, words):
    with pytest.raises(UsageError, match=words):
        check_tile_options(tile, overlap, out)


def test_labels_that_are_mapped_are_written_as_classes(tmp_path):
    from convnext_dense.datasets.request import CheckedDataset
    from convnext_dense.datasets.write_dataset import class_table

    kwargs = dict(reduce_zero_label=True, label_map=[[4, 1], [9, 255]])
    table = class_table(CheckedDataset('segmentation', '', ['a', 'b'], {}, None, dataset_kwargs=kwargs))
    assert table[[0, 1, 5, 10, 255]].tolist() == [255, 0, 1, 255, 255]
