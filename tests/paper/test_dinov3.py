"""The recipes with weights of DINOv3 against their sources, value by value.

Of the linear ones that is facebookresearch/dinov3 (6876159), dinov3/eval/segmentation: its
configs/config-ade20k-linear-training.yaml, schedulers.py, transforms.py and models/heads/linear_head.py.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from convnext_dense.checkpoints.hub import WEIGHTS
from convnext_dense.config.recipe import training_precision
from convnext_dense.models.convnext import ARCHS
from convnext_dense.paper.flops import count_flops
from convnext_dense.paper.recipe_diff import diff_from_recipe
from convnext_dense.paper.results import RESULTS, find_paper_result
from helpers.foreign_weights import TIMM, original_weights, rename_to_library, save_pth
from helpers.paths import ROOT
from helpers.recipes import load, lrs_over_iterations

MIOU = {'t': 42.7, 's': 44.8, 'b': 46.3, 'l': 47.8}
SIZES = {'t': 'tiny', 's': 'small', 'b': 'base', 'l': 'large'}
LETTERS = pytest.mark.parametrize('letter', SIZES)
UNTRAINED = [result.recipe for result in RESULTS if result.pretraining == 'DINOv3' and not result.metrics]


def weights_of(letter: str) -> str:
    return f'hf-hub:timm/convnext_{SIZES[letter]}.dinov3_lvd1689m'


@LETTERS
def test_a_linear_recipe_has_the_values_of_its_source(letter):
    name = f'linear/dinov3_convnext_{letter}'
    config, result = load(name), next(result for result in RESULTS if result.recipe == name)
    assert find_paper_result(config) is result and diff_from_recipe(config, result) == []
    assert result.metrics == {'mIoU': MIOU[letter]} and result.weights in WEIGHTS
    title = (ROOT / f'configs/{name}.py').read_text().splitlines()[0]
    assert f'{MIOU[letter]} mIoU' in title and result.source in title
    model = config.model
    assert model.backbone == dict(
        type='ConvNeXt', arch=SIZES[letter], drop_path_rate=0.0, layer_scale_init_value=1.0, out_indices=[3],
        frozen_stages=4, init_cfg=dict(type='Pretrained', checkpoint=weights_of(letter), final_norm='reuse'),
    )  # fmt: skip
    assert model.decode_head == dict(
        type='LinearHead', in_channels=ARCHS[SIZES[letter]]['channels'][-1], num_classes=150, dropout_ratio=0.1,
        norm_cfg=dict(type='SyncBN', requires_grad=True), align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),  # over ignored pixels too
    )  # fmt: skip
    assert model.auxiliary_head is None and training_precision(config) == result.precision == 'float32'
    assert model.test_cfg == dict(mode='slide', crop_size=(512, 512), stride=(341, 341))
    assert model.data_preprocessor.mean == [123.675, 116.28, 103.53]  # 255 times ImageNet's
    assert model.data_preprocessor.std == [58.395, 57.12, 57.375] and model.data_preprocessor.bgr_to_rgb
    assert config.total_batch == 16 == 8 * config.train_dataloader.batch_size
    assert config.optim_wrapper.optimizer == dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-3)
    assert 'clip_grad' not in config.optim_wrapper  # which is infinite there
    assert config.train_cfg == dict(type='IterBasedTrainLoop', max_iters=40_000, val_interval=5000)
    steps = config.train_dataloader.dataset.pipeline[2:]
    assert steps[0] == dict(type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True)
    assert steps[1] == dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75)
    assert steps[2:4] == [dict(type='RandomFlip', prob=0.5), dict(type='PhotoMetricDistortion', hue_delta=90)]
    assert config.test_dataloader == load('upernet/convnext_t').test_dataloader


def original_lr(iteration: int) -> float:
    """Of WarmupOneCycleLR, relative to the base lr, for an iteration; the first one is not followed by a step."""
    step = max(iteration - 1, 0)
    if step >= 1500:
        return (math.cos(math.pi * (step + 1) / 40_000) + 1) / 2
    return (1 - (1 - step / 1500) * (1 - 1e-6)) * (1 - step / 40_000)


def test_schedule():
    iterations = [0, 1, 700, 1500, 1501, 20_000, 39_999]
    for iteration, lr in lrs_over_iterations(load('linear/dinov3_convnext_t'), iterations).items():
        if iteration > 1500:
            assert lr == pytest.approx(original_lr(iteration), rel=1e-6, abs=1e-12)
        else:  # a step of the warmup earlier, and without its second factor
            assert lr == pytest.approx(original_lr(iteration), rel=0.037, abs=0.7e-3), iteration


def small_linear(tmp_path=None):
    """The recipe with a small backbone and one process; weights as timm names those of DINOv3."""
    config = load('linear/dinov3_convnext_t')
    arch = dict(depths=(1, 1, 1, 1), channels=(8, 16, 32, 64))
    config.model.backbone.arch = arch
    config.model.decode_head.update(in_channels=64, norm_cfg=dict(type='BN'))
    original = original_weights(arch)
    weights = {n: t for n, t in rename_to_library(original, TIMM).items() if not n.startswith('head.fc')}
    config.model.backbone.init_cfg.checkpoint = str(save_pth(tmp_path / 'dinov3.pth', weights))
    model = MODELS.build(config.model)
    model.init_weights()
    return config, model, original


def test_the_head_alone_learns(tmp_path):
    config, model, original = small_linear(tmp_path)
    model.train()
    assert torch.equal(model.backbone.norm3.weight, original['norm.weight'])
    groups = build_optim_wrapper(model, copy.deepcopy(config.optim_wrapper)).optimizer.param_groups
    settings = {id(p): (g['lr'], g['weight_decay']) for g in groups for p in g['params']}
    for name, p in model.named_parameters():
        in_head = name.startswith('decode_head.')
        assert settings.get(id(p), (0, 0)) == ((1e-3, 1e-3) if in_head else (0, 0)), name
        assert p.requires_grad or name.startswith(('backbone.stages', 'backbone.downsample'))
    initial_weights = {name: p.clone() for name, p in model.named_parameters()}
    wrapper = build_optim_wrapper(model, copy.deepcopy(config.optim_wrapper))
    samples = [sample(64) for _ in range(2)]
    data = dict(inputs=[torch.randint(0, 255, (3, 64, 64)).byte() for _ in range(2)], data_samples=samples)
    model.train_step(data, wrapper)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, initial_weights[name])}
    assert changed == {name for name in initial_weights if name.startswith('decode_head.')}


def sample(side: int):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    shape = dict(img_shape=(side, side), ori_shape=(side, side))
    return SegDataSample(metainfo=shape, gt_sem_seg=PixelData(data=torch.randint(0, 150, (1, side, side))))


def test_the_head_is_dropout_batch_norm_and_a_convolution(tmp_path):
    head = small_linear(tmp_path)[1].decode_head
    x = torch.randn(2, 64, 4, 4)
    head.norm.running_mean.normal_()
    head.eval()
    normed = F.batch_norm(x, head.norm.running_mean, head.norm.running_var, head.norm.weight, head.norm.bias)
    expected = (
        torch.einsum('nchw,kc->nkhw', normed, head.conv_seg.weight[..., 0, 0]) + head.conv_seg.bias[:, None, None]
    )
    torch.testing.assert_close(head((x,)), expected, rtol=1e-4, atol=1e-5)
    head.train()
    torch.manual_seed(0)
    dropped = F.dropout2d(x, 0.1)
    assert not torch.equal(dropped, x)
    torch.manual_seed(0)
    expected = head.conv_seg(F.batch_norm(dropped, None, None, head.norm.weight, head.norm.bias, training=True))
    torch.testing.assert_close(head((x,)), expected)


@pytest.mark.parametrize('name', UNTRAINED)
def test_untrained_recipes_are_another_one_but_for_the_weights(name):
    folder, letter = name.split('/')[0], name[-1]
    config, reference = load(name), load(f'{folder}/convnext_{letter}')
    assert find_paper_result(config).recipe == name and find_paper_result(reference).recipe != name
    assert config.model.backbone.init_cfg.checkpoint == weights_of(letter)
    assert diff_from_recipe(config, find_paper_result(reference)) == ['weights']
    title = (ROOT / f'configs/{name}.py').read_text().splitlines()[0]
    assert 'untrained' in title and 'DINOv3' in title


@pytest.mark.parametrize(
    'letter, gflops, parameters',
    [('t', 93.3, 27_937_014), ('s', 181.7, 49_571_574), ('b', 321.1, 87_722_262), ('l', 718.5, 196_463_958)],
)
def test_counts(letter, gflops, parameters):
    complexity = count_flops(load(f'linear/dinov3_convnext_{letter}'), (2048, 512))
    assert (round(complexity.flops / 1e9, 1), complexity.parameters) == (gflops, parameters)


@pytest.fixture(autouse=True)
def scope():
    yield
    init_default_scope('mmdet')
