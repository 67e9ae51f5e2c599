"""Classes that cannot be learned and labels without a class are errors whose advice follows from the pixels and fixes
the data set."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from convnext_dense.datasets.class_names import read_classes
from convnext_dense.errors import UsageError
from helpers.datasets import check_dataset
from helpers.files import error_message, run_limited

SIZE = 40


def write(root, *maps, classes=None, palette=False, splits=('train', 'val')):
    """Write images with masks, each of equally high rows of the given labels."""
    rng = np.random.RandomState(0)
    for split in splits:
        for i, rows in enumerate(maps):
            for folder in ('images', 'labels'):
                (root / folder / split).mkdir(parents=True, exist_ok=True)
            pixels = rng.randint(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / f'images/{split}/{i}.png')
            labels = np.repeat(np.array(rows, np.uint8), SIZE // len(rows))[:, None].repeat(SIZE, 1)
            image = Image.fromarray(labels)
            if palette:
                image.putpalette([n % 256 for n in range(768)])
            image.save(root / f'labels/{split}/{i}.png')
    if classes:
        (root / 'classes.txt').write_text('\n'.join(classes))
    return root


def advice(root, kind, **request):
    """Return the example of an error that is reported once for all masks."""
    data, problems = check_dataset(root, 'segmentation', **request)
    assert problems[kind].action == 'error' and (problems[kind].split, problems[kind].count) == ('all', 1)
    with pytest.raises(UsageError, match=kind):
        data.report.raise_if_errors()
    return problems[kind].examples[0]


SINGLE = {  # the labels of the maps, what is asked for, and what is reported
    '0 and 1': ([0, 0, 0, 1], {}, '2 names, for labels 0 and 1'),
    '0 and 1, 0 ignored': ([0, 0, 0, 1], dict(ignore_labels=[0]), '2 names, for labels 0 and 1, without --ignore 0'),
    '0 and 255, 0 ignored': ([0, 255], dict(ignore_labels=[0]), '255, which is ignored, as 1, without --ignore 0'),
    '1 and 255': ([1, 255], {}, '255, which is ignored, as 0'),
    '0 and 128': ([0, 128], {}, 'write the labels 0 and 128 as 0 to 1'),
    '0, 1 and 255': ([0, 1, 1, 255], {}, '2 names, for labels 0 and 1'),
    '0, 1 and 2': ([0, 1, 1, 2], {}, '3 names, for labels 0, 1 and 2'),
    '0': ([0], {}, 'all pixels are 0: give masks that show at least two classes'),
    '1': ([1], dict(ignore_labels=[0]), 'all pixels are 1: give masks that show at least two classes'),
    '255': ([255], {}, 'all pixels are 255: give masks that show at least two classes'),
    'many': (list(range(20)), {}, 'name a class for each label, if these are segmentation masks'),
}


@pytest.mark.parametrize('kind', SINGLE)
def test_single_class_is_an_error(kind, tmp_path):
    rows, request, message = SINGLE[kind]
    write(tmp_path, rows, rows, classes=['crack'])
    text = advice(tmp_path, 'single-class', **request)
    assert text.startswith('crack alone, where the pixels are ') and text.endswith(message)
    assert 'label-out-of-range' not in check_dataset(tmp_path, 'segmentation', **request)[1]
    if '2 names' in message:  # as it says
        (tmp_path / 'classes.txt').write_text('background\ncrack')
        assert not check_dataset(tmp_path, 'segmentation')[0].report.problems


def test_single_class_has_no_gradient():
    """The reason why a single class is an error."""
    scores = torch.randn(2, 1, 4, 4, requires_grad=True)
    loss = cross_entropy(scores, torch.zeros(2, 4, 4, dtype=torch.long))
    loss.backward()
    assert loss == 0 and not scores.grad.any()


@pytest.mark.parametrize('rows', [[0, 255], [0], [0, 0, 0, 255]])
def test_palette_with_one_label_is_a_single_class(rows, tmp_path):
    write(tmp_path, rows, palette=True)
    assert advice(tmp_path, 'single-class').startswith('class 0 alone')


def test_background_as_single_class_asks_for_the_others(tmp_path):
    write(tmp_path, [0, 0, 0, 1], classes=['Background'])
    assert 'name the classes, too: 2 names' in advice(tmp_path, 'single-class')


CAMVID = ['Sky', 'Building', 'Pole', 'Road', 'Pavement', 'Tree', 'Sign', 'Fence', 'Car', 'Pedestrian', 'Bicyclist']
OUT_OF_RANGE = {  # the labels of the maps, the number of classes, what is asked for, what is reported of them and to do
    'void above the classes': (
        [*range(11)] * 3 + [11], 11, {}, 'label 11 is used and has no name',
        'name its class in --classes FILE, or --ignore 11, or, if 0 is no class, --ignore 0',
    ),
    'from 1 on': ([1, 2, 3], 3, {}, 'label 3 is used and has no name', '0 is not used: --ignore 0'),
    'from 1 on, with 255': ([1, 2, 3, 255], 3, {}, 'label 3', '0 is not used: --ignore 0'),
    'from 1 on, one unused': ([1, 3], 3, {}, 'label 3', '0 is not used: --ignore 0'),
    'from 1 on, and 0 ignored': (
        [0, 1, 2, 3], 2, dict(ignore_labels=[0]), 'label 3', 'in --classes FILE, or --ignore 0 3',
    ),
    'next, and another ignored': (
        [0, 1, 2, 200], 2, dict(ignore_labels=[200]), 'label 2',
        'or --ignore 2 200, or, if 0 is no class, --ignore 0 200',
    ),
    'far above': ([0, 1, 2, 200], 3, {}, 'label 200', 'name its class in --classes FILE, or --ignore 200'),
    'several': (
        [0, 1, 12, 13], 2, {}, '2 labels are used and have no names (12: 16.7 %, 13: 16.7 % of the pixels',
        'name their classes in --classes FILE, or --ignore 12 13',
    ),
    'several from 1 on': ([1, 2, 3, 4], 3, {}, '2 labels', 'or --ignore 3 4'),
    'one class is left': ([0, 0, 0, 200], 2, {}, 'label 200', 'write labels as the indices of their classes, 0 to 1'),
    'one class is left, next': ([0, 0, 0, 2], 2, {}, 'label 2', 'write labels as the indices of their classes, 0 to 1'),
    'many': (
        list(range(0, 40)), 3, {}, '37 labels', 'name their classes in --classes FILE, if these are segmentation masks',
    ),
}  # fmt: skip


@pytest.mark.parametrize('kind', OUT_OF_RANGE)
def test_unnamed_labels_are_an_error(kind, tmp_path):
    rows, n, request, begin, end = OUT_OF_RANGE[kind]
    write(tmp_path, rows, rows, rows[:1], classes=CAMVID[:n])
    text = advice(tmp_path, 'label-out-of-range', **request)
    assert text.startswith(begin) and text.endswith(end), text
    assert len(text) < 300


@pytest.mark.parametrize('kind', [kind for kind, (*_, end) in OUT_OF_RANGE.items() if '--ignore' in end])
def test_advice_on_unnamed_labels_fixes_them(kind, tmp_path):
    """After each --ignore of the advice, all labels have a class."""
    rows, n, _, _, end = OUT_OF_RANGE[kind]
    write(tmp_path, rows, rows, rows[:1], classes=CAMVID[:n])
    for labels in re.findall('--ignore ([0-9 ]+[0-9]|[0-9])', end):
        data, problems = check_dataset(tmp_path, 'segmentation', ignore_labels=[int(label) for label in labels.split()])
        assert not {'label-out-of-range', 'single-class'} & set(problems) and data.classes == CAMVID[:n]


def test_pixel_fractions_cover_all_masks(tmp_path):
    write(tmp_path, [0, 0, 0, 0], [0, 1, 2, 2], classes=CAMVID[:2], splits=('train',))
    write(tmp_path, [1, 1, 1, 1], classes=CAMVID[:2], splits=('val',))
    text = advice(tmp_path, 'label-out-of-range')
    assert '(16.7 % of the pixels, in 1.png; label 0 has 41.7 %)' in text
    write(tmp_path, [2, 2, 2, 2], classes=CAMVID[:2], splits=('val',))
    assert 'in 2 masks, such as 1.png' in advice(tmp_path, 'label-out-of-range')


@pytest.mark.parametrize('n, ignore', [(3, None), (21, None), (2, [0])])
def test_masks_of_0_and_255_report_pixel_fractions(n, ignore, tmp_path):
    names = [f'class {i}' for i in range(n)]
    write(tmp_path, [0, 0, 0, 255], classes=names)
    assert advice(tmp_path, 'mask-values-0-and-255', ignore_labels=ignore) == 'the pixels are 0: 75.0 %, 255: 25.0 %'


def test_single_class_in_train_is_reported(tmp_path):
    write(tmp_path, [0, 255], [0], classes=CAMVID[:2], splits=('train',))
    write(tmp_path, [0, 1], classes=CAMVID[:2], splits=('val',))
    data, problems = check_dataset(tmp_path, 'segmentation')
    assert problems['single-class-in-train'].examples == ['Sky'] and not data.report.problems
    write(tmp_path, [0, 1], classes=CAMVID[:2], splits=('train',))
    assert 'single-class-in-train' not in check_dataset(tmp_path, 'segmentation')[1]


def test_ignored_pixels_are_named_as_the_cause(tmp_path):
    write(tmp_path, [0], [0], classes=CAMVID, splits=('train',))
    write(tmp_path, [1, 2], classes=CAMVID, splits=('val',))
    problems = check_dataset(tmp_path, 'segmentation', ignore_labels=[0])[1]
    assert 'mask-all-ignored, 2 (0.png, 1.png)' in problems['nothing-to-train-on'].examples[0]


@pytest.mark.parametrize(
    'ignore, message', [(None, 'label 0 is Sky, label 2 is Pole'), ([0], 'label 1 is Sky, label 3')]
)
def test_report_shows_labels_of_first_and_last_class(ignore, message, tmp_path):
    """So that users notice shifted labels."""
    write(tmp_path, [1, 2], classes=CAMVID[:3])
    assert message in check_dataset(tmp_path, 'segmentation', ignore_labels=ignore)[0].report.facts[-1]


def test_large_or_damaged_class_files_are_one_line_errors(tmp_path):
    """They fail at once, with one line."""
    for name, text in {
        'lines.txt': 'a' + ' ' * 2**21 + 'b', 'numbers.txt': '1' * 5000 + ' a',
        'many.txt': '\n'.join(map(str, range(10**5))),
        'deep.json': '[' * 10**5, 'list.json': '[["a"]]', 'null.json': '[null]', 'control.txt': 'a\0b\nc',
        'surrogate.json': '["\\ud800"]', 'color.json': '{"a": [1, 2, 300]}', 'inf.json': '{"a": [1e999, 0, 0]}',
        'field.csv': 'a,b\n0,' + 'x' * 10**6, 'digits.csv': f'a,b\n{"9" * 5000},x', 'long.txt': 'x' * 301,
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=name) as caught:
            read_classes(tmp_path / name)
        assert len(str(caught.value)) < 1500 and '\n' not in str(caught.value)


CLASSES = {  # of labels that are none: what the line says
    'negative.json': ('{"cat": -1, "dog": 0}', 'label -1 of 2'),
    'truth.json': ('{"cat": true, "dog": false}', 'label True of 2'),
    'ids.json': ('[{"id": true, "name": "a"}, {"id": false, "name": "b"}]', 'label True of 2'),
    'keys.json': ('{"-1": "a", "0": "b"}', 'label -1 of 2'),
    'half.json': ('{"a": 0.5, "b": 1}', 'label 0.5 of 2'),
    'twice.json': ('{"a": 1, "b": 1}', 'label 1 occurs twice'),
    'keys twice.json': ('{"0": "a", "0": "b"}', "the key '0' occurs twice"),
    'numbers.json': ('[7, 8]', '7 is not a name'),
    'text.json': ('"abc"', 'neither a list of names nor a dict'),
    'truth in a color.json': ('{"a": [true, 0, 0], "b": [1, 1, 1]}', 'not a color'),
    'deep.json': ('[' * 10**5, 'nested too deeply'),
    'digits.json': ('[' + '9' * 5000, 'a number of more than 4,300 digits'),
    'lines.txt': ('-1 a\n0 b\n1 c', 'label -1 of 3'),
    'lines with colons.txt': ('0: a\n2: b', 'label 2 of 2'),
    'rows.csv': ('value,class\n-1,a\n0,b', 'label -1 of 2'),
    'columns.csv': ('a,b\n0', 'not a value and a name'),
    'many.csv': ('a,b\n' + '\n'.join(f'{i},c{i}' for i in range(256)), '256 classes'),
    'latin.txt': ('caf\udce9\nb', 'not UTF-8'),
}


@pytest.mark.parametrize('name', CLASSES)
def test_invalid_labels_are_named(name, tmp_path):
    text, message = CLASSES[name]
    (tmp_path / name).write_bytes(text.encode('utf-8', 'surrogateescape'))
    with pytest.raises(UsageError, match=message):
        read_classes(tmp_path / name)


@pytest.mark.parametrize('name, text', [
    ('x.json', '{"b": 1, "a": 0}'), ('x.json', '{"b": "1", "a": "0"}'), ('x.json', '{"b": 1.0, "a": 0.0}'),
    ('x.json', '{"1": "b", "0": "a"}'), ('x.json', '[{"id": 1, "name": "b"}, {"id": 0, "name": "a"}]'),
    ('x.json', '{"a": "red", "b": null}'), ('x.txt', '1: b\n0: a'), ('x.txt', ' 1  b\n 0  a'), ('x.txt', 'a:\nb::'),
    ('x.csv', 'value,class\n1,b\n0,a'),
])  # fmt: skip
def test_class_files_are_sorted_by_label(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert read_classes(tmp_path / name) == (['a', 'b'], None)


@pytest.mark.parametrize('label', [-1, 256, 10**400])
def test_labels_to_ignore_are_8_bit(label, tmp_path):
    write(tmp_path, [0, 1], classes=CAMVID)
    with pytest.raises(UsageError, match=r'--ignore .*: labels are 0 to 255'):
        check_dataset(tmp_path, 'segmentation', ignore_labels=[label])


def test_lines_of_many_spaces_take_linear_time(tmp_path):
    """The longest lines, as many as a file may hold."""
    for line in ['a' + ' ' * 290 + 'b', 'a' + ' ,' * 145 + 'b', '1 ' * 149 + 'x', 'a ' + '1,' * 149]:
        (tmp_path / 'x.txt').write_text('\n'.join([line] * 10000))
        assert '10,000 classes' in run_limited(error_message, read_classes, tmp_path / 'x.txt')
