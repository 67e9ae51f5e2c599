"""The toy data set trains from each supported layout by one command, with the images, annotations and classes that were
drawn; classes and their number follow from the data set."""

import hashlib
import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, MODELS, init_default_scope
from mmengine.runner import find_latest_checkpoint

from convnext_dense.datasets import cache, toy_shapes
from convnext_dense.datasets.configure import check_classes, iter_class_heads, set_num_classes
from convnext_dense.datasets.custom import DatasetRequest, apply_custom_data, read_data
from convnext_dense.datasets.request import split_by_hash
from convnext_dense.errors import UsageError
from convnext_dense.paper.results import find_paper_result
from convnext_dense.paper.work_dirs import read_runs
from helpers.datasets import (
    CONFIGS,
    DETECTOR,
    N_TRAIN,
    N_VAL,
    SEGMENTOR,
    as_folders,
    as_roboflow,
    as_voc,
    class_map,
    copy_images,
    load_coco,
    load_recipe,
    quick_options,
    renumber_categories,
    run,
    write_dataset,
    write_json,
    write_masks,
)


def rename_images(content, name):
    return {**content, 'images': [{**i, 'file_name': name.format(i['file_name'])} for i in content['images']]}


def merge_splits(toy_dataset):
    """Return both splits as one COCO dict, with ids from 0 as Label Studio writes them."""
    train, val = load_coco(toy_dataset, 'train'), load_coco(toy_dataset, 'val')
    n, prefixes = len(train['images']), ('t_', 'v_')
    images, annotations = [], []
    for content, prefix, offset in zip((train, val), prefixes, (-1, n - 1)):
        images += [{**i, 'id': i['id'] + offset, 'file_name': prefix + i['file_name']} for i in content['images']]
        annotations += [{**a, 'image_id': a['image_id'] + offset} for a in content['annotations']]
    annotations = [{**a, 'id': i} for i, a in enumerate(annotations)]
    return dict(images=images, annotations=annotations, categories=train['categories'])


def as_coco_2017(toy_dataset, folder):
    for split in ('train', 'val'):
        copy_images(toy_dataset, split, folder / f'{split}2017')
        write_json(load_coco(toy_dataset, split), folder / f'annotations/instances_{split}2017.json')
        write_json(
            {'images': [], 'annotations': [{'caption': 'a disc'}]}, folder / f'annotations/captions_{split}2017.json'
        )


def as_cvat(toy_dataset, folder):
    for split in ('train', 'val'):
        copy_images(toy_dataset, split, folder / 'images/default', split[0] + '_{}')
    write_json(merge_splits(toy_dataset), folder / 'annotations/instances_default.json')


def as_cvat_subsets(toy_dataset, folder):
    for split, name in (('train', 'Train'), ('val', 'Validation')):
        copy_images(toy_dataset, split, folder / 'images' / name)
        write_json(load_coco(toy_dataset, split), folder / f'annotations/instances_{name}.json')


def as_label_studio(toy_dataset, folder):
    for split in ('train', 'val'):
        copy_images(toy_dataset, split, folder / 'images', split[0] + '_{}')
    write_json(rename_images(merge_splits(toy_dataset), 'images\\{}'), folder / 'result.json')


def as_label_studio_uploads(toy_dataset, folder):
    for split in ('train', 'val'):
        copy_images(toy_dataset, split, folder / 'images', split[0] + '_{}')
    write_json(rename_images(merge_splits(toy_dataset), '/data/upload/1/{}'), folder / 'result.json')


def as_files(toy_dataset, folder):
    """One JSON file per split, with other category ids in val."""
    for split in ('train', 'val'):
        copy_images(toy_dataset, split, folder / split)
    write_json(load_coco(toy_dataset, 'train'), folder / 'train.json')
    write_json(renumber_categories(load_coco(toy_dataset, 'val')), folder / 'val.json')


def as_given(toy_dataset, folder):
    for split in ('train', 'val'):
        copy_images(toy_dataset, split, folder / f'pictures of {split}')
        write_json(load_coco(toy_dataset, split), folder / f'elsewhere/{split}_objects.json')
    return [
        *('--train-ann', folder / 'elsewhere/train_objects.json', '--val-ann', folder / 'elsewhere/val_objects.json'),
        *('--train-images', folder / 'pictures of train', '--val-images', folder / 'pictures of val'),
    ]


def as_drawn(toy_dataset, folder):
    shutil.copytree(toy_dataset, folder)


DETECTION = {
    'embedded': as_drawn, 'COCO': as_coco_2017, 'Roboflow': as_roboflow, 'CVAT': as_cvat,
    'CVAT, subsets': as_cvat_subsets, 'Label Studio': as_label_studio, 'Label Studio, uploads': as_label_studio_uploads,
    'a file a split': as_files, 'given': as_given,
}  # fmt: skip


def as_ade20k(toy_dataset, folder):
    for split, name in (('train', 'training'), ('val', 'validation')):
        copy_images(toy_dataset, split, folder / 'images' / name, suffix='.jpg')
        write_masks(toy_dataset, split, folder / 'annotations' / name, lambda classes: classes + 1)  # 255 becomes 0
    (folder / 'objectInfo150.txt').write_text('Idx Ratio Train Val Stuff Name\n')


def as_cityscapes(toy_dataset, folder):
    for split in ('train', 'val'):
        copy_images(toy_dataset, split, folder / 'leftImg8bit' / split / 'ulm', 'ulm_{}_leftImg8bit')
        write_masks(toy_dataset, split, folder / 'gtFine' / split / 'ulm', name='ulm_{}_gtFine_labelTrainIds')
        write_masks(
            toy_dataset, split, folder / 'gtFine' / split / 'ulm', lambda c: c * 0, name='ulm_{}_gtFine_instanceIds'
        )


def as_cityscapes_ids(toy_dataset, folder):
    ids = np.array([7, 8, 11, 12, 13, *[0] * 250, 3], np.uint8)
    for split in ('train', 'val'):
        copy_images(toy_dataset, split, folder / 'leftImg8bit' / split / 'ulm', 'ulm_{}_leftImg8bit')
        write_masks(
            toy_dataset, split, folder / 'gtFine' / split / 'ulm', lambda c: ids[c], name='ulm_{}_gtFine_labelIds'
        )


def as_folders_by_split(toy_dataset, folder):
    """train/images and train/masks, with a palette instead of class names."""
    for split, name in (('train', 'train'), ('val', 'valid')):
        copy_images(toy_dataset, split, folder / name / 'images')
        write_masks(toy_dataset, split, folder / name / 'masks', palette=True)


def as_roboflow_masks(toy_dataset, folder):
    for split, name in (('train', 'train'), ('val', 'valid')):
        copy_images(toy_dataset, split, folder / name, suffix='.jpg')
        write_masks(toy_dataset, split, folder / name, name='{}_mask')
        rows = ''.join(f'{i}, {name}\n' for i, name in enumerate(toy_shapes.LABEL_NAMES))
        (folder / name / '_classes.csv').write_text('Pixel Value, Class\n' + rows)


def as_flat_folders(toy_dataset, folder):
    for split in ('train', 'val'):
        copy_images(toy_dataset, split, folder / 'img', split + '_{}')
        write_masks(toy_dataset, split, folder / 'label', lambda classes: classes + 1, name=split + '_{}')
    write_json(dict(zip(toy_shapes.LABEL_NAMES, toy_shapes.PALETTE)), folder / 'names.json')
    return ['--data', folder, '--classes', folder / 'names.json', '--ignore', 0]


SEGMENTATION = {
    'embedded': as_drawn, 'ADE20K': as_ade20k, 'Cityscapes': as_cityscapes, 'Cityscapes, ids': as_cityscapes_ids,
    'VOC': as_voc, 'images/, masks/': as_folders, 'train/, valid/': as_folders_by_split,
    'Roboflow': as_roboflow_masks, 'img/, label/': as_flat_folders,
}  # fmt: skip
N_CLASSES = {'ADE20K': 150, 'Cityscapes': 19, 'Cityscapes, ids': 19, 'VOC': 21}


def read_cached_split(folder, split):
    return json.loads((folder / f'data/{split}.json').read_text())


def objects(content, folder):
    """Return the annotations of a COCO dict: hash of the image's pixels, class, box, polygons and area."""
    names = {c['id']: c['name'] for c in content['categories']}
    pixels = {}
    for image in content['images']:
        read = cv2.imread(str(folder / image['file_name']))
        assert read.shape[:2] == (image['height'], image['width'])
        pixels[image['id']] = hashlib.sha256(read.tobytes()).hexdigest()
    return sorted(
        (pixels[a['image_id']], names[a['category_id']], str(a['bbox']), str(a['segmentation']), a['area'])
        for a in content['annotations']
    )


def expected_objects(toy_dataset, split):
    return objects(rename_images(load_coco(toy_dataset, split), f'{split}/{{}}'), toy_dataset)


@pytest.mark.parametrize('layout', DETECTION)
def test_detection_trains_from_each_layout(toy_dataset, tmp_path, monkeypatch, layout):
    monkeypatch.chdir(tmp_path)
    extra = DETECTION[layout](toy_dataset, tmp_path / 'custom data') or ['--data', 'custom data']
    options = ['--work-dir', 'run', '--epochs', 1, *extra, '--cfg-options', *quick_options(layout)]
    assert run('train.py', DETECTOR, *options) == 0
    train, val = (read_cached_split(tmp_path / 'run', split) for split in ('train', 'val'))
    root = Path(Config.fromfile('run/mask_rcnn.py').train_dataloader.dataset.data_root)
    if layout.startswith(('CVAT', 'Label')) and 'subsets' not in layout:
        assert val['images'] and len(train['images']) + len(val['images']) == N_TRAIN + N_VAL
        expected = sorted(expected_objects(toy_dataset, 'train') + expected_objects(toy_dataset, 'val'))
        assert sorted(objects(train, root) + objects(val, root)) == expected
    else:
        assert objects(train, root) == expected_objects(toy_dataset, 'train')
        assert objects(val, root) == expected_objects(toy_dataset, 'val')
    for content in (train, val):
        assert content['categories'] == [dict(id=i, name=name) for i, name in enumerate(toy_shapes.CLASSES, 1)]
        assert [a['id'] for a in content['annotations']] == list(range(1, 1 + len(content['annotations'])))
    weights = torch.load(find_latest_checkpoint('run'), weights_only=False)['state_dict']
    assert weights['roi_head.bbox_head.fc_cls.weight'].shape[0] == 1 + len(toy_shapes.CLASSES)
    assert weights['roi_head.mask_head.conv_logits.weight'].shape[0] == len(toy_shapes.CLASSES)


@pytest.mark.parametrize('layout', SEGMENTATION)
def test_segmentation_trains_from_each_layout(toy_dataset, tmp_path, monkeypatch, layout):
    monkeypatch.chdir(tmp_path)
    extra = SEGMENTATION[layout](toy_dataset, tmp_path / 'custom data') or ['--data', 'custom data']
    options = ['--work-dir', 'run', '--iters', 1, *extra, '--cfg-options', *quick_options(layout)]
    assert run('train.py', SEGMENTOR, *options) == 0
    config = Config.fromfile('run/upernet.py')
    n = N_CLASSES.get(layout, 5)
    init_default_scope('mmseg')
    result = []
    for split in ('train', 'val'):
        settings = config[f'{split}_dataloader'].dataset
        assert len(settings.metainfo.classes) == n
        settings.pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
        result.append(sorted(as_bytes(item) for item in DATASETS.build(settings)))
    expected = [
        sorted(class_map(toy_dataset, split, path.name).tobytes() for path in (toy_dataset / split).iterdir())
        for split in ('train', 'val')
    ]
    if layout == 'img/, label/':
        assert sorted(result[0] + result[1]) == sorted(expected[0] + expected[1]) and result[1]
        assert config.train_dataloader.dataset.metainfo.palette == toy_shapes.PALETTE
    else:
        assert result == expected
    weights = torch.load(find_latest_checkpoint('run'), weights_only=False)['state_dict']
    for head in ('decode_head', 'auxiliary_head'):
        assert weights[f'{head}.conv_seg.weight'].shape[0] == n


def as_bytes(item):
    assert item['img'].shape[:2] == item['gt_seg_map'].shape
    return item['gt_seg_map'].tobytes()


def class_counts(config):
    return {head['num_classes'] for head in iter_class_heads(config.model)}


@pytest.mark.parametrize(
    'recipe, n', [('demo/mask_rcnn', 2), ('demo/cascade', 200), ('demo/upernet', 2), ('demo/upernet', 200)]
)
def test_train_and_test_with_other_numbers_of_classes(tmp_path, monkeypatch, recipe, n):
    monkeypatch.chdir(tmp_path)
    names = write_dataset(tmp_path / 'my_data', n)
    length = ['--iters', 1] if 'upernet' in recipe else ['--epochs', 1]
    options = [
        '--data',
        'my_data',
        '--work-dir',
        'run',
        *length,
        '--cfg-options',
        *quick_options(f'{recipe}{"x" * (n > 2)}'),
    ]
    options += ['model.decode_head.norm_cfg.type=BN', 'model.auxiliary_head.norm_cfg.type=BN'] * ('upernet' in recipe)
    options += [f'model.roi_head.bbox_head.{i}.norm_cfg.type=BN' for i in range(3)] * ('cascade' in recipe)
    assert run('train.py', CONFIGS / f'{recipe}.py', *options) == 0
    checkpoint = find_latest_checkpoint('run')
    content = torch.load(checkpoint, weights_only=False)
    assert list(content['meta']['dataset_meta']['classes']) == names
    result = {
        key: len(weight) for key, weight in content['state_dict'].items() if re.search('fc_cls.w|logits.w|seg.w', key)
    }
    assert set(result.values()) == ({n} if 'upernet' in recipe else {n, n + 1})
    assert run('test.py', CONFIGS / f'{recipe}.py', checkpoint, *options[:4], *options[6:]) == 0


@pytest.mark.parametrize('recipe', ['mask_rcnn/convnext_t', 'cascade/convnext_b', 'upernet/convnext_b_in22k'])
def test_paper_recipes_adapt_to_a_custom_dataset(toy_dataset, tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    config, original = load_recipe(recipe), load_recipe(recipe)
    assert find_paper_result(config)
    lines = apply_custom_data(config, DatasetRequest(str(toy_dataset)))
    n = 5 if 'upernet' in recipe else 4
    assert class_counts(config) == {n} and len(class_counts(original) & {80, 150}) == 1
    assert any(f'{n} classes: ' in line for line in lines) and lines[-1] == 'data: no problems found'
    for split in ('train', 'val', 'test'):
        dataset, original_dataset = (c[f'{split}_dataloader'].dataset for c in (config, original))
        assert (dataset.pipeline, dataset.get('filter_cfg')) == (
            original_dataset.pipeline,
            original_dataset.get('filter_cfg'),
        )
        assert len(dataset.metainfo.classes) == n
    init_default_scope(config.default_scope)
    config.model.backbone.init_cfg = None
    with torch.device('meta'):
        model = MODELS.build(config.model)
    assert model is not None
    assert find_paper_result(config) is None
    assert not any(key in str(config.train_dataloader) + str(config.val_evaluator) for key in ('data/coco', 'data/ade'))


def test_custom_dataset_of_80_classes_is_no_paper_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / 'my_data', 80)
    config = load_recipe('cascade/convnext_t')
    apply_custom_data(config, DatasetRequest('my_data'))
    assert class_counts(config) == {80} and find_paper_result(config) is None
    start = tmp_path / 'run/20260101_000000'
    (start / 'vis_data').mkdir(parents=True)
    (start / 'vis_data/config.py').write_text(config.pretty_text)
    (start / 'vis_data/scalars.json').write_text('{"coco/bbox_mAP": 0.5, "step": 36}\n')
    assert [run.paper_result for run in read_runs(tmp_path / 'run')] == [None]


@pytest.mark.parametrize(
    'recipe, key',
    [
        ('demo/mask_rcnn', 'model.roi_head.bbox_head.num_classes'),
        ('demo/mask_rcnn', 'model.roi_head.mask_head.num_classes'),
        ('demo/cascade', 'model.roi_head.bbox_head.1.num_classes'),
        ('demo/upernet', 'model.decode_head.num_classes'),
        ('demo/upernet', 'model.auxiliary_head.num_classes'),
    ],
)
def test_wrong_num_classes_in_cfg_options_is_an_error(toy_dataset, tmp_path, monkeypatch, capsys, recipe, key):
    monkeypatch.chdir(tmp_path)
    args = [CONFIGS / f'{recipe}.py', '--data', toy_dataset, '--cfg-options', *quick_options(recipe)]
    assert run('train.py', *args, f'{key}=80') == 2
    assert f'{key}=80: leave it out; the data set has' in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob('**/*.pth'))


def test_wrong_num_classes_in_config_is_an_error(toy_dataset, tmp_path, monkeypatch, capsys):
    """Also without --data, if the config names its classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('SHAPES_ROOT', str(toy_dataset))
    key = 'model.roi_head.mask_head.num_classes'
    assert run('train.py', DETECTOR, '--cfg-options', *quick_options('config'), f'{key}=80') == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert 'FP32FCNMaskHead has num_classes=80, but the data set names 4 classes' in line
    config = load_recipe('demo/mask_rcnn')
    config.train_dataloader.dataset = dict(type='RepeatDataset', times=3, dataset=config.train_dataloader.dataset)
    check_classes(config)
    apply_custom_data(config, DatasetRequest(str(toy_dataset)))
    assert (config.train_dataloader.dataset.type, config.train_dataloader.dataset.dataset.type) == (
        'RepeatDataset',
        'CocoDataset',
    )


def test_num_classes_is_set_in_all_heads():
    model = dict(
        rpn_head=dict(num_classes=1),
        bbox_head=[dict(num_classes=80, loss_cls=dict(type='SeesawLoss', num_classes=80))],
        decode_head=dict(num_classes=150, out_channels=150),
        auxiliary_head=[dict(num_classes=2, out_channels=1)],
    )
    set_num_classes(model, 7)
    assert model == dict(
        rpn_head=dict(num_classes=1),
        bbox_head=[dict(num_classes=7, loss_cls=dict(type='SeesawLoss', num_classes=7))],
        decode_head=dict(num_classes=7, out_channels=7),
        auxiliary_head=[dict(num_classes=7, out_channels=7)],
    )
    model = dict(decode_head=dict(num_classes=2, loss_decode=dict(class_weight=[1.0, 2.0])))
    set_num_classes(model, 2)
    with pytest.raises(UsageError, match='class_weight .* has 2 values, but the data set 7 classes'):
        set_num_classes(model, 7)


def evaluate_ground_truth(config):
    """Evaluate the ground truth as training reads it against that of the evaluator."""
    init_default_scope('mmdet')
    config.val_dataloader.dataset.pipeline = []
    dataset, metric = DATASETS.build(config.val_dataloader.dataset), METRICS.build(config.val_evaluator)
    metric.dataset_meta = dataset.metainfo
    for item in dataset:
        boxes = torch.tensor([i['bbox'] for i in item['instances']]).reshape(-1, 4)
        labels = torch.tensor([i['bbox_label'] for i in item['instances']])
        result = dict(bboxes=boxes, scores=torch.ones(len(boxes)), labels=labels)
        metric.process({}, [dict(img_id=item['img_id'], ori_shape=(64, 64), pred_instances=result)])
    return metric.evaluate(len(dataset))


def test_evaluation_matches_labels_for_any_category_order(toy_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_files(toy_dataset, tmp_path / 'my_data')
    config = load_recipe('demo/mask_rcnn')
    apply_custom_data(config, DatasetRequest('my_data'))
    config.val_evaluator.metric = ['bbox']
    assert evaluate_ground_truth(config)['coco/bbox_mAP'] == 1
    dataset, original = DATASETS.build(config.val_dataloader.dataset), load_coco(toy_dataset, 'val')
    result = [
        (item['img_id'], toy_shapes.CLASSES[i['bbox_label']], *i['bbox'][:2])
        for item in dataset
        for i in item['instances']
    ]
    names = {c['id']: c['name'] for c in original['categories']}
    assert sorted(result) == sorted(
        (a['image_id'], names[a['category_id']], *a['bbox'][:2]) for a in original['annotations']
    )
    train, val = (json.loads(Path(f'my_data/{split}.json').read_text())['categories'] for split in ('train', 'val'))
    assert [c['name'] for c in train] == [c['name'] for c in val][::-1]
    assert config.train_dataloader.dataset.metainfo == config.val_dataloader.dataset.metainfo


def test_boxes_without_masks_remove_the_mask_branch(toy_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / 'my_data', 3, masks=False)
    for recipe in ('demo/mask_rcnn', 'demo/cascade'):
        config = load_recipe(recipe)
        lines = apply_custom_data(config, DatasetRequest('my_data'))
        assert 'mask branch is removed' in lines[-1]
        assert not [key for key in config.model.roi_head if 'mask' in key]
        loaders = str(config.train_dataloader) + str(config.val_dataloader) + str(config.test_dataloader)
        assert config.val_evaluator.metric == ['bbox'] and "'with_mask': True" not in loaders and 'with_mask' in loaders
    options = ['--data', 'my_data', '--work-dir', 'trained', '--cfg-options', *quick_options('boxes')]
    assert run('train.py', DETECTOR, '--epochs', 1, *options) == 0
    assert run('test.py', DETECTOR, 'trained/epoch_1.pth', *options) == 0
    # The same model on data with masks stays one of boxes.
    assert run('test.py', DETECTOR, 'trained/epoch_1.pth', '--data', toy_dataset, '--work-dir', 'other') == 2


def write_checkpoint(classes, file='trained.pth', part='mask_head'):
    """Write a checkpoint that names its classes and has one head."""
    weights = {f'roi_head.{part}.weight': torch.zeros(1)}
    torch.save(dict(state_dict=weights, meta=dict(dataset_meta=dict(classes=tuple(classes)))), file)
    return file


def test_testing_uses_the_classes_of_the_checkpoint(toy_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_files(toy_dataset, tmp_path / 'my_data')
    config, request = load_recipe('demo/mask_rcnn'), DatasetRequest(ann_files={'val': 'my_data/val.json'})
    apply_custom_data(config, request, ('test',), checkpoint=write_checkpoint(toy_shapes.CLASSES))
    config.val_dataloader.dataset = config.test_dataloader.dataset
    assert list(config.test_dataloader.dataset.metainfo.classes) == list(toy_shapes.CLASSES)
    assert config.test_evaluator.metric == ['bbox', 'segm'] and 'mask_head' in config.model.roi_head
    config.val_evaluator.metric = ['bbox']
    assert evaluate_ground_truth(config)['coco/bbox_mAP'] == 1
    # Of classes that the model does not know nothing is tested; a model of more classes is tested on these.
    config = load_recipe('demo/mask_rcnn')
    lines = apply_custom_data(config, request, ('test',), checkpoint=write_checkpoint(['disc', 'square', 'star']))
    assert class_counts(config) == {3} and any(
        'category-without-class, 2 (cross, triangle): no class of train' in line for line in lines
    )
    # A model of boxes stays one, whatever the data have.
    config = load_recipe('demo/mask_rcnn')
    apply_custom_data(config, request, ('test',), checkpoint=write_checkpoint(toy_shapes.CLASSES, part='bbox_head'))
    assert config.test_evaluator.metric == ['bbox'] and 'mask_head' not in config.model.roi_head
    with pytest.raises(UsageError, match="has 5 classes: ground, .*; the checkpoint's are 2 classes: a, b"):
        apply_custom_data(
            load_recipe('demo/upernet'), DatasetRequest(str(toy_dataset)), ('test',), checkpoint=write_checkpoint('ab')
        )


def test_resuming_with_other_classes_is_an_error(toy_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for recipe, classes in (('demo/mask_rcnn', toy_shapes.CLASSES), ('demo/upernet', toy_shapes.LABEL_NAMES)):
        apply_custom_data(load_recipe(recipe), DatasetRequest(str(toy_dataset)), checkpoint=write_checkpoint(classes))
        with pytest.raises(UsageError, match='trained.pth was trained on .*; the data set has'):
            apply_custom_data(
                load_recipe(recipe), DatasetRequest(str(toy_dataset)), checkpoint=write_checkpoint(classes[::-1])
            )


def test_missing_train_split_is_an_error(toy_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match='no training data: give --train-ann'):
        apply_custom_data(
            load_recipe('demo/mask_rcnn'),
            DatasetRequest(ann_files={'val': str(toy_dataset / 'annotations/instances_val.json')}),
        )


def test_annotated_test_split_is_preferred_to_val(toy_dataset, tmp_path, monkeypatch):
    """The test split is used if it has annotations, else val."""
    monkeypatch.chdir(tmp_path)
    as_roboflow(toy_dataset, tmp_path / 'my_data')
    shutil.copytree('my_data/valid', 'my_data/test')
    content = json.loads(Path('my_data/test/_annotations.coco.json').read_text())
    write_json({**content, 'images': content['images'][:1]}, Path('my_data/test/_annotations.coco.json'))
    tested = read_data(DatasetRequest('my_data'), 'detection', ('test',)).splits['test']
    assert len(tested['images']) == 1
    write_json({**content, 'annotations': []}, Path('my_data/test/_annotations.coco.json'))
    tested = read_data(DatasetRequest('my_data'), 'detection', ('test',)).splits['test']
    assert len(tested['images']) == N_VAL


def test_unchanged_dataset_is_read_from_the_cache(toy_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy_dataset, 'my_data')
    first_summary = apply_custom_data(load_recipe('demo/upernet'), DatasetRequest('my_data'))
    calls = []
    monkeypatch.setattr('convnext_dense.datasets.custom.read_data', lambda *a: calls.append(a) or read_data(*a))
    config = load_recipe('demo/upernet')
    assert apply_custom_data(config, DatasetRequest('my_data')) == first_summary and not calls
    assert config.train_dataloader.dataset.reduce_zero_label
    path = next(Path('my_data/train').iterdir())
    path.write_bytes(path.read_bytes()[:1000])
    assert (
        any(
            'dropped  train: ' in line
            for line in apply_custom_data(load_recipe('demo/upernet'), DatasetRequest('my_data'))
        )
        and calls
    )
    with pytest.raises(UsageError, match='dropped'):
        apply_custom_data(load_recipe('demo/upernet'), DatasetRequest('my_data', strict=True))
    assert len(calls) == 1


def test_other_ranks_wait_for_local_rank_0(toy_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('convnext_dense.datasets.cache.POLL_SECONDS', 0.01)
    config0, config1 = load_recipe('demo/mask_rcnn'), load_recipe('demo/mask_rcnn')
    config0.launcher, config1.launcher = 'pytorch', 'slurm'
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setenv('SLURM_LOCALID', '3')
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(apply_custom_data, config1, DatasetRequest(str(toy_dataset)))
        assert not waiting.done()
        assert apply_custom_data(config0, DatasetRequest(str(toy_dataset))) == waiting.result(timeout=60)
    assert config0.val_dataloader == config1.val_dataloader


def test_ranks_wait_only_while_rank_0_is_busy(tmp_path, monkeypatch):
    for name, seconds in dict(POLL_SECONDS=0.01, HEARTBEAT_SECONDS=0.1, STALE_SECONDS=1).items():
        monkeypatch.setattr(cache, name, seconds)
    load_times, original = [], cache.load_cached
    monkeypatch.setattr(cache, 'load_cached', lambda *args: load_times.append(time.monotonic()) or original(*args))
    with ThreadPoolExecutor() as pool:
        with cache.hold_busy_file(str(tmp_path)):
            waiting = pool.submit(cache.wait_for_cache, str(tmp_path), ('key',))
            time.sleep(2)
            assert not waiting.done()
        assert not (tmp_path / cache.BUSY_FILE).exists()
        with pytest.raises(UsageError, match='the first process of this machine has shown no progress for'):
            waiting.result(timeout=60)
    assert len(load_times) < 50  # once a beat, and not a hundred times a second


def test_random_validation_split_is_reproducible(toy_dataset, tmp_path, monkeypatch):
    as_label_studio(toy_dataset, tmp_path / 'my_data')
    names = []
    for fraction in (0.25, 0.25, 0.5):
        data = read_data(
            DatasetRequest(str(tmp_path / 'my_data'), val_fraction=fraction), 'detection', ('train', 'val')
        )
        train, val = ({i['file_name'] for i in data.splits[split]['images']} for split in ('train', 'val'))
        assert not train & val and len(train | val) == N_TRAIN + N_VAL
        names.append(val)
    assert names[0] == names[1] <= names[2] and names[0]
    assert (
        f'{len(names[0])} of {N_TRAIN + N_VAL} images, chosen by the hash of the file name'
        in read_data(DatasetRequest(str(tmp_path / 'my_data'), val_fraction=0.25), 'detection', ('val',)).report.facts[
            0
        ]
    )


def test_adding_images_moves_few_between_the_splits(tmp_path):
    request = DatasetRequest(str(tmp_path), val_fraction=0.2)
    names = [f'{n:05d}.jpg' for n in range(600)]
    val_of_few, val_of_all = split_by_hash(names[:400], request)[0], split_by_hash(names, request)[0]
    assert len(val_of_few ^ val_of_all & set(names[:400])) <= 8


@pytest.mark.parametrize('n, fraction, expected', [
    (10, 0.1, 1), (14, 0.1, 1), (40, 0.1, 4), (400, 0.2, 80), (3, 0.5, 2), (3, 0.01, 1), (2, 0.99, 1), (1, 0.5, 1),
])  # fmt: skip
def test_validation_split_has_as_many_images_as_the_fraction_says(n, fraction, expected):
    names = [f'{i}.jpg' for i in range(n)]
    val_names, note = split_by_hash(names, DatasetRequest('x', val_fraction=fraction))
    assert len(val_names) == expected and f'{expected} of {n} images' in note


def test_val_split_without_train_is_tested(toy_dataset, tmp_path):
    as_coco_2017(toy_dataset, tmp_path / 'my_data')
    for path in (tmp_path / 'my_data/annotations').glob('*train*'):
        path.unlink()
    data = read_data(DatasetRequest(str(tmp_path / 'my_data')), 'detection', ('test',))
    assert len(data.splits['test']['images']) == N_VAL
    with pytest.raises(UsageError, match='no train'):
        read_data(DatasetRequest(str(tmp_path / 'my_data')), 'detection', ('train',))


def test_given_annotations_take_precedence_over_a_test_split(toy_dataset, tmp_path):
    as_roboflow(toy_dataset, tmp_path / 'my_data')
    shutil.copytree(tmp_path / 'my_data/train', tmp_path / 'my_data/test')
    ann_files = {'val': str(tmp_path / 'my_data/valid/_annotations.coco.json')}
    data = read_data(DatasetRequest(str(tmp_path / 'my_data'), ann_files=ann_files), 'detection', ('test',))
    assert len(data.splits['test']['images']) == N_VAL


def test_images_are_not_searched_in_mask_folders(toy_dataset, tmp_path):
    for folder, source in (('images', 'train'), ('annotations', 'labels/train')):
        shutil.copytree(toy_dataset / source, tmp_path / f'my_data/{folder}/train')
    shutil.copy(toy_dataset / 'annotations/instances_train.json', tmp_path / 'my_data/annotations')
    data = read_data(DatasetRequest(str(tmp_path / 'my_data'), val_fraction=0.3), 'detection', ('train',))
    assert all(i['file_name'].startswith('images/train/') for i in data.splits['train']['images'])
