"""File names from other machines, in other spellings and folders: each is located, or reported as ambiguous or missing,
and none gets the image of another."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convnext_dense.datasets.custom import DatasetRequest, read_data
from convnext_dense.datasets.file_names import FileIndex, match_names, normalize_spelling, split_machine_prefix
from convnext_dense.datasets.image_resolver import ImageResolver
from convnext_dense.datasets.layouts import SplitDirs, find_folders, pair_files
from convnext_dense.datasets.request import split_by_hash
from convnext_dense.errors import UsageError
from helpers.datasets import DETECTOR, check_dataset, load_coco, quick_options, write_json, write_masks
from helpers.files import run_limited

BY_SUFFIX, RESPELLED, CASE = 'name-matched-by-suffix', 'name-spelling-mismatch', 'name-case-mismatch'
MISSING, OUTSIDE, AMBIGUOUS = 'missing-image', 'name-outside-root', 'ambiguous-name'


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b'')


def locate(root, names, file='annotations/instances_train.json', **extra):
    """Return path and code of each name of a JSON file."""
    images = ImageResolver(root / file, root, names, **extra)
    return {name: images.locations[name][:2] for name in names}


SEQUENCES = ('images/seq1/1.png', 'images/seq1/2.png', 'images/seq2/1.png', 'images/seq2/2.png')
# What is on the disk, and for names of a file where they are and what is reported of them.
CASES = {
    'of another machine': (SEQUENCES, {
        '/home/me/images/seq1/1.png': ('images/seq1/1.png', BY_SUFFIX),
        '/home/me/images/seq2/1.png': ('images/seq2/1.png', BY_SUFFIX),
    }),
    'of Windows': (SEQUENCES, {
        'C:\\data\\images\\seq1\\1.png': ('images/seq1/1.png', BY_SUFFIX),
        'd:/images/seq2/2.png': ('images/seq2/2.png', BY_SUFFIX),
        '\\\\server\\share\\seq2\\1.png': ('images/seq2/1.png', BY_SUFFIX),
    }),
    'addresses': (SEQUENCES, {
        'https://host:80/bucket/seq1/1.png?sig=a/b#c': ('images/seq1/1.png', BY_SUFFIX),
        's3://bucket/images/seq2/1.png': ('images/seq2/1.png', BY_SUFFIX),
        'file:///mnt/images/seq2/2.png': ('images/seq2/2.png', BY_SUFFIX),
    }),
    "Label Studio's local files": (('a/b.jpg', 'c/b.jpg'), {
        '/data/local-files/?d=a/b.jpg': ('a/b.jpg', None),
        'http://host/data/local-files/?d=c%2Fb.jpg': ('c/b.jpg', RESPELLED),
    }),
    "Label Studio's uploads": (('images/x.jpg', 'images/y.jpg'), {
        '/data/upload/3/x.jpg': ('images/x.jpg', BY_SUFFIX),
        '/data/upload/3/y.jpg': ('images/y.jpg', BY_SUFFIX),
    }),
    'uploads of one name': (('images/x.jpg', 'images/y.jpg'), {
        '/data/upload/3/x.jpg': (None, AMBIGUOUS),
        '/data/upload/4/x.jpg': (None, AMBIGUOUS),
        '/data/upload/3/y.jpg': ('images/y.jpg', BY_SUFFIX),
    }),
    'longest suffix': (('a/x.png', 'b/a/x.png', 'c/b/a/x.png'), {
        '/home/c/b/a/x.png': ('c/b/a/x.png', BY_SUFFIX),
        '/mnt/d/b/a/x.png': (None, AMBIGUOUS),
    }),
    'of several folders': (SEQUENCES, {'/home/me/1.png': (None, AMBIGUOUS)}),
    'a folder that is not there': (SEQUENCES, {
        '/home/me/images/seq1/1.png': ('images/seq1/1.png', BY_SUFFIX),
        '/home/me/images/seq3/1.png': (None, MISSING),
    }),
    'the last part alone, where others have more': (('images/a/1.png', 'images/b/2.png'), {
        '/home/me/images/a/1.png': ('images/a/1.png', BY_SUFFIX),
        '/home/me/images/c/2.png': (None, MISSING),
    }),
    'the last part alone, where others are found in full': (('images/a/1.png', 'images/b/2.png'), {
        'a/1.png': ('images/a/1.png', None),
        'c/2.png': (None, MISSING),
    }),
    'a shorter suffix than names of the same prefix have': (('p/t/1.png', 'p/t/2.png', 'q/t/3.png'), {
        '/home/p/t/1.png': ('p/t/1.png', BY_SUFFIX),
        '/home/p/t/2.png': ('p/t/2.png', BY_SUFFIX),
        '/home/r/t/3.png': (None, MISSING),
    }),
    'one more folder by chance': (('images/1.png', 'images/2.png', 'images/3.png', 'me/4.png'), {
        '/home/me/images/1.png': ('images/1.png', BY_SUFFIX),
        '/home/me/images/2.png': ('images/2.png', BY_SUFFIX),
        '/home/me/images/3.png': ('images/3.png', BY_SUFFIX),
        '/home/me/4.png': ('me/4.png', BY_SUFFIX),
    }),
    'another number': (('images/seq1/1.png',), {'/me/seq2/1.png': (None, None)}),
    'another split': (('val/1.png',), {'/me/train/1.png': (None, None)}),
    'another split than that of the file': (('valid/1.png',), {'/me/1.png': (None, None)}),
    'another word for the split': (('training/x/1.png', 'val/x/1.png'), {
        '/me/train2017/1.png': ('training/x/1.png', BY_SUFFIX),
    }),
    'no folder': (('deep/in/the/data/1.png',), {'1.png': ('deep/in/the/data/1.png', BY_SUFFIX)}),
    'no folder, where others are in full': (('train/1.png', 'more/2.png'), {
        '1.png': ('train/1.png', None), '2.png': (None, MISSING),
    }),
    'one folder up': (('images/1.png', 'images/2.png'), {
        '../images/1.png': ('images/1.png', None),
        '..\\images\\2.png': ('images/2.png', None),
    }),
    'folders up that leave the data': (('images/1.png', 'images/2.png'), {
        '../images/1.png': ('images/1.png', None),
        '../../images/2.png': (None, OUTSIDE),
        '/dev/zero': (None, OUTSIDE),
    }),
    'missing, of another machine': (('images/1.png',), {
        '/me/images/1.png': ('images/1.png', BY_SUFFIX), '/me/images/2.png': (None, MISSING),
    }),
    'Unicode forms': (('train/caf\u00e9/\u00fc.png', 'train/caf\u00e9/o\u0308.png'), {
        'cafe\u0301/u\u0308.png': ('train/caf\u00e9/\u00fc.png', RESPELLED),
        'caf\u00e9/\u00f6.png': ('train/caf\u00e9/o\u0308.png', RESPELLED),
    }),
    'percent escapes': (('train/a b.png', 'train/c%20d.png', 'train/100%.png'), {
        'a%20b.png': ('train/a b.png', RESPELLED),
        'c d.png': ('train/c%20d.png', RESPELLED),
        '100%.png': ('train/100%.png', None),
    }),
    'backslashes': (('train/a/1.png', 'train/b\\2.png'), {
        'a\\1.png': ('train/a/1.png', None),
        'b\\2.png': ('train/b\\2.png', None),
    }),
    'backslashes in names of files': (('data\\images\\1.png', 'data\\images\\2.png'), {
        'images/1.png': ('data\\images\\1.png', BY_SUFFIX), 'C:\\images\\2.png': ('data\\images\\2.png', BY_SUFFIX),
    }),
    'case': (('train/A.PNG', 'train/b.png', 'train/B.png', 'train/c.png', 'train/C.png'), {
        'a.png': ('train/A.PNG', CASE),
        'b.png': ('train/b.png', None),
        'B.png': ('train/B.png', None),
        'c.PNG': (None, AMBIGUOUS),
    }),
    'what only looks like an escape or an address': (('train/a?d=b.png', 'train/x#1.png', 'train/c:d.png'), {
        'a?d=b.png': ('train/a?d=b.png', None),
        'x#1.png': ('train/x#1.png', None),
        'c:d.png': ('train/c:d.png', None),
    }),
    'dots': (('train/a/1.png',), {'./a/./1.png': ('train/a/1.png', None), 'b/../a//1.png': ('train/a/1.png', None)}),
    'masks of the same names': (('images/seq/1.png', 'masks/seq/1.png'), {
        '/me/seq/1.png': ('images/seq/1.png', BY_SUFFIX),
    }),
    'hidden folders': (('images/1.png', '.thumbs/images/1.png'), {'/me/images/1.png': ('images/1.png', BY_SUFFIX)}),
    'longer than any path': (('images/1.png', 'images/2.png'), {
        '/me/images/1.png': ('images/1.png', BY_SUFFIX), '/' + 'a/' * 100000 + 'images/2.png': (None, MISSING),
    }),
    'no names at all': (('train/1.png',), {'1.png': ('train/1.png', None), '.': (None, MISSING), '/': (None, OUTSIDE)}),
}  # fmt: skip


@pytest.mark.parametrize('kind', CASES)
def test_names_are_located(kind, tmp_path):
    files, expected = CASES[kind]
    touch(tmp_path, *files)
    if not any(path or problem == AMBIGUOUS for path, problem in expected.values()):
        with pytest.raises(UsageError, match=r'none of its images \(such as .*give --train-images and --val-images'):
            locate(tmp_path, list(expected), split='train')
        return
    assert locate(tmp_path, list(expected), split='train') == expected
    backwards = list(expected)[::-1]
    assert locate(tmp_path, backwards, split='train') == {name: expected[name] for name in backwards}


def test_folder_of_the_split_takes_precedence(tmp_path):
    touch(tmp_path, 'train/images/1.png', 'val/images/1.png', 'other/images/1.png', 'other/images/2.png')
    names = ['/me/images/1.png', '/me/images/2.png']
    assert locate(tmp_path, names, split='train')[names[0]] == ('train/images/1.png', BY_SUFFIX)
    result = locate(tmp_path, names, 'annotations/val.json', split='val')
    assert result == {names[0]: ('val/images/1.png', BY_SUFFIX), names[1]: ('other/images/2.png', BY_SUFFIX)}


def test_given_image_folder_is_the_only_one(tmp_path):
    touch(tmp_path, 'train/1.png', 'val/1.png', 'val/2.png', 'train/3.png')
    names = ['/me/images/1.png', '/me/2.png', '/me/3.png']
    result = locate(tmp_path, names, image_dir=str(tmp_path / 'val'), split='train')
    assert [path for path, _ in result.values()] == ['val/1.png', 'val/2.png', None]


def test_absolute_paths_of_this_machine_are_located(tmp_path):
    touch(tmp_path, 'train/1.png', 'val/1.png')
    name = str(tmp_path / 'val/1.png')
    assert locate(tmp_path, [name], split='train') == {name: ('val/1.png', None)}


def test_images_next_to_the_annotation_folder_are_located(tmp_path):
    """Next to the folder of a JSON file that is given without --data."""
    touch(tmp_path, 'images/a/1.png')
    name = '/me/a/1.png'
    images = ImageResolver(tmp_path / 'annotations/x.json', tmp_path / 'annotations', [name])
    assert images.locations[name].path == str(tmp_path / 'images/a/1.png') and images.searched_folders[-1] == tmp_path


def write_coco(root, names):
    for split, names_of_split in names.items():
        ids = dict(enumerate(names_of_split, 1))
        annotations = [dict(id=i, image_id=i, category_id=1, bbox=[5, 5, 20, 20], area=400, iscrowd=0) for i in ids]
        image_dicts = [dict(id=i, file_name=name, width=40, height=40) for i, name in ids.items()]
        content = dict(images=image_dicts, annotations=annotations, categories=[dict(id=1, name='cat')])
        write_json(content, root / f'annotations/instances_{split}.json')


def write_images(root, *names):
    for n, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), n, np.uint8)).save(root / name)


def test_respelled_names_are_fixed_and_ambiguous_names_are_errors(tmp_path):
    write_images(tmp_path, *SEQUENCES, 'images/\u00e9.png')
    write_coco(tmp_path, dict(train=['/x/images/seq1/1.png', '/x/images/e\u0301.png'], val=['C:\\y\\seq2\\2.png']))
    data, problems = check_dataset(tmp_path)
    paths = [image['file_name'] for split in ('train', 'val') for image in data.splits[split]['images']]
    assert paths == ['images/seq1/1.png', 'images/\u00e9.png', 'images/seq2/2.png']
    assert not data.report.problems and problems[BY_SUFFIX].action == 'fixed'
    assert problems[BY_SUFFIX].examples == ['C:\\y\\seq2\\2.png is images/seq2/2.png']
    write_coco(tmp_path, dict(train=['/x/1.png'], val=['/y/seq2/2.png']))
    data, problems = check_dataset(tmp_path)
    assert problems[AMBIGUOUS].examples == ['/x/1.png may be images/seq1/1.png or images/seq2/1.png']
    with pytest.raises(UsageError, match='ambiguous-name, 1 .*write names with their folders'):
        data.report.raise_if_errors()


def test_moved_image_invalidates_the_cache(tmp_path):
    """If images are matched by suffix, the fingerprint covers all files of the data set."""
    write_images(tmp_path, *SEQUENCES)
    write_coco(tmp_path, dict(train=['/x/images/seq1/1.png'], val=['/y/seq2/2.png']))
    assert str(tmp_path) in check_dataset(tmp_path)[0].watched_paths
    images = ImageResolver(
        tmp_path / 'x.json', tmp_path, ['1.png', '/x/images/seq2/2.png'], image_dir=str(tmp_path / 'images')
    )
    assert images.searched_folders == [tmp_path / 'images'] * 2
    touch(tmp_path, 'train/9.png')
    images = ImageResolver(tmp_path / 'train.json', tmp_path, ['9.png', '/x/images/seq2/2.png'])
    assert images.locations['9.png'].code is None and images.searched_folders == [tmp_path / 'train', tmp_path]


def test_suffix_lookup_is_fast(tmp_path):
    """100,000 names of another machine, most of which share their last part."""
    names = [f'images/{n % 50}/{n // 50 % 200}/image{n // 10000}.png' for n in range(100000)]
    index = FileIndex(names)
    assert index.find_by_suffix('nowhere/image3.png')[0] == 1 and len(index.find_by_suffix('image3.png')[1]) <= 50
    # A search among all of them would take hours.
    assert run_limited(lambda: all(index.find_by_suffix(f'home/me/{name}') == (4, [name]) for name in names[::10]))


def test_folders_are_walked_once(tmp_path, monkeypatch):
    touch(tmp_path, *SEQUENCES)
    calls = []
    monkeypatch.setattr(
        'convnext_dense.datasets.image_resolver.files_below',
        lambda *a, **k: calls.append(a) or {str(n) for n in range(9)},
    )
    locate(tmp_path, [f'/me/{n}' for n in range(5)])
    assert len(calls) == 1


@pytest.mark.parametrize('name, path', [
    ('a/b.png', ('a/b.png', '')), ('a\\b.png', ('a/b.png', '')), ('/a/b.png', ('a/b.png', '/')),
    ('C:\\a\\b.png', ('a/b.png', 'c:/')), ('http://h/a/b.png?c=d', ('a/b.png', 'http://h/')), ('http://H', ('', 'http://h')),
    ('../a', ('../a', '')), ('/../../a', ('a', '/')), ('C:\\..\\a', ('a', 'c:/')), ('a/../../b', ('../b', '')),
    ('/data/local-files/?d=a/b.png', ('a/b.png', '')), ('', ('.', '')), ('/', ('', '/')),
])  # fmt: skip
def test_machine_prefix_is_split(name, path):
    assert split_machine_prefix(name) == path


def test_names_are_matched_one_to_one():
    result, ambiguous = match_names(
        ['a', 'B', 'c', 'C', 'd', 'e%20f', 'g'], ['a', 'A', 'b', 'c', 'D', 'd', 'e f', 'G', 'g ']
    )
    assert result == {'a': 'a', 'B': 'b', 'c': 'c', 'd': 'd', 'e%20f': 'e f', 'g': 'G'} and not ambiguous
    assert match_names(['e\u0301'], ['\u00c9', '\u00e9']).ambiguous == {'e\u0301': ['\u00c9', '\u00e9']}
    assert set(match_names(['Ab', 'aB'], ['ab']).ambiguous) == {'Ab', 'aB'}


def test_masks_are_paired_with_respelled_names(tmp_path):
    touch(tmp_path, 'i/caf\u00e9.jpg', 'i/A.jpg', 'i/a.jpg', 'i/b c.jpg', 'i/x.y.z.jpg', 'i/none.jpg')
    touch(tmp_path, 'l/cafe\u0301_mask.png', 'l/A_mask.png', 'l/a_mask.png', 'l/b%20c_MASK.png', 'l/x.y.z_mask.png')
    result = pair_files(SplitDirs(tmp_path / 'i', tmp_path / 'l'))
    pairs = {image.name: labels.name for image, labels in result.pairs}
    assert result.mask_suffix == '_mask' and pairs == {
        'caf\u00e9.jpg': 'cafe\u0301_mask.png', 'A.jpg': 'A_mask.png', 'a.jpg': 'a_mask.png',
        'b c.jpg': 'b%20c_MASK.png', 'x.y.z.jpg': 'x.y.z_mask.png',
    }  # fmt: skip
    assert result.problems == [
        ('unmatched-image', 'none.jpg'),
        (RESPELLED, 'b c_mask is b%20c_MASK'),
        (RESPELLED, 'caf\u00e9_mask is cafe\u0301_mask'),
    ]


LINES = {  # of a list of images -> the image that is meant
    '2007_01': '2007_01', '2007_02 1': '2007_02', 'JPEGImages/2007_03.jpg SegmentationClass/2007_03.png': '2007_03',
    '/home/me/VOC2012/JPEGImages/2007_04.jpg': '2007_04', 'C:\\VOC\\JPEGImages\\a\\5.jpg': 'a/5', 'a.b.c': 'a.b.c',
    'with space': 'with space', 'cafe\u0301': 'caf\u00e9', 'of%20web.png': 'of web', '.\\7': '7', 'UPPER': 'upper',
}  # fmt: skip


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_image_lists_are_parsed(end, encoding, tmp_path):
    for stem in LINES.values():
        touch(tmp_path, f'JPEGImages/{stem}.jpg', f'SegmentationClass/{stem}.png')
    text = end.join([*LINES, '', 'gone', '../../secret', '/dev/zero', ''])
    touch(tmp_path, 'ImageSets/Segmentation/train.txt')
    (tmp_path / 'ImageSets/Segmentation/train.txt').write_bytes(text.encode(encoding))
    layout, folders = find_folders(tmp_path)
    result = pair_files(folders['train'])
    stems = {image.relative_to(tmp_path / 'JPEGImages').with_suffix('').as_posix() for image, _ in result.pairs}
    assert layout == 'VOC' and stems == set(LINES.values())
    unmatched = sorted(name for code, name in result.problems if code == 'unmatched-image')
    assert unmatched == ['gone.jpg', 'secret.jpg', 'zero.jpg']
    assert {code for code, _ in result.problems} == {'unmatched-image', RESPELLED}


def test_latin1_list_names_latin1_files(tmp_path):
    touch(tmp_path, 'JPEGImages/x.jpg', 'SegmentationClass/x.png', 'ImageSets/Segmentation/train.txt')
    for folder, suffix in (('JPEGImages', 'jpg'), ('SegmentationClass', 'png')):
        Path(f'{tmp_path}/{folder}/caf\udce9.{suffix}').write_bytes(b'')
    (tmp_path / 'ImageSets/Segmentation/train.txt').write_bytes(b'caf\xe9\r\n')
    result = pair_files(find_folders(tmp_path)[1]['train'])
    assert [image.name for image, _ in result.pairs] == ['caf\udce9.jpg']


# Where Python is told that names are ASCII: what is beyond it comes as bytes.
ASCII = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
LATIN, JAPANESE = os.fsdecode(b'caf\xe9.png'), '\u65e5\u672c.png'


@pytest.fixture
def non_ascii_dataset(toy_dataset, tmp_path):
    """Names beyond ASCII: one is Latin-1 on the disk and UTF-8 in the JSON file, one has a terminal escape sequence."""
    names = {'000001.png': LATIN, '000002.png': JAPANESE, '000003.png': '\x1b[31mred.png'}
    shutil.copytree(toy_dataset, tmp_path / 'my_data')
    for old, new in names.items():
        for folder in ('train', 'labels/train'):
            os.rename(tmp_path / 'my_data' / folder / old, tmp_path / 'my_data' / folder / new)
    content = load_coco(toy_dataset, 'train')
    for i in content['images']:
        i['file_name'] = names.get(i['file_name'], i['file_name']).replace(LATIN, 'caf\u00e9.png')
    write_json(content, tmp_path / 'my_data/annotations/instances_train.json')
    return tmp_path / 'my_data'


def test_latin1_file_names_match_utf8_json(non_ascii_dataset):
    data, problems = check_dataset(non_ascii_dataset)
    assert {f: problems[f].examples for f in problems} == {RESPELLED: ['caf\u00e9.png is train/caf\\udce9.png']}
    names = [image['file_name'] for image in data.splits['train']['images']]
    assert names[:3] == [f'train/{LATIN}', f'train/{JAPANESE}', 'train/\x1b[31mred.png']
    assert all((non_ascii_dataset / name).is_file() for name in names)


@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_all_names_are_located_in_an_ascii_locale(task, non_ascii_dataset, run_tool):
    process = run_tool('check_data.py', '--task', task, '--data', 'my_data', **ASCII)
    assert process.returncode == 0 and '\x1b' not in process.stdout + process.stderr
    assert 'train: 5 images' in process.stdout and ('name-spelling-mismatch, 2' in process.stdout) is (
        task == 'detection'
    )


def test_training_in_an_ascii_locale(non_ascii_dataset, run_tool):
    options = ['--work-dir', 'run', '--epochs', 1, '--data', 'my_data', '--cfg-options', *quick_options('ascii')]
    process = run_tool('train.py', DETECTOR, *options, **ASCII)
    assert process.returncode == 0, process.stderr
    cached = json.loads((non_ascii_dataset.parent / 'run/data/train.json').read_text())
    assert len(cached['images']) == 5 and '\x1b' not in process.stdout + process.stderr


def test_validation_split_is_the_same_in_any_locale():
    names = [f'\u00e9{i}.png' for i in range(300)]
    as_ascii = {name.encode().decode('ascii', 'surrogateescape'): name for name in names}
    val_names, _ = split_by_hash(names, DatasetRequest('x'))
    assert {as_ascii[name] for name in split_by_hash(list(as_ascii), DatasetRequest('x'))[0]} == val_names and 10 < len(
        val_names
    ) < 60


@pytest.mark.parametrize('name, normalized', [
    (LATIN, 'caf\u00e9.png'), (os.fsdecode(b'CAF\xc9.png'), 'caf\u00e9.png'), ('\udcc3\udca9', '\u00e9'),
    ('\u65e5/\udce9', '\u65e5/\u00e9'), ('%E9', '\u00e9'), ('\ud800', '\ud800'), ('\udce9\ud800', '\u00e9\ud800'),
])  # fmt: skip
def test_undecoded_bytes_are_normalized(name, normalized):
    assert normalize_spelling(name) == normalize_spelling(normalized)


def test_respelled_masks_are_reported(toy_dataset, tmp_path):
    write_masks(toy_dataset, 'train', tmp_path / 'images/train', name='{} \u00e9')
    write_masks(toy_dataset, 'train', tmp_path / 'labels/train', name='{}%20e\u0301')
    (tmp_path / 'classes.txt').write_text('a\nb\nc\nd\ne')
    data = read_data(DatasetRequest(str(tmp_path)), 'segmentation', ('train', 'val'))
    problems = {f.code: f for f in data.report.diagnostics.values()}
    assert (
        sum(len(names_of_split) for names_of_split in data.splits.values()) == 5
        and problems[RESPELLED].action == 'fixed'
    )
    assert problems[RESPELLED].examples[0] == '000001 \u00e9 is 000001%20e\u0301'
    assert json.dumps(data.splits)
