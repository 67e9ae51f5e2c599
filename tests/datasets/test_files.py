"""Untrusted files and folders: only regular files of limited size are read, symlink loops terminate, and large images
are decoded one at a time."""

import json
import os
import shutil
import socket
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from convnext_dense.datasets import check_images
from convnext_dense.datasets.cache import dataset_fingerprint, load_cached
from convnext_dense.datasets.check_images import MAX_PIXELS, inspect_image, inspect_mask
from convnext_dense.datasets.class_names import read_classes
from convnext_dense.datasets.custom import DatasetRequest, detect_tasks, read_data
from convnext_dense.datasets.files import files_below, folders_in, open_regular, read_json, read_text, to_one_line, walk
from convnext_dense.datasets.foreign_layouts import describe_unsupported
from convnext_dense.datasets.image_resolver import _candidate_folders
from convnext_dense.datasets.layouts import find_annotations, find_folders
from helpers.datasets import as_voc, load_coco, write_json
from helpers.files import error_message, png_bytes, run_limited


def listen(path):
    socket.socket(socket.AF_UNIX).bind(str(path))


IRREGULAR_FILES = {
    'a pipe': os.mkfifo,
    'a device': lambda path: path.symlink_to('/dev/zero'),
    'a folder': Path.mkdir,
    'a socket': listen,
}


@pytest.mark.parametrize('file_type', IRREGULAR_FILES)
def test_only_regular_files_are_read(file_type, tmp_path):
    path = tmp_path / 'odd'
    IRREGULAR_FILES[file_type](path)

    def problems():
        with pytest.raises(OSError) as caught:
            open_regular(path, 2**40)
        return caught.value.strerror, inspect_image(str(path)).problem, inspect_mask(str(path)).problem

    assert run_limited(problems) == (f'is {file_type}, not a regular file', 'not-a-regular-file', 'not-a-regular-file')


@pytest.mark.parametrize('name', ['gone', 'a\0b', '\ud800', 'a' * 5000])
def test_invalid_file_names_are_missing_files(name, tmp_path):
    with pytest.raises(OSError):
        open_regular(tmp_path / name, 9)
    assert inspect_image(f'{tmp_path}/{name}').problem == 'missing-image'


def test_pipe_that_replaces_a_file_does_not_block(tmp_path, monkeypatch):
    """It is replaced between os.stat and os.open."""
    os.mkfifo(tmp_path / 'odd')
    (tmp_path / 'file').touch()
    state = os.stat(tmp_path / 'file')
    monkeypatch.setattr(os, 'stat', lambda path, **_: state)

    def end():
        with pytest.raises(OSError, match='is a pipe'):
            open_regular(tmp_path / 'odd', 9)

    run_limited(end)


def detection_of(root):
    return read_data(DatasetRequest(str(root)), 'detection', ('train', 'val'))


def segmentation_of(root):
    return read_data(DatasetRequest(str(root)), 'segmentation', ('train', 'val'))


# What is read: where a file is put, and by what it is read then. All but images, which kinds of the report are.
READERS = {
    'annotations/instances_train.json': detection_of,
    'annotations/instances_val.json': detection_of,
    'classes.txt': segmentation_of,
    'given.json': lambda root: read_data(
        DatasetRequest(ann_files={'train': f'{root}/given.json'}), 'detection', ('train',)
    ),
    'names.txt': lambda root: read_classes(root / 'names.txt'),
    'names.json': lambda root: read_classes(root / 'names.json'),
    'list.txt': lambda root: read_text(root / 'list.txt'),
    'data.json': lambda root: load_cached(str(root), ('key',)),
}


@pytest.mark.parametrize('name', READERS)
@pytest.mark.parametrize('file_type', ['a pipe', 'a device'])
def test_lists_and_json_must_be_regular_files(name, file_type, toy_dataset, tmp_path):
    root = tmp_path / 'my_data'
    shutil.copytree(toy_dataset, root)
    (root / 'shapes.json').unlink()  # which would name the classes
    (root / name).unlink(missing_ok=True)
    IRREGULAR_FILES[file_type](root / name)

    def end():
        try:
            return error_message(READERS[name], root)
        except OSError as error:
            return f'{error.filename} {error.strerror}'

    line = run_limited(end)
    assert line is None if name == 'data.json' else (name in line and f'is {file_type}, not a regular file' in line)


@pytest.mark.parametrize('file_type', ['a pipe', 'a device'])
@pytest.mark.parametrize('name', ['a.json', 'train.json', 'a.xml', 'a.csv', 'labels/a.txt', 'a.jpg', 'data.zip', 'a'])
def test_pipes_and_devices_do_not_block_recognition(name, file_type, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    IRREGULAR_FILES[file_type](tmp_path / name)

    def end():
        return describe_unsupported(tmp_path), error_message(detect_tasks, DatasetRequest(str(tmp_path)))

    kind, line = run_limited(end)
    assert kind.startswith(('holds', 'looks like')) and (name == 'train.json' or str(tmp_path) in line)


@pytest.mark.parametrize('file_type', ['a pipe', 'a device'])
def test_image_list_must_be_a_regular_file(file_type, toy_dataset, tmp_path):
    as_voc(toy_dataset, tmp_path)
    path = tmp_path / 'VOC2012/ImageSets/Segmentation/train.txt'
    path.unlink()
    IRREGULAR_FILES[file_type](path)
    assert f'train.txt: is {file_type}' in run_limited(
        error_message, detect_tasks, DatasetRequest(str(tmp_path / 'VOC2012'))
    )


@pytest.mark.parametrize('file_type', ['a pipe', 'a device', 'a socket'])
def test_data_path_must_be_a_folder(file_type, tmp_path):
    IRREGULAR_FILES[file_type](tmp_path / 'odd')
    assert 'neither a folder nor a file' in run_limited(
        error_message, detect_tasks, DatasetRequest(str(tmp_path / 'odd'))
    )


@pytest.mark.parametrize('name', ['/dev/zero', '../..', '/proc/self/environ', '../../../../../../dev/zero', '/'])
def test_names_outside_the_root_are_not_opened(name, toy_dataset, tmp_path):
    root = tmp_path / 'my_data'
    shutil.copytree(toy_dataset, root)
    content = load_coco(root, 'train')
    content['images'][0]['file_name'] = name
    write_json(content, root / 'annotations/instances_train.json')
    problems = run_limited(lambda: {f.code: f.examples for f in detection_of(root).report.diagnostics.values()})
    assert problems == {'name-outside-root': [name]}


def test_symlinks_are_followed(toy_dataset, tmp_path):
    (tmp_path / 'my_data').mkdir()
    (tmp_path / 'my_data/annotations').symlink_to(toy_dataset / 'annotations')
    (tmp_path / 'my_data/val').symlink_to(toy_dataset / 'val')
    (tmp_path / 'my_data/train').mkdir()
    for path in (toy_dataset / 'train').iterdir():
        (tmp_path / 'my_data/train' / path.name).symlink_to(path)
    data = detection_of(tmp_path / 'my_data')
    assert not data.report.diagnostics and len(data.splits['train']['images']) == 5


def test_errors_name_the_size_limits(tmp_path, monkeypatch):
    path = tmp_path / 'train.json'
    path.write_text('{"images": []}')
    monkeypatch.setattr('convnext_dense.datasets.files.MAX_JSON_BYTES', 13)
    assert error_message(read_json, path) == f'{path}: has 14 bytes, but at most 13 bytes of such a file are read'
    (tmp_path / 'names.txt').touch()
    os.truncate(tmp_path / 'names.txt', 2**24 + 1)
    assert error_message(read_classes, tmp_path / 'names.txt').startswith(
        f'{tmp_path}/names.txt: has 16 MiB, but at most 16 MiB of such a file are read'
    )


@pytest.mark.parametrize('begin', ['PK\3\4', '<html>', '5', '"text"', '\0' * 5000, ' ' * 5000 + '{'])
def test_large_files_that_are_not_json_are_not_read(begin, tmp_path):
    """The first bytes decide, so that large files of other formats are not read."""
    path = tmp_path / 'train.json'
    path.write_text(begin)
    os.truncate(path, 2**33)
    assert 'is not JSON of a data set' in run_limited(error_message, read_json, path, gigabytes=1)


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32'])
def test_json_encodings_are_detected(encoding, tmp_path):
    (tmp_path / 'x.json').write_bytes('\n {"a": "\u00e9"}'.encode(encoding))
    assert read_json(tmp_path / 'x.json') == {'a': '\u00e9'}


def tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('')


def ladder(root):
    """Make folders that each link to the next one twice, which are exponentially many paths."""
    for n in range(30):
        (root / f'step{n}').mkdir()
        for name in 'ab' if n else '':
            (root / f'step{n}/{name}').symlink_to(f'../step{n - 1}')


LOOPS = {
    'itself': lambda root: [(root / f'loop{n}').symlink_to('.') for n in range(3)],
    'above': lambda root: [(root / f'train/up{n}').symlink_to('..') for n in range(3)],
    'far above': lambda root: [(root / f'train/up{n}').symlink_to('/') for n in range(3)],
    'one another': lambda root: [
        (root / f'{a}/other{n}').symlink_to(f'../{b}')
        for n in range(3)
        for a, b in (('train', 'val'), ('val', 'train'), ('annotations', 'train'))
    ],
    'a ladder': ladder,
}


@pytest.mark.parametrize('kind', LOOPS)
@pytest.mark.parametrize('task', ['detection', 'segmentation', 'neither'])
def test_symlink_loops_terminate(kind, task, toy_dataset, tmp_path):
    """In the search for data sets and for images, and in the fingerprint of the cache."""
    root = tmp_path / 'my_data'
    if task == 'neither':
        tree(root, 'train/a.doc', 'val/b.doc', 'annotations/c.doc')
    else:
        shutil.copytree(toy_dataset, root)
        (root / 'annotations' if task == 'segmentation' else root / 'labels').rename(tmp_path / 'away')
    (root / 'annotations').mkdir(exist_ok=True)
    LOOPS[kind](root)

    def end():
        print(dataset_fingerprint(('key',), [str(root)]))
        return (
            error_message(describe_unsupported, root)
            if task == 'neither'
            else len(error_message(read_of[task], root).splits['train'])
        )

    read_of = dict(detection=detection_of, segmentation=segmentation_of)
    expected = {'neither': 'holds no known data set (its files end with .doc)', 'detection': 3}
    assert run_limited(end, seconds=30) == expected.get(task, 5)


def test_walk_is_sorted_and_limits_visits(tmp_path):
    tree(
        tmp_path,
        'my_data/b/2',
        'my_data/b/1',
        'my_data/a/.hidden/3',
        'my_data/a/4',
        'my_data/0',
        'away/real/5',
        'away/6',
    )
    (tmp_path / 'my_data/c').symlink_to('../away/real')
    (tmp_path / 'my_data/d').symlink_to('../away/real')
    root = str(tmp_path / 'my_data')
    result = [(os.path.relpath(folder, root), names) for folder, names in walk(root)]
    assert result == [
        ('.', ['0']), ('a', ['4']), ('a/.hidden', ['3']), ('b', ['1', '2']), ('c', ['5']), ('d', ['5']),
    ]  # fmt: skip
    assert [os.path.relpath(folder, root) for folder, _ in walk(root, depth=1)] == ['.']
    assert 'a/.hidden/3' not in files_below(root, hidden=False)
    (tmp_path / 'away/real/up').symlink_to('..')  # above itself, though not above the link to it
    assert not any('/up/' in path for path in files_below(root))
    for n in range(100):
        (tmp_path / f'my_data/e{n}').symlink_to('../away/real')
    assert 2 <= sum(path.endswith('/5') for path in files_below(root)) < 20
    assert not list(walk(tmp_path / 'gone'))


def test_candidate_folders_are_unique(tmp_path):
    tree(tmp_path, 'a/1', 'b/.c/2', '.hidden/3')
    for n in range(300):
        (tmp_path / f'loop{n}').symlink_to('.')
        (tmp_path / f'a/up{n}').symlink_to('..')
    assert folders_in(tmp_path) == [tmp_path / 'a', tmp_path / 'b']
    assert len(_candidate_folders(tmp_path / 'train.json', tmp_path)[1]) <= 4


def test_names_that_are_not_utf8_are_read(toy_dataset, tmp_path):
    """A folder and a file in Latin-1 are read, and are part of the fingerprint."""
    root = os.fsencode(tmp_path) + b'/caf\xe9'
    shutil.copytree(os.fsencode(toy_dataset), root)
    shutil.copy(root + b'/train/000001.png', root + b'/train/caf\xe9.png')
    data = read_data(DatasetRequest(os.fsdecode(root), val_fraction=None), 'detection', ('train', 'val'))
    assert all(line.isprintable() for line in data.report.lines())
    fingerprint = dataset_fingerprint(('key',), [os.fsdecode(root)])
    os.remove(root + b'/train/caf\xe9.png')
    assert fingerprint != dataset_fingerprint(('key',), [os.fsdecode(root)])


def test_invalid_cache_is_ignored(tmp_path):
    for text in (
        '',
        '[]',
        '{}',
        '5',
        '{"fingerprint": 1}',
        '{"fingerprint": "x", "watched_paths": 5}',
        '[' * 100000,
        '{"fingerprint": {}, "watched_paths": [1]}',
    ):
        (tmp_path / 'data.json').write_text(text)
        assert load_cached(str(tmp_path), ('key',)) is None


def gray_png(path, width, height):
    """Write a valid PNG of zeros, a thousandth as large as its pixels."""
    compressor, row = zlib.compressobj(1), bytes(1 + width)
    data = b''.join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    Path(path).write_bytes(png_bytes(width, height, data))


def test_huge_images_are_rejected_by_their_header(tmp_path, monkeypatch):
    """Images at Pillow's limit are still read."""
    gray_png(tmp_path / 'huge.png', 32767, 32767)
    gray_png(tmp_path / 'large.png', 16384, MAX_PIXELS // 16384)
    gray_png(tmp_path / 'too_large.png', 16384, MAX_PIXELS // 16384 + 1)
    for function in (inspect_image, inspect_mask):
        assert run_limited(function, str(tmp_path / 'huge.png'), gigabytes=0.5).problem.endswith('-too-large')
        with monkeypatch.context() as patch:
            patch.setattr(Image, 'MAX_IMAGE_PIXELS', None)  # as some libraries do
            assert run_limited(function, str(tmp_path / 'huge.png'), gigabytes=0.5).problem.endswith('-too-large')
        result = run_limited(function, str(tmp_path / 'large.png'), gigabytes=2.5)
        assert (result.width, result.height, result.problem) == (16384, MAX_PIXELS // 16384, None)
        assert run_limited(function, str(tmp_path / 'too_large.png'), gigabytes=0.5).problem.endswith('-too-large')


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    """Images are large by pixels or bytes, or if Pillow cannot read their header."""
    concurrent, max_concurrent, lock = 0, 0, threading.Lock()
    decode = check_images.cv2.imdecode

    def count_concurrent(*args):
        nonlocal concurrent, max_concurrent
        with lock:
            concurrent += 1
            max_concurrent = max(max_concurrent, concurrent)
        threading.Event().wait(0.05)
        result = decode(*args)
        with lock:
            concurrent -= 1
        return result

    monkeypatch.setattr(check_images.cv2, 'imdecode', count_concurrent)
    monkeypatch.setattr(check_images, 'n_threads', lambda: 8)
    paths = [str(tmp_path / f'{n}.png') for n in range(8)]
    for path in paths:
        Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(path)

    def measure_concurrency():
        nonlocal max_concurrent
        max_concurrent = 0
        assert not any(info.problem for info in check_images.inspect_all(inspect_image, paths, 'images').values())
        return max_concurrent

    assert measure_concurrency() > 1
    for limit, value in (('LARGE_PIXELS', 2499), ('LARGE_BYTES', 50), ('FORMATS', ('PCX',))):
        with monkeypatch.context() as patch:
            patch.setattr(check_images, limit, value)
            assert measure_concurrency() == 1, limit


def test_pixel_limit_applies_to_images_unknown_to_pillow(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(tmp_path / 'x.png')
    monkeypatch.setattr(check_images, 'FORMATS', ('PCX',))
    for limit, problem in ((2500, None), (2499, 'image-too-large')):
        monkeypatch.setattr(check_images, 'MAX_PIXELS', limit)
        assert inspect_image(str(tmp_path / 'x.png')).problem == problem


def text_bomb(path):
    """Write a PNG of a thousand text chunks that decompress to a megabyte each."""
    info = PngImagePlugin.PngInfo()
    for n in range(1000):
        info.add_text(f'key{n}', 'x' * 2**20, zip=True)
    Image.new('L', (64, 64)).save(path, pnginfo=info)


def tiff_bomb(path, entries=60000):
    """Write a TIFF whose tags all have the whole file as their value."""
    size = 8 + 2 + 12 * entries + 4
    tags = b''.join(
        (n + 400).to_bytes(2, 'little') + b'\7\0' + size.to_bytes(4, 'little') + bytes(4) for n in range(entries)
    )
    Path(path).write_bytes(b'II*\0\10\0\0\0' + entries.to_bytes(2, 'little') + tags + bytes(4))


def exif_bomb(path, name='JPEG'):
    """Write EXIF whose tags all have the whole block as their value."""
    entries = 5400
    size = 8 + 2 + 12 * entries + 4
    tags = b''.join(
        (n + 400).to_bytes(2, 'little') + b'\7\0' + size.to_bytes(4, 'little') + bytes(4) for n in range(entries)
    )
    exif = b'Exif\0\0II*\0\10\0\0\0' + entries.to_bytes(2, 'little') + tags + bytes(4)
    Image.new('RGB', (64, 64)).save(path, format=name, exif=exif)


BOMBS = {
    'text.png': text_bomb,
    'tags.tif': tiff_bomb,
    'exif.jpg': exif_bomb,
    'exif.png': lambda path: exif_bomb(path, 'PNG'),
    'exif.webp': lambda path: exif_bomb(path, 'WEBP'),
}


@pytest.mark.parametrize('name', BOMBS)
def test_decompression_bombs_stay_within_memory(name, tmp_path):
    path = tmp_path / name
    BOMBS[name](path)
    for function in (inspect_image, inspect_mask):
        run_limited(function, str(path), gigabytes=0.5, seconds=30)


def test_formats_read_by_external_programs_are_rejected(tmp_path):
    """Pillow would start Ghostscript for EPS."""
    Image.new('L', (40, 40)).save(tmp_path / 'x.png', format='EPS')
    assert inspect_image(str(tmp_path / 'x.png')).problem == 'not-an-image'
    assert inspect_mask(str(tmp_path / 'x.png')).problem == 'unreadable-mask'


@pytest.mark.parametrize('name, options', [
    ('JPEG', {}), ('JPEG2000', {}), ('WEBP', dict(quality=80)), ('TIFF', dict(compression='jpeg')),
])  # fmt: skip
def test_lossy_masks_are_an_error(name, options, tmp_path):
    Image.fromarray(np.eye(64, dtype=np.uint8)).save(tmp_path / 'x.png', format=name, **options)
    assert inspect_mask(str(tmp_path / 'x.png')).problem == 'mask-lossy-format'


@pytest.mark.parametrize('name, options', [
    ('PNG', {}), ('TIFF', {}), ('TIFF', dict(compression='tiff_lzw')), ('BMP', {}), ('GIF', {}), ('PPM', {}),
])  # fmt: skip
def test_lossless_masks_are_read(name, options, tmp_path):
    Image.fromarray(np.eye(64, dtype=np.uint8)).save(tmp_path / 'x.png', format=name, **options)
    result = inspect_mask(str(tmp_path / 'x.png'))
    assert result.problem is None and result.counts[:3].tolist() == [64 * 63, 64, 0]
    Image.fromarray(np.eye(64, dtype=np.uint8)).save(tmp_path / 'x.webp', lossless=True)
    assert inspect_mask(str(tmp_path / 'x.webp')).problem == 'mask-in-color'  # WebP has no others


def test_examples_are_one_printable_line(toy_dataset, tmp_path):
    root = tmp_path / 'my_data'
    shutil.copytree(toy_dataset, root)
    content = load_coco(root, 'train')
    content['images'][0]['file_name'] = 'a\nb\x1b[31m' + 'x' * 100000
    write_json(content, root / 'annotations/instances_train.json')
    line = next(line for line in detection_of(root).report.lines() if 'missing-image' in line)
    deep = []
    for _ in range(10**5):
        deep = [deep]
    assert to_one_line(deep) == 'a list' and to_one_line('\udce9') == '\\udce9' and to_one_line(5) == '5'
    assert line.isprintable() and len(line) < 1000 and 'a\\nb\\x1b' in line
    assert find_annotations(root) and find_folders(root) and json.dumps(detection_of(root).report.as_data())
