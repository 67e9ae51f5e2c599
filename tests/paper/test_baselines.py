"""The recipes of Swin, ResNet-50 and ResNeXt-101 against their sources, value by value.

Sources are Swin's repositories for detection (c7b2011) and segmentation (87e6f90), its paper, the ConvNeXt paper's A.3,
and mmdet's and mmseg's own Swin configs in test_recipes_vs_openmmlab.py.
"""

import copy

import mmdet
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner, set_random_seed

from convnext_dense.checkpoints.hub import WEIGHT_URLS, WEIGHTS
from convnext_dense.config.recipe import training_precision
from convnext_dense.datasets import toy_shapes
from convnext_dense.paper.flops import build_on_meta, count_flops
from convnext_dense.paper.recipe_diff import diff_from_recipe
from convnext_dense.paper.results import (
    BASELINE_RESULTS,
    DINO_RESULTS,
    LATER_RESULTS,
    PAPER_RESULTS,
    RESULTS,
    TOTAL_BATCH,
    UNTRAINED_RESULTS,
    find_paper_result,
)
from helpers.paths import ROOT
from helpers.recipes import load, lrs_over_iterations

RECIPES = {result.recipe: result for result in BASELINE_RESULTS}
SWIN = [name for name in RECIPES if 'swin' in name]
RESNETS = [name for name in RECIPES if 'resne' in name]
# recipe -> embed_dims, depths, num_heads; drop path rate, lr, weight decay, weights, precision.
TINY, SMALL = (96, [2, 2, 6, 2], [3, 6, 12, 24]), (96, [2, 2, 18, 2], [3, 6, 12, 24])
BASE, LARGE = (128, [2, 2, 18, 2], [4, 8, 16, 32]), (192, [2, 2, 18, 2], [6, 12, 24, 48])
SOURCE = {
    'mask_rcnn/swin_t': (TINY, 0.2, 1e-4, 0.05, 'swin_tiny_patch4_window7_224', 'float16'),
    'cascade/swin_t': (TINY, 0.2, 1e-4, 0.05, 'swin_tiny_patch4_window7_224', 'float16'),
    'cascade/swin_s': (SMALL, 0.2, 1e-4, 0.05, 'swin_small_patch4_window7_224', 'float16'),
    'cascade/swin_b': (BASE, 0.3, 1e-4, 0.05, 'swin_base_patch4_window7_224', 'float16'),
    'cascade/swin_b_in22k': (BASE, 0.3, 1e-4, 0.05, 'swin_base_patch4_window7_224_22k', 'float16'),
    'cascade/swin_l_in22k': (LARGE, 0.4, 1e-4, 0.05, 'swin_large_patch4_window7_224_22k', 'float32'),
    'upernet/swin_t': (TINY, 0.3, 6e-5, 0.01, 'swin_tiny_patch4_window7_224', 'float32'),
    'upernet/swin_s': (SMALL, 0.3, 6e-5, 0.01, 'swin_small_patch4_window7_224', 'float32'),
    'upernet/swin_b': (BASE, 0.3, 6e-5, 0.01, 'swin_base_patch4_window7_224', 'float32'),
    'upernet/swin_b_in22k': (BASE, 0.3, 6e-5, 0.01, 'swin_base_patch4_window7_224_22k', 'float32'),
    'upernet/swin_l_in22k': (LARGE, 0.3, 6e-5, 0.01, 'swin_large_patch4_window7_224_22k', 'float32'),
}
# In G, and parameters. Published are the rounded ones, but for UperNet Swin-B-22K's 1841.
COUNTS = {
    'mask_rcnn/swin_t': (266.89, 47_794_602),
    'cascade/resnet50': (739.01, 82_231_538),
    'cascade/resnext101_32x4d': (818.83, 100_852_210),
    'cascade/resnext101_64x4d': (972.31, 140_129_778),
    'cascade/swin_t': (745.46, 85_629_804),
    'cascade/swin_s': (837.58, 106_947_708),
    'cascade/swin_b': (982.11, 144_977_002),
    'cascade/swin_b_in22k': (982.11, 144_977_002),
    'cascade/swin_l_in22k': (1382.09, 253_475_910),
    'upernet/swin_t': (944.70, 59_941_862),
    'upernet/swin_s': (1037.81, 81_259_766),
    'upernet/swin_b': (1187.83, 121_279_716),
    'upernet/swin_b_in22k': (1839.93, 121_279_716),
    'upernet/swin_l_in22k': (2467.74, 233_759_936),
}
WRONG_GFLOPS = {'upernet/swin_b_in22k': 1840}


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_settings_equal_its_result(name):
    config, result = load(name), RECIPES[name]
    assert find_paper_result(config) is result and diff_from_recipe(config, result) == []
    assert training_precision(config) == result.precision
    assert config.train_dataloader.batch_size * 8 == config.total_batch == TOTAL_BATCH  # on 8 GPUs
    checkpoint = config.model.backbone.init_cfg.checkpoint
    assert WEIGHT_URLS[result.weights] == WEIGHT_URLS.get(checkpoint, checkpoint)
    assert result.released is None or result.released in WEIGHTS
    assert (result.released is None) == ('resne' in name or 'in22k' in name)
    title = (ROOT / 'configs' / f'{name}.py').read_text().splitlines()[0]
    for metric in ('box AP', 'mask AP', 'mIoU multi-scale'):
        assert metric not in result.metrics or f'{result.metrics[metric]} {metric}' in title
    assert 'in the paper' in title


def test_no_config_has_two_results():
    for result in RESULTS:
        config = load(result.recipe)
        assert find_paper_result(config) is result


@pytest.mark.parametrize('name', SWIN)
def test_swin_settings_equal_the_source(name):
    (embed_dims, depths, num_heads), drop_path_rate, lr, weight_decay, weights, precision = SOURCE[name]
    config = load(name)
    backbone = config.model.backbone
    assert backbone == dict(
        type='StrictSwinTransformer', embed_dims=embed_dims, depths=depths, num_heads=num_heads, window_size=7,
        mlp_ratio=4, qkv_bias=True, patch_norm=True, drop_path_rate=drop_path_rate, out_indices=(0, 1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint=weights),
    )  # fmt: skip
    assert config.optim_wrapper.optimizer == dict(type='AdamW', lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay)
    assert config.optim_wrapper.type == ('AmpOptimWrapper' if precision == 'float16' else 'OptimWrapper')
    channels = [embed_dims * 2**i for i in range(4)]
    model = config.model
    if 'neck' in model:
        assert model.neck.in_channels == channels
    else:
        assert model.decode_head.in_channels == channels and model.auxiliary_head.in_channels == channels[2]
    built = build_on_meta(model).backbone
    assert built.use_abs_pos_embed is False and built.patch_embed.norm is not None
    assert [type(getattr(built, f'norm{i}')) for i in range(4)] == [torch.nn.LayerNorm] * 4


@pytest.mark.parametrize('name', RECIPES)
def test_lr_and_weight_decay_of_every_parameter(name):
    config = load(name)
    model = build_on_meta(config.model)
    wrapper_cfg = copy.deepcopy(config.optim_wrapper)
    del wrapper_cfg.type
    assert 'clip_grad' not in wrapper_cfg
    optimizer = build_optim_wrapper(model, wrapper_cfg).optimizer
    assert type(optimizer) is torch.optim.AdamW
    groups = {id(p): group for group in optimizer.param_groups for p in group['params']}
    base_lr, weight_decay = (6e-5, 0.01) if name.startswith('upernet') else (1e-4, 0.05)
    kinds = {'position table': 0, 'norm': 0, 'bias': 0, 'norm of a head': 0}
    for parameter_name, parameter in model.named_parameters():
        group = groups[id(parameter)]
        path = parameter_name.split('.')
        is_norm = any('norm' in part for part in path)
        is_table = path[-1] == 'relative_position_bias_table'
        exempt = 'swin' in name and (is_norm or is_table)
        assert group['weight_decay'] == (0 if exempt else weight_decay), parameter_name
        scale = 0.9 ** (25 - swin_layer(path)) if name in ('cascade/swin_b_in22k', 'cascade/swin_l_in22k') else 1
        assert group['lr'] == pytest.approx(base_lr * scale, rel=1e-12), parameter_name
        assert group['betas'] == (0.9, 0.999) and group['eps'] == 1e-8
        kinds['position table'] += is_table
        kinds['norm'] += is_norm
        kinds['norm of a head'] += 'bn' in path
        kinds['bias'] += path[-1] == 'bias' and not is_norm
    if 'swin' in name:
        assert kinds['position table'] == sum(SOURCE[name][0][1]) and kinds['norm'] and kinds['bias']
        assert bool(kinds['norm of a head']) == (not name.startswith('mask_rcnn'))  # of SyncBN, which decays


def swin_layer(path: list[str]) -> int:
    """Of 24 blocks; the downsampling layers have the number of the block before them."""
    if path[:2] == ['backbone', 'patch_embed']:
        return 0
    if path[:2] != ['backbone', 'stages']:
        return 25
    stage, last_layer = int(path[2]), (2, 4, 22, 24)[int(path[2])]
    return last_layer if path[3] == 'downsample' else (0, 2, 4, 22)[stage] + 1 + int(path[4])


@pytest.mark.parametrize('name', [name for name in RECIPES if not name.startswith('upernet')])
def test_detectors_differ_from_convnexts_in_backbone_and_optimizer_only(name):
    """Heads, images, augmentations, test settings and batch: test_recipes.py compares ConvNeXt's with the paper."""
    config = load(name)
    reference = load('mask_rcnn/convnext_t' if name.startswith('mask_rcnn') else 'cascade/convnext_t')
    parts = ('train_dataloader', 'val_dataloader', 'test_dataloader', 'val_evaluator', 'test_evaluator', 'train_cfg')
    for part in (*parts, 'param_scheduler', 'default_hooks', 'total_batch'):
        assert config[part] == reference[part], part
    config.model.backbone = reference.model.backbone
    config.model.neck.in_channels = reference.model.neck.in_channels
    assert config.model == reference.model
    assert config.train_cfg.max_epochs == 36
    length = 40  # iterations an epoch
    iterations = [0, 1, 499, 500, 501, 27 * length - 1, 27 * length, 33 * length - 1, 33 * length, 36 * length - 1]
    for iteration, lr in lrs_over_iterations(config, iterations, length).items():
        warmup = 1 - (1 - min(iteration / 500, 1)) * (1 - 1e-3)
        epoch = iteration // length
        assert lr == pytest.approx(warmup * 0.1 ** ((epoch >= 27) + (epoch >= 33)), rel=1e-9), iteration


@pytest.mark.parametrize('name', [name for name in RECIPES if name.startswith('upernet')])
def test_segmentors_differ_from_convnexts_in_backbone_optimizer_and_test_only(name):
    config = load(name)
    reference = load('upernet/convnext_b_in22k' if 'in22k' in name else 'upernet/convnext_t')
    parts = ('train_dataloader', 'val_dataloader', 'test_dataloader', 'val_evaluator', 'test_evaluator', 'train_cfg')
    for part in (*parts, 'param_scheduler', 'default_hooks', 'total_batch'):
        assert config[part] == reference[part], part
    assert config.model.test_cfg == dict(mode='whole')
    config.model.backbone, config.model.test_cfg = reference.model.backbone, reference.model.test_cfg
    config.model.decode_head.in_channels = reference.model.decode_head.in_channels
    config.model.auxiliary_head.in_channels = reference.model.auxiliary_head.in_channels
    assert config.model == reference.model
    assert config.train_cfg.max_iters == 160_000
    for iteration, lr in lrs_over_iterations(config, [0, 1, 1499, 1500, 1501, 5000]).items():
        warmup = 1 - (1 - min(iteration / 1500, 1)) * (1 - 1e-6)
        assert lr == pytest.approx(warmup * (1 - iteration / 160_000), rel=1e-9), iteration


@pytest.mark.parametrize('name', RESNETS)
def test_resnets_equal_mmdets_configs(name):
    """The backbone of mmdet's own Cascade Mask R-CNN; the optimizer of the Swin paper, A2.2 and table 9."""
    stock_name = {
        'cascade/resnet50': 'r50',
        'cascade/resnext101_32x4d': 'x101-32x4d',
        'cascade/resnext101_64x4d': 'x101-64x4d',
    }[name]
    file = f'{mmdet.__path__[0]}/.mim/configs/cascade_rcnn/cascade-mask-rcnn_{stock_name}_fpn_ms-3x_coco.py'
    stock = Config.fromfile(file).model
    config = load(name)
    backbone, stock_backbone = dict(config.model.backbone), dict(stock.backbone)
    del backbone['init_cfg'], stock_backbone['init_cfg']
    assert backbone == {**stock_backbone, 'norm_eval': True}  # the default of the class
    assert config.model.neck.in_channels == stock.neck.in_channels
    assert config.optim_wrapper == dict(
        type='AmpOptimWrapper', optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
    )


@pytest.mark.parametrize('name', RECIPES)
def test_counts_equal_published_values(name):
    result = RECIPES[name]
    complexity = count_flops(load(name), result.size, result.counted)
    gflops, parameters = COUNTS[name]
    assert complexity.flops / 1e9 == pytest.approx(gflops, abs=0.01) and complexity.parameters == parameters
    assert round(gflops) == WRONG_GFLOPS.get(name, result.gflops)
    assert result.params_m in (None, round(parameters / 1e6))


def test_attention_by_hand():
    """Two products of 49 x 49 per window and block; windows are padded, and the third map is smaller than one."""
    config = load('upernet/swin_t')
    config.model.backbone.update(embed_dims=24, depths=[1, 1, 1, 1], num_heads=[3, 3, 3, 3])
    config.model.decode_head.in_channels = [24, 48, 96, 192]
    config.model.auxiliary_head.in_channels = 96
    with_attention, without = (count_flops(config, (96, 64), counted).flops for counted in ({'attention'}, ()))
    windows = [3 * 4, 2 * 2, 1, 1]  # maps of 16 x 24, 8 x 12, 4 x 6 and 2 x 3
    assert with_attention - without == sum(2 * n * 49**2 * 24 * 2**i for i, n in enumerate(windows))
    layer_norms = count_flops(config, (96, 64), {'LayerNorm'}).flops - without
    assert 0 < layer_norms < without / 100
    assert count_flops(config, (96, 64), {'SyncBN'}).flops > without


def test_differences_between_recipes_are_lines():
    """Recipes of one model that differ by a fact differ by that line."""
    folder = ROOT / 'configs'
    small, tiny = ((folder / f'cascade/swin_{size}.py').read_text().splitlines() for size in 'st')
    mask = (folder / 'mask_rcnn/swin_t.py').read_text().splitlines()
    assert sum(a != b for a, b in zip(small[2:], tiny[2:])) == 2  # depths, weights
    assert [a for a, b in zip(tiny[2:], mask[2:]) if a != b] == [
        "_base_ = ['../_base_/cascade_mask_rcnn_3x_swin.py', '../_base_/coco.py']"
    ]


def test_demo_trains(tmp_path, monkeypatch):
    """The UperNet recipe with a small Swin on the embedded data set: the loss falls."""
    toy_shapes.write(tmp_path / 'shapes', train=16, val=2, size=128)
    monkeypatch.setenv('SHAPES_ROOT', str(tmp_path / 'shapes'))
    config = load('demo/upernet_swin')
    set_random_seed(0)
    model = MODELS.build(config.model)
    for module in model.modules():
        if isinstance(module, torch.nn.SyncBatchNorm):  # which needs a GPU
            module.__class__ = torch.nn.BatchNorm2d
    model.init_weights()
    wrapper_cfg = copy.deepcopy(config.optim_wrapper)
    wrapper = build_optim_wrapper(model, wrapper_cfg)
    config.train_dataloader.update(num_workers=0, persistent_workers=False, batch_size=4)
    batches = iter(Runner.build_dataloader(config.train_dataloader, seed=0))
    initial = {name: parameter.clone() for name, parameter in model.backbone.named_parameters()}
    losses = [model.train_step(next(batches), wrapper)['loss'].item() for _ in range(40)]
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10]), losses
    assert all(not torch.equal(p, initial[name]) for name, p in model.backbone.named_parameters())


def test_released_names_equal_the_swin_authors():
    assert {result.released for result in BASELINE_RESULTS if result.released} == {
        name for name, entry in WEIGHTS.items() if entry.backbone == 'Swin' and '_224' not in name
    }
    assert len({result.recipe for result in RESULTS}) == len(RESULTS)
    assert RESULTS == PAPER_RESULTS + BASELINE_RESULTS + LATER_RESULTS + DINO_RESULTS + UNTRAINED_RESULTS
    assert len(BASELINE_RESULTS) == 14
