"""`--balance`: images with rare classes more often, rare classes with more weight, against numbers counted by hand."""

import json
import math

import numpy as np
import pytest
from mmengine.registry import DATASETS
from PIL import Image

from convnext_dense.config.class_balance import balance_classes
from convnext_dense.config.mixed_images import set_copy_paste
from convnext_dense.config.training_set import count_training_images
from convnext_dense.errors import UsageError
from helpers.recipes import load

# The classes of each image: disc in ten, square in eight, triangle in six of ten, cross in one.
IMAGES = ['disc square triangle'] * 5 + ['disc square triangle cross'] + ['disc square'] * 2 + ['disc'] * 2
CLASSES = ('disc', 'square', 'triangle', 'cross')


@pytest.fixture
def detection(tmp_path, monkeypatch):
    boxes = [(i, CLASSES.index(name) + 1) for i, names in enumerate(IMAGES) for name in names.split()]
    annotations = [
        dict(id=n, image_id=i, category_id=c, bbox=[1, 2, 9, 8], area=72, iscrowd=0, segmentation=[[1, 2, 9, 8, 1, 8]])
        for n, (i, c) in enumerate(boxes, 1)
    ]
    content = dict(
        images=[dict(id=i, file_name=f'{i}.png', width=64, height=64) for i in range(len(IMAGES))],
        annotations=annotations,
        categories=[dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)],
    )
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'annotations/instances_train.json').write_text(json.dumps(content))
    monkeypatch.setenv('SHAPES_ROOT', str(tmp_path))
    return load('demo/mask_rcnn')


def test_images_of_a_rare_class_are_repeated(detection):
    table = balance_classes(detection).splitlines()
    # the median class is in (8 + 6) / 2 of ten images, rare is less than 0.35; ceil(sqrt(0.35 / 0.1)) is 2
    assert detection.train_dataloader.dataset.type == 'ClassBalancedDataset'
    assert detection.train_dataloader.dataset.oversample_thr == 0.35 and '(oversample_thr=0.35)' in table[0]
    assert [line.split() for line in table[1:]] == [
        ['class', 'images', 'repeated'],
        ['cross', '10.00%', '2'],
        ['triangle', '60.00%', '1'],
        ['square', '80.00%', '1'],
        ['disc', '100.00%', '1'],
    ]
    assert count_training_images(detection) == 11
    dataset = DATASETS.build(detection.train_dataloader.dataset)
    names = [dataset.get_data_info(i)['img_path'].rsplit('/', 1)[-1] for i in range(11)]
    assert names.count('5.png') == 2 and len({*names}) == 10
    set_copy_paste(detection)
    assert detection.train_dataloader.dataset.dataset.type == 'ClassBalancedDataset'


def test_config_with_class_balanced_dataset_is_refused(detection):
    balance_classes(detection)
    with pytest.raises(UsageError, match='--balance: the config has a ClassBalancedDataset already'):
        balance_classes(detection)


def test_without_rare_classes_nothing_is_repeated(detection, tmp_path):
    file = tmp_path / 'annotations/instances_train.json'
    content = json.loads(file.read_text())
    content['annotations'] = [a for a in content['annotations'] if a['category_id'] < 4]
    file.write_text(json.dumps(content))
    assert 'nothing is repeated' in balance_classes(detection)
    assert detection.train_dataloader.dataset.type == 'CocoDataset'


@pytest.fixture
def segmentation(tmp_path, monkeypatch):
    """Two masks of 1000 pixels each: 1400 of class 0, 400 of 1, 100 of 2 and none of 3 and 4; 100 are ignored.

    Their values are one more than the class; 0 is ignored (`reduce_zero_label`).
    """
    for kind, suffix in (('images', 'jpg'), ('masks', 'png')):
        (tmp_path / kind / 'train').mkdir(parents=True)
        for i, values in enumerate(([1] * 800 + [2] * 200, [1] * 600 + [2] * 200 + [3] * 100 + [0] * 100)):
            pixels = np.uint8(values).reshape(20, 50)
            Image.fromarray(pixels).save(tmp_path / kind / 'train' / f'{i}.{suffix}')
    monkeypatch.setenv('SHAPES_ROOT', str(tmp_path))
    config = load('demo/upernet')
    dataset = config.train_dataloader.dataset
    dataset.data_prefix = dict(img_path='images/train', seg_map_path='masks/train')
    dataset.img_suffix, dataset.seg_map_suffix = '.jpg', '.png'
    return config


def test_rare_classes_have_more_weight(segmentation):
    table = balance_classes(segmentation)
    fractions = [1400 / 1900, 400 / 1900, 100 / 1900, 0, 0]
    enet = [1 / math.log(1.02 + p) for p in fractions]
    mean = sum(p * weight for p, weight in zip(fractions, enet))
    weights = segmentation.model.decode_head.loss_decode.class_weight
    assert weights == pytest.approx([weight / mean for weight in enet], rel=1e-3)
    assert segmentation.model.auxiliary_head.loss_decode.class_weight == weights
    assert f'73.68%  {weights[0]:8.4g}' in table and len(table.splitlines()) == 7
    with pytest.raises(UsageError, match='has class_weight already'):
        balance_classes(segmentation)


def test_model_without_class_weights_is_refused(segmentation):
    for head in (segmentation.model.decode_head, segmentation.model.auxiliary_head):
        head.loss_decode = dict(type='DiceLoss')
    with pytest.raises(UsageError, match='--balance: the loss of the model takes no class_weight'):
        balance_classes(segmentation)
