"""Distributions of the training augmentations against the paper's protocol in closed form; seeded first batch."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.registry import MODELS, TRANSFORMS

from convnext_dense.datasets import toy_shapes
from helpers.paths import ROOT
from helpers.recipes import load

SIDES = range(480, 801, 32)
# Every pixel's row and column, and four classes in tiles, of which none fills a large window.
GRID = np.stack(np.mgrid[:1400, :1400], axis=-1).astype(np.int16)
LABELS = (GRID // 100 % 2 @ [2, 1]).astype(np.uint8)


@pytest.fixture(autouse=True)
def seed():
    np.random.seed(0)


def assert_fraction(count: float, n: int, p: float) -> None:
    """`count` of `n` is within 4.5 standard deviations of the binomial distribution."""
    assert abs(count - n * p) <= 4.5 * np.sqrt(n * p * (1 - p)), (count, n, p)


def assert_uniform(values, low, high) -> None:
    """Each of `values` is uniform over the integers from its `low` to its `high`: bounds, ends, Kolmogorov's test.

    Noise makes the integers continuous; then all follow one distribution whatever their bounds. 12 and 2.5 make each
    check fail by chance as rarely as 4.5 standard deviations.
    """
    values, low, high = np.broadcast_arrays(values, low, high)
    assert (low <= values).all() and (values <= high).all()
    n = len(values)
    u = np.sort((values - low + np.random.default_rng(0).random(n)) / (high - low + 1))
    assert u[0] < 12 / n and u[-1] > 1 - 12 / n
    assert np.abs(u - (np.arange(n) + 0.5) / n).max() * np.sqrt(n) < 2.5


def resized(size: tuple[int, int], short: int, long: int = 1333) -> tuple[int, int]:
    """A size rescaled to fit both sides with its aspect ratio."""
    scale = min(short / min(size), long / max(size))
    return tuple(int(side * scale + 0.5) for side in size)


def positions(results: dict) -> dict:
    """Transform that replaces the image by the coordinates of each pixel."""
    height, width = results['uncropped'] = results['img'].shape[:2]
    results['img'] = GRID[:height, :width]
    if 'gt_seg_map' in results:
        results['gt_seg_map'] = LABELS[:height, :width]
    return results


def read(name: str):
    """A step that reads what became of the pixels' places: `name` becomes size, first and last place."""

    def step(results: dict) -> dict:
        places = results['img']
        results[name] = places.shape[:2], places[0, 0].tolist(), places[-1, -1].tolist()
        results['img'] = np.zeros(places.shape[:2], np.uint8)
        return results

    return step


def shape_only(results: dict) -> dict:
    """Transform that drops the image, so that many samples fit into memory."""
    results['img'] = results['img'].shape
    return results


# Twice as wide as high: from 672 on the long side is what limits; upright: never; four times as wide: always.
@pytest.mark.parametrize('size, n', [((90, 180), 2000), ((160, 120), 2000), ((80, 320), 500)])
def test_coco_train_pipeline_follows_paper(size, n):
    height, width = size
    flip, choice = map(TRANSFORMS.build, load('cascade/convnext_t').train_pipeline[2:-1])
    _, cropped = choice.transforms
    first_resize, crop, last_resize = cropped.transforms
    cropped.transforms = [first_resize, positions, crop, read('crop'), last_resize]
    steps = Compose([positions, flip, read('flipping'), choice, shape_only])
    part = 0.1237  # of each side: its edge lies at no size between two pixels
    corner = torch.tensor([[0.0, 0.0, width * part, height * part]])
    inputs = [dict(img=np.zeros(size, np.uint8), gt_bboxes=HorizontalBoxes(corner.clone())) for _ in range(n)]
    draws = [steps(results) for results in inputs]
    assert None not in draws  # crops without an object are allowed

    flipped = [d for d in draws if d['flipping'][1] == [0, width - 1]]
    assert_fraction(len(flipped), n, 1 / 2)
    assert all(d['flip'] == (d['flipping'][1] != [0, 0]) and d['flipping'][0] == size for d in draws)

    uncropped_draws = [d for d in draws if 'crop' not in d]
    assert_fraction(len(uncropped_draws), n, 1 / 2)
    for shape in {d['img_shape'] for d in uncropped_draws} | {resized(size, side) for side in SIDES}:
        fraction = sum(resized(size, side) == shape for side in SIDES) / len(SIDES)
        assert_fraction(sum(d['img_shape'] == shape for d in uncropped_draws), len(uncropped_draws), fraction)
    for d in uncropped_draws:
        box = d['gt_bboxes'].tensor[0] / torch.tensor(d['img_shape'][::-1] * 2)
        assert torch.allclose(box, torch.tensor([1 - part, 0, 1, part] if d['flip'] else [0, 0, part, part]))

    crops = [d for d in draws if 'crop' in d]
    for shape in {d['uncropped'] for d in crops} | {resized(size, side) for side in (400, 500, 600)}:
        fraction = sum(resized(size, side) == shape for side in (400, 500, 600)) / 3
        assert_fraction(sum(d['uncropped'] == shape for d in crops), len(crops), fraction)
    for axis in range(2):
        uncropped = np.array([d['uncropped'][axis] for d in crops])
        crop_sizes = np.array([d['crop'][0][axis] for d in crops])
        start, ends = (np.array([d['crop'][i][axis] for d in crops]) for i in (1, 2))
        assert_uniform(crop_sizes, np.minimum(uncropped, 384), np.minimum(uncropped, 600))
        assert_uniform(start, 0, uncropped - crop_sizes)
        assert (ends - start == crop_sizes - 1).all()
    # The fraction of a side in what is left: each draw counts for the sides that it may come from.
    fractions = dict.fromkeys(SIDES, 0)
    for d in crops:
        possible = [side for side in SIDES if resized(d['crop'][0], side) == d['img_shape'] == d['img']]
        for side in possible:
            fractions[side] += 1 / len(possible)
    assert sum(fractions.values()) == pytest.approx(len(crops))
    for fraction in fractions.values():
        assert_fraction(fraction, len(crops), 1 / len(SIDES))
    objects = [len(d['gt_bboxes']) for d in crops]
    for d, count in zip(crops, objects):  # the object is there if and only if the crop reaches its corner
        (_, (top, left), (_, right)), (high, wide) = d['crop'], d['uncropped']
        is_visible = right + 1 > wide * (1 - part) if d['flip'] else left < wide * part
        assert count == (is_visible and top < high * part)
    assert set(objects) == {0, 1}


@pytest.mark.parametrize('name, side', [('upernet/convnext_t', 512), ('upernet/convnext_b_in22k', 640)])
def test_ade20k_train_pipeline_follows_paper(name, side):
    size, n = (60, 64), 600
    resize, crop, flip = map(TRANSFORMS.build, load(name).train_pipeline[2:5])
    steps = Compose([resize, positions, crop, flip])
    flips, uncropped, starts = [], [], []
    for i in range(n):
        zeros = np.zeros(size, np.uint8)
        results = steps(dict(img=zeros, gt_seg_map=zeros, seg_fields=['gt_seg_map']))
        places = results['img']
        expected = tuple(min(side_before, side) for side_before in results['uncropped'])
        assert results['uncropped'] == resized(size, min(results['uncropped']), 4 * side)
        assert places.shape[:2] == results['gt_seg_map'].shape == results['img_shape'] == expected
        flips.append(places[0, 0, 1] > places[0, -1, 1])
        uncropped.append(results['uncropped'])
        starts.append((places[0, 0, 0], places[0, :, 1].min()))
        assert flips[-1] == results['flip']
        if i < 50:  # each label is still that of its pixel
            rows, columns = places[..., 0], places[..., 1]
            assert (results['gt_seg_map'] == LABELS[rows, columns]).all()
    assert_fraction(sum(flips), n, 1 / 2)
    uncropped, starts = np.array(uncropped), np.array(starts)
    # The ratio is uniform over 0.5 to 2, so the short side, rounded down, is uniform over half to twice the crop.
    assert_uniform(uncropped.min(axis=1), side // 2, 2 * side - 1)
    for axis in range(2):
        assert_uniform(starts[:, axis], 0, np.maximum(uncropped[:, axis] - side, 0))


@pytest.mark.parametrize('name, long', [('upernet/convnext_t', 2048), ('upernet/convnext_b_in22k', 2560)])
def test_ade20k_long_side_of_a_wide_image(name, long):
    resize = TRANSFORMS.build(load(name).train_pipeline[2])
    shapes = [resize(dict(img=np.zeros((4, 40), np.uint8)))['img_shape'] for _ in range(600)]
    assert all(height == int(width / 10 + 0.5) for height, width in shapes)
    assert_uniform([width for _, width in shapes], long // 2, 2 * long - 1)


@pytest.mark.parametrize('name, side', [('upernet/convnext_t', 512), ('upernet/convnext_b_in22k', 640)])
@pytest.mark.parametrize('kind', ['one class', 'halves', 'labeled in part', 'many classes'])
def test_ade20k_crops_of_one_class_are_resampled(name, side, kind):
    """Ten crops are looked at for one of which no class has 75%; the eleventh is taken as it comes."""
    crop = TRANSFORMS.build(load(name).train_pipeline[3])
    width, n = 4 * side, 1500
    room = width - side  # the crop's first column is uniform over 0 to this
    columns = np.arange(width)
    halves = columns // (width // 2)
    labels, n_good = {  # and how many first columns make a good crop
        'one class': (columns * 0, 0),
        'halves': (halves, side // 2 - 1),
        'labeled in part': (np.where(columns % 8 == 0, halves, 255), side // 2 - 8),
        'many classes': (columns % 150, room + 1),
    }[kind]
    labels = np.tile(labels.astype(np.uint8), (8, 1))
    chosen, starts = np.zeros(11, int), []
    for i in range(n):
        np.random.seed(i)
        results = crop(dict(img=np.tile(columns, (8, 1)), gt_seg_map=labels, seg_fields=['gt_seg_map']))
        assert results['img'].shape == results['gt_seg_map'].shape == (8, side)
        starts.append(results['img'][0, 0])
        np.random.seed(i)
        stream = [(np.random.randint(1), np.random.randint(room + 1))[1] for _ in range(11)]
        passing = [j for j in range(10) if _largest_fraction(labels[:, stream[j] : stream[j] + side]) < 0.75]
        chosen[passing[0] if passing else 10] += 1
        assert starts[-1] == stream[passing[0] if passing else 10]
    p = n_good / (room + 1)
    for j, count in enumerate(chosen):
        assert_fraction(count, n, (1 - p) ** j * (p if j < 10 else 1))
    n_bad = sum(_largest_fraction(labels[:, start : start + side]) >= 0.75 for start in starts)
    assert_fraction(n_bad, n, (1 - p) ** 11)  # of halves a seventh; without drawing again five of six
    if kind in ('one class', 'many classes'):
        assert_uniform(starts, 0, room)


def _largest_fraction(labels: np.ndarray) -> float:
    """The fraction of the most frequent class among labeled pixels; 1 where there is one class."""
    counts = np.bincount(labels.ravel(), minlength=256)[:255]
    return counts.max() / counts.sum()


@pytest.mark.parametrize('name, side', [('upernet/convnext_t', 512), ('upernet/convnext_b_in22k', 640)])
def test_ade20k_batch_is_padded(name, side):
    config = load(name)
    preprocessor = MODELS.build(config.model.data_preprocessor)
    steps = Compose([TRANSFORMS.build(cfg) for cfg in config.train_pipeline[2:]])
    image = np.random.randint(0, 256, (60, 64, 3), np.uint8)
    samples = []
    while len(samples) < 4:
        labels = np.random.randint(0, 150, image.shape[:2], np.uint8)
        data = steps(dict(img=image.copy(), gt_seg_map=labels, seg_fields=['gt_seg_map']))
        if data['inputs'].shape[1] < side:
            samples.append(data)
    raw = [data['inputs'].float() for data in samples]
    ground_truths = [data['data_samples'].gt_sem_seg.data.clone() for data in samples]
    batch = preprocessor({key: [data[key] for data in samples] for key in ('inputs', 'data_samples')}, training=True)
    assert batch['inputs'].shape == (4, 3, side, side)
    mean = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
    std = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
    for image, raw_image, sample, ground_truth in zip(batch['inputs'], raw, batch['data_samples'], ground_truths):
        height, width = raw_image.shape[1:]
        assert torch.allclose(image[:, :height, :width], (raw_image.flip(0) - mean) / std, atol=1e-5)
        assert (image[:, height:] == 0).all() and (image[:, :, width:] == 0).all()
        padded = sample.gt_sem_seg.data
        assert padded.shape == (1, side, side) and (padded[:, :height, :width] == ground_truth).all()
        assert (padded[:, height:] == 255).all() and (padded[:, :, width:] == 255).all()


FIRST_BATCHES = """
import hashlib, sys
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

for name in ('mask_rcnn', 'upernet'):
    for seed in (0, 1):
        config = Config.fromfile(f'{sys.argv[1]}/configs/demo/{name}.py')
        init_default_scope(config.default_scope)
        config.train_dataloader.update(num_workers=1, persistent_workers=False)
        batch = next(iter(Runner.build_dataloader(config.train_dataloader, seed=seed)))
        digest = hashlib.sha256()
        for image, sample in zip(batch['inputs'], batch['data_samples']):
            ground_truth = sample.gt_instances.bboxes.tensor if name == 'mask_rcnn' else sample.gt_sem_seg.data
            for tensor in (image, ground_truth):
                digest.update(f'{tensor.dtype} {tuple(tensor.shape)}'.encode() + tensor.numpy().tobytes())
        print('batch', name, seed, len(batch['inputs']), digest.hexdigest())
"""


def test_equal_seeds_give_equal_batches_in_two_processes(tmp_path):
    toy_shapes.write(tmp_path / 'shapes', train=8, val=2, size=64)
    command = [sys.executable, '-c', FIRST_BATCHES, str(ROOT)]
    env = {**os.environ, 'SHAPES_ROOT': str(tmp_path / 'shapes')}
    processes = [subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE) for _ in range(2)]
    printed = [process.communicate(timeout=300)[0].splitlines() for process in processes]
    batches0, batches1 = ([line.split() for line in lines if line.startswith('batch ')] for lines in printed)
    assert batches0 == batches1
    assert [line[1:4] for line in batches0] == [
        ['mask_rcnn', '0', '2'],
        ['mask_rcnn', '1', '2'],
        ['upernet', '0', '8'],
        ['upernet', '1', '8'],
    ]
    assert len({line[4] for line in batches0}) == 4
