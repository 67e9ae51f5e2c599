"""XML files of Pascal VOC become the COCO that they stand for, in each layout: boxes are compared with those that were
written and with those that mmdet reads; difficult objects stay apart from the others."""

import json
import re
import shutil
from functools import partial

import cv2
import numpy as np
import pytest
from mmdet.datasets import XMLDataset

from convnext_dense.datasets import toy_shapes
from convnext_dense.datasets.custom import DatasetRequest, detect_tasks
from helpers.datasets import DETECTOR, check_dataset, copy_images, load_coco, quick_options, run
from helpers.files import error_message

CLASSES = sorted(toy_shapes.CLASSES)
OBJECT = """<object><name>{name}</name><pose>Left</pose><truncated>1</truncated><difficult>{difficult}</difficult>
<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part></object>"""


def xml(objects, size=(64, 64), name='elsewhere.jpg'):
    """Return the XML of objects: (name, corners, difficult)."""
    sides = f'<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>'
    text = '\n'.join(OBJECT.format(name=name, box=box, difficult=difficult) for name, box, difficult in objects)
    return f'<annotation>\n<filename>{name}</filename>{sides}<segmented>0</segmented>\n{text}\n</annotation>'


def objects_of(toy_dataset, split):
    """Return the objects of each image as they are written: corners that count from 1 and include the last pixel."""
    coco = load_coco(toy_dataset, split)
    names = {c['id']: c['name'] for c in coco['categories']}
    objects = {image['file_name'][:-4]: [] for image in coco['images']}
    stems = {image['id']: image['file_name'][:-4] for image in coco['images']}
    for a in coco['annotations']:
        x, y, w, h = a['bbox']
        box = (int(x) + 1, int(y) + 1, min(int(x + w) + 1, 64), min(int(y + h) + 1, 64))
        objects[stems[a['image_id']]].append((names[a['category_id']], box, a['id'] % 3 == 0))
    return objects


def write_split(toy_dataset, split, images, labels, name='{}'):
    copy_images(toy_dataset, split, images, name)
    labels.mkdir(parents=True, exist_ok=True)
    for stem, objects in objects_of(toy_dataset, split).items():
        (labels / f'{name.format(stem)}.xml').write_text(xml([(n, box, int(d)) for n, box, d in objects]))


def as_voc_devkit(toy_dataset, root):
    """VOC2007, in which segmentation masks have the names of images."""
    (root / 'ImageSets/Main').mkdir(parents=True)
    for split in ('train', 'val'):
        write_split(toy_dataset, split, root / 'JPEGImages', root / 'Annotations', split + '_{}')
        copy_images(toy_dataset, split, root / 'SegmentationClass', split + '_{}')
        names = [f'{split}_{path.stem}' for path in sorted((toy_dataset / split).iterdir())]
        (root / f'ImageSets/Main/{split}.txt').write_text('\n'.join(names) + '\n')
        (root / f'ImageSets/Main/disc_{split}.txt').write_text('\n'.join(f'{name} -1' for name in names))


def as_roboflow_voc(toy_dataset, root):
    for split, name in (('train', 'train'), ('val', 'valid')):
        write_split(toy_dataset, split, root / name, root / name)


def as_images_and_annotations(toy_dataset, root):
    for split in ('train', 'val'):
        write_split(toy_dataset, split, root / split / 'images', root / split / 'annotations')


def as_annotations_by_split(toy_dataset, root):
    for split in ('train', 'val'):
        write_split(toy_dataset, split, root / 'images' / split, root / 'annotations' / split)


def as_level_above(toy_dataset, root):
    as_voc_devkit(toy_dataset, root / 'VOC2007')


LAYOUTS = {
    'VOC': as_voc_devkit, 'Roboflow': as_roboflow_voc, 'SPLIT/annotations': as_images_and_annotations,
    'annotations/SPLIT': as_annotations_by_split, 'a level above': as_level_above,
}  # fmt: skip


@pytest.mark.parametrize('layout', LAYOUTS)
def test_each_layout_is_read(layout, toy_dataset, tmp_path):
    root = tmp_path / 'my data'
    LAYOUTS[layout](toy_dataset, root)
    content_of_file = {path: path.read_bytes() for path in root.rglob('*') if path.is_file()}
    data, findings = check_dataset(root)
    assert set(findings) == {'pixels-from-one', 'difficult'}
    assert data.classes == CLASSES and not data.has_masks
    for split in ('train', 'val'):
        content = data.splits[split]
        images = {i['id']: (root / i['file_name']).read_bytes() for i in content['images']}
        actual = sorted(
            (images[a['image_id']], CLASSES[a['category_id'] - 1], *a['bbox'], a['area'], a['iscrowd'])
            for a in content['annotations']
        )
        expected = sorted(
            ((toy_dataset / split / f'{stem}.png').read_bytes(), name, x1 - 1, y1 - 1, w, h, w * h, difficult)
            for stem, objects in objects_of(toy_dataset, split).items()
            for name, (x1, y1, x2, y2), difficult in objects
            for w, h in [(x2 - x1 + 1, y2 - y1 + 1)]
        )
        assert actual == expected
        assert {a['iscrowd'] for a in content['annotations']} == {0, 1}
        assert all(a.get('difficult', 0) == a['iscrowd'] for a in content['annotations'])
    assert content_of_file == {path: path.read_bytes() for path in root.rglob('*') if path.is_file()}


def test_boxes_are_those_of_mmdet(toy_dataset, tmp_path):
    """mmdet's XMLDataset moves all corners by one pixel, so its boxes end a pixel earlier."""
    root = tmp_path / 'VOC2007'
    as_voc_devkit(toy_dataset, root)
    for path in (root / 'JPEGImages').iterdir():
        path.rename(path.with_suffix('.jpg'))
    mmdet_dataset = XMLDataset(
        data_root=f'{root}/', ann_file='ImageSets/Main/train.txt', img_subdir='JPEGImages', ann_subdir='Annotations',
        data_prefix=dict(sub_data_root=''), metainfo=dict(classes=CLASSES),
    )  # fmt: skip
    expected = sorted(
        (item['img_path'].rsplit('/', 1)[1], i['bbox_label'], i['ignore_flag'], x1, y1, x2 + 1, y2 + 1)
        for item in mmdet_dataset
        for i in item['instances']
        for x1, y1, x2, y2 in [i['bbox']]
    )
    content = check_dataset(root)[0].splits['train']
    names = {i['id']: i['file_name'].rsplit('/', 1)[1] for i in content['images']}
    actual = sorted(
        (names[a['image_id']], a['category_id'] - 1, a['iscrowd'], x, y, x + w, y + h)
        for a in content['annotations']
        for x, y, w, h in [a['bbox']]
    )
    assert actual == expected and expected


def test_training_starts_from_xml_files(toy_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_roboflow_voc(toy_dataset, tmp_path / 'set')
    assert detect_tasks(DatasetRequest('set')) == ['detection']
    options = ['--epochs', 1, '--work-dir', 'run', '--cfg-options', *quick_options('voc')]
    assert run('train.py', DETECTOR, '--data', 'set', *options) == 0
    assert len(json.loads((tmp_path / 'run/data/train.json').read_text())['images']) == 5


def write_set(root, texts, suffix='.png'):
    """Write gray images of 80 x 40 pixels for XML texts by stem, None for an image without one."""
    root.mkdir(parents=True)
    for i, (stem, text) in enumerate(texts.items()):
        cv2.imwrite(str(root / f'{stem}{suffix}'), np.full((40, 80, 3), i, np.uint8))
        if text is not None:
            (root / f'{stem}.xml').write_text(text)


GOOD = xml([('cat', (11, 11, 30, 30), 0)], (80, 40))
BAD = {  # XML of an image -> what is reported, with how many images and boxes left of three
    'cut off': (GOOD[:200], 'unreadable-label', 'b.xml: not valid XML', 2, 2),
    'empty': ('', 'unreadable-label', 'b.xml: not valid XML', 2, 2),
    'HTML': ('<html></html>', 'unreadable-label', 'b.xml: it is <html>, not <annotation>', 2, 2),
    'entities': (
        '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>' + GOOD.replace('cat', '&b;'),
        'unreadable-label', 'b.xml: it declares a document type', 2, 2,
    ),
    'no name': (GOOD.replace('cat', ''), 'label-without-name', 'b.xml:1', 3, 2),
    'no box': (re.sub('<bndbox>.*?</bndbox>', '', GOOD, count=1), 'label-not-numbers', 'b.xml:1', 3, 2),
    'words': (GOOD.replace('>11<', '>left<'), 'label-not-numbers', 'b.xml:1', 3, 2),
    'not finite': (GOOD.replace('>11<', '>inf<'), 'label-not-numbers', 'b.xml:1', 3, 2),
    'swapped': (GOOD.replace('>11<', '>50<'), 'box-without-area', 'id b.xml:1', 3, 2),
    'another size': (GOOD.replace('80', '160'), 'image-size-mismatch', 'b.png: 160 x 40', 2, 2),
    'no size': (re.sub('<size>.*</size>', '', GOOD), 'image-without-size', 'b.png', 3, 3),
    'a size of 0': (GOOD.replace('80', '0').replace('40', '0'), 'image-without-size', 'b.png', 3, 3),
    'no objects': (re.sub('(?s)<object>.*</object>', '', GOOD), 'image-without-annotations', 'b.png', 3, 2),
    'no XML': (None, 'missing-label', 'b.png', 2, 2),
}  # fmt: skip


@pytest.mark.parametrize('kind', BAD)
def test_mistakes_are_reported(kind, tmp_path):
    text, code, example, n_images, n_boxes = BAD[kind]
    write_set(tmp_path / 'set', {'a': GOOD, 'b': text, 'c': GOOD})
    data, findings = check_dataset(tmp_path / 'set', val_fraction=0.3)
    also = {'image-without-annotations'} if n_images == 3 and n_boxes == 2 else set()
    assert set(findings) - {code, 'pixels-from-one'} <= also
    assert findings[code].examples[0].startswith(example)
    assert sum(len(content['images']) for content in data.splits.values()) == n_images
    boxes = [a['bbox'] for content in data.splits.values() for a in content['annotations']]
    assert boxes == [[10, 10, 20, 20]] * n_boxes


def test_xml_without_an_image(tmp_path):
    write_set(tmp_path / 'set', {'a': GOOD, 'b': GOOD})
    (tmp_path / 'set/c.xml').write_text(GOOD)
    assert check_dataset(tmp_path / 'set')[1]['unmatched-label'].examples == ['c.xml']


@pytest.mark.parametrize('corners', [(0, 11, 30, 30), (10.5, 11, 30, 30)])
def test_points_are_used_as_they_are(corners, tmp_path):
    """A 0 or a fraction anywhere says that corners are points, and do not count pixels from 1."""
    write_set(tmp_path / 'set', {'a': GOOD, 'b': xml([('cat', corners, 0)], (80, 40))})
    data, findings = check_dataset(tmp_path / 'set')
    boxes = [a['bbox'] for content in data.splits.values() for a in content['annotations']]
    x1, y1, x2, y2 = corners
    assert sorted(boxes) == sorted([[11, 11, 19, 19], [x1, y1, x2 - x1, y2 - y1]]) and not findings


def test_images_that_are_not_there(tmp_path):
    write_set(tmp_path / 'set', {'a': GOOD, 'b': GOOD})
    for path in (tmp_path / 'set').glob('*.png'):
        path.unlink()
    line = error_message(check_dataset, tmp_path / 'set')
    assert 'nothing-to-train-on' in line and 'unmatched-label, 2 (a.xml, b.xml)' in line


def test_names_in_lists(tmp_path):
    """Names may have a suffix, and 1 or -1 after them; trainval stands for a missing train."""
    write_set(tmp_path / 'set', {'a': GOOD, 'b': GOOD, 'c': GOOD, 'd': GOOD})
    (tmp_path / 'set/ImageSets/Main').mkdir(parents=True)
    (tmp_path / 'set/ImageSets/Main/trainval.txt').write_text('a.png\nb  1\nc -1\nz\n\n')
    (tmp_path / 'set/ImageSets/Main/val.txt').write_text('d')
    data, findings = check_dataset(tmp_path / 'set')
    names = {split: [i['file_name'] for i in content['images']] for split, content in data.splits.items()}
    assert names == {'train': ['a.png', 'b.png'], 'val': ['d.png']}
    assert findings['missing-label'].examples == ['z']


def test_several_data_sets_are_an_error(toy_dataset, tmp_path):
    for year in (2007, 2012):
        as_voc_devkit(toy_dataset, tmp_path / f'VOCdevkit/VOC{year}')
    line = error_message(check_dataset, tmp_path / 'VOCdevkit')
    assert 'holds several data sets, such as VOC2007 and VOC2012: give the folder of one' in line


def test_format_chooses_among_several(toy_dataset, tmp_path):
    root = tmp_path / 'set'
    as_roboflow_voc(toy_dataset, root)
    for path in [*root.glob('*/*.xml')]:
        path.with_suffix('.txt').write_text('0 0.5 0.5 0.5 0.5')
    data, findings = check_dataset(root)
    assert 'YOLO' in data.report.facts[0] and findings['other-format'].examples == ['Pascal VOC: --format voc']
    data, findings = check_dataset(root, format='voc')
    assert data.classes == CLASSES and 'other-format' not in findings
    assert 'no labels of this format: leave out --format coco' in error_message(
        partial(check_dataset, root, format='coco')
    )
    shutil.copytree(toy_dataset / 'annotations', root / 'annotations')
    data, findings = check_dataset(root)
    assert 'COCO json' in data.report.facts[0]
    assert findings['other-format'].examples == ['YOLO: --format yolo', 'Pascal VOC: --format voc']
    (root / 'data.yaml').write_text('names: [a')
    assert check_dataset(root)[1]['other-format'].examples == ['Pascal VOC: --format voc']
    shutil.rmtree(root / 'annotations')
    assert 'is not valid YAML' in (line := error_message(check_dataset, root))
    assert line.endswith('by --format voc')
