"""Mask2Former's recipes against their source, value by value.

facebookresearch/Mask2Former (9b0651c) and its pull request #34: train_net.py, maskformer2_R50_bs16_160k.yaml,
maskformer2_convnext_base_384_160k_res640.yaml, maskformer2_swin_base_IN21k_384_bs16_50ep.yaml; and mmdet's and mmseg's
own configs of its heads.
"""

import copy
import inspect
from pathlib import Path

import mmdet
import mmseg
import pytest
import torch
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, set_random_seed

from convnext_dense.checkpoints import WEIGHT_URLS
from convnext_dense.config.image_size import set_image_size
from convnext_dense.config.recipe import training_precision
from convnext_dense.datasets import toy_shapes
from convnext_dense.datasets.configure import set_num_classes
from convnext_dense.paper.flops import build_on_meta, count_flops
from convnext_dense.paper.recipe_diff import diff_from_recipe
from convnext_dense.paper.results import RESULTS, find_paper_result
from helpers.paths import ROOT
from helpers.recipes import load, lrs_over_iterations

ADE20K, COCO = 'mask2former/convnext_b_in22k_ade20k', 'mask2former/convnext_b_in22k_coco'
STOCK = {
    ADE20K: Path(mmseg.__path__[0], '.mim/configs/mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py'),
    COCO: Path(mmdet.__path__[0], '.mim/configs/mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'),
}
NORMS = (torch.nn.GroupNorm, torch.nn.LayerNorm)
BOTH = pytest.mark.parametrize('name', [ADE20K, COCO])


@pytest.mark.parametrize('name, drop_path, lr, batch', [(ADE20K, 0.4, 4e-4, 64), (COCO, 0.6, 1e-4, 16)])
def test_recipe_values_equal_the_source(name, drop_path, lr, batch):
    config = load(name)
    result = next(result for result in RESULTS if result.recipe == name)
    assert find_paper_result(config) is result and diff_from_recipe(config, result) == []
    assert training_precision(config) == result.precision == 'float32'
    assert config.model.backbone == dict(
        type='ConvNeXt', arch='base', drop_path_rate=drop_path, layer_scale_init_value=1.0, out_indices=[0, 1, 2, 3],
        init_cfg=dict(type='Pretrained', checkpoint='convnext_base_22k_1k_384'),
    )  # fmt: skip
    assert 'convnext_base_22k_1k_384' in WEIGHT_URLS
    assert config.optim_wrapper.optimizer == dict(type='AdamW', lr=lr, betas=(0.9, 0.999), weight_decay=0.05)
    assert config.optim_wrapper.clip_grad == dict(max_norm=0.01, norm_type=2)
    assert config.total_batch == batch == 8 * config.train_dataloader.batch_size
    title = (ROOT / f'configs/{name}.py').read_text().splitlines()[0]
    assert 'PR #34: 55.06 mIoU' in title if name == ADE20K else 'untrained' in title
    assert result.metrics == ({'mIoU': 55.06} if name == ADE20K else {})


def parameter_groups(name: str) -> list[tuple[str, torch.nn.Module, str, dict]]:
    """Name of each parameter, the module that holds it, its name there, and its parameter group."""
    config = load(name)
    model = build_on_meta(config.model)
    optimizer = build_optim_wrapper(model, copy.deepcopy(config.optim_wrapper)).optimizer
    groups = {id(p): group for group in optimizer.param_groups for p in group['params']}
    assert len(groups) == len(list(model.parameters()))
    return [
        (f'{path}.{leaf}', module, leaf, groups[id(p)])
        for path, module in model.named_modules()
        for leaf, p in module.named_parameters(recurse=False)
    ]


def test_lr_and_weight_decay_equal_train_net():
    """As its build_optimizer: a tenth of the lr in the backbone; norms that PyTorch has and embeddings do not decay.

    ConvNeXt's LayerNorm was none of PyTorch's there, and the level embedding of the pixel decoder a parameter.
    """
    counts = {}
    for name, module, _, group in parameter_groups(ADE20K):
        in_backbone = name.startswith('backbone.')
        is_embedding = isinstance(module, torch.nn.Embedding) and 'pixel_decoder' not in name
        kind = 'norm' if isinstance(module, NORMS) else 'embedding' if is_embedding else 'other'
        counts[kind, in_backbone] = counts.get((kind, in_backbone), 0) + 1
        assert group['lr'] == pytest.approx(4e-5 if in_backbone else 4e-4), name
        assert group['weight_decay'] == (0 if kind != 'other' and not in_backbone else 0.05), name
    assert counts['embedding', False] == 3 and counts['norm', False] > 40 and counts['norm', True] > 80


def test_layer_decay_with_queries():
    """Of the recipe of this project: embeddings of the head do not decay, nor biases and vectors of any part."""
    lrs = {}
    for name, module, leaf, group in parameter_groups(COCO):
        is_embedding = isinstance(module, torch.nn.Embedding) and 'pixel_decoder' not in name
        parameter = getattr(module, leaf)
        decays = parameter.ndim > 1 and leaf != 'bias' and not is_embedding
        assert group['weight_decay'] == (0.05 if decays else 0), name
        lrs[name] = group['lr']
    for name, power in (
        ('backbone.downsample_layers.0.0.weight', 13),
        ('backbone.stages.3.2.gamma', 1),
        ('backbone.norm3.weight', 0),
        ('panoptic_head.query_feat.weight', 0),
        ('panoptic_head.level_embed.weight', 0),
        ('panoptic_head.pixel_decoder.level_encoding.weight', 0),
    ):
        assert lrs[name] == pytest.approx(1e-4 * 0.8**power), name


def test_schedules():
    """Poly of power 0.9 over 50,000 iterations, without warmup; and steps at 327,778 and 355,092 of 368,750."""
    config = load(ADE20K)
    assert config.train_cfg == dict(type='IterBasedTrainLoop', max_iters=50_000, val_interval=2500)
    assert config.default_hooks.checkpoint.interval == 2500
    for iteration, lr in lrs_over_iterations(config, [0, 1, 2500, 30_000, 49_999]).items():
        assert lr == pytest.approx((1 - iteration / 50_000) ** 0.9, rel=1e-9)
    config = load(COCO)
    assert config.train_cfg == dict(type='IterBasedTrainLoop', max_iters=368_750, val_interval=5000)
    (steps,) = config.param_scheduler
    assert (steps.type, steps.milestones, steps.gamma, steps.by_epoch) == ('MultiStepLR', [327778, 355092], 0.1, False)


def test_ade20k_pipelines():
    config = load(ADE20K)
    resize, crop, *final_transforms = config.train_dataloader.dataset.pipeline[2:]
    assert resize == dict(
        type='RandomChoiceResize', scales=[int(x * 0.1 * 640) for x in range(5, 21)], resize_type='ResizeShortestEdge',
        max_size=2560,
    )  # fmt: skip
    assert crop == dict(type='RandomCrop', crop_size=(640, 640))  # SINGLE_CATEGORY_MAX_AREA 1.0: any part of a class
    assert [step.type for step in final_transforms] == ['RandomFlip', 'PhotoMetricDistortion', 'PackSegInputs']
    assert config.train_pipeline == config.train_dataloader.dataset.pipeline
    for loader in (config.val_dataloader, config.test_dataloader):
        assert loader.dataset.pipeline[1] == dict(type='Resize', scale=(2560, 640), keep_ratio=True)
    assert config.model.data_preprocessor.size == (640, 640)
    assert config.model.data_preprocessor.test_cfg == dict(size_divisor=32) and config.model.test_cfg.mode == 'whole'
    set_image_size(config, 320)
    assert resize.scales[0] == 160 and resize.max_size == 1280 and crop.crop_size == (320, 320)


def without(value, *keys: str):
    """A setting without some keys, at any depth."""
    if isinstance(value, dict):
        return {k: without(v, *keys) for k, v in value.items() if k not in keys}
    return [without(v, *keys) for v in value] if isinstance(value, list) else value


@BOTH
def test_head_equals_mmdet_and_mmseg(name, monkeypatch):
    """Modules, numbers of weights, losses, matching and points of mmseg's and mmdet's own config."""
    # mmcv writes the dropout of a DETR, if one was built before, into this default.
    default = inspect.signature(MultiheadAttention.__init__).parameters['dropout_layer'].default
    monkeypatch.setitem(default, 'drop_prob', 0.0)
    config, stock = load(name), Config.fromfile(STOCK[name], import_custom_modules=False)
    key = 'decode_head' if name == ADE20K else 'panoptic_head'
    head, stock_head = config.model[key], stock.model[key]
    stock_head.in_channels = head.in_channels
    heads = [build_on_meta(head) for head in (copy.deepcopy(head), copy.deepcopy(stock_head))]
    ours_text, theirs_text = (str(head).replace('Dropout(p=0.0, inplace=False)', 'Identity()') for head in heads)
    assert ours_text == theirs_text
    shapes = [{n: tuple(p.shape) for n, p in head.state_dict().items()} for head in heads]
    assert shapes[0] == shapes[1]
    for loss in ('loss_cls', 'loss_mask', 'loss_dice'):
        assert {**head[loss], 'type': 0} == {**stock_head[loss], 'type': 0}
    holder = (lambda c: c.model.decode_head) if name == ADE20K else (lambda c: c.model)
    points = [holder(c).train_cfg for c in (config, stock)]
    assert without(points[0], 'type') == without(points[1], 'type')
    costs = [[cost.type.removeprefix('mmdet.') for cost in cfg.assigner.match_costs] for cfg in points]
    assert costs[0] == costs[1]


def test_instance_recipe_equals_mmdet():
    config, stock = load(COCO), Config.fromfile(STOCK[COCO], import_custom_modules=False)
    unimportant = ('backend_args', 'to_float32', 'resize_type')
    assert without(config.train_pipeline, *unimportant) == without(stock.train_pipeline, *unimportant)
    assert config.train_pipeline == config.train_dataloader.dataset.pipeline
    assert config.test_dataloader == load('mask_rcnn/convnext_t').test_dataloader
    assert config.model.data_preprocessor == without(stock.model.data_preprocessor, 'seg_pad_value')
    assert config.model.test_cfg == {**stock.model.test_cfg, 'panoptic_on': False}
    head, stock_head = config.model.panoptic_fusion_head, stock.model.panoptic_fusion_head
    assert {**head, 'init_cfg': None} == stock_head
    assert config.train_cfg.max_iters == stock.train_cfg.max_iters
    assert config.param_scheduler[0].milestones == stock.param_scheduler.milestones


@pytest.mark.parametrize('name, gflops, parameters', [(ADE20K, 742.25, 107_610_071), (COCO, 464.48, 107_592_081)])
def test_counts(name, gflops, parameters):
    """Nobody published any; Mask2Former's paper has 107M for Swin-B, as large a backbone."""
    result = next(result for result in RESULTS if result.recipe == name)
    complexity = count_flops(load(name), result.size, result.counted)
    assert complexity.flops / 1e9 == pytest.approx(gflops, abs=0.01) and complexity.parameters == parameters


def test_flops_of_the_head_by_hand():
    """What Linears and convolutions of pixel decoder and decoder cost, by the sizes of the maps."""
    config = load(COCO)
    head, sides = config.model.panoptic_head, [16, 8, 4, 2]  # of an image of 64 x 64, at strides 4 to 32
    config.model.backbone.update(arch='tiny')
    head.update(in_channels=[96, 192, 384, 768])
    without_attention = count_flops(config, (64, 64), ()).flops
    attention = count_flops(config, (64, 64), {'attention'}).flops - without_attention
    maps = [side**2 for side in sides[:0:-1]] * 3  # of the nine layers of the decoder
    assert attention == sum(2 * 100 * (n + 100) * 256 for n in maps)  # across to a map, among the queries
    tokens, queries, c = sum(maps[:3]), 100, 256
    convolutions = sum(c * s**2 * n for n, s in zip(head.in_channels, sides)) + sides[0] ** 2 * (9 * c * c + c * c)
    encoder = 6 * tokens * (2 * c * c + 8 * 3 * 4 * 3 * c + 2 * c * 1024)
    decoder = 9 * queries * (4 * c * c + 2 * c * c + 2 * c * 2048) + sum(2 * n * c * c for n in maps)
    predictions = 10 * queries * (81 * c + 3 * c * c)
    backbone = load('mask_rcnn/convnext_t')
    expected = convolutions + encoder + decoder + predictions
    actual = without_attention - backbone_flops(backbone)
    assert actual == pytest.approx(expected, rel=0.01)  # biases and ReLUs


def backbone_flops(config: Config) -> int:
    """Of the backbone alone on an image of 64 x 64: with a head of one weight per channel."""
    head = dict(type='FCNHead', in_channels=768, channels=768, in_index=3, num_convs=0, concat_input=False,
                num_classes=1)  # fmt: skip
    segmentor = dict(type='EncoderDecoder', backbone=config.model.backbone, decode_head=head)
    return count_flops(Config(dict(default_scope='mmseg', model=segmentor)), (64, 64), ()).flops


@BOTH
def test_classes_follow_a_custom_data_set(name):
    model = load(name).model
    set_num_classes(model, 3)
    key = 'decode_head' if name == ADE20K else 'panoptic_head'
    assert build_on_meta(model[key]).cls_embed.out_features == 4
    assert model[key].loss_cls.class_weight == [1.0] * 3 + [0.1] and model[key].out_channels == 256
    assert name == ADE20K or model.panoptic_fusion_head.num_things_classes == 3


def test_demo_trains(tmp_path, monkeypatch):
    """On the embedded data set the loss falls, and every stage of the backbone learns."""
    toy_shapes.write(tmp_path / 'shapes', train=16, val=2, size=128)
    monkeypatch.setenv('SHAPES_ROOT', str(tmp_path / 'shapes'))
    config = load('demo/mask2former')
    set_random_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    wrapper = build_optim_wrapper(model, copy.deepcopy(config.optim_wrapper))
    config.train_dataloader.update(num_workers=0, persistent_workers=False, batch_size=2)
    batches = iter(Runner.build_dataloader(config.train_dataloader, seed=0))
    initial_weights = {name: parameter.clone() for name, parameter in model.backbone.named_parameters()}
    losses = [model.train_step(next(batches), wrapper)['loss'].item() for _ in range(30)]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5]), losses
    assert all(not torch.equal(p, initial_weights[name]) for name, p in model.backbone.named_parameters())


@pytest.fixture(autouse=True)
def scope():
    yield
    init_default_scope('mmdet')
