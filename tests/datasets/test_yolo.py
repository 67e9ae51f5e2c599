"""Labels of YOLO become the COCO that they stand for: the same images, classes, boxes and polygons as those of a COCO
file of the same objects, in each layout; and each usual mistake is reported."""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from convnext_dense.datasets import toy_shapes
from convnext_dense.datasets.custom import DatasetRequest, apply_custom_data, read_data
from convnext_dense.datasets.find_yolo import find_yolo
from convnext_dense.datasets.layouts import FolderTree
from helpers.datasets import DETECTOR, check_dataset, copy_images, load_coco, load_recipe, quick_options, run
from helpers.files import error_message

CLASSES = list(toy_shapes.CLASSES)
YAML = 'train: {train}\nval: {val}\nnc: 4\nnames: ' + str(CLASSES) + '\n'


def label_lines(coco, image, polygons):
    """Return the lines of the label of an image, by another way than the code takes: from pycocotools' boxes."""
    lines = []
    for a in coco.loadAnns(coco.getAnnIds(imgIds=image['id'])):
        sides = np.array([image['width'], image['height']])
        x, y, w, h = a['bbox']
        values = [(x + w / 2) / sides[0], (y + h / 2) / sides[1], w / sides[0], h / sides[1]]
        if polygons:
            values = (np.array(a['segmentation'][0]).reshape(-1, 2) / sides).ravel()
        index = CLASSES.index(coco.cats[a['category_id']]['name'])
        lines.append(' '.join([str(index), *(f'{v:.10g}' for v in values)]))
    return lines


def write_labels(toy_dataset, split, folder, polygons=False, name='{}'):
    folder.mkdir(parents=True, exist_ok=True)
    coco = COCO(str(toy_dataset / f'annotations/instances_{split}.json'))
    for image in coco.imgs.values():
        lines = label_lines(coco, image, polygons)
        (folder / f'{name.format(Path(image["file_name"]).stem)}.txt').write_text('\n'.join(lines) + '\n')


def write_split(toy_dataset, split, images, labels, **options):
    copy_images(toy_dataset, split, images, options.get('name', '{}'))
    write_labels(toy_dataset, split, labels, **options)


def as_ultralytics(toy_dataset, root, polygons=False):
    for split in ('train', 'val'):
        write_split(toy_dataset, split, root / 'images' / split, root / 'labels' / split, polygons=polygons)
    (root / 'coco8.yaml').write_text('path: ../datasets/coco8\n' + YAML.format(train='images/train', val='images/val'))


def as_polygons(toy_dataset, root):
    as_ultralytics(toy_dataset, root, polygons=True)


def as_names_with_gaps(toy_dataset, root):
    """Classes 0, 7, 14 and 21."""
    as_ultralytics(toy_dataset, root)
    for file in root.glob('labels/*/*.txt'):
        lines = [line.split(' ', 1) for line in file.read_text().splitlines()]
        file.write_text('\n'.join(f'{7 * int(index)} {rest}' for index, rest in lines))
    names = ''.join(f'  {7 * i}: {name}\n' for i, name in enumerate(CLASSES))
    (root / 'coco8.yaml').write_text(f'path: .\ntrain: [images/train]\nval:\n  - images/val\nnames:\n{names}')


def as_roboflow_yolo(toy_dataset, root):
    for split, name in (('train', 'train'), ('val', 'valid')):
        write_split(toy_dataset, split, root / name / 'images', root / name / 'labels')
    text = YAML.format(train='../train/images', val='../valid/images') + 'test: ../test/images\n\nroboflow:\n  v: 1\n'
    (root / 'data.yaml').write_text(text)
    (root / 'README.roboflow.txt').write_text('5 images')


def as_lists(toy_dataset, root):
    """Text files of paths, with the paths of another machine."""
    as_ultralytics(toy_dataset, root)
    for split in ('train', 'val'):
        names = sorted(path.name for path in (root / 'images' / split).iterdir())
        (root / f'{split}2017.txt').write_text('\n'.join(f'./images/{split}/{name}' for name in names))
    text = YAML.format(train='/content/set/train2017.txt', val='val2017.txt')
    (root / 'coco8.yaml').write_text(text)


def as_darknet(toy_dataset, root):
    """CVAT's export."""
    for split, key in (('train', 't_{}'), ('val', 'v_{}')):
        write_split(toy_dataset, split, root / 'obj_train_data', root / 'obj_train_data', name=key)
        names = [f'data/obj_train_data/{key.format(path.stem)}.png' for path in sorted((toy_dataset / split).iterdir())]
        (root / {'train': 'train.txt', 'val': 'valid.txt'}[split]).write_text('\n'.join(names) + '\n')
    (root / 'obj.names').write_text('\n'.join(CLASSES) + '\n')
    text = 'classes = 4\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\nbackup = backup/\n'
    (root / 'obj.data').write_text(text)


def as_darknet_by_split(toy_dataset, root):
    """Roboflow's export: labels beside images, in folders by split."""
    for split, name in (('train', 'train'), ('val', 'valid')):
        write_split(toy_dataset, split, root / name, root / name)
        (root / name / '_darknet.labels').write_text('\n'.join(CLASSES))


def as_plain_lists(toy_dataset, root):
    as_ultralytics(toy_dataset, root)
    (root / 'coco8.yaml').unlink()
    for split in ('train', 'val'):
        paths = sorted((root / 'images' / split).iterdir())
        (root / f'{split}.txt').write_text('\n'.join(map(str, paths)))
    (root / 'classes.txt').write_text('\n'.join(CLASSES))


def as_folders_without_yaml(toy_dataset, root):
    as_ultralytics(toy_dataset, root)
    (root / 'coco8.yaml').unlink()
    (root / 'labels/classes.txt').write_text('\r\n'.join(CLASSES) + '\r\n')


def as_moved(toy_dataset, root):
    """A data.yaml that was written for another place, and Label Studio's notes."""
    as_ultralytics(toy_dataset, root)
    (root / 'coco8.yaml').write_text(YAML.format(train='/x/pictures', val='/x/others'))
    (root / 'notes.json').write_text(json.dumps(dict(categories=[dict(id=0, name='disc')], info={})))


def as_yaml_elsewhere(toy_dataset, root):
    """Images and labels of train outside the folder of data.yaml."""
    as_ultralytics(toy_dataset, root)
    outside = root.parent / 'outside'
    for kind in ('images', 'labels'):
        (outside / kind).mkdir(parents=True)
        (root / kind / 'train').rename(outside / kind / 'train')
    (root / 'coco8.yaml').write_text(YAML.format(train='../outside/images/train', val='images/val'))


LAYOUTS = {
    'Ultralytics': as_ultralytics, 'polygons': as_polygons, 'names with gaps': as_names_with_gaps,
    'Roboflow': as_roboflow_yolo, 'lists': as_lists, 'darknet': as_darknet, 'darknet by split': as_darknet_by_split,
    'lists alone': as_plain_lists, 'folders alone': as_folders_without_yaml, 'moved': as_moved,
    'outside': as_yaml_elsewhere,
}  # fmt: skip
REPORTED = {  # besides what the conversion of a correct data set reports: nothing
    'names with gaps': {'category-id-gaps'},
    'darknet': {'name-matched-by-suffix'},
    'outside': {'images-outside-folder'},
}


def objects(content, root):
    """Return class, box, area and polygon of each object by the bytes of its image, in the order of the label."""
    names = {c['id']: c['name'] for c in content['categories']}
    images = {i['id']: (root / i['file_name']).read_bytes() for i in content['images']}
    return [
        (images[a['image_id']], names[a['category_id']], *a['bbox'], a['area'], *a.get('segmentation', [[]])[0])
        for a in content['annotations']
    ]


def expected_objects(toy_dataset, split, polygons):
    api = COCO(str(toy_dataset / f'annotations/instances_{split}.json'))
    result = []
    for a in api.anns.values():
        image = (toy_dataset / split / api.imgs[a['image_id']]['file_name']).read_bytes()
        x, y, w, h = a['bbox']
        area, polygon = w * h, []
        if polygons:
            polygon = a['segmentation'][0]
            points = np.array(polygon, np.float32).reshape(-1, 2)
            (x, y), (right, bottom) = points.min(0), points.max(0)
            w, h, area = right - x, bottom - y, cv2.contourArea(points)
        result.append((image, api.cats[a['category_id']]['name'], x, y, w, h, area, *polygon))
    return result


def assert_same_objects(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(sorted(actual), sorted(expected)):
        assert a[:2] == b[:2]
        assert np.allclose(a[2:], b[2:], atol=1e-3)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_each_layout_is_read(layout, toy_dataset, tmp_path):
    root = tmp_path / 'my data'
    LAYOUTS[layout](toy_dataset, root)
    content_of_file = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    data, findings = check_dataset(root)
    assert set(findings) == REPORTED.get(layout, set())
    assert data.classes == CLASSES and data.has_masks == (layout == 'polygons')
    for split in ('train', 'val'):
        assert_same_objects(
            objects(data.splits[split], root), expected_objects(toy_dataset, split, layout == 'polygons')
        )
    assert content_of_file == {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}


def test_training_starts_from_a_data_yaml(toy_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    as_polygons(toy_dataset, tmp_path / 'set')
    options = ['--epochs', 1, '--work-dir', 'run', '--cfg-options', *quick_options('yolo')]
    assert run('train.py', DETECTOR, '--data', 'set/coco8.yaml', *options) == 0
    assert (tmp_path / 'run/epoch_1.pth').exists()
    written = json.loads((tmp_path / 'run/data/train.json').read_text())
    assert_same_objects(objects(written, tmp_path / 'set'), expected_objects(toy_dataset, 'train', True))


def test_a_changed_label_is_read_again(toy_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_ultralytics(toy_dataset, tmp_path / 'set')
    calls = []
    monkeypatch.setattr('convnext_dense.datasets.custom.read_data', lambda *a: calls.append(a) or read_data(*a))
    label = sorted(Path('set/labels/train').iterdir())[0]
    text = label.read_text()
    for n, content in ((1, text), (1, None), (2, text + '0 0.5 0.5 0.25 0.25\n')):
        if content:
            label.write_text(content)
        apply_custom_data(load_recipe('demo/mask_rcnn'), DatasetRequest('set'))
        assert len(calls) == n


def write_set(root, labels, yaml='names: [cat, dog]\n', sizes=(80, 40)):
    """Write gray images of 80 x 40 pixels for the texts of labels by stem, None for an image without a label."""
    (root / 'labels').mkdir(parents=True)
    (root / 'images').mkdir()
    for i, (stem, text) in enumerate(labels.items()):
        cv2.imwrite(str(root / f'images/{stem}.png'), np.full((sizes[1], sizes[0], 3), i, np.uint8))
        if text is not None:
            (root / f'labels/{stem}.txt').write_text(text)
    if yaml:
        (root / 'data.yaml').write_text(f'train: images\nval: images\n{yaml}')


GOOD = '0 0.5 0.5 0.5 0.5'
POINTER = f'version https://git-lfs.github.com/spec/v1\noid sha256:{"a" * 64}\nsize 12345\n'
MISTAKES = {  # lines of a label -> what is reported, with how many boxes left
    'index out of range': ('2 0.5 0.5 0.5 0.5', 'class-index-out-of-range', 'labels/b.txt:1: 2 0.5', 0),
    'pixels': ('0 20 10 5 5', 'coordinates-beyond-one', 'labels/b.txt:1: 0 20 10 5 5', 0),
    'negative': ('0 0.5 -0.5 0.1 0.1', 'coordinates-beyond-one', 'labels/b.txt:1', 0),
    'too short': ('0 0.5 0.5', 'label-too-short', 'labels/b.txt:1', 0),
    'odd polygon': ('0 .1 .1 .2 .2 .3 .1 .4', 'label-odd-polygon', 'labels/b.txt:1', 0),
    'words': ('cat 0.5 0.5 0.5 0.5', 'label-not-numbers', 'labels/b.txt:1: cat', 0),
    'not finite': ('0 nan 0.5 0.5 0.5', 'label-not-numbers', 'labels/b.txt:1', 0),
    'half a class': ('0.5 0.5 0.5 0.5 0.5', 'label-not-numbers', 'labels/b.txt:1', 0),
    'a Git LFS pointer': (POINTER, 'unreadable-label', 'labels/b.txt: is a Git LFS pointer', 0),
    'no area': ('0 0.5 0.5 0 0.5', 'box-without-area', 'id labels/b.txt:1', 0),
    'outside': ('0 0.0 0.0 0.0 0.0\n' + GOOD, 'box-without-area', 'id labels/b.txt:1', 1),
    'twice': (f'{GOOD}\n{GOOD}', 'duplicate-annotation', 'id labels/b.txt:2', 1),
    'commas for points': ('0 0,5 0,5 0,5 0,5', 'label-with-commas', 'labels/b.txt:1', 1),
    'commas between': ('0,0.5,0.5,0.5,0.5', 'label-with-commas', 'labels/b.txt:1', 1),
    'commas and spaces': ('0, 0.5, 0.5, 0.5, 0.5', 'label-with-commas', 'labels/b.txt:1', 1),
    'confidence': (f'{GOOD} 0.93', 'label-sixth-number', 'labels/b.txt:1', 1),
    'boxes and polygons': (f'{GOOD}\n1 .1 .1 .4 .1 .4 .4', 'boxes-and-polygons', 'labels/b.txt', 2),
    'empty': ('', 'image-without-annotations', 'images/b.png', 0),
    'blank lines': (f'\n{GOOD}\n\n  \n', None, '', 1),
    'class as a float': ('0.0 0.5 0.5 0.5 0.5', None, '', 1),
    'no label': (None, 'image-without-annotations', 'images/b.png', 0),
    'beyond the border': ('0 0.05 0.5 0.5 0.5', 'box-partly-outside-image', 'id labels/b.txt:1', 1),
    'rounded at the border': ('0 0.2500005 0.5 0.5000011 0.5', None, '', 1),
}


@pytest.mark.parametrize('kind', MISTAKES)
def test_usual_mistakes_are_reported(kind, tmp_path):
    text, code, example, n_left = MISTAKES[kind]
    write_set(tmp_path / 'set', {'a': f'{GOOD}\n1 0.25 0.25 0.5 0.5', 'b': text, 'c': GOOD, 'd': '1 0.5 0.5 0.5 0.5'})
    data, findings = check_dataset(tmp_path / 'set')
    findings = {k: v for k, v in findings.items() if k not in ('train-image-in-val', 'few-masks')}
    also = {'image-without-annotations'} if n_left == 0 else set()
    assert set(findings) - {code} <= also
    if code:
        assert any(each.startswith(example) for each in findings[code].examples)
    content = data.splits['val']
    image = next(i['id'] for i in content['images'] if i['file_name'] == 'images/b.png')
    assert len([a for a in content['annotations'] if a['image_id'] == image]) == n_left
    assert len(content['images']) == 4 and len(content['annotations']) == 4 + n_left
    boxes = [a['bbox'] for a in content['annotations'] if a['image_id'] == image]
    if 'comma' in kind or 'conf' in kind:
        assert boxes == [[20, 10, 40, 20]]


def test_labels_without_images_are_reported(tmp_path):
    write_set(tmp_path / 'set', {'a': GOOD, 'b': '1 0.5 0.5 0.5 0.5'})
    (tmp_path / 'set/labels/c.txt').write_text(GOOD)
    (tmp_path / 'set/labels/classes.txt').write_text('cat\ndog')
    (tmp_path / 'set/labels/notes.txt').write_text('drawn by hand')
    findings = check_dataset(tmp_path / 'set')[1]
    assert findings['unmatched-label'].examples == ['labels/c.txt']


def test_labels_of_no_image_at_all_are_reported(tmp_path):
    write_set(tmp_path / 'set', {'a': None, 'b': None})
    (tmp_path / 'set/labels/frame_a.txt').write_text(GOOD)
    findings = check_dataset(tmp_path / 'set')[1]
    assert 'unmatched-label, 1 (labels/frame_a.txt)' in findings['nothing-to-train-on'].examples[0]


def test_rotated_by_exif(tmp_path):
    """Fractions are of the image as it is shown, as in Ultralytics."""
    from PIL import Image

    (tmp_path / 'set/labels').mkdir(parents=True)
    (tmp_path / 'set/images').mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for stem in 'ab':
        Image.new('RGB', (80, 40), 'gray').save(tmp_path / f'set/images/{stem}.jpg', exif=exif)
        (tmp_path / f'set/labels/{stem}.txt').write_text(GOOD)
    (tmp_path / 'set/data.yaml').write_text('train: images\nval: images\nnames: [cat]')
    content = check_dataset(tmp_path / 'set')[0].splits['train']
    assert [(i['width'], i['height']) for i in content['images']] == [(40, 80)] * 2
    assert [a['bbox'] for a in content['annotations']] == [[10, 20, 20, 40]] * 2


YAMLS = {  # content -> class names, or an error
    'a list': ('names: [cat, dog]', ['cat', 'dog']),
    'words that YAML takes for values': ('names: [no, 1]', ['no', '1']),
    'a dict': ('names:\n  1: dog\n  0: cat', ['cat', 'dog']),
    'a count': ('nc: 3', ['class 0', 'class 1', 'class 2']),
    'a wrong count': ('nc: 7\nnames: [cat, dog]', ['cat', 'dog']),
    'a name twice': ('names: [cat, cat]', ['cat']),
    'a file': ('names: names.txt', ['cat', 'dog']),
    'no file': ('names: nothing.txt', 'its names are nothing.txt, neither a list nor a file'),
    'indices': ('names: {cat: 0}', 'names has to be a list of names, or a dict of indices and names'),
    'lists': ('names: [[cat]]', 'names has to be a list of names'),
    'broken': ('names: [cat', 'data.yaml is not valid YAML (line '),
    'deep': ('names: ' + '[' * 5000, 'data.yaml is not valid YAML'),
    'paths that are no texts': ('names: [cat, dog]\ntest: [[a]]', 'test is neither a path nor a list of paths'),
}


@pytest.mark.parametrize('kind', YAMLS)
def test_names_in_a_data_yaml(kind, tmp_path):
    text, expected = YAMLS[kind]
    write_set(tmp_path / 'set', {'a': GOOD, 'b': '1 0.5 0.5 0.5 0.5'}, yaml=text)
    (tmp_path / 'set/names.txt').write_text('cat\ndog\n')
    if isinstance(expected, str):
        assert expected in error_message(check_dataset, tmp_path / 'set')
    else:
        data, findings = check_dataset(tmp_path / 'set')
        assert data.classes == expected
        assert ('class-count-mismatch' in findings) == (kind == 'a wrong count')
        assert ('class-names-missing' in findings) == (kind == 'a count')


def test_ten_thousand_classes(tmp_path):
    write_set(tmp_path / 'set', {'a': GOOD, 'b': '9999 0.5 0.5 0.5 0.5'}, yaml=f'names: {[*map(str, range(10000))]}')
    assert len(check_dataset(tmp_path / 'set')[0].classes) == 10000


def test_several_data_yamls_are_listed(toy_dataset, tmp_path):
    as_ultralytics(toy_dataset, tmp_path / 'set')
    (tmp_path / 'set/other.yaml').write_text(YAML.format(train='images/val', val='images/val'))
    line = error_message(check_dataset, tmp_path / 'set')
    assert 'coco8.yaml and other.yaml describe a data set: choose one with --data' in line
    data = check_dataset(tmp_path / 'set/coco8.yaml')[0]
    assert len(data.splits['train']['images']) == 5 and data.root == str(tmp_path / 'set')


def test_missing_images_of_a_data_yaml(tmp_path):
    (tmp_path / 'set').mkdir()
    (tmp_path / 'set/data.yaml').write_text(YAML.format(train='../train/images', val='../valid/images'))
    line = error_message(check_dataset, tmp_path / 'set')
    assert 'data.yaml: its train is ../train/images, which is not there' in line
    (tmp_path / 'set/data.yaml').write_text('just a text')
    assert 'is no data set of YOLO' in error_message(check_dataset, tmp_path / 'set/data.yaml')


def test_a_missing_val_is_not_that_of_train(toy_dataset, tmp_path):
    """An absolute path of another machine is found by its end, but not by one that all splits have."""
    as_roboflow_yolo(toy_dataset, tmp_path / 'set')
    (tmp_path / 'set/images').mkdir()
    shutil.rmtree(tmp_path / 'set/valid')
    data, findings = check_dataset(tmp_path / 'set')
    assert findings['missing-split'].count == 1 and 'random validation split' in data.report.facts[0]
    (tmp_path / 'set/train.yaml').write_text('names: [a]')  # no paths: no data set
    sources = find_yolo(FolderTree(tmp_path / 'set'))[1]
    assert sources['val'].images == () and sources['val'].missing == '../valid/images'


def test_keypoints_after_boxes_are_ignored(tmp_path):
    text = f'{GOOD} 0.5 0.5 2 0.1 0.1 0'
    write_set(tmp_path / 'set', {'a': text, 'b': text}, yaml='names: [cat]\nkpt_shape: [2, 3]')
    data, findings = check_dataset(tmp_path / 'set')
    assert [a['bbox'] for a in data.splits['train']['annotations']] == [[20, 10, 40, 20]] * 2
    assert findings['keypoints-ignored'].count == 2 and not data.has_masks


PLACES = {  # image, label, and other files of a data set without a data.yaml
    'beside': ('a.png', 'a.txt', {}),
    'beside, with classes': ('a.png', 'a.txt', {'classes.txt': 'cat\ndog'}),
    'beside, by split': ('train/a.png', 'train/a.txt', {}),
    'in labels': ('images/a.png', 'labels/a.txt', {}),
    'in labels beside': ('pictures/a.png', 'labels/a.txt', {}),
    'in labels below': ('a.png', 'labels/a.txt', {}),
    'in labels of the root': ('train/a.png', 'labels/train/a.txt', {}),
    'behind empty ones': ('images/z.png', 'labels/z.txt', {f'labels/{i}.txt': '' for i in range(10)}),
    'names in a data.yaml': ('train/images/a.png', 'train/labels/a.txt', {'data.yaml': 'names: [cat, dog]'}),
}


@pytest.mark.parametrize('kind', PLACES)
def test_labels_are_found(kind, tmp_path):
    image, label, other_files = PLACES[kind]
    for name, text in {label: f'{GOOD}\n1 0.5 0.5 0.25 0.25', **other_files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for path in (tmp_path / image, tmp_path / image.replace('.png', '2.png')):
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((40, 80, 3), len(path.name), np.uint8))
    shutil.copy(tmp_path / label, tmp_path / label.replace('.txt', '2.txt'))
    data = check_dataset(tmp_path)[0]
    assert data.classes == (['cat', 'dog'] if 'names' in kind or 'classes' in kind else ['class 0', 'class 1'])
    assert [len(content['annotations']) for content in data.splits.values()] == [2, 2]


def test_links_that_loop_are_walked_once(toy_dataset, tmp_path):
    as_folders_without_yaml(toy_dataset, tmp_path / 'set')
    for name in ('images/train/loop', 'labels/train/loop', 'again'):
        os.symlink(tmp_path / 'set', tmp_path / 'set' / name)
    data = check_dataset(tmp_path / 'set')[0]
    assert len(data.splits['train']['images']) == 5
    assert_same_objects(objects(data.splits['val'], tmp_path / 'set'), expected_objects(toy_dataset, 'val', False))


def test_coco_json_beside_labels_takes_precedence(toy_dataset, tmp_path):
    as_ultralytics(toy_dataset, tmp_path / 'set')
    shutil.copytree(toy_dataset / 'annotations', tmp_path / 'set/annotations')
    data = check_dataset(tmp_path / 'set')[0]
    assert 'COCO json' in data.report.facts[0] and data.has_masks
    assert len(data.splits['train']['annotations']) == len(load_coco(toy_dataset, 'train')['annotations'])
