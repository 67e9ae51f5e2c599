"""Masks that are not 8-bit index images become labels: colors, instance ids, arrays, black and white."""

import json

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image

from convnext_dense.datasets.class_names import read_classes
from convnext_dense.datasets.custom import DatasetRequest, apply_custom_data
from convnext_dense.datasets.files import DataError
from convnext_dense.datasets.mask_encoding import MaskEncoding, decode_mask
from convnext_dense.datasets.write_dataset import write_clean, write_tiles
from convnext_dense.errors import UsageError
from convnext_dense.inference.dataset_pictures import write_pictures
from helpers.datasets import SEGMENTOR, check_dataset, load_recipe, quick_options, run
from helpers.files import error_message

SIDE = 40
COLORS = [[128, 64, 128], [0, 0, 0], [64, 0, 192], [255, 255, 255]]
NAMES = ['road', 'void', 'car', 'sky']


def labels_of(n_classes, seed=0):
    return np.random.RandomState(seed).randint(0, n_classes, (SIDE, SIDE)).astype(np.uint8)


def write(root, masks, suffix='.png', split='train', save=None):
    """Write images and their masks, arrays that PIL or `save` writes."""
    for folder in ('images', 'masks'):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    for i, mask in enumerate(masks):
        image = np.random.RandomState(i + 100 * (split == 'val')).randint(0, 256, (SIDE, SIDE, 3), np.uint8)
        cv2.imwrite(str(root / f'images/{split}/{i}.png'), image)
        file = root / f'masks/{split}/{i}{suffix}'
        save(file, mask) if save else Image.fromarray(mask).save(file)
    return root


def colored(labels):
    return np.array(COLORS, np.uint8)[labels]


TABLES = {
    'class_dict.csv': 'name,r,g,b\n' + '\n'.join(f'{n},{r},{g},{b}' for n, (r, g, b) in zip(NAMES, COLORS)),
    'class_dict_seg.csv': 'name, r, g, b\n' + '\n'.join(f'{n}, {r}, {g}, {b}' for n, (r, g, b) in zip(NAMES, COLORS)),
    'labelmap.txt': '# label:color_rgb:parts:actions\n'
    + '\n'.join(f'{n}:{r},{g},{b}::' for n, (r, g, b) in zip(NAMES, COLORS)),
    'label_colors.txt': '\n'.join(f'{r} {g} {b}\t\t{n}' for n, (r, g, b) in zip(NAMES, COLORS)),
    'classes.json': json.dumps([dict(name=n, color=c) for n, c in zip(NAMES, COLORS)]),
}


@pytest.mark.parametrize('table', TABLES)
def test_color_tables_are_found(table, tmp_path):
    maps = [labels_of(4, seed) for seed in range(3)]
    write(tmp_path, [colored(labels) for labels in maps])
    (tmp_path / table).write_text(TABLES[table])
    assert read_classes(tmp_path / table) == (NAMES, COLORS)
    data, codes = check_dataset(tmp_path, 'segmentation')
    assert data.classes == NAMES and data.palette == COLORS and not data.report.problems
    assert codes['mask-color-coded'].count == 3 and str(tmp_path / table) in data.report.facts[1]
    for i, labels in enumerate(maps):
        decoded, other_colors = decode_mask(tmp_path / f'masks/train/{i}.png', MaskEncoding(COLORS))
        assert np.array_equal(decoded, labels) and not other_colors


def test_a_table_in_a_folder_or_given(tmp_path):
    write(tmp_path / 'data', [colored(labels_of(4))] * 2)
    (tmp_path / 'mine.csv').write_text(TABLES['class_dict.csv'])
    line = error_message(lambda: check_dataset(tmp_path / 'data', 'segmentation')[0].report.raise_if_errors())
    assert 'mask-in-color' in line and 'give --classes FILE with lines NAME R G B' in line
    data, _ = check_dataset(tmp_path / 'data', 'segmentation', classes=str(tmp_path / 'mine.csv'))
    assert data.classes == NAMES
    (tmp_path / 'data/meta').mkdir()
    (tmp_path / 'mine.csv').rename(tmp_path / 'data/meta/class_dict.csv')
    assert check_dataset(tmp_path / 'data', 'segmentation')[0].classes == NAMES


def test_known_palettes_are_tables(tmp_path):
    """Masks of VOC that a viewer has saved as colors."""
    write(tmp_path, [np.array([[0, 0, 0], [128, 0, 0]], np.uint8)[labels_of(2)]] * 2)
    data, codes = check_dataset(tmp_path, 'segmentation', classes='voc')
    assert data.classes[:2] == ['background', 'aeroplane'] and 'mask-color-coded' in codes


def test_other_colors_are_counted_and_refused_or_ignored(tmp_path):
    pixels = colored(labels_of(4))
    pixels[:4, :10], pixels[4, :10] = (1, 2, 3), (9, 9, 9)
    write(tmp_path, [pixels, colored(labels_of(4, 1))])
    (tmp_path / 'class_dict.csv').write_text(TABLES['class_dict.csv'])
    _, codes = check_dataset(tmp_path, 'segmentation')
    problem = codes['color-not-in-table']
    assert (problem.action, problem.count) == ('error', 2)
    assert problem.examples == [f'1 2 3: {4000 / 3200:.2g} %, 9 9 9: {1000 / 3200:.2g} %']
    data, codes = check_dataset(tmp_path, 'segmentation', ignore_other_colors=True)
    assert not data.report.problems
    decoded, other_colors = decode_mask(tmp_path / 'masks/train/0.png', MaskEncoding(COLORS))
    assert (decoded[:4, :10] == 255).all() and other_colors == {(1, 2, 3): 40, (9, 9, 9): 10}


def test_ignored_labels_of_a_table_are_no_classes(tmp_path):
    write(tmp_path, [colored(labels_of(4))] * 2)
    (tmp_path / 'class_dict.csv').write_text(TABLES['class_dict.csv'])
    data, _ = check_dataset(tmp_path, 'segmentation', ignore_labels=[1])
    assert data.classes == ['road', 'car', 'sky'] and data.palette == [COLORS[i] for i in (0, 2, 3)]
    assert sorted(data.dataset_kwargs['label_map']) == [[1, 255], [2, 1], [3, 2]]
    line = error_message(lambda: check_dataset(tmp_path, 'segmentation', ignore_labels=[0, 1, 2, 3]))
    assert line.startswith('--ignore leaves none of 4 classes: road')


def test_two_classes_of_one_color_are_refused(tmp_path):
    write(tmp_path, [colored(labels_of(4))])
    (tmp_path / 'class_dict.csv').write_text('name,r,g,b\na,1,1,1\nb,1,1,1\n')
    assert 'a and b have the same color' in error_message(check_dataset, tmp_path, 'segmentation')


def instance_ids(labels):
    """Cityscapes: things are class * 1000 + number, the rest is its class; -1 cannot be written in 16 bits."""
    return np.choose(labels, (7, 8, 24007, 26001)).astype(np.uint16)


def save_array(file, values):
    np.save(file, values)


def save_tiff(file, values):
    Image.fromarray(values.astype(np.int32)).save(file)


BINARY, MAP = labels_of(2), labels_of(4)
IDS = instance_ids(MAP)
ENCODINGS = {  # what the files hold, their suffix, how they are saved, the labels, and the code
    'ids in PNG': (IDS, '.png', None, np.choose(MAP, (7, 8, 24, 26)), 'mask-instance-ids'),
    'ids in TIFF': (IDS, '.tif', save_tiff, np.choose(MAP, (7, 8, 24, 26)), 'mask-instance-ids'),
    'array': (MAP.astype(np.int64), '.npy', save_array, MAP, 'mask-array'),
    'array with -1': (MAP.astype(int) - 1, '.npy', save_array, np.choose(MAP, (255, 0, 1, 2)), 'mask-array'),
    'array of floats': (MAP.astype(float)[None], '.npy', save_array, MAP, 'mask-array'),
    'gray as color': (np.dstack([MAP] * 3), '.png', None, MAP, 'mask-gray-as-color'),
    '8-bit TIFF': (MAP, '.tif', None, MAP, None),
    'GIF': (MAP, '.gif', None, MAP, None),
}


@pytest.mark.parametrize('kind', ENCODINGS)
def test_values_become_labels(kind, tmp_path):
    values, suffix, save, expected, code = ENCODINGS[kind]
    root = tmp_path / 'data'
    for split in ('train', 'val'):
        write(root, [values], suffix, split, save)
    (root / 'classes.txt').write_text('\n'.join(f'class {i}' for i in range(expected[expected < 255].max() + 1)))
    contents = {path: path.read_bytes() for path in root.rglob('*') if path.is_file()}
    assert np.array_equal(loaded_mask(root, tmp_path / 'work')[0], expected)
    assert {path: path.read_bytes() for path in root.rglob('*') if path.is_file()} == contents
    codes = check_dataset(root, 'segmentation')[1]
    assert {'mask-instance-ids', 'mask-array', 'mask-gray-as-color'} & {*codes} == ({code} if code else set())


def loaded_mask(root, work_dir, **request):
    """Return the first mask as mmseg loads it in training, and the config."""
    config = load_recipe('demo/upernet')
    config.work_dir = str(work_dir)
    apply_custom_data(config, DatasetRequest(str(root), **request))
    dataset = config.train_dataloader.dataset
    mask = json.loads((work_dir / 'data/train.json').read_text())[0][1]
    info = dict(
        seg_map_path=str(root / mask),
        label_map=dict(dataset.label_map) if dataset.label_map else None,
        reduce_zero_label=dataset.reduce_zero_label,
        seg_fields=[],
    )
    return LoadAnnotations()(info)['gt_seg_map'], config


@pytest.mark.parametrize('names', [None, ['crack'], ['background', 'crack'], ['background']])
def test_black_and_white(names, tmp_path):
    for split in ('train', 'val'):
        write(tmp_path / 'data', [BINARY * 255, BINARY * 0], split=split)
    if names:
        (tmp_path / 'data/classes.txt').write_text('\n'.join(names))
    labels, config = loaded_mask(tmp_path / 'data', tmp_path / 'work')
    assert np.array_equal(labels, BINARY)
    expected = ('background', 'crack' if names and 'crack' in names else 'foreground')
    assert config.train_dataloader.dataset.metainfo.classes == expected
    assert config.model.decode_head.num_classes == 2
    data, codes = check_dataset(tmp_path / 'data', 'segmentation')
    assert codes['mask-0-and-255'].action == 'fixed' and not data.report.problems
    write_tiles(data, 24, 0, str(tmp_path / 'tiles'))
    tile = np.array(Image.open(tmp_path / 'tiles/masks/train/images_train_0_0_0.png'))
    assert np.array_equal(tile, BINARY[:24, :24])


def test_0_and_1_without_names(tmp_path):
    write(tmp_path / 'data', [BINARY, BINARY])
    labels, config = loaded_mask(tmp_path / 'data', tmp_path / 'work')
    assert np.array_equal(labels, BINARY)
    assert config.train_dataloader.dataset.metainfo.classes == ('background', 'foreground')


@pytest.mark.parametrize('suffix', ['.png', '.jpg'])
def test_soft_edges_are_refused_or_thresholded(suffix, tmp_path):
    disc = cv2.circle(np.zeros((SIDE, SIDE), np.uint8), (20, 20), 12, 255, -1)
    soft = cv2.GaussianBlur(disc, (5, 5), 0)
    write(tmp_path / 'data', [soft, soft.T.copy()], suffix)
    line = error_message(lambda: check_dataset(tmp_path / 'data', 'segmentation')[0].report.raise_if_errors())
    assert '--mask-threshold 128' in line
    assert ('gray edges' if suffix == '.png' else 'mask-lossy-format') in line
    stored = np.array(Image.open(tmp_path / f'data/masks/train/0{suffix}'))
    threshold = int(np.unique(stored)[3])  # this value is of the second class
    labels, _ = loaded_mask(tmp_path / 'data', tmp_path / 'work', mask_threshold=threshold)
    assert np.array_equal(labels, stored >= threshold)


def test_masks_in_color_have_no_threshold(tmp_path):
    write(tmp_path, [colored(labels_of(4))] * 2)
    (tmp_path / 'class_dict.csv').write_text(TABLES['class_dict.csv'])
    data, codes = check_dataset(tmp_path, 'segmentation', mask_threshold=128)
    assert codes['mask-not-gray'].action == 'error' and 'leave it out' in error_message(data.report.raise_if_errors)
    Image.fromarray(np.dstack([BINARY * 250 + i for i in range(3)])).save(tmp_path / 'tinted.png')
    assert np.array_equal(decode_mask(tmp_path / 'tinted.png', MaskEncoding(threshold=128))[0], BINARY)


def test_plain_instance_ids_are_no_classes(tmp_path):
    ids = (np.arange(SIDE * SIDE) // 4).reshape(SIDE, SIDE).astype(np.uint16)
    write(tmp_path, [ids, ids])
    (tmp_path / 'classes.txt').write_text('a\nb')
    line = error_message(lambda: check_dataset(tmp_path, 'segmentation')[0].report.raise_if_errors())
    assert 'mask-not-8-bit' in line and 'if they number objects, use a detection recipe' in line


def test_broken_arrays(tmp_path):
    (tmp_path / 'a.npy').write_bytes(b'\x93NUMPY')
    np.save(tmp_path / 'b.npy', np.array([None, 'x'], object))
    np.save(tmp_path / 'c.npy', np.zeros((4, 4, 4, 4)))
    np.save(tmp_path / 'd.npy', np.full((4, 4), 0.5))
    for name in 'abcd':
        with pytest.raises((ValueError, EOFError, DataError)):
            decode_mask(tmp_path / f'{name}.npy', MaskEncoding())


def test_a_training_reads_converted_masks(tmp_path):
    """Which lie in the work dir, and are made again if they are gone."""
    for split in ('train', 'val'):
        write(tmp_path / 'data', [colored(labels_of(4, seed)) for seed in range(3)], split=split)
    (tmp_path / 'data/class_dict.csv').write_text(TABLES['class_dict.csv'])
    args = [SEGMENTOR, '--data', tmp_path / 'data', '--work-dir', tmp_path / 'work', '--iters', 2]
    assert run('train.py', *args, '--no-auto-schedule', '--cfg-options', *quick_options('colors')) == 0
    config = Config.fromfile(tmp_path / 'work/upernet.py')
    assert config.model.decode_head.num_classes == 4
    for split in ('train', 'val'):
        for i, (_, mask) in enumerate(json.loads((tmp_path / f'work/data/{split}.json').read_text())):
            assert mask == str(tmp_path / f'work/data/masks/{split}/{i:06d}_{i}.png')
            assert np.array_equal(np.array(Image.open(mask)), labels_of(4, i))
    checked = (tmp_path / 'work/data/data.json').stat().st_mtime_ns
    config = load_recipe('demo/upernet')
    config.work_dir = str(tmp_path / 'work')
    apply_custom_data(config, DatasetRequest(str(tmp_path / 'data')))
    assert (tmp_path / 'work/data/data.json').stat().st_mtime_ns == checked
    (tmp_path / 'work/data/masks/val/000001_1.png').unlink()
    apply_custom_data(config, DatasetRequest(str(tmp_path / 'data')))
    assert (tmp_path / 'work/data/masks/val/000001_1.png').exists()


def test_a_threshold_that_is_no_gray_value(tmp_path):
    write(tmp_path, [BINARY])
    with pytest.raises(UsageError, match='give a gray value from 1 to 255'):
        check_dataset(tmp_path, 'segmentation', mask_threshold=0)


def test_clean_copies_and_pictures_show_classes(tmp_path):
    maps = [labels_of(4, seed) for seed in range(2)]
    for split in ('train', 'val'):
        write(tmp_path / 'data', [colored(labels) for labels in maps], split=split)
    (tmp_path / 'data/class_dict.csv').write_text(TABLES['class_dict.csv'])
    data, _ = check_dataset(tmp_path / 'data', 'segmentation', ignore_labels=[1])
    write_clean(data, str(tmp_path / 'clean'))
    for i, labels in enumerate(maps):
        (mask,) = (tmp_path / 'clean/masks/train').glob(f'*{i}.png')
        assert np.array_equal(np.array(Image.open(mask)), np.choose(labels, (0, 255, 1, 2)))
    splits = json.dumps(data.splits)
    write_pictures(load_recipe('demo/upernet'), data, str(tmp_path / 'pictures'))
    sheet = cv2.imread(str(tmp_path / 'pictures/segmentation_images.png'))
    assert sheet.std() > 10 and json.dumps(data.splits) == splits
