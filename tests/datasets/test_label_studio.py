"""Label Studio's own JSON: rotated rectangles, ellipses, brush masks, paths of images, and which annotation counts."""

import json
import math
from itertools import groupby

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from convnext_dense.datasets.label_studio import decode_brush
from helpers.box_formats import decode, ls_result, ls_task
from helpers.datasets import check_dataset, write_json
from helpers.files import error_message

SIZE = (80, 60)
RECT = dict(x=25, y=50, width=37.5, height=25, rotation=0)  # 20, 30, 30, 15 in pixels


def region(value, kind='rectanglelabels', name='cat', **more):
    return ls_result(value | {kind: [name]}, kind, SIZE, **more)


def read(root, results, **more):
    for number, name in enumerate(('a.png', 'b.png')):
        (root / 'images').mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / 'images' / name), np.full((*SIZE[::-1], 3), number, np.uint8))
    tasks = [ls_task(f'/data/upload/1/{i}1b2c3d4-{name}', results) for i, name in enumerate(('a.png', 'b.png'))]
    for task in tasks:
        task |= more
    write_json(tasks, root / 'project.json')
    data, findings = check_dataset(root)
    return data, [a for content in data.splits.values() for a in content['annotations']], findings


def test_rectangles_are_boxes(tmp_path):
    data, annotations, findings = read(tmp_path, [region(RECT)])
    assert not data.has_masks and set(findings) == {'name-matched-by-suffix'}
    assert [(a['bbox'], a['area']) for a in annotations] == [([20, 30, 30, 15], 450)] * 2


@pytest.mark.parametrize('degrees', [30, 90, 200.5, 359])
def test_rotated_rectangles_are_polygons(degrees, tmp_path):
    _, annotations, _ = read(tmp_path, [region(RECT | dict(rotation=degrees))])
    rotation = complex(math.cos(math.radians(degrees)), math.sin(math.radians(degrees)))
    corners = [(20 + 30j) + corner * rotation for corner in (0, 30, 30 + 15j, 15j)]
    expected = np.array([[c.real, c.imag] for c in corners])
    assert np.allclose(np.reshape(annotations[0]['segmentation'], (-1, 2)), expected, atol=1e-9)
    assert math.isclose(annotations[0]['area'], 450)


def test_ellipses(tmp_path):
    value = dict(x=50, y=50, radiusX=25, radiusY=20, rotation=30)
    _, annotations, _ = read(tmp_path, [region(value, 'ellipselabels')])
    drawn = cv2.ellipse(np.zeros(SIZE[::-1], np.uint8), (40, 30), (20, 12), 30, 0, 360, 1, -1).astype(bool)
    mask = decode(annotations[0]['segmentation'], SIZE)
    assert (drawn & mask).sum() / (drawn | mask).sum() > 0.85
    assert math.isclose(annotations[0]['area'], math.pi * 20 * 12, rel_tol=0.05)


def encode_brush(pixels, sizes=(3, 4, 8, 16), runs=True):
    """Encode a mask as rle-pack does: the alpha of four channels."""
    values = np.repeat(pixels.ravel().astype(int) * 255, 4).tolist()
    bits = f'{len(values):032b}{7:05b}' + ''.join(f'{size - 1:04b}' for size in sizes)
    for value, group in groupby(values):
        length = len(list(group))
        while length:
            n = min(length, 2 ** sizes[3])
            index = next(i for i, size in enumerate(sizes) if n <= 2**size)
            bits += f'{int(runs)}{index:02b}{n - 1:0{sizes[index]}b}' + f'{value:08b}' * (1 if runs else n)
            length -= n
    bits += '0' * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


@pytest.mark.parametrize(('sizes', 'runs'), [((3, 4, 8, 16), True), ((2, 5, 9, 12), True), ((3, 4, 8, 16), False)])
def test_brush_masks_are_decoded(sizes, runs):
    pixels = np.random.RandomState(0).rand(*SIZE[::-1]) > 0.6
    pixels[:20] = True
    assert np.array_equal(decode_brush(encode_brush(pixels, sizes, runs), SIZE), pixels)


@pytest.mark.parametrize('data', [None, 'abc', [], [1, 2], [999], [-1], {'a': 1}])
def test_broken_brush_masks_are_none(data):
    valid_data = encode_brush(np.ones(SIZE[::-1], bool))
    assert decode_brush(data, SIZE) is None and decode_brush(valid_data[:-3], SIZE) is None
    assert decode_brush(valid_data, (81, 60)) is None


def test_brush_masks_are_read_pixel_by_pixel(tmp_path):
    pixels = np.random.RandomState(0).rand(*SIZE[::-1]) > 0.6
    invalid_region = region(dict(format='rle', rle=[1, 2, 3]), 'brushlabels')
    _, annotations, findings = read(
        tmp_path, [region(dict(format='rle', rle=encode_brush(pixels)), 'brushlabels'), invalid_region]
    )
    for a in annotations:
        assert np.array_equal(coco_mask.decode(a['segmentation']), pixels) and a['area'] == pixels.sum()
    assert len(annotations) == 2 and findings['mask-format-unknown'].count == 2


def test_regions_are_merged_by_id_and_split_by_label(tmp_path):
    shape = ls_result(RECT, 'rectangle', SIZE, id='x')
    label = ls_result(RECT | dict(labels=['dog']), 'labels', SIZE, id='x')
    two_labels = ls_result(RECT | dict(x=5, rectanglelabels=['cat', 'dog']), 'rectanglelabels', SIZE, id='y')
    data, annotations, _ = read(tmp_path, [shape, label, two_labels, ls_result(dict(choices=['ok']), 'choices', SIZE)])
    assert data.classes == ['cat', 'dog']
    assert [(data.classes[a['category_id'] - 1], a['bbox'][0]) for a in annotations[:3]] == [
        ('dog', 20),
        ('cat', 4),
        ('dog', 4),
    ]


def annotation(number, **more):
    return dict(id=number, result=[region(RECT | dict(x=number))], created_at=f'2024-01-0{number}T00:00:00Z') | more


@pytest.mark.parametrize(
    ('annotations', 'chosen', 'code'),
    [
        ([annotation(3), annotation(1)], 3, 'several-annotations'),
        ([annotation(1, updated_at='2024-02-01'), annotation(2)], 1, 'several-annotations'),
        ([annotation(3), annotation(1, ground_truth=True)], 1, 'several-annotations'),
        ([annotation(3, was_cancelled=True), annotation(1)], 1, None),
        ([annotation(3, skipped=True), annotation(2)], 2, None),
    ],
)
def test_selected_annotation_of_a_task(annotations, chosen, code, tmp_path):
    _, annotations_read, findings = read(tmp_path, [], annotations=annotations)
    assert [a['bbox'][0] for a in annotations_read] == [chosen * 0.8] * 2
    assert set(findings) == {'name-matched-by-suffix', *([code] if code else [])}


def test_skipped_tasks_and_tasks_without_objects(tmp_path):
    read(tmp_path, [region(RECT)])
    file = tmp_path / 'project.json'
    tasks = json.loads(file.read_text())
    for name, more in (('c', dict(annotations=[annotation(1, was_cancelled=True)])), ('d', dict(annotations=[]))):
        cv2.imwrite(str(tmp_path / f'images/{name}.png'), np.full((*SIZE[::-1], 3), ord(name), np.uint8))
        tasks.append(ls_task(f'/data/upload/1/{name}1b2c3d4-{name}.png', []) | more)
    cv2.imwrite(str(tmp_path / 'images/e.png'), np.full((*SIZE[::-1], 3), 99, np.uint8))
    tasks.append(ls_task('/data/upload/1/e1b2c3d4-e.png', []))
    write_json(tasks, file)
    data, findings = check_dataset(tmp_path, val_fraction=0.4)
    names = sorted(i['file_name'] for content in data.splits.values() for i in content['images'])
    assert names == ['images/a.png', 'images/b.png', 'images/e.png']
    assert findings['task-without-annotation'].count == 2
    assert findings['image-without-annotations'].examples == ['images/e.png']


EMPTY = {
    'tasks': dict(id=1, annotations=[], data=dict(image='/data/upload/1/a.png'), total_annotations=0),
    'the short form': dict(id=1, image='/data/upload/1/a.png', annotator=1, annotation_id=2, lead_time=3.5),
}


@pytest.mark.parametrize('kind', EMPTY)
def test_exports_without_annotations(kind, tmp_path):
    cv2.imwrite(str(tmp_path / 'a.png'), np.zeros((*SIZE[::-1], 3), np.uint8))
    write_json([EMPTY[kind]] * 2, tmp_path / 'project.json')
    line = error_message(check_dataset, tmp_path)
    assert ('task-without-annotation, 2' if kind == 'tasks' else 'image-without-annotations, 2') in line


def test_images_of_another_size_than_the_annotated_ones(tmp_path):
    result = ls_result(RECT | dict(rectanglelabels=['cat']), 'rectanglelabels', (160, 120))
    data, _, findings = read(tmp_path, [result])
    assert findings['image-size-mismatch'].examples[0].endswith('.png: 160 x 120, its image 80 x 60')
    assert 'of an image of another size; give the images' in error_message(data.report.raise_if_errors)


BAD = {
    'a point': (dict(x=1, y=2, width=0.5, keypointlabels=['cat']), {}, 'shape-without-area'),
    'no label': (RECT, {}, 'label-without-name'),
    'words': (RECT | dict(x='a', labels=['cat']), {}, 'label-not-numbers'),
    'no size': (RECT | dict(labels=['cat']), dict(original_width=None), 'label-not-numbers'),
    'of a rotated image': (RECT | dict(labels=['cat']), dict(image_rotation=90), 'region-of-rotated-image'),
    'no points': (dict(points=[[1, 2], 3], polygonlabels=['cat']), {}, 'label-not-numbers'),
}


@pytest.mark.parametrize('kind', BAD)
def test_bad_regions_are_reported(kind, tmp_path):
    value, more, code = BAD[kind]
    _, annotations, findings = read(tmp_path, [region(RECT), ls_result(value, 'x', SIZE, **more)])
    assert len(annotations) == 2 and set(findings) == {'name-matched-by-suffix', code}
