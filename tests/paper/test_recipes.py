"""Recipes against the original: sizes, learning rates, pipelines, in closed form or by the table of results."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, init_default_scope

from convnext_dense.config.recipe import training_precision
from convnext_dense.models.convnext import ARCHS
from convnext_dense.optim.layer_decay import layer_ids
from convnext_dense.paper.flops import build_on_meta
from convnext_dense.paper.recipe_diff import diff_from_recipe
from convnext_dense.paper.results import PAPER_RESULTS, RESULTS, TOTAL_BATCH, find_paper_result
from helpers.paths import ROOT
from helpers.recipes import SEGMENTATION, SIZES, load, lrs_over_iterations

# The lr scales of stem, first stage, downsample 1, first and last block of the third stage, last stage, output norm.
PLACES = (
    'downsample_layers.0.0.weight',
    'stages.0.0.gamma',
    'downsample_layers.1.1.weight',
    'stages.2.0.gamma',
    'stages.2.{last}.gamma',
    'stages.3.0.gamma',
    'norm3.weight',
)
SCALES = {
    ('layer_wise', 0.95, 6): (0.698337, 0.735092, 0.773781, 0.814506, 0.9025, 0.95, 1),
    ('layer_wise', 0.7, 6): (0.0823543, 0.117649, 0.16807, 0.2401, 0.49, 0.7, 1),
    ('layer_wise', 0.7, 12): (0.00968890, 0.0138413, 0.0197733, 0.0282475, 0.49, 0.7, 1),
    ('layer_wise', 0.8, 12): (0.0549756, 0.0687195, 0.0858993, 0.107374, 0.64, 0.8, 1),
    ('stage_wise', 0.9, 6): (0.478297, 0.531441, 0.478297, 0.6561, 0.6561, 0.729, 1),
    ('stage_wise', 0.9, 12): (0.254187, 0.282430, 0.254187, 0.348678, 0.348678, 0.387420, 1),
}
DETECTION = [result.recipe for result in PAPER_RESULTS if result.is_detection]
EVERY_CONFIG = sorted(str(p.relative_to(ROOT / 'configs'))[:-3] for p in (ROOT / 'configs').glob('[!_]*/*.py'))
result_ids = {'ids': lambda result: result.recipe}


def build(config: Config) -> torch.nn.Module:
    return build_on_meta(config.model)


def test_every_result_has_a_recipe_and_every_recipe_a_result():
    assert [result.recipe for result in PAPER_RESULTS] == list(SIZES)
    assert {name for name in EVERY_CONFIG if not name.startswith('demo/')} == {result.recipe for result in RESULTS}


@pytest.mark.parametrize('result', PAPER_RESULTS, **result_ids)
def test_recipe_settings_equal_its_result(result):
    config = load(result.recipe)
    assert find_paper_result(config) is result and diff_from_recipe(config, result) == []
    assert training_precision(config) == result.precision
    assert config.model.backbone.init_cfg == dict(type='Pretrained', checkpoint=result.weights)
    assert config.train_dataloader.batch_size * 8 == config.total_batch == TOTAL_BATCH  # on 8 GPUs
    channels = list(ARCHS[result.arch]['channels'])
    model = config.model
    assert (model.neck.in_channels if result.is_detection else model.decode_head.in_channels) == channels
    title = (ROOT / 'configs' / f'{result.recipe}.py').read_text().splitlines()[0]
    for name in ('box AP', 'mask AP', 'mIoU'):
        assert name not in result.metrics or f'{result.metrics[name]} {name}' in title
    assert str(result.metrics.get('mIoU multi-scale', '')) in title and 'in the paper' in title


def test_other_configs_have_no_paper_result():
    config = load('cascade/convnext_s')
    config.model.backbone.drop_path_rate = 0.5
    assert find_paper_result(config) is None
    assert (
        find_paper_result(load('demo/upernet'))
        is find_paper_result(Config())
        is find_paper_result(Config(dict(model=dict(type='MaskRCNN'))))
        is None
    )


def test_changed_settings_are_reported():
    config = load('upernet/convnext_s')
    config.optim_wrapper.optimizer.lr = 2e-4
    config.train_cfg.max_iters = 320_000
    config.model.backbone.init_cfg.checkpoint = '/data/other.pth'
    assert diff_from_recipe(config, find_paper_result(config)) == ['optimizer.lr', 'length', 'weights']
    config.optim_wrapper.update(accumulative_counts=2, optimizer=dict(config.optim_wrapper.optimizer, lr=1e-4))
    config.model.backbone.init_cfg.checkpoint = '/data/convnext_small_1k_224.pth'
    assert diff_from_recipe(config, find_paper_result(config)) == []


@pytest.mark.parametrize('result', PAPER_RESULTS, **result_ids)
def test_parameters_equal_the_original_code(result):
    model = build(load(result.recipe))
    n_parameters = sum(p.numel() for p in model.parameters())
    assert (n_parameters, len(model.state_dict())) == SIZES[result.recipe]
    assert round(n_parameters / 1e6) == result.params_m


@pytest.mark.parametrize('result', PAPER_RESULTS, **result_ids)
def test_lr_and_weight_decay_of_every_parameter(result):
    config = load(result.recipe)
    model = build(config)
    wrapper_cfg = copy.deepcopy(config.optim_wrapper)
    wrapper_cfg.pop('type')
    assert 'clip_grad' not in wrapper_cfg
    optimizer = build_optim_wrapper(model, wrapper_cfg).optimizer
    assert type(optimizer) is torch.optim.AdamW
    groups = {id(p): group for group in optimizer.param_groups for p in group['params']}
    n = 6 if result.arch == 'tiny' else 12
    decay_type = 'layer_wise' if result.is_detection else 'stage_wise'
    ids, _ = layer_ids(model, decay_type)  # itself tested against the original's description
    assert len(groups) == len(ids) == len(list(model.parameters()))
    for parameter_name, p in model.named_parameters():
        group = groups[id(p)]
        assert group['lr'] == pytest.approx(result.lr * result.decay_rate ** (n + 1 - ids[parameter_name]), rel=1e-12)
        assert group['weight_decay'] == (0 if p.ndim == 1 or parameter_name.endswith('.bias') else 0.05)
        assert group['betas'] == (0.9, 0.999) and group['eps'] == 1e-8
    parameters = dict(model.named_parameters())
    for place, scale in zip(PLACES, SCALES[decay_type, result.decay_rate, n]):
        name = 'backbone.' + place.format(last=model.backbone.depths[2] - 1)
        assert groups[id(parameters[name])]['lr'] == pytest.approx(result.lr * scale, rel=2e-6), name
    head_lrs = {groups[id(p)]['lr'] for n, p in model.named_parameters() if not n.startswith('backbone.')}
    assert head_lrs == {result.lr}


def assert_equal_keys(names: list[str], *keys: str) -> Config:
    """The config of the first recipe, once the others are seen to have the same under these keys."""
    config, *other_configs = map(load, names)
    for other_config in other_configs:
        for key in keys:
            assert other_config[key] == config[key], key
    return config


def test_coco_schedule():
    """Linear warmup over 500 iterations from 0.001, steps of 0.1 after epochs 27 and 33 of 36."""
    config = assert_equal_keys(DETECTION, 'param_scheduler', 'train_cfg', 'default_hooks')
    assert config.train_cfg == dict(type='EpochBasedTrainLoop', max_epochs=36, val_interval=1)
    length = 40  # iterations an epoch; 7330 on COCO
    iterations = [0, 1, 250, 499, 500, 501, 27 * length - 1, 27 * length, 33 * length - 1, 33 * length, 36 * length - 1]
    for iteration, lr in lrs_over_iterations(config, iterations, length).items():
        warmup = 1 - (1 - min(iteration / 500, 1)) * (1 - 1e-3)
        epoch = iteration // length
        assert lr == pytest.approx(warmup * 0.1 ** ((epoch >= 27) + (epoch >= 33)), rel=1e-9), iteration


def test_ade20k_schedule():
    """Poly of power 1 to 0 over 160,000 iterations, times linear warmup over 1500 from 1e-6."""
    config = assert_equal_keys(SEGMENTATION, 'param_scheduler', 'train_cfg', 'default_hooks')
    assert config.train_cfg == dict(type='IterBasedTrainLoop', max_iters=160_000, val_interval=16_000)
    iterations = [0, 1, 250, 1499, 1500, 1501, 80_000, 159_999]
    for iteration, lr in lrs_over_iterations(config, iterations).items():
        warmup = 1 - (1 - min(iteration / 1500, 1)) * (1 - 1e-6)
        assert lr == pytest.approx(warmup * (1 - iteration / 160_000), rel=1e-9), iteration


def test_differences_between_the_two_detectors():
    mask, cascade = (load(name).model for name in DETECTION[:2])
    for model in (mask, cascade):
        assert model.data_preprocessor.pad_size_divisor == 32 and model.backbone.layer_scale_init_value == 1.0
        assert model.neck.num_outs == 5 and 'norm_cfg' not in model.neck
        anchors = model.rpn_head.anchor_generator
        assert (anchors.scales, anchors.ratios, anchors.strides) == ([8], [0.5, 1.0, 2.0], [4, 8, 16, 32, 64])
        assert model.train_cfg.rpn.sampler.num == 256 and model.train_cfg.rpn_proposal.nms_pre == 2000
        assigner = model.train_cfg.rpn.assigner
        assert (assigner.pos_iou_thr, assigner.neg_iou_thr, assigner.min_pos_iou) == (0.7, 0.3, 0.3)
        for extractor, size in ((model.roi_head.bbox_roi_extractor, 7), (model.roi_head.mask_roi_extractor, 14)):
            assert extractor.roi_layer == dict(type='RoIAlign', output_size=size, sampling_ratio=0)
        assert model.roi_head.mask_head.num_convs == 4
        test = model.test_cfg
        assert (test.rpn.nms_pre, test.rpn.max_per_img, test.rpn.nms.iou_threshold) == (1000, 1000, 0.7)
        assert (test.rcnn.score_thr, test.rcnn.nms.iou_threshold, test.rcnn.max_per_img) == (0.05, 0.5, 100)
        assert test.rcnn.mask_thr_binary == 0.5
    assert mask.rpn_head.loss_bbox.type == 'L1Loss'
    assert cascade.rpn_head.loss_bbox == dict(type='SmoothL1Loss', beta=1 / 9, loss_weight=1.0)
    assert (mask.train_cfg.rpn.allowed_border, cascade.train_cfg.rpn.allowed_border) == (-1, 0)
    assert (mask.train_cfg.rpn_proposal.max_per_img, cascade.train_cfg.rpn_proposal.max_per_img) == (1000, 2000)
    assert mask.train_cfg.rcnn.assigner.pos_iou_thr == 0.5 and mask.train_cfg.rcnn.assigner.match_low_quality
    assert [s.assigner.pos_iou_thr for s in cascade.train_cfg.rcnn] == [0.5, 0.6, 0.7]
    assert not any(s.assigner.match_low_quality for s in cascade.train_cfg.rcnn)
    assert mask.roi_head.bbox_head.type == 'FP32Shared2FCBBoxHead'
    assert mask.roi_head.bbox_head.loss_bbox == dict(type='L1Loss', loss_weight=1.0)
    assert not mask.roi_head.bbox_head.reg_class_agnostic
    assert cascade.roi_head.stage_loss_weights == [1, 0.5, 0.25]
    for head, stds in zip(
        cascade.roi_head.bbox_head, ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
    ):
        assert head.bbox_coder.target_stds == stds and head.reg_decoded_bbox and not head.reg_class_agnostic
        assert head.loss_bbox == dict(type='GIoULoss', loss_weight=10.0) and head.norm_cfg.type == 'SyncBN'
        assert (head.type, head.num_shared_convs, head.num_shared_fcs) == ('FP32ConvFCBBoxHead', 4, 1)


def test_cascades_differ_in_backbone_only():
    cascade, *other_configs = (load(name).model for name in DETECTION[1:])
    for other_config in other_configs:
        other_config.update(backbone=cascade.backbone, neck=cascade.neck)
        assert other_config == cascade


def test_coco_data():
    config = assert_equal_keys(DETECTION, 'train_pipeline', 'train_dataloader', 'test_dataloader', 'test_evaluator')
    _, _, flip, choice, _ = config.train_pipeline
    assert flip == dict(type='RandomFlip', prob=0.5)
    sides = [(side, 1333) for side in range(480, 801, 32)]
    reference, cropped = choice.transforms
    assert reference == [dict(type='RandomChoiceResize', scales=sides, keep_ratio=True)]
    assert cropped == [
        dict(type='RandomChoiceResize', scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True),
        dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600), allow_negative_crop=True),
        *reference,
    ]
    assert dict(type='Resize', scale=(1333, 800), keep_ratio=True) in config.test_pipeline
    assert config.test_dataloader.batch_size == 1
    assert config.val_evaluator.metric == ['bbox', 'segm']
    assert config.default_hooks.checkpoint.interval == config.train_cfg.val_interval


@pytest.mark.parametrize('name', SEGMENTATION)
def test_upernet_model_and_data(name):
    config = load(name)
    long, crop = find_paper_result(config).size
    stride = crop * 2 // 3
    head, auxiliary = config.model.decode_head, config.model.auxiliary_head
    assert (head.channels, head.pool_scales, head.dropout_ratio, head.num_classes) == (512, (1, 2, 3, 6), 0.1, 150)
    assert (auxiliary.in_index, auxiliary.num_convs, auxiliary.channels) == (2, 1, 256)
    assert not auxiliary.concat_input and auxiliary.loss_decode.loss_weight == 0.4
    assert head.norm_cfg.type == auxiliary.norm_cfg.type == 'SyncBN'
    assert 'avg_non_ignore' not in head.loss_decode
    assert config.model.test_cfg == dict(mode='slide', crop_size=(crop, crop), stride=(stride, stride))
    preprocessor = config.model.data_preprocessor
    assert (preprocessor.size, preprocessor.pad_val, preprocessor.seg_pad_val) == ((crop, crop), 0, 255)
    assert config.train_pipeline[2:-1] == [
        dict(type='RandomResize', scale=(long, crop), ratio_range=(0.5, 2.0), keep_ratio=True),
        dict(type='RandomCrop', crop_size=(crop, crop), cat_max_ratio=0.75),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PhotoMetricDistortion'),
    ]
    assert config.train_dataloader.dataset.pipeline == config.train_pipeline
    for dataloader in (config.val_dataloader, config.test_dataloader):
        assert dict(type='Resize', scale=(long, crop), keep_ratio=True) in dataloader.dataset.pipeline
    assert config.default_hooks.checkpoint.interval == config.train_cfg.val_interval


@pytest.mark.parametrize('name', EVERY_CONFIG)
def test_every_config_builds(name):
    config = load(name)
    assert build(config)
    for split in ('train', 'val', 'test'):
        dataset = config[f'{split}_dataloader'].dataset
        assert DATASETS.build({**dataset, 'lazy_init': True}).metainfo['classes']
    assert config.custom_imports.imports[0] == 'convnext_dense'


def test_base_config_from_any_folder(tmp_path, monkeypatch):
    """`convnext_dense::` finds the recipe, and what comes by it builds in mmdet's scope, from the root or a child."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'mine.py').write_text(
        "_base_ = 'convnext_dense::cascade/convnext_t.py'\n"
        'model = dict(backbone=dict(arch="atto"), neck=dict(in_channels=[40, 80, 160, 320]))'
    )
    config = Config.fromfile('mine.py')
    init_default_scope(config.default_scope)
    model = build(config)
    assert model.backbone.channels[0] == 40 and type(model).__name__ == 'CascadeRCNN'
    assert config.test_cfg.type == 'TestLoop'


@pytest.mark.parametrize(
    'name, variable',
    [('cascade/convnext_t', 'COCO_ROOT'), ('upernet/convnext_t', 'ADE20K_ROOT'), ('demo/mask_rcnn', 'SHAPES_ROOT')],
)
def test_data_folder_by_environment(name, variable, monkeypatch):
    monkeypatch.setenv(variable, '/elsewhere')
    config = load(name)
    assert config.train_dataloader.dataset.data_root == '/elsewhere/'
    assert config.val_evaluator.get('ann_file', '/elsewhere/').startswith('/elsewhere/')
