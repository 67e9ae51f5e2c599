"""Inputs of predictions: files, folders, patterns, lists, standard input."""

import io

import pytest

from convnext_dense.errors import UsageError
from convnext_dense.inference.inputs import find_inputs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    find_names = ['a.jpg', 'b.PNG', 'notes.txt', 'c.mp4', 'sub/a.jpg', 'sub/a.png', "sub/it's 图.webp", '.hidden/x.jpg']
    for name in find_names:
        (tmp_path / 'photos' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'photos' / name).write_bytes(b'x')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def find_names(*args, **kwargs):
    return [file.file_name for file in find_inputs(args, **kwargs).images]


def test_folders_are_searched_for_images(folder):
    inputs = find_inputs(['photos'])
    assert [file.file_name for file in inputs.images] == [
        'a.jpg',
        'b.PNG',
        'sub/a.jpg',
        'sub/a.png',
        "sub/it's 图.webp",
    ]
    assert [file.stem for file in inputs.images] == ['a', 'b', 'sub/a.jpg', 'sub/a.png', "sub/it's 图"]
    assert not inputs.videos and inputs.notices == ['photos: 1 videos are left out: name them one by one']


def test_files_patterns_and_videos(folder):
    assert find_names('photos/b.PNG', 'photos/a.jpg') == ['b.PNG', 'a.jpg']
    assert find_names('photos/**/*.jpg') == ['photos/a.jpg', 'sub/a.jpg']  # two of them are a.jpg
    assert [file.file_name for file in find_inputs(['photos/c.mp4']).videos] == ['c.mp4']
    assert find_names('photos/su*') == ['a.jpg', 'a.png', "it's 图.webp"]
    (folder / 'photos/[odd].jpg').write_bytes(b'x')
    assert find_names('photos/[odd].jpg') == ['[odd].jpg']


def test_lists_and_standard_input(folder):
    (folder / 'photos/list.txt').write_text("a.jpg\n\nphotos/b.PNG\r\nsub/it's 图.webp\nnone.jpg\n", encoding='utf-8')
    assert find_names('photos/list.txt') == [
        'a.jpg',
        'b.PNG',
        "it's 图.webp",
        'none.jpg',
    ]  # a missing file is reported when it is read
    assert find_names('-', stdin=io.StringIO('photos/a.jpg\nphotos/sub/a.png\n')) == ['a.jpg', 'a.png']


def test_files_and_names_are_unique(folder):
    assert find_names('photos', 'photos/a.jpg', './photos/../photos/a.jpg') == find_names('photos')
    inputs = find_inputs(['photos', 'photos/sub', 'photos/sub/a.png']).images
    for attribute in ('file_name', 'stem', 'path'):
        values = [getattr(file, attribute) for file in inputs]
        assert len(set(values)) == len(values)
    (folder / 'other').mkdir()
    (folder / 'other/a.jpg').write_bytes(b'x')
    assert find_names('photos/a.jpg', 'other/a.jpg') == ['photos/a.jpg', 'other/a.jpg']


def test_output_folder_is_excluded(folder):
    (folder / 'photos/out/pictures').mkdir(parents=True)
    (folder / 'photos/out/pictures/a.jpg').write_bytes(b'x')
    assert 'out/pictures/a.jpg' in find_names('photos')
    assert find_names('photos', exclude='photos/out') == [
        name for name in find_names('photos') if not name.startswith('out')
    ]


@pytest.mark.parametrize(
    'args, words',
    [
        (['none.jpg'], "no image or folder 'none.jpg'"),
        (['photos/*.tif'], "no file matches 'photos/"),
        (['empty'], "no images in 'empty'"),
        (['photos', 'none'], "no image or folder 'none'"),
    ],
)
def test_missing_inputs_are_refused(folder, args, words):
    (folder / 'empty').mkdir()
    with pytest.raises(UsageError) as error:
        find_inputs(args)
    assert words in str(error.value)
