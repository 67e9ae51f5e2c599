"""Masks of single objects and maps of instance ids become COCO instances."""

import numpy as np
import pytest
from mmengine.logging import MessageHub
from PIL import Image
from pycocotools import mask as coco_mask

from convnext_dense.datasets.custom import DatasetRequest, detect_tasks, find_sources
from helpers.datasets import DETECTOR, check_dataset, quick_options, run
from helpers.files import error_message

SIDE = 64
# Of each image its objects: rows, columns.
OBJECTS = {
    'a': [((2, 22), (3, 33)), ((30, 60), (8, 28)), ((20, 60), (40, 60))],
    'b': [((5, 45), (5, 45))],
    'b_2': [((1, 31), (1, 21)), ((32, 62), (30, 60))],
    'c 3': [((10, 40), (20, 50)), ((44, 60), (4, 44))],
}


def mask_of(place):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[slice(*place[0]), slice(*place[1])] = True
    return mask


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values) if path.suffix == '.npy' else Image.fromarray(values).save(path)


def save_images(root, template):
    for i, name in enumerate(OBJECTS):
        save(root / template.format(name), np.random.RandomState(i).randint(0, 256, (SIDE, SIDE, 3), np.uint8))


def save_objects(root, image, mask, change=lambda mask: mask.astype(np.uint8) * 255):
    save_images(root, image)
    for name, places in OBJECTS.items():
        for number, place in enumerate(places):
            save(root / mask.format(name=name, n=number), change(mask_of(place)))


def ids_of(places, ids, dtype):
    result = np.zeros((SIDE, SIDE), dtype)
    for place, id_ in zip(places, ids):
        result[mask_of(place)] = id_
    return result


def save_maps(root, image, mask, ids, dtype=np.uint16):
    save_images(root, image)
    for name, places in OBJECTS.items():
        save(root / mask.format(name), ids_of(places, ids, dtype))


PALETTE = (7000, 300, 65000)
LAYOUTS = {
    'folder per image': lambda root: save_objects(root, '{0}/images/{0}.png', '{name}/masks/x{n}.png'),
    'folder per image in a split': lambda root: save_objects(
        root, 'train/{0}/images/{0}.png', 'train/{name}/masks/x{n}.png'
    ),
    'folder of masks': lambda root: save_objects(root, 'images/{0}.png', 'masks/{name}/m{n}.png'),
    'numbered': lambda root: save_objects(root, 'images/{0}.jpg', 'masks/{name}_{n}.png'),
    'numbered, a word': lambda root: save_objects(root, 'images/{0}.jpg', 'masks/{name}_mask_{n}.png'),
    'in color': lambda root: save_objects(
        root, 'images/{0}.jpg', 'masks/{name}-{n}.png', lambda m: np.dstack([m * 255, m * 0, m * 9]).astype(np.uint8)
    ),
    'JPEG': lambda root: save_objects(root, 'images/{0}.jpg', 'masks/{name}_{n}.jpg'),
    'arrays': lambda root: save_objects(root, 'images/{0}.jpg', 'masks/{name}_{n}.npy', lambda m: m),
    'ids of 16 bits': lambda root: save_maps(root, 'images/{}.png', 'masks/{}.png', PALETTE),
    'ids in TIFF': lambda root: save_maps(root, 'images/{}.png', 'masks/{}_ids.tif', PALETTE, np.int32),
    'ids in arrays': lambda root: save_maps(root, 'images/{}.png', 'masks/{}.npy', PALETTE, np.int64),
    'other names': lambda root: save_maps(root, 'one/{}.png', 'two/{}.png', PALETTE),
}  # fmt: skip


def expected_objects():
    return {(name, mask_of(place).tobytes()) for name, places in OBJECTS.items() for place in places}


def found_objects(data):
    objects = set()
    for coco in data.splits.values():
        names = {image['id']: image['file_name'].rpartition('/')[2].rpartition('.')[0] for image in coco['images']}
        for annotation in coco['annotations']:
            mask = coco_mask.decode(annotation['segmentation']).astype(bool)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            assert annotation['bbox'] == box and annotation['area'] == mask.sum() and not annotation['iscrowd']
            objects.add((names[annotation['image_id']], mask.tobytes()))
    return objects


@pytest.mark.parametrize('layout', LAYOUTS)
def test_instances_are_read(layout, tmp_path):
    LAYOUTS[layout](tmp_path)
    data, codes = check_dataset(tmp_path)
    assert not data.report.problems and data.classes == ['object'] and 'instances-of-one-class' in codes
    objects = found_objects(data)
    assert len(objects) == 8
    if layout != 'JPEG' and 'ids' not in layout and layout != 'other names':
        assert objects == expected_objects()
    assert 'detection' in detect_tasks(DatasetRequest(str(tmp_path)))


@pytest.mark.parametrize('layout', ['ids of 16 bits', 'ids in TIFF', 'ids in arrays', 'other names'])
def test_overlaps_in_maps_are_those_of_the_map(layout, tmp_path):
    LAYOUTS[layout](tmp_path)
    expected = {
        (name, (ids_of(places, (1, 2, 3), int) == i).tobytes())
        for name, places in OBJECTS.items()
        for i in range(1, len(places) + 1)
    }
    assert found_objects(check_dataset(tmp_path)[0]) == expected


def test_maps_of_8_bits_are_ids_where_that_is_said(tmp_path):
    save_maps(tmp_path, 'images/{}.png', 'masks/{}.png', (1, 2, 7), np.uint8)
    (tmp_path / 'classes.txt').write_text('background\ncell')
    line = error_message(find_sources, DatasetRequest(str(tmp_path)), 'detection')
    assert 'holds segmentation masks, but detection needs boxes' in line and '--format instances' in line
    data, codes = check_dataset(tmp_path, format='instances')
    assert data.classes == ['cell'] and len(found_objects(data)) == 8 and 'instances-of-one-class' not in codes


def test_a_check_of_maps_without_names_of_classes(tmp_path, capsys):
    """They could be segmentation masks as well, which need names."""
    save_maps(tmp_path, 'images/{}.png', 'masks/{}.png', PALETTE)
    assert run('check_data.py', '--data', tmp_path) == 2
    line = capsys.readouterr().err
    assert 'does not name its classes' in line and '; --task detection checks the rest' in line
    assert run('check_data.py', '--data', tmp_path, '--format', 'instances', '--classes', 'object=cell') == 0
    assert 'cell; boxes and masks' in capsys.readouterr().out


def test_class_times_1000_plus_number(tmp_path):
    save_maps(tmp_path, 'images/{}.png', 'masks/{}.png', (2001, 2002, 3001))
    save(tmp_path / 'images/group.png', np.zeros((SIDE, SIDE, 3), np.uint8))
    save(tmp_path / 'masks/group.png', ids_of(OBJECTS['a'], (2, 1, 3000), np.uint16))
    (tmp_path / 'classes.txt').write_text('ground\nsky\ncar\nman')
    data, _ = check_dataset(tmp_path)
    assert data.classes == ['car', 'man']
    annotations = [a for coco in data.splits.values() for a in coco['annotations']]
    assert sorted((a['category_id'], a['iscrowd']) for a in annotations) == [(1, 0)] * 7 + [(1, 1)] + [(2, 0)] * 2


def test_cityscapes(tmp_path):
    """As mmdet's tools/dataset_converters/cityscapes.py: classes with instances, groups are crowds."""
    for split in ('train', 'val'):
        names = f'leftImg8bit/{split}/ulm/{{}}_leftImg8bit.png', f'gtFine/{split}/ulm/{{}}_gtFine_instanceIds.png'
        save_maps(tmp_path, *names, (26001, 24000, 33))
    data, _ = check_dataset(tmp_path)
    assert data.classes == ['person', 'rider', 'car', 'truck', 'bus', 'train', 'motorcycle', 'bicycle']
    annotations = data.splits['train']['annotations']
    assert sorted((a['category_id'], a['iscrowd']) for a in annotations) == [(1, 0)] * 3 + [(3, 0)] * 4 + [(8, 1)]
    assert {*detect_tasks(DatasetRequest(str(tmp_path)))} == {'detection', 'segmentation'}
    segmentation, codes = check_dataset(tmp_path, 'segmentation')
    assert len(segmentation.classes) == 19 and 'mask-instance-ids' in codes and not segmentation.report.problems


def test_problems(tmp_path):
    LAYOUTS['numbered'](tmp_path)
    save(tmp_path / 'masks/a_7.png', np.zeros((SIDE, SIDE), np.uint8))
    (tmp_path / 'masks/a_8.png').write_bytes(b'no image')
    save(tmp_path / 'masks/b_7.png', np.ones((SIDE, 9), np.uint8))
    data, codes = check_dataset(tmp_path)
    assert codes['mask-without-object'].examples == ['masks/a_7.png']
    assert codes['unreadable-mask'].examples == ['masks/a_8.png']
    assert codes['rle-size-mismatch'].count == 1 and len(found_objects(data)) == 8


def test_label_masks_are_no_instances(tmp_path):
    save_maps(tmp_path, 'images/{}.png', 'masks/{}.png', (1, 2, 3), np.uint8)
    assert detect_tasks(DatasetRequest(str(tmp_path))) == ['segmentation']


def test_mask_rcnn_trains(tmp_path):
    LAYOUTS['folder of masks'](tmp_path / 'data')
    args = [DETECTOR, '--data', tmp_path / 'data', '--work-dir', tmp_path / 'work', '--epochs', 1]
    assert run('train.py', *args, '--no-auto-schedule', '--cfg-options', *quick_options('instances')) == 0
    assert 0 <= MessageHub.get_current_instance().get_scalar('val/coco/segm_mAP').current() <= 1
