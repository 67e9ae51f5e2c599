"""Long, thin images are dropped exactly where the recipes' pipelines or models cannot read them."""

import json
import math

import cv2
import mmcv
import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmengine.registry import init_default_scope

from convnext_dense.config.evaluation import SCALE_FACTORS, set_multiscale
from convnext_dense.datasets import toy_shapes
from convnext_dense.datasets.custom import DatasetRequest, read_data
from convnext_dense.datasets.image_sizes import DEFAULT_LIMITS, STRIDE, ResizeLimit, resize_limits, resized, too_thin
from convnext_dense.models.convnext import ConvNeXt
from convnext_dense.paper.results import PAPER_RESULTS
from helpers.datasets import DETECTOR, SEGMENTOR, load_recipe, quick_options, run


def config_of(name):
    config = load_recipe(name)
    init_default_scope(config.default_scope)
    return config


def test_resized_sizes_match_mmcv():
    rng = np.random.RandomState(0)
    for _ in range(2000):
        size, scale = (tuple(int(v) for v in 10 ** rng.uniform(0, 4.5, 2)) for _ in range(2))
        assert resized(size, scale) == mmcv.rescale_size(size, scale)


@pytest.mark.parametrize('recipe', [result.recipe for result in PAPER_RESULTS])
def test_default_limits_are_those_of_the_paper(recipe):
    """Recipes of others resize otherwise, which `resize_limits` reads out of their pipelines."""
    limits = resize_limits(config_of(recipe))
    if '22k' in recipe and recipe.startswith('upernet'):  # at 640
        larger = {split: limit._replace(scales=tuple(tuple(side * 5 // 4 for side in s) for s in limit.scales))
                  for split, limit in DEFAULT_LIMITS['segmentation'].items()}  # fmt: skip
        assert limits == larger
    else:
        assert limits == DEFAULT_LIMITS['segmentation' if recipe.startswith('upernet') else 'detection']


def sample(config, width, height):
    """Return a sample as it is after the loading transforms."""
    image = np.zeros((height, width, 3), np.uint8)
    results = dict(img=image, img_shape=(height, width), ori_shape=(height, width), img_path='', img_id=0)
    if config.default_scope == 'mmseg':
        results |= dict(gt_seg_map=image[..., 0], seg_fields=['gt_seg_map'], reduce_zero_label=False, seg_map_path='')
    return results


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('recipe', ['mask_rcnn/convnext_t', 'upernet/convnext_t', 'demo/mask_rcnn', 'demo/upernet'])
def test_pipelines_fail_exactly_beyond_the_limit(recipe, split):
    """On both sides of the limit; with random transforms, dropped sizes fail for some seeds."""
    config = config_of(recipe)
    limit = resize_limits(config)[split]._replace(min_side=1)
    steps = config[f'{split}_dataloader'].dataset.pipeline
    pipeline = Compose([step for step in steps if not step.type.startswith(('Load', 'Pack'))])
    longest = 2 * max(limit.scales[0])  # the longest side of which one pixel is left: half of one is rounded up
    readable = [(longest, 1), (1, longest), (3 * longest, 3), (40, 40), (longest // 2, 2)]
    too_small = [(math.ceil(longest * 1.1), 1), (1, longest * 2), (longest * 4, 3)]
    assert not any(too_thin(size, limit) for size in readable) and too_thin((longest + 1, 1), limit)
    for size in readable:
        for seed in range(20):
            np.random.seed(seed)
            assert min(pipeline(sample(config, *size))['img'].shape[:2]) >= 1
    for size in too_small:
        kind, text = too_thin(size, limit)
        assert kind == 'image-resized-to-zero' and text.startswith(f'{size[0]} x {size[1]} becomes')
        with pytest.raises(cv2.error):
            for seed in range(300):
                np.random.seed(seed)
                pipeline(sample(config, *size))


@pytest.mark.parametrize('height', [STRIDE - 1, STRIDE])
def test_backbone_needs_images_of_its_stride(height):
    backbone = ConvNeXt(arch='atto').eval()
    images = torch.zeros(1, 3, height, 64)
    if height < STRIDE:
        with pytest.raises(RuntimeError):
            backbone(images)
    else:
        assert backbone(images)[-1].shape[2:] == (1, 2)
    assert bool(too_thin((64, height), ResizeLimit(min_side=STRIDE))) is (height < STRIDE)


def test_limits_follow_from_the_config():
    config = config_of('upernet/convnext_t')
    config.model.data_preprocessor.test_cfg = dict(size_divisor=32)
    assert resize_limits(config)['val'].min_side == 1
    config = config_of('upernet/convnext_t')
    config.val_dataloader.dataset.pipeline.insert(2, dict(type='Pad', size_divisor=32))
    assert resize_limits(config)['val'].min_side == 1
    config.model.backbone.type = 'ResNetV1c'  # whose convolutions pad
    assert resize_limits(config)['test'].min_side == 1
    config.train_dataloader.dataset = dict(type='RepeatDataset', dataset=config.train_dataloader.dataset)
    resize = config.train_dataloader.dataset.dataset.pipeline[2]
    resize.update(scale=[(2048, 300), (900, 512)], ratio_range=None)
    assert resize_limits(config)['train'].scales == ((900, 300),)
    resize.keep_ratio = False
    assert resize_limits(config)['train'].scales == () and not too_thin((9999, 1), resize_limits(config)['train'])


def test_multi_scale_limit_is_that_of_the_smallest_scale():
    config = config_of('upernet/convnext_t')
    limit = resize_limits(config, min(SCALE_FACTORS))['test']
    set_multiscale(config)
    assert limit.scales == resize_limits(config)['test'].scales == ((1024, 256),)


def add_thin_image(root, split, name, width, height):
    """Add a thin image with an object that covers half of it, and its mask."""
    cv2.imwrite(str(root / split / name), np.zeros((height, width, 3), np.uint8))
    labels = np.ones((height, width), np.uint8)
    labels[:, : width // 2] = 2
    cv2.imwrite(str(root / 'labels' / split / name), labels)
    file = root / f'annotations/instances_{split}.json'
    content = json.loads(file.read_text())
    n, w, h = len(content['images']) + 1, max(width // 2, 1), height
    content['images'].append(dict(id=n, file_name=name, width=width, height=height))
    mask = [[0, 0, w, 0, w, h, 0, h]]
    annotation = dict(
        id=999 + n, image_id=n, category_id=1, iscrowd=0, area=w * h, bbox=[0, 0, w, h], segmentation=mask
    )
    content['annotations'].append(annotation)
    file.write_text(json.dumps(content))


SIZES = {'line.png': (6000, 1), 'strip.png': (1600, 12), 'column.png': (3, 9000), 'band.png': (100, 40)}


@pytest.fixture
def dataset_root(tmp_path):
    toy_shapes.write(tmp_path / 'my_data', train=5, val=3, size=64)
    for split in ('train', 'val'):
        for name, size in SIZES.items():
            add_thin_image(tmp_path / 'my_data', split, name, *size)
    return tmp_path / 'my_data'


def reported(root, task):
    report = read_data(DatasetRequest(str(root)), task, ('train', 'val')).report
    return {(f.split, f.code): f.examples for f in report.diagnostics.values()}


def test_thin_images_are_reported(dataset_root):
    """For the paper's recipes of both tasks, in each split."""
    in_detection, in_segmentation = reported(dataset_root, 'detection'), reported(dataset_root, 'segmentation')
    nothing, stride = 'image-resized-to-zero', 'image-below-stride'
    lines = ['line.png: 6000 x 1 becomes 1333 x 0', 'column.png: 3 x 9000 becomes 0 x 1333']
    assert in_detection['train', nothing] == in_detection['val', nothing] == lines
    assert in_detection['train', 'image-below-32-pixels'] == ['strip.png (1600 x 12)']
    assert ('val', stride) not in in_detection  # it is padded
    assert in_segmentation['train', nothing] == ['column.png: 3 x 9000 becomes 0 x 1024']
    assert ('train', stride) not in in_segmentation  # it is padded to the crop
    assert in_segmentation['val', stride] == [
        'column.png: 3 x 9000 becomes 1 x 2048', 'strip.png: 1600 x 12 becomes 2048 x 15'
    ]  # fmt: skip
    assert in_segmentation['train', 'mask-single-row'] == ['line.png']


@pytest.mark.parametrize('config', [DETECTOR, SEGMENTOR], ids=['detection', 'segmentation'])
def test_training_with_thin_images(config, dataset_root, monkeypatch):
    """The remaining images are trained on and evaluated."""
    monkeypatch.chdir(dataset_root.parent)
    length = ['--epochs', 2] if config is DETECTOR else ['--iters', 12]
    options = [
        '--work-dir',
        'run',
        *length,
        '--data',
        'my_data',
        '--cfg-options',
        *quick_options(f'thin {config.stem}'),
    ]
    assert run('train.py', config, *options) == 0
    written = {split: (dataset_root.parent / f'run/data/{split}.json').read_text() for split in ('train', 'val')}
    assert all('band.png' in text and 'line.png' not in text for text in written.values())
