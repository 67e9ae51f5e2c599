"""Fields of COCO annotations are compared with one another and with their types: clear mistakes are fixed,
contradictions are dropped or errors, and valid data is unchanged."""

import json
from functools import partial

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from convnext_dense.datasets import toy_shapes
from convnext_dense.datasets.check_coco import (
    class_names,
    match_categories,
    validate_annotations,
    validate_images,
)
from convnext_dense.datasets.check_images import ImageInfo
from convnext_dense.datasets.coco_masks import decode_rle_runs
from convnext_dense.datasets.coco_values import parse_id
from convnext_dense.datasets.diagnostics import Report
from convnext_dense.datasets.image_resolver import ImageLocation
from convnext_dense.datasets.image_sizes import ResizeLimit
from convnext_dense.errors import UsageError
from helpers.datasets import DETECTOR, check_dataset, edit_coco, quick_options, run
from helpers.files import run_limited

SIZE = 100  # of the images


def image(i=1, **extra):
    return dict(id=i, file_name=f'{i}.png', width=SIZE, height=SIZE, **extra)


def square(box):
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def annotation(i=1, box=(20, 30, 40, 20), **extra):
    base = dict(id=i, image_id=1, category_id=1, bbox=list(box), area=box[2] * box[3], iscrowd=0)
    return {**base, 'segmentation': square(box), **extra}


def rle(box, compressed=True):
    """Return the mask of a box as an RLE."""
    x, y, w, h = box
    mask = np.zeros((SIZE, SIZE), np.uint8, order='F')
    mask[y : y + h, x : x + w] = 1
    if compressed:
        return dict(size=[SIZE, SIZE], counts=coco_mask.encode(mask)['counts'].decode())
    flat = mask.ravel('F')
    ends = np.flatnonzero(np.diff(np.r_[0, flat, 2]))
    return dict(size=[SIZE, SIZE], counts=np.diff(np.r_[0, ends]).tolist())


def check(annotations, images=None, categories=None, masks=True):
    """Return the valid annotations, and the examples of the problems by code."""
    images = images or [image()]
    content = dict(images=images, annotations=annotations, categories=categories or [dict(id=1, name='cat')])
    content = json.loads(json.dumps(content))
    report, infos = Report(), {i['file_name']: ImageInfo(SIZE, SIZE) for i in images}
    add = partial(report.add, 'train')
    classes = class_names(content, add)
    class_indices = match_categories(content, content, classes, add)
    usable = validate_images(content, {name: ImageLocation(name) for name in infos}, infos, True, ResizeLimit(), add)
    valid = validate_annotations(content, usable, class_indices, masks, 'train', report)
    return valid, {f.code: f.examples for f in report.diagnostics.values()}


def check_one(**extra):
    """Check one annotation among valid ones: return it (None if dropped) and the examples of the problems by code."""
    other_annotations = [annotation(i, (5 * i, 40, 20 + i, 30)) for i in range(2, 8)]
    valid, problems = check(
        [annotation(1, **extra), *other_annotations], masks=extra.get('segmentation', 1) is not None
    )
    annotation_or_none = valid[0] if len(valid) == 7 else None
    assert len(valid) - (annotation_or_none is not None) == 6
    return annotation_or_none, problems


CROWDS = [  # what is written, whether it is a crowd, None where that is unclear, and whether it is reported
    *((value, 0, False) for value in (0, 0.0, False, None)),
    *((value, 1, False) for value in (1, 1.0, True)),
    *((value, 0, True) for value in ('0', 'false', 'False', ' 0 ')),
    *((value, 1, True) for value in ('1', 'true', 'TRUE')),
    *((value, None, True) for value in (2, -1, 0.5, '', 'no', '2', float('nan'), 10**400, [], {}, [1])),
]


@pytest.mark.parametrize('key', ['iscrowd', 'ignore'])
@pytest.mark.parametrize('value, crowd, is_reported', CROWDS)
def test_iscrowd_is_parsed(key, value, crowd, is_reported):
    valid, problems = check_one(**{key: value})
    kinds = {kind for kind in problems if 'iscrowd' in kind}
    if crowd is None:
        assert valid is None and kinds == {'iscrowd-invalid'}
        assert problems['iscrowd-invalid'][0].startswith(f'id 1: {key} ')
    else:
        assert valid['iscrowd'] == crowd and valid['iscrowd'] in (0, 1)
        assert kinds == ({'iscrowd-as-text'} if is_reported else set())


IDS = [  # what is written, and as what it is compared
    *((value, 1) for value in (1, 1.0, '1', '1.0')), *((value, -3) for value in (-3, -3.0, '-3')), ('0', 0), (0.0, 0),
    (2**60, 2**60), (1e30, int(1e30)),
    *((text, text) for text in ('007', 'a', '1e3', ' 1', '\u0661', '9' * 5000, '')),
    *((value, None) for value in (1.5, None, float('nan'), float('inf'), True, False, [1], {})),
]  # fmt: skip


@pytest.mark.parametrize('value, expected', IDS)
def test_ids_are_parsed(value, expected):
    assert parse_id(value) == expected and type(parse_id(value)) is type(expected)


ID_TYPES = {'as they are': lambda i: i, 'float': float, 'text': str, 'float as text': lambda i: f'{i}.0'}


@pytest.mark.parametrize('image_type', ID_TYPES)
@pytest.mark.parametrize('category_type', ID_TYPES)
@pytest.mark.parametrize('reference_type', ID_TYPES)
def test_ids_of_different_types_match(image_type, category_type, reference_type):
    i, c, r = ID_TYPES[image_type], ID_TYPES[category_type], ID_TYPES[reference_type]
    images = [image(n) | dict(id=i(n)) for n in (3, 4)]
    categories = [dict(id=c(n), name=f'class {n}') for n in (7, 8)]
    annotations = [annotation(r(n), image_id=r(3 + n % 2), category_id=r(7 + n % 2)) for n in range(2)]
    valid, problems = check(annotations, images, categories)
    assert [(a['id'], a['image_id'], a['category_id']) for a in valid] == [(1, 3, 1), (2, 4, 2)]
    assert all(type(a[key]) is int for a in valid for key in ('id', 'image_id', 'category_id'))
    all_integers = {image_type, category_type, reference_type} == {'as they are'}
    assert ('id-not-integer' in problems) is not all_integers
    if reference_type == 'text':
        assert (
            "id 0: image_id '3'" in ' '.join(problems['id-not-integer'])
            or category_type != 'as they are'
            or (image_type != 'as they are')
        )


@pytest.mark.parametrize('ids', [('a', 'b'), ('a', 2), (1, 2**53 + 1), (-(2**60), 5), ('001', '1'), (1e300, '')])
def test_unsupported_image_ids_are_renumbered(ids):
    images = [image(i) | dict(id=number) for i, number in enumerate(ids)]
    valid, problems = check([annotation(i, image_id=number) for i, number in enumerate(ids)], images)
    assert [a['image_id'] for a in valid] == [1, 2] and problems['image-id-renumbered']


def test_integer_image_ids_are_kept(tmp_path):
    images = [image(i) for i in (139, 2**53, 0, -5)]
    valid, problems = check([annotation(i, image_id=i) for i in (139, 2**53, 0, -5)], images)
    assert [a['image_id'] for a in valid] == [139, 2**53, 0, -5] and not problems


def test_booleans_are_no_ids():
    valid, problems = check([annotation(1, image_id=True), annotation(2, category_id=True), annotation(True)])
    assert len(valid) == 1
    assert problems['orphan-annotation'] == ['id 1: image True']
    assert problems['unknown-category'] == ['id 2: category True']
    assert 'image-without-id-or-name' in check([annotation()], [image(), image(2) | dict(id=True)])[1]


def test_first_image_of_a_duplicate_id_is_used():
    valid, problems = check([annotation()], [image(), image(2) | dict(id='1')])
    assert problems['duplicate-image-id'] == ['2.png'] and valid[0]['image_id'] == 1


def corners(box):
    x, y, w, h = box
    return [x, y, x + w, y + h]


BOXES = [(20, 30, 40, 20), (5, 5, 10, 50), (50, 60, 30, 30), (0, 0, 30, 20), (40, 10, 50, 80), (70, 70, 25, 28)]


@pytest.mark.parametrize('masks', ['polygons', 'rle', 'runs'])
def test_corner_boxes_are_detected_by_masks(masks):
    base = {'polygons': square, 'rle': rle, 'runs': lambda box: rle(box, compressed=False)}[masks]
    boxes = [annotation(i, box, bbox=corners(box), segmentation=base(box)) for i, box in enumerate(BOXES)]
    problems = check(boxes)[1]
    assert problems['most-boxes-as-corners'] == ['id 0', 'id 1', 'id 2'] and 'box-as-corners' not in problems
    other_boxes = [(x, y, w - 1, h - n) for n in (1, 2) for x, y, w, h in BOXES]
    valid, problems = check(
        [*boxes, *(annotation(9 + i, box, segmentation=base(box)) for i, box in enumerate(other_boxes))]
    )
    assert 'most-boxes-as-corners' not in problems and problems['box-as-corners'] == ['id 0', 'id 1', 'id 2']
    assert [tuple(a['bbox']) for a in valid] == [(0, 0, 30, 20), *other_boxes]  # the first is the same either way


def test_corner_boxes_are_detected_by_areas():
    near = [(2, 3, 20, 10), (5, 5, 10, 20), (10, 2, 20, 25), (1, 9, 30, 11), (7, 7, 9, 30), (12, 3, 15, 5)]
    boxes = [annotation(i, box, bbox=corners(box), segmentation=None) for i, box in enumerate(near)]
    assert check(boxes, masks=False)[1]['most-boxes-as-corners'][0].startswith('id ')
    other_annotations = [annotation(9 + i, box, segmentation=None) for i, box in enumerate(BOXES)]
    assert 'most-boxes-as-corners' not in check([*boxes[:3], *other_annotations], masks=False)[1]


@pytest.mark.parametrize('area', [None, 'of its own'])
def test_corner_boxes_are_detected_by_image_borders(area):
    """Without masks and areas, or with areas that were computed from the corners."""
    boxes = []
    for i, box in enumerate(BOXES):
        x, y, right, bottom = corners(box)
        boxes.append(annotation(i, bbox=[x, y, right, bottom], area=area and right * bottom, segmentation=None))
    problems = check(boxes, masks=False)[1]
    assert problems['most-boxes-as-corners'][0].startswith('id ')
    reach_out = [b for b in boxes if b['bbox'][0] + b['bbox'][2] > SIZE or b['bbox'][1] + b['bbox'][3] > SIZE]
    inside = [b for b in boxes if b not in reach_out]
    assert len(reach_out) == 3
    assert 'most-boxes-as-corners' not in check([*inside, *reach_out[:2]], masks=False)[1]
    assert 'most-boxes-as-corners' not in check([*inside * 5, *reach_out], masks=False)[1]  # under a fifth
    assert (
        'most-boxes-as-corners'
        not in check([*boxes, annotation(9, (60, 60, 20, 20), segmentation=None)], masks=False)[1]
    )


def test_masks_outweigh_image_borders():
    """Boxes and masks that reach out of the image, whose boxes could be corners."""
    boxes = [annotation(i, (30 + i, 30, 75, 75)) for i in range(6)]
    valid, problems = check(boxes)
    assert len(valid) == 6 and set(problems) == {'box-partly-outside-image'}


def test_single_corner_box_is_detected():
    problems = check([annotation(1, bbox=corners((20, 30, 40, 20)))])[1]
    assert 'most-boxes-as-corners' in problems


def test_dataset_of_corner_boxes_is_an_error(tmp_path):
    toy_shapes.write(tmp_path / 'my_data', train=5, val=3, size=64)
    edit_coco(lambda c: [a.update(bbox=corners(a['bbox'])) for a in c['annotations']])(tmp_path / 'my_data')
    data, problems = check_dataset(tmp_path / 'my_data')
    assert problems['most-boxes-as-corners'].split == 'train'
    with pytest.raises(UsageError, match=r'most-boxes-as-corners, .* \(id 1, .*write x, y, width, height'):
        data.report.raise_if_errors()


@pytest.mark.parametrize('box, mask, kind', [
    ((5, 5, 10, 10), (60, 60, 20, 20), 'box-mask-unrelated'),
    ((20, 20, 10, 10), (25, 25, 60, 60), 'box-mask-unrelated'),
    ((20, 20, 20, 20), (30, 30, 20, 20), 'box-mask-mismatch'),
    ((20, 20, 60, 60), (30, 30, 10, 10), 'box-mask-mismatch'),  # amodal: what is hidden belongs to the object
    ((0, 0, 100, 100), (40, 40, 3, 3), 'box-mask-mismatch'),
    ((20, 20, 20, 20), (22, 18, 20, 20), None),  # rounding
    ((20, 20, 2, 2), (21, 21, 2, 2), None),
    ((20, 20, 1, 1), (21, 21, 1, 1), None),
    ((20, 20, 20, 20), (24, 24, 16, 16), None),
    ((90, 90, 10, 10), (90, 90, 40, 40), None),  # a mask that reaches out of the image
    ((90, 90, 40, 40), (90, 90, 10, 10), None),
    ((-5, -5, 30, 30), (0, 0, 25, 25), None),
])  # fmt: skip
def test_boxes_are_compared_with_masks(box, mask, kind):
    valid, problems = check_one(box=box, segmentation=square(mask))
    kinds = {k for k in problems if k.startswith('box-mask-')}
    assert kinds == ({kind} if kind else set()) and all(problems[k] == ['id 1'] for k in kinds)
    assert (valid is None) is (kind == 'box-mask-unrelated')


def test_crowds_are_not_compared_with_boxes():
    """The mask of a crowd covers many objects."""
    valid, problems = check_one(box=(5, 5, 10, 10), segmentation=rle((60, 60, 20, 20)), iscrowd=1, area=9999)
    assert valid['area'] == 9999 and set(problems) == {'crowd'}
    valid, problems = check_one(box=(5, 5, 10, 10), segmentation=rle((60, 60, 20, 20)), iscrowd=1, area=10**400)
    assert valid['area'] == 400 and set(problems) == {'crowd', 'implausible-area'}


AREAS = {  # of a box of 40 x 20 with a mask: what is written, and what is made of it
    'of the box': (800, square((20, 30, 40, 20)), 800),
    'of half of it': (400, [[20, 30, 60, 30, 20, 50]], 400),
    'over the box': (1201, square((20, 30, 40, 20)), 800),
    'far over the box': (10**9, [[20, 30, 60, 30, 20, 50]], 400),
    'up to the box and a half': (1200, square((20, 30, 40, 20)), 1200),
    'under a fifth of the mask': (150, square((20, 30, 40, 20)), 800),
    'a fifth of the mask': (160, square((20, 30, 40, 20)), 160),
    'over five times the mask': (700, [[20, 30, 60, 30, 60, 31, 21, 31, 21, 50, 20, 50]], 59),
    'of an RLE': (800, rle((20, 30, 40, 20)), 800),
    'under a fifth of an RLE': (10, rle((20, 30, 40, 20)), 800),
    'under a fifth of runs': (10, rle((20, 30, 40, 20), compressed=False), 800),
    'of the pixels of a thin mask': (40, [[20, 30.45, 60, 30.45, 60, 30.55, 20, 30.55]], 40),
    'of a mask that crosses itself': (400, [[20, 30, 60, 50, 60, 30, 20, 50]], 400),
    'none': (None, square((20, 30, 40, 20)), 800),
    'infinite': (float('inf'), square((20, 30, 40, 20)), 800),
    'of 400 digits': (10**400, square((20, 30, 40, 20)), 800),
    'below 0': (-5, [[20, 30, 60, 30, 20, 50]], 400),
}


@pytest.mark.parametrize('kind', AREAS)
def test_areas_are_compared_with_masks(kind):
    written, mask, area = AREAS[kind]
    valid, problems = check_one(area=written, segmentation=mask)
    assert valid['area'] == area and type(valid['area']) in (int, float)
    assert ('implausible-area' in problems or 'missing-area' in problems) is (written != area)
    assert problems.get('implausible-area', ['id 1: '])[0].startswith('id 1: ')


@pytest.mark.parametrize('area, expected', [(800, 800), (1201, 800), (30, 30), (10**400, 800)])
def test_areas_are_compared_with_boxes(area, expected):
    """A small area may be that of a mask."""
    valid, problems = check([annotation(area=area, segmentation=None)], masks=False)
    assert valid[0]['area'] == expected and ('implausible-area' in problems) is (area != expected)


def test_realistic_annotations_are_unchanged():
    """Objects from a pixel to the whole image, in one or two parts, with COCO's rounding of boxes, areas in pixels."""
    rng = np.random.RandomState(0)
    annotations = []
    for i in range(300):
        n, parts = rng.randint(3, 12), []
        middle, radius = rng.uniform(10, 90, 2), rng.uniform(0.7, 10) if i % 3 else rng.uniform(5, 60)
        for _ in range(1 + (i % 5 == 0)):
            angles, far = np.sort(rng.uniform(0, 2 * np.pi, n)), radius * rng.uniform(0.4, 1, n)
            points = middle + np.stack([np.cos(angles), np.sin(angles)], 1) * far[:, None]
            parts.append(points.clip(0, SIZE).round(2).ravel().tolist())
            middle = (middle + rng.uniform(-10, 10, 2)).clip(1, 99)
        x, y = (np.concatenate([np.array(p)[k::2] for p in parts]) for k in (0, 1))
        box = [float(np.round(v, 2)) for v in (x.min(), y.min(), np.ptp(x), np.ptp(y))]
        pixels = float(coco_mask.area(coco_mask.merge(coco_mask.frPyObjects(parts, SIZE, SIZE))))
        if min(box[2:]) >= 1 and pixels:
            annotations.append(annotation(i, tuple(box), area=pixels, segmentation=parts))
    assert len(annotations) > 250
    valid, problems = check(annotations)
    assert not problems and [a['area'] for a in valid] == [a['area'] for a in annotations]
    assert [a['segmentation'] for a in valid] == [a['segmentation'] for a in annotations]
    without_masks = [{k: v for k, v in a.items() if k != 'segmentation'} for a in annotations]
    assert not check(without_masks, masks=False)[1]


INVALID_VALUES = {  # what is no value of a field -> what is reported
    'box of 400 digits': (dict(bbox=[10**400, 1, 2, 3]), 'box-far-outside-image'),
    'width of 400 digits': (dict(bbox=[1, 1, 10**400, 3]), 'box-far-outside-image'),
    'polygon of 400 digits': (dict(segmentation=[[10**400] * 6]), 'polygon-far-outside-image'),
    'polygon of NaN': (dict(segmentation=[[float('nan')] * 6]), 'polygon-not-numeric'),
    'polygon of Inf': (dict(segmentation=[[float('-inf'), 1, 2, 3, 4, 5]]), 'polygon-not-numeric'),
    'polygon of true': (dict(segmentation=[[True] * 6]), 'polygon-not-numeric'),
    'polygon of text': (dict(segmentation=['abcdef']), 'polygon-not-numeric'),
    'mask of text': (dict(segmentation='abc'), 'mask-format-unknown'),
    'mask of a number': (dict(segmentation=5), 'mask-format-unknown'),
    'mask of nothing': (dict(segmentation={}), 'missing-mask'),
    'RLE of a size of one number': (dict(segmentation=dict(size=5, counts=[1])), 'rle-size-mismatch'),
    'RLE of a size of text': (dict(segmentation=dict(size='ab', counts=[1])), 'rle-size-mismatch'),
    'RLE of a size of truth': (dict(segmentation=dict(size=[True, True], counts=[1])), 'rle-size-mismatch'),
    'RLE without a size': (dict(segmentation=dict(counts=[1])), 'rle-size-mismatch'),
    'RLE of 400 digits': (dict(segmentation=dict(size=[100, 100], counts=[10**400])), 'rle-length-mismatch'),
    'RLE of floats': (dict(segmentation=dict(size=[100, 100], counts=[9999.5, 0.5])), 'rle-length-mismatch'),
    'RLE below 0': (dict(segmentation=dict(size=[100, 100], counts=[10001, -1])), 'rle-length-mismatch'),
    'RLE of lists': (dict(segmentation=dict(size=[100, 100], counts=[[10000]])), 'rle-length-mismatch'),
    'RLE of nothing': (dict(segmentation=dict(size=[100, 100])), 'rle-length-mismatch'),
    'RLE of other text': (dict(segmentation=dict(size=[100, 100], counts='\u00e9\n~')), 'rle-length-mismatch'),
    'category of a list': (dict(category_id=[1]), 'unknown-category'),
    'image of a dict': (dict(image_id={'a': 1}), 'orphan-annotation'),
}


@pytest.mark.parametrize('kind', INVALID_VALUES)
def test_invalid_values_are_reported_with_the_annotation_id(kind):
    values, expected = INVALID_VALUES[kind]
    valid, problems = check_one(**values)
    assert valid is None and problems[expected][0].startswith('id 1')


def deep(n):
    value = []
    for _ in range(n):
        value = [value]
    return value


def test_deeply_nested_values_are_reported():
    """Up to the depth that the JSON parser reads."""
    for value in (deep(900), deep(300)):
        for key in ('bbox', 'segmentation', 'area', 'iscrowd', 'id', 'image_id', 'category_id'):
            valid, problems = check_one(**{key: value})
            assert (valid is None) is (key not in ('area', 'id')) and (problems or key == 'id')
            assert all(len(example) < 600 for examples in problems.values() for example in examples)


def test_invalid_category_names_are_reported():
    for name in ('\ud800', 'a\0b', '', ' ', None, ['a'], {}, True):
        problems = check([annotation()], categories=[dict(id=1, name='cat'), dict(id=2, name=name)])[1]
        assert 'category-without-id-or-name' in problems
    assert 'category-without-id-or-name' not in check([annotation()], categories=[dict(id=1, name=7)])[1]


def test_rle_size_may_be_floats():
    mask = rle((20, 30, 40, 20))
    valid, problems = check_one(segmentation={**mask, 'size': [100.0, 100.0], 'more': 'text'})
    assert valid['segmentation'] == mask and not problems


def zigzag_polygon(height, times):
    """Return a polygon of long lines to and fro, along which pycocotools walks pixel by pixel."""
    return [[0, 0, 10 * SIZE, height] * times]


def test_polygons_with_endless_outlines_are_dropped():
    """With them pycocotools crashes or takes gigabytes."""
    endless = annotation(1, (0, 0, SIZE, 50), segmentation=zigzag_polygon(50, 100_000), area=9)
    valid, problems = run_limited(check, [endless, annotation(2)])
    assert len(valid) == 1 and problems['polygon-outline-too-long'] == ['id 1']
    long = [v for i in range(SIZE) for v in (0, i, SIZE, i + 0.5)]  # as long as one may be in all sense
    assert 'polygon-outline-too-long' not in check([annotation(1, segmentation=[long])])[1]


def test_checks_take_linear_time():
    """30,000 categories and masks of a million characters take a second."""
    categories = [dict(id=i, name=f'class {i}') for i in range(30000)]

    def end():
        with pytest.raises(ValueError):
            decode_rle_runs('o' * 1_000_000)
        assert decode_rle_runs('0' * 1_000_000) == [0] * 1_000_000
        several = [annotation(i, segmentation=dict(size=[SIZE, SIZE], counts='o' * 10**6)) for i in range(2)]
        zigzag = [annotation(i, (0, 0, SIZE, i), segmentation=zigzag_polygon(i, 2500), area=9) for i in range(50, 52)]
        return len(check(several)[0]), len(check([annotation()], categories=categories)[0]), len(check(zigzag)[0])

    assert run_limited(end, seconds=20) == (0, 1, 2)


def test_training_with_text_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_shapes.write(tmp_path / 'my_data', train=5, val=3, size=64)

    def as_text(coco):
        for i in coco['images'][::2]:
            i['id'] = f'x{i["id"]}'
        for a in coco['annotations']:
            a['image_id'] = f'x{a["image_id"]}' if a['image_id'] % 2 else a['image_id']

    for split in ('train', 'val'):
        edit_coco(as_text, f'annotations/instances_{split}.json')(tmp_path / 'my_data')
    options = ['--work-dir', 'run', '--epochs', 1, '--data', 'my_data', '--cfg-options', *quick_options('text')]
    assert run('train.py', DETECTOR, *options) == 0
