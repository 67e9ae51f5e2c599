"""`--classes` for boxes: a subset, an order, a merge; boxes of other classes are left out and nothing else changes."""

import json

import pytest

from convnext_dense.datasets import toy_shapes
from convnext_dense.datasets.custom import DatasetRequest, read_data
from convnext_dense.datasets.select_classes import parse_entries
from convnext_dense.errors import UsageError
from helpers.datasets import check_dataset, copy_images, edit_coco, load_coco, renumber_categories, run, write_json
from helpers.files import error_message

PARSED = {
    'car': {'car': ['car']},
    'car,bus': {'car': ['car'], 'bus': ['bus']},
    'car, traffic light ,': {'car': ['car'], 'traffic light': ['traffic light']},
    'car,truck=vehicle': {'vehicle': ['car', 'truck']},
    ('person', 'car,truck=vehicle'): {'person': ['person'], 'vehicle': ['car', 'truck']},
    ('a,b=x', 'c=x'): {'x': ['a', 'b', 'c']},
    ('a,b=a', 'c'): {'a': ['a', 'b'], 'c': ['c']},
}
BAD = {'': 'give names such as', 'a=': 'give names such as', '=b': 'give names such as', 'a,a': "names 'a' twice"}
BAD |= dict.fromkeys(['a=x,b=y', 'a=x,b', ('c', 'a=b=x')], 'put a space, not a comma, after a new name')


@pytest.mark.parametrize('classes', PARSED)
def test_entries_are_parsed(classes):
    assert parse_entries(classes) == PARSED[classes]
    assert list(parse_entries(classes)) == list(PARSED[classes])


@pytest.mark.parametrize('classes', BAD)
def test_bad_entries(classes):
    with pytest.raises(UsageError, match=BAD[classes]):
        parse_entries(classes)


def write_files(toy_dataset, root):
    """One JSON file per split, with other category ids in val."""
    for split in ('train', 'val'):
        copy_images(toy_dataset, split, root / split)
    write_json(load_coco(toy_dataset, 'train'), root / 'train.json')
    write_json(renumber_categories(load_coco(toy_dataset, 'val')), root / 'val.json')


def boxes_by_name(content):
    names = {c['id']: c['name'] for c in content['categories']}
    return sorted((a['image_id'], names[a['category_id']], *a['bbox']) for a in content['annotations'])


MAPPINGS = {  # --classes -> class of each category that is left
    'subset': (['cross,disc'], {'cross': 'cross', 'disc': 'disc'}),
    'all in another order': (['cross', 'disc', 'square', 'triangle'], None),
    'merge': (['disc,cross=round', 'square'], {'disc': 'round', 'cross': 'round', 'square': 'square'}),
}


@pytest.mark.parametrize('kind', MAPPINGS)
def test_boxes_of_the_selected_classes_are_left(kind, toy_dataset, tmp_path):
    """Also where the splits number their categories differently."""
    entries, mapping = MAPPINGS[kind]
    mapping = mapping or dict(zip(entries, entries))
    write_files(toy_dataset, tmp_path / 'set')
    names = sorted(toy_shapes.CLASSES)
    assert set(mapping) <= set(names)
    data, findings = check_dataset(tmp_path / 'set', classes=entries)
    assert data.classes == list(dict.fromkeys(mapping.values()))
    for split in ('train', 'val'):
        expected = [
            (image, mapping[name], *box) for image, name, *box in boxes_by_name(load_coco(toy_dataset, split))
            if name in mapping
        ]  # fmt: skip
        assert boxes_by_name(data.splits[split]) == sorted(expected)
        assert len(data.splits[split]['images']) == len(load_coco(toy_dataset, split)['images'])
    assert ('class-not-selected' in findings) == (set(mapping) != set(names))
    assert 'duplicate-category-name' not in findings


def test_classes_of_a_file(toy_dataset, tmp_path):
    (tmp_path / 'names.txt').write_text('cross\ndisc\n')
    data = check_dataset(toy_dataset, classes=str(tmp_path / 'names.txt'))[0]
    assert data.classes == ['cross', 'disc']
    assert "no classes file 'gone.txt'" in error_message(
        lambda root: check_dataset(root, classes='gone.txt'), toy_dataset
    )


def test_a_class_that_does_not_exist(toy_dataset):
    assert error_message(lambda root: check_dataset(root, classes='disc,ring'), toy_dataset).endswith(
        f"--classes: no class is called 'ring'; the data set has {', '.join(toy_shapes.CLASSES)}"
    )
    line = error_message(lambda root: check_dataset(root, classes='Disc'), toy_dataset)
    assert line.endswith("no class is called 'Disc'; it is called disc")


def test_invalid_annotations_are_still_reported(toy_dataset, tmp_path):
    write_files(toy_dataset, tmp_path / 'set')
    edit_coco(lambda c: c['annotations'].extend([5, dict(c['annotations'][0], category_id=99)]), 'train.json')(
        tmp_path / 'set'
    )
    findings = check_dataset(tmp_path / 'set', classes='disc')[1]
    assert {'not-an-annotation', 'unknown-category', 'class-not-selected'} <= set(findings)


def test_the_flag(toy_dataset, tmp_path, capsys):
    options = ['--data', toy_dataset, '--task', 'detection', '--json']
    assert run('check_data.py', *options, '--classes', 'disc,cross=round', 'square') == 0
    report = json.loads(capsys.readouterr().out)['detection']
    assert any(fact.startswith('2 classes: round, square') for fact in report['facts'])
    data = read_data(DatasetRequest(str(toy_dataset), classes=['disc,cross=round']), 'detection', ('train',))
    assert data.classes == ['round']
