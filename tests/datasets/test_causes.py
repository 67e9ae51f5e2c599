"""A split without usable images or annotations is an error that names the causes, in check_data.py as in train.py."""

import json
import shutil

import pytest

from convnext_dense.datasets import toy_shapes
from convnext_dense.datasets.custom import DatasetRequest, read_data
from helpers.datasets import run
from helpers.files import error_message
from helpers.paths import ROOT

DETECTOR, SEGMENTOR = ROOT / 'configs/demo/mask_rcnn.py', ROOT / 'configs/demo/upernet.py'
FILES = [f'annotations/instances_{split}.json' for split in ('train', 'val')]


@pytest.fixture
def dataset_root(tmp_path):
    toy_shapes.write(tmp_path / 'my_data', train=5, val=3, size=64)
    return tmp_path / 'my_data'


def edit(change, *files):
    def do(root):
        for file in files or FILES:
            content = json.loads((root / file).read_text())
            change(content)
            (root / file).write_text(json.dumps(content))

    return do


def update_annotations(**values):
    return edit(lambda c: [a.update(values) for a in c['annotations']])


def rename_categories(name):
    def change(content):
        for category in content['categories']:
            category.update(name=name(category['name']), id=category['id'] + 10)
        for annotation in content['annotations']:
            annotation['category_id'] += 10

    return edit(change, FILES[1])


def mostly_crowds(content):
    for annotation in content['annotations']:
        annotation['iscrowd'] = 1
    content['annotations'][0]['bbox'] = [1, 2]


def boxes_of_crowds(content):
    for annotation in content['annotations']:
        annotation.update(iscrowd=1, segmentation=[])


def without(pattern):
    return lambda root: [path.unlink() for path in root.glob(pattern)]


CAUSES = {  # what is done to the data -> what must be in the line that refuses them
    'names in capitals': (rename_categories(str.upper), ['val', 'DISC: a class is called disc', 'SQUARE: a class is']),
    'other names': (rename_categories('x{}'.format), ['val', 'category-without-class, 4 (xdisc, xsquare)']),
    'crowds': (update_annotations(iscrowd=1), ['crowd-with-polygons']),
    'crowds without masks': (edit(boxes_of_crowds), ['crowd, ']),
    'crowds, and one other thing': (edit(mostly_crowds), ['crowd-with-polygons, ', 'box-not-four-numbers, 1']),
    'no annotations': (edit(lambda c: c.update(annotations=[])), ['image-without-annotations, 5']),
    'no images': (edit(lambda c: c.update(annotations=[], images=[])), ['no images']),
    'images of text': (edit(lambda c: c.update(images=['a'])), ['image-without-id-or-name', 'orphan-annotation']),
    'other images': (update_annotations(image_id=99), ['orphan-annotation', 'id 1: image 99']),
    'other categories': (update_annotations(category_id=-1), ['unknown-category', 'id 1: category -1']),
    'categories true': (
        edit(lambda c: [k.update(id=True) for k in c['categories']]),
        ['without-id-or-name', 'an id that is not true or false'],
    ),
    'categories of numbers': (edit(lambda c: c.update(categories=[1, 2])), ['without-id-or-name', '(1, 2)']),
    'empty files': (lambda root: [p.write_bytes(b'') for p in (root / 'train').iterdir()], ['empty-file, 5']),
}  # fmt: skip


@pytest.mark.parametrize('kind', CAUSES)
def test_error_names_the_causes_of_an_empty_split(kind, dataset_root):
    change, message = CAUSES[kind]
    change(dataset_root)

    def raise_if_errors():
        read_data(DatasetRequest(str(dataset_root)), 'detection', ('train', 'val')).report.raise_if_errors()

    line = error_message(raise_if_errors)
    assert line and all(word in line for word in message)
    assert len(line) < 1000


def test_train_and_check_data_report_the_same_error(dataset_root, monkeypatch, capsys):
    monkeypatch.chdir(dataset_root.parent)
    rename_categories(str.upper)(dataset_root)
    assert run('check_data.py', '--data', 'my_data', '--task', 'detection') == 1
    finding = next(line for line in capsys.readouterr().out.splitlines() if 'nothing-to-evaluate' in line)
    assert run('train.py', DETECTOR, '--data', 'my_data', '--work-dir', 'run') == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f'error: data set: {finding.split(maxsplit=1)[1]}') and 'tools/check_data.py' in line


def test_missing_masks_are_named_as_the_cause(dataset_root, monkeypatch, capsys):
    monkeypatch.chdir(dataset_root.parent)
    without('labels/val/*')(dataset_root)
    (dataset_root / 'labels/val/x.png').touch()
    assert run('train.py', SEGMENTOR, '--data', 'my_data', '--work-dir', 'run') == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert 'val: nothing-to-evaluate' in line and 'unmatched-image, 3 (000001.png, 000002.png)' in line


def test_ignored_masks_are_reported_without_mask_branch(dataset_root):
    update_annotations(segmentation='abc')(dataset_root)
    data = read_data(DatasetRequest(str(dataset_root)), 'detection', ('train', 'val'))
    problems = {f.code: f.examples for f in data.report.diagnostics.values()}
    assert not data.has_masks and problems['mask-ignored'][0] == 'id 1: abc'


@pytest.mark.parametrize('folder', ['train', 'gone'])
def test_missing_images_are_not_replaced_by_other_splits_images(folder, dataset_root):
    """Images of both splits have the same names and sizes."""
    without('train/00000[2-5].png')(dataset_root)
    if folder == 'train':
        data = read_data(DatasetRequest(str(dataset_root)), 'detection', ('train', 'val'))
        assert [i['file_name'] for i in data.splits['train']['images']] == ['train/000001.png']
        assert data.report.diagnostics['train', 'missing-image'].count == 4
    else:
        without('train/*')(dataset_root)
        assert 'none of its images' in error_message(
            read_data, DatasetRequest(str(dataset_root)), 'detection', ('train', 'val')
        )


def test_one_split_folder_may_hold_all_images(dataset_root):
    """As if COCO's train2017 had been split into two JSON files."""
    shutil.rmtree(dataset_root / 'val')
    (dataset_root / 'train').rename(dataset_root / 'train2017')
    content = json.loads((dataset_root / FILES[0]).read_text())
    (dataset_root / FILES[1]).write_text(json.dumps(content))
    data = read_data(DatasetRequest(str(dataset_root)), 'detection', ('train', 'val'))
    assert data.splits['val']['images'][0]['file_name'] == 'train2017/000001.png'
