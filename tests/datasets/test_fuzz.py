"""Randomly damaged COCO files, images, segmentation masks and lists: each is reported or a one-line error, within
limits of time and memory, and the rest of the data is valid.

`pytest -m slow tests/datasets/test_fuzz.py` reads over 100,000 of them in a quarter of an hour.
"""

import json
import math
import os
import re
import resource
import struct
import zlib
from collections import Counter
from pathlib import Path

import mmcv
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from convnext_dense.datasets.check_images import MAX_PIXELS, inspect_image, inspect_mask
from convnext_dense.datasets.class_names import read_classes
from convnext_dense.datasets.custom import DatasetRequest, read_data
from convnext_dense.datasets.diagnostics import RULES
from convnext_dense.errors import UsageError
from helpers.files import run_limited

SECONDS, GIGABYTES = 300, 3  # of a batch
SIZES = ((40, 36), (48, 40), (36, 48), (40, 40))
DEEP = 'a value that is nested deeply'  # which json would not write
INVALID_VALUES = [
    None, True, False, 0, 1, -1, 2, 0.0, 1.0, 1.5, -0.5, 5e-324, 1e308, float('nan'), float('inf'), float('-inf'),
    10**30, 10**400, -(10**400), 2**31, 2**53 + 1, 2**64, '', ' ', '0', '1', '1.0', '007', 'false', 'true', 'nan',
    'a\0b', '\ud800', '\udce9', 'caf\u00e9', 'a\nb', 'x' * 3000, '..', '../..', '../train/0.png', '/', '/dev/zero',
    '/proc/self/mem', 'C:\\train\\0.png', 'http://host/train/1.png', '/me/train/1.png', '%2e%2e/x', '0.PNG', '0.png',
    '1.png', 'val/0.png', [], [[]], [None], [1, 2, 3, 4], [1, 2, 3], [1.5] * 6, [[1, 1, 9, 1, 9, 9]], [[1, 1, 9, 1, 9]],
    [[float('nan')] * 6], [10**400] * 4, ['a'], [{}], {}, {'a': 1}, {'size': [36, 40], 'counts': [1440]},
    {'size': 5, 'counts': [1]}, {'size': [36, 40], 'counts': 'o' * 50},
    {'size': [36, 40], 'counts': [10**400]}, {'size': [], 'counts': ''},
    {'size': [36, 40], 'counts': '\u20ac'}, {'counts': None}, {'id': 1, 'name': 'cat'}, DEEP,
]  # fmt: skip


def base(root):
    """Write a small data set with all kinds of annotations; return the content of its JSON files."""
    contents = {}
    for split in ('train', 'val'):
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for i, (width, height) in enumerate(SIZES):
            Image.fromarray(np.full((height, width, 3), 9 * i + 100 * (split == 'val'), np.uint8)).save(
                root / split / f'{i}.png'
            )
            images.append(dict(id=i, file_name=f'{i}.png', width=width, height=height))
            mask = np.zeros((height, width), np.uint8, order='F')
            mask[4:20, 6:30] = 1
            packed = coco_mask.encode(mask)['counts'].decode()
            outcomes = np.flatnonzero(np.diff(np.r_[0, mask.ravel('F'), 2]))
            for segmentation in (
                [[6, 4, 30, 4, 30, 20, 6, 20]],
                dict(size=[height, width], counts=packed),
                dict(size=[height, width], counts=np.diff(np.r_[0, outcomes]).tolist()),
            ):
                number = len(annotations)
                annotation = dict(id=number, image_id=i, category_id=1 + number % 3, bbox=[6, 4, 24, 16], area=384)
                annotations.append({**annotation, 'iscrowd': int(number % 7 == 6), 'segmentation': segmentation})
        categories = [dict(id=n + 1, name=name, supercategory='animal') for n, name in enumerate(('cat', 'dog', 'cow'))]
        contents[f'{split}.json'] = dict(images=images, annotations=annotations, categories=categories)
    return contents


def iter_paths(value, prefix=()):
    """Iterate over the key paths of nested dicts and lists."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*prefix, key)
        yield from iter_paths(item, (*prefix, key))


def holder_of(content, place):
    for key in place[:-1]:
        content = content[key]
    return content


def damaged_content(content, rng):
    """Return a COCO dict with some values replaced, dropped, repeated, wrapped or exchanged."""
    content = json.loads(json.dumps(content))
    paths = list(iter_paths(content))
    for _ in range(rng.randint(1, 5)):
        place, other_place = (paths[rng.randint(len(paths))] for _ in range(2))
        try:
            holder, key, value = holder_of(content, place), place[-1], holder_of(content, place)[place[-1]]
            action = rng.randint(12)
            if action < 7:
                holder[key] = INVALID_VALUES[rng.randint(len(INVALID_VALUES))]
            elif action == 7:
                del holder[key]
            elif action == 8:
                holder[key] = [value] if rng.randint(2) else {'value': value}
            elif action == 9 and isinstance(holder, list):
                holder.append(json.loads(json.dumps(value)))
            elif action == 10:
                holder[key] = json.loads(json.dumps(holder_of(content, other_place)[other_place[-1]]))
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                holder[key] = (str(value), float(value), value + 1, -value, value * 1000)[rng.randint(5)]
        except (LookupError, TypeError, ValueError, OverflowError):  # what was there is no more, or holds itself
            continue
    return content


def text_of(content, rng):
    """Return the bytes of a COCO file, some of them damaged."""
    depth = (10, 500, 900, 990, 5000, 10**6)[rng.randint(6)]
    nested = ('[' * depth + ']' * depth, '{"a":' * depth + '1' + '}' * depth)[rng.randint(2)]
    data = json.dumps(content).replace(f'"{DEEP}"', nested).encode()
    return damaged_bytes(data, rng) if rng.randint(8) == 0 else data


def damaged_bytes(data, rng, head=0):
    """Return data with some bytes flipped, cut, filled, repeated or exchanged, mostly in the first `head` bytes."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        if not data:
            break
        end = min(len(data), head) if head and rng.randint(3) else len(data)
        prefix, n = rng.randint(end), rng.randint(1, 40)
        action = rng.randint(8)
        if action < 3:
            data[prefix] ^= 1 << rng.randint(8)
        elif action == 3:
            data[prefix : prefix + 1] = bytes([rng.randint(256)])
        elif action == 4:
            data[prefix : prefix + n] = (b'\0', b'\xff')[rng.randint(2)] * n
        elif action == 5:
            data[prefix:prefix] = data[prefix : prefix + n]
        elif action == 6:
            del data[prefix : prefix + n]
        elif rng.randint(4) == 0:
            del data[prefix:]
    return bytes(data)


def assert_sound(data, root):
    """Assert that numbers are finite, ids exist, and boxes and masks are within their images."""
    known = {f.code for f in data.report.diagnostics.values()}
    assert known <= set(RULES) and all(line.isprintable() for line in data.report.lines())
    for content in data.splits.values():
        assert json.loads(json.dumps(content, allow_nan=False)) == content
        images = {image['id']: image for image in content['images']}
        assert len(images) == len(content['images']) == len({image['file_name'] for image in content['images']})
        for number, image in images.items():
            path = os.path.join(root, image['file_name'])
            assert type(number) is int and abs(number) <= 2**53
            assert os.path.isfile(path) and os.path.realpath(path).startswith(f'{os.path.realpath(root)}{os.sep}')
            with Image.open(path) as opened:
                assert opened.size == (image['width'], image['height'])
        names = [category['name'] for category in content['categories']]
        assert [category['id'] for category in content['categories']] == list(range(1, 1 + len(names)))
        assert len(set(names)) == len(names) and all(name.strip() for name in names) and names == data.classes
        assert [a['id'] for a in content['annotations']] == list(range(1, 1 + len(content['annotations'])))
        for annotation in content['annotations']:
            assert_sound_annotation(annotation, images[annotation['image_id']], len(names), data.has_masks)


def assert_sound_annotation(annotation, image, num_classes, with_mask):
    width, height = image['width'], image['height']
    assert type(annotation['category_id']) is int and 1 <= annotation['category_id'] <= num_classes
    assert type(annotation['iscrowd']) is int and annotation['iscrowd'] in (0, 1)
    x, y, w, h = annotation['bbox']
    for value in (x, y, w, h, annotation['area']):
        assert type(value) in (int, float) and math.isfinite(value)
    assert w > 0 and h > 0 and annotation['area'] > 0 and max(map(abs, (x, y, w, h))) <= 10 * max(width, height)
    assert x < width and y < height and x + w > 0 and y + h > 0
    assert ('segmentation' in annotation) is with_mask
    if with_mask:
        mask = annotation['segmentation']
        if isinstance(mask, list):
            assert mask and all(len(p) >= 6 and len(p) % 2 == 0 for p in mask)
            assert all(type(v) in (int, float) and math.isfinite(v) for p in mask for v in p)
        if isinstance(mask, list) or isinstance(mask['counts'], list):
            mask = coco_mask.frPyObjects(mask, height, width)
        decoded = coco_mask.decode(mask)
        assert decoded.shape[:2] == (height, width)


def outcome_of(read, *args):
    """Return the result of reading, or the beginning of the one-line error."""
    try:
        return read(*args)
    except UsageError as error:
        assert '\n' not in str(error) and len(str(error)) < 5000
        return re.sub(r"[0-9]+|'[^']*'|\([^)]*\)|/\S+", '', str(error))[:40]


def coco_files(root, seed, n):
    """Damage and read `n` COCO files; return the number of each outcome and the peak memory."""
    rng, outcomes, root = np.random.RandomState(seed), Counter(), root / f'coco{seed}'
    contents = base(root)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a line for each
    for _ in range(n):
        for name, content in contents.items():
            damaged = damaged_content(content, rng) if name == 'train.json' or rng.randint(4) == 0 else content
            (root / name).write_bytes(text_of(damaged, rng) if damaged is not content else json.dumps(content).encode())
        data = outcome_of(read_data, DatasetRequest(str(root)), 'detection', ('train', 'val'))
        if isinstance(data, str):
            outcomes[data] += 1
        else:
            assert_sound(data, root)
            outcomes[
                'refused' if data.report.by_action('error') else 'left out' if data.report.problems else 'read'
            ] += 1
    return outcomes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def encoded_images(rng):
    """Return encoded images and masks of all formats and modes."""
    labels = np.repeat(rng.randint(0, 5, (6, 8)), 6, 0).repeat(6, 1).astype(np.uint8)
    colors = rng.randint(0, 256, (36, 48, 3)).astype(np.uint8)
    palette = Image.fromarray(labels)
    palette.putpalette([n % 256 for n in range(768)])
    exif = Image.Exif()
    exif[274] = 6
    variants = [
        (Image.fromarray(labels), 'PNG', {}), (Image.fromarray(labels), 'TIFF', dict(compression='tiff_lzw')),
        (Image.fromarray(labels), 'BMP', {}), (Image.fromarray(labels), 'GIF', {}), (palette, 'PNG', {}),
        (Image.fromarray(labels.astype(np.uint16)), 'PNG', {}), (Image.fromarray(labels > 2), 'PNG', {}),
        (Image.fromarray(labels.astype(np.int32)), 'TIFF', {}), (Image.fromarray(labels), 'PPM', {}),
        *((Image.fromarray(colors), name, {}) for name in ('PNG', 'JPEG', 'TIFF', 'BMP', 'WEBP', 'JPEG2000', 'PPM')),
        (Image.fromarray(colors), 'PCX', {}), (Image.fromarray(colors), 'WEBP', dict(lossless=True)),
        (Image.fromarray(colors), 'JPEG', dict(exif=exif)), (Image.fromarray(colors), 'PNG', dict(exif=exif)),
        (Image.fromarray(colors), 'JPEG', dict(progressive=True)),
        (Image.fromarray(colors), 'TIFF', dict(compression='jpeg')), (Image.fromarray(colors[..., 0]), 'JPEG', {}),
    ]  # fmt: skip
    return [encode(*args) for args in variants]


def encode(image, name, options):
    path = Path(f'fuzz{os.getpid()}.image')
    image.save(path, format=name, **options)
    data = path.read_bytes()
    path.unlink()
    return data


def other_size(data, rng):
    """Return a PNG with another size in its header, with a valid checksum."""
    sides = (0, 1, 7, 48, 4096, 2**15, 2**16, 2**31 - 1, 2**32 - 1)
    size = struct.pack('>II', *(sides[rng.randint(len(sides))] for _ in range(2)))
    header = data[12:16] + size + data[24:29]
    return data[:12] + header + struct.pack('>I', zlib.crc32(header)) + data[33:]


def image_files(root, seed, n):
    """Damage and read `n` images and masks."""
    os.chdir(root)
    rng, outcomes, path = np.random.RandomState(seed), Counter(), root / f'{seed}.png'
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings of libraries
    originals = encoded_images(rng)
    for _ in range(n):
        data = originals[rng.randint(len(originals))]
        if data.startswith(b'\x89PNG') and rng.randint(20) == 0:
            data = other_size(data, rng)
        path.write_bytes(damaged_bytes(data, rng, head=100))
        info, labels = inspect_image(str(path)), inspect_mask(str(path))
        for result in (info, labels):
            assert result.problem in RULES if result.problem else 0 < result.width * result.height <= MAX_PIXELS
            outcomes[result.problem or 'read'] += 1
        if not info.problem:
            assert mmcv.imread(str(path)).shape[:2] == (info.height, info.width)
        if not labels.problem:
            with Image.open(path) as image:
                values = np.array(image).squeeze()
            assert values.shape == (labels.height, labels.width)
            assert np.array_equal(np.bincount(values.astype(np.uint8).ravel(), minlength=256), labels.counts)
    return outcomes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


LISTS = {
    'a.txt': 'background\ncat: 1,2,3\ndog 4 5 6\n', 'b.txt': '0: a\n1: b\n2: c\n',
    'c.csv': 'Value, Class\n0, a\n1, b\n',
    'd.json': '["a", "b"]', 'e.json': '{"a": [1, 2, 3], "b": "#010203"}', 'f.json': '{"0": "a", "1": "b"}',
    'g.json': '[{"id": 0, "name": "a", "color": [1, 2, 3]}, {"id": 1, "name": "b"}]', 'h.json': '{"classes": {"a": 0}}',
}  # fmt: skip


def segmentation_folders(root, seed, n):
    """Damage and read `n` folders of images, masks, a list of images and one of classes."""
    rng, outcomes, root = np.random.RandomState(seed), Counter(), root / f'masks{seed}'
    folders = [root / name for name in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation')]
    for folder in folders:
        folder.mkdir(parents=True)
    os.chdir(root)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    labels = [np.repeat(rng.randint(0, 3, (6, 8)), 6, 0).repeat(6, 1).astype(np.uint8) for _ in range(4)]
    maps = [encode(Image.fromarray(part), 'PNG', {}) for part in labels]
    images = [encode(Image.fromarray(rng.randint(0, 256, (36, 48, 3)).astype(np.uint8)), 'JPEG', {}) for _ in range(4)]
    names = '\n'.join(map(str, range(4))).encode()
    for _ in range(n):
        damaged = rng.randint(4, size=4)
        for i in range(4):
            for folder, suffix, originals, which in zip(folders, ('jpg', 'png'), (images, maps), damaged):
                data = damaged_bytes(originals[i], rng, head=60) if which == 0 and i == 1 else originals[i]
                (folder / f'{i}.{suffix}').write_bytes(data)
        (folders[2] / 'train.txt').write_bytes(damaged_bytes(names, rng) if damaged[2] == 0 else names)
        name = list(LISTS)[rng.randint(len(LISTS))] if damaged[3] == 0 else 'a.txt'
        (root / name).write_bytes(damaged_bytes(LISTS[name].encode(), rng) if damaged[3] == 0 else LISTS[name].encode())
        classes = outcome_of(read_classes, root / name)
        assert isinstance(classes, str) or (classes[0] and all(type(text) is str and text for text in classes[0]))
        request = DatasetRequest(str(root), classes=str(root / name), ignore_labels=[0] * rng.randint(2) or None)
        data = outcome_of(read_data, request, 'segmentation', ('train', 'val'))
        if isinstance(data, str):
            outcomes[data] += 1
            continue
        outcomes['refused' if data.report.by_action('error') else 'left out' if data.report.problems else 'read'] += 1
        assert all(line.isprintable() for line in data.report.lines())
        for image, labels in (pair for part in data.splits.values() for pair in part):
            with Image.open(root / labels) as opened:
                size = opened.size
            assert mmcv.imread(str(root / image)).shape[1::-1] == size
    return outcomes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


FUZZERS = {'coco': coco_files, 'images': image_files, 'segmentation': segmentation_folders}


@pytest.mark.parametrize('kind, n', [('coco', 150), ('images', 300), ('segmentation', 50)])
def test_damaged_files(kind, n, tmp_path):
    outcomes, _ = run_limited(FUZZERS[kind], tmp_path, 0, n, seconds=SECONDS, gigabytes=GIGABYTES)
    assert sum(outcomes.values()) in (n, 2 * n) and len(outcomes) > 3


@pytest.mark.slow
@pytest.mark.parametrize('kind, batches, n', [('coco', 120, 500), ('images', 50, 1000), ('segmentation', 20, 250)])
def test_many_damaged_files(kind, batches, n, tmp_path):
    """60,000 COCO files, 50,000 images that are read as masks too, and 5,000 folders of both."""
    outcomes, max_memory = Counter(), 0
    for seed in range(1, batches + 1):
        result, memory = run_limited(FUZZERS[kind], tmp_path, seed, n, seconds=SECONDS, gigabytes=GIGABYTES)
        outcomes, max_memory = outcomes + result, max(max_memory, memory)
    print(kind, sum(outcomes.values()), f'{max_memory / 2**20:.1f} GiB', dict(outcomes.most_common(12)))
    assert len(outcomes) > 5
