"""The recipes of DINO-4scale against detrex's code (e244e6c), value by value, and mmdet's DINO in them.

Of detrex: projects/dino/configs (dino_r50, dino_convnext, the four dino-convnext), configs/common (coco_detr, optim,
coco_schedule, train), and what these build there and in detectron2 (DetrDatasetMapper, get_default_optimizer_params).
"""

import copy
import re
from pathlib import Path

import mmdet
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import nn

from convnext_dense.checkpoints import WEIGHT_URLS
from convnext_dense.checkpoints.io import load_checkpoint
from convnext_dense.checkpoints.pretrained import check_state_dict_matches, load_model_weights
from convnext_dense.config.recipe import training_precision
from convnext_dense.datasets import toy_shapes
from convnext_dense.errors import UsageError
from convnext_dense.models.convnext import ARCHS
from convnext_dense.models.dino import QueryPositionMLP
from convnext_dense.optim.layer_decay import layer_ids
from convnext_dense.paper.flops import build_on_meta, count_flops
from convnext_dense.paper.recipe_diff import diff_from_recipe
from convnext_dense.paper.results import DINO_RESULTS, find_paper_result
from helpers.foreign_weights import original_weights, save_pth
from helpers.paths import ROOT
from helpers.recipes import load, lrs_over_iterations
from helpers.weights import random_weights

RESULTS = {result.recipe: result for result in DINO_RESULTS}
# recipe -> arch, weights, box AP.
TRAINED = {
    'dino/convnext_t': ('tiny', 'convnext_tiny_1k_224_ema', 51.4),
    'dino/convnext_s': ('small', 'convnext_small_1k_224_ema', 52.0),
    'dino/convnext_b': ('base', 'convnext_base_1k_384', 52.6),
    'dino/convnext_l': ('large', 'convnext_large_1k_384', 53.4),
    'dino/convnext_t_in22k': ('tiny', 'convnext_tiny_22k_1k_384', 52.4),
    'dino/convnext_s_in22k': ('small', 'convnext_small_22k_1k_384', 54.2),
    'dino/convnext_b_in22k': ('base', 'convnext_base_22k_1k_384', 55.1),
    'dino/convnext_l_in22k': ('large', 'convnext_large_22k_1k_384', 55.5),
}
# recipe -> the recipe of the paper that has its drop path rate and layer decay; both values.
UNTRAINED = {
    'dino/convnext_t_layer_decay': ('cascade/convnext_t', 0.4, 0.7),
    'dino/convnext_s_layer_decay': ('cascade/convnext_s', 0.6, 0.7),
    'dino/convnext_b_layer_decay': ('cascade/convnext_b', 0.7, 0.8),
    'dino/convnext_l_layer_decay': ('cascade/convnext_l_in22k', 0.7, 0.7),
    'dino/convnext_t_in22k_layer_decay': ('cascade/convnext_t', 0.4, 0.7),
    'dino/convnext_s_in22k_layer_decay': ('cascade/convnext_s', 0.6, 0.7),
    'dino/convnext_b_in22k_layer_decay': ('cascade/convnext_b_in22k', 0.6, 0.8),
    'dino/convnext_l_in22k_layer_decay': ('cascade/convnext_l_in22k', 0.7, 0.7),
}
COUNTS = {'t': (281.46, 48_494_124), 's': (367.77, 70_128_684), 'b': (504.55, 108_945_356), 'l': (893.71, 219_019_020)}
TINY = dict(depths=(1, 1, 1, 1), channels=(16, 32, 48, 64))
SHORT_SIDES = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]


def small_dino(name: str = 'dino/convnext_t') -> Config:
    """A recipe with a model of few channels, layers and queries."""
    config = load(name)
    attention, ffn = dict(embed_dims=32, num_heads=4), dict(embed_dims=32, feedforward_channels=32)
    config.model.backbone.update(arch=TINY, init_cfg=None, drop_path_rate=0.0)
    encoder = dict(num_layers=1, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=ffn))
    decoder = dict(num_layers=2, layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=ffn))
    small = dict(
        num_queries=20,
        neck=dict(in_channels=[32, 48, 64], out_channels=32),
        positional_encoding=dict(num_feats=16),
        encoder=encoder,
        decoder=decoder,
        bbox_head=dict(num_classes=3, embed_dims=32),
        dn_cfg=dict(group_cfg=dict(num_dn_queries=4)),
    )
    config.merge_from_dict(dict(model=small))
    return config


def build(config: Config) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    return model


def batch(seed: int = 0, num_items=(3, 2)) -> dict:
    return demo_mm_inputs(2, [[3, 64, 96], [3, 64, 64]], num_items=[*num_items], num_classes=3)


def test_every_result_has_a_source():
    assert list(RESULTS) == [*TRAINED, *UNTRAINED]
    assert all(result.source == "detrex's README" for result in DINO_RESULTS)
    sizes = 'tiny', 'small', 'base', 'large'
    released = [f'dino_convnext_{size}_{weights}_4scale_12ep' for weights in ('1k', '384') for size in sizes]
    assert [result.released for result in DINO_RESULTS] == released + [None] * 8
    url = 'https://github.com/IDEA-Research/detrex-storage/releases/download/v0.4.0'
    assert all(WEIGHT_URLS[name] == f'{url}/{name}.pth' for name in released)
    assert {name: result.metrics for name, result in RESULTS.items()} == {
        **{name: {'box AP': ap} for name, (*_, ap) in TRAINED.items()},
        **{name: {} for name in UNTRAINED},
    }


@pytest.mark.parametrize('name', RESULTS)
def test_recipe_values_equal_the_source(name):
    arch, weights, ap = TRAINED[name.removesuffix('_layer_decay')]
    config, result = load(name), RESULTS[name]
    assert find_paper_result(config) is result and diff_from_recipe(config, result) == []
    assert config.model.backbone == dict(
        type='ConvNeXt', arch=arch, drop_path_rate=result.drop_path_rate, layer_scale_init_value=1.0,
        out_indices=[1, 2, 3], init_cfg=dict(type='Pretrained', checkpoint=weights),
    )  # fmt: skip
    assert weights == result.weights and weights in WEIGHT_URLS
    assert config.model.neck.in_channels == list(ARCHS[arch]['channels'][1:])
    assert training_precision(config) == result.precision == 'float32'
    title = (ROOT / 'configs' / f'{name}.py').read_text().splitlines()[0]
    assert 'untrained: no result was published' in title if name in UNTRAINED else f'{ap} box AP' in title


@pytest.mark.parametrize('name', UNTRAINED)
def test_variants_differ_in_drop_path_and_layer_decay_only(name):
    like, drop_path_rate, decay_rate = UNTRAINED[name]
    config, base, paper = load(name), load(name.removesuffix('_layer_decay')), load(like)
    assert config.model.backbone.drop_path_rate == paper.model.backbone.drop_path_rate == drop_path_rate
    assert config.optim_wrapper.paramwise_cfg == paper.optim_wrapper.paramwise_cfg
    assert config.optim_wrapper.paramwise_cfg == dict(decay_type='layer_wise', decay_rate=decay_rate)
    assert config.optim_wrapper.pop('constructor') == paper.optim_wrapper.constructor
    config.model.backbone.drop_path_rate = 0.0
    config.optim_wrapper.paramwise_cfg = base.optim_wrapper.paramwise_cfg
    assert config.to_dict() == base.to_dict()
    assert f'{like}.py' in (ROOT / 'configs' / f'{name}.py').read_text()


def test_model_values_equal_detrex():
    """projects/dino/configs/models/dino_r50.py, and the defaults of what it builds."""
    model = load('dino/convnext_t').model
    assert model.num_queries == 900 and model.num_feature_levels == 4
    assert model.with_box_refine and model.as_two_stage  # look_forward_twice, learnt_init_query: mmdet's DINO has both
    preprocessor = model.data_preprocessor
    assert preprocessor.mean == [123.675, 116.280, 103.530] and preprocessor.std == [58.395, 57.120, 57.375]
    assert preprocessor.bgr_to_rgb and preprocessor.pad_size_divisor == 1
    assert model.positional_encoding == dict(num_feats=128, temperature=10000, normalize=True, offset=-0.5)
    neck = dict(model.neck, in_channels=0)
    assert neck == dict(
        type='ChannelMapper', in_channels=0, out_channels=256, num_outs=4, kernel_size=1, bias=True, act_cfg=None,
        norm_cfg=dict(type='GN', num_groups=32),
    )  # fmt: skip
    for part in (model.encoder, model.decoder):
        layer = part.layer_cfg
        assert part.num_layers == 6
        assert layer.ffn_cfg == dict(embed_dims=256, feedforward_channels=2048, ffn_drop=0.0)
        for attention in {'self_attn_cfg', 'cross_attn_cfg'} & set(layer):
            assert (layer[attention].embed_dims, layer[attention].num_heads, layer[attention].dropout) == (256, 8, 0.0)
    for deformable in (model.encoder.layer_cfg.self_attn_cfg, model.decoder.layer_cfg.cross_attn_cfg):
        assert deformable.num_levels == 4 and deformable.num_points == 4
    head = model.bbox_head
    assert head.num_classes == 80 and head.sync_cls_avg_factor
    assert head.loss_cls == dict(type='FocalLoss', use_sigmoid=True, alpha=0.25, gamma=2.0, loss_weight=1.0)
    assert head.loss_bbox == dict(type='L1Loss', loss_weight=5.0)
    assert head.loss_iou == dict(type='GIoULoss', loss_weight=2.0)
    assert model.train_cfg.assigner.type == 'HungarianAssigner' and model.train_cfg.assigner.match_costs == [
        dict(type='FocalLossCost', weight=2.0, alpha=0.25, gamma=2.0),
        dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
        dict(type='IoUCost', iou_mode='giou', weight=2.0),
    ]
    assert model.dn_cfg == dict(
        label_noise_scale=0.5, box_noise_scale=1.0, group_cfg=dict(dynamic=True, num_dn_queries=100)
    )
    assert model.test_cfg == dict(max_per_img=300)  # no NMS, no threshold


@pytest.mark.parametrize('name', TRAINED)
def test_sizes_differ_in_backbone_and_neck_only(name):
    config, tiny = load(name), load('dino/convnext_t')
    config.model.backbone, config.model.neck.in_channels = tiny.model.backbone, tiny.model.neck.in_channels
    assert config.to_dict() == tiny.to_dict()


def test_differences_from_mmdets_model():
    """What was changed to have detrex's values; the rest are defaults that are written out."""
    stock = Config.fromfile(Path(mmdet.__path__[0], '.mim/configs/dino/dino-4scale_r50_8xb2-12e_coco.py')).model
    model = load('dino/convnext_t').model
    stock.type = 'DetrexDINO'
    stock.backbone, stock.neck.in_channels = model.backbone, model.neck.in_channels
    stock.neck.bias = True
    stock.positional_encoding.update(offset=-0.5, temperature=10000)
    for attention in (stock.encoder.layer_cfg.self_attn_cfg, stock.decoder.layer_cfg.cross_attn_cfg):
        attention.update(num_heads=8, num_points=4)
    stock.dn_cfg.group_cfg.pop('num_groups')
    stock.num_feature_levels, stock.bbox_head.embed_dims = 4, 256
    stock.train_cfg.assigner.match_costs[0].update(alpha=0.25, gamma=2.0)
    assert stock == model


def test_image_pipeline_equals_detrex():
    """configs/common/data/coco_detr.py; mmdet's own DINO has the same augmentation, but also images without objects."""
    config = load('dino/convnext_t')
    loader = config.train_dataloader
    _, boxes, flip, choice, _ = loader.dataset.pipeline
    assert loader.dataset.pipeline == config.train_pipeline
    assert boxes == dict(type='LoadAnnotations', with_bbox=True) and flip == dict(type='RandomFlip', prob=0.5)
    resize = dict(type='RandomChoiceResize', scales=[(side, 1333) for side in SHORT_SIDES], keep_ratio=True)
    first_resize = dict(type='RandomChoiceResize', scales=[(side, 4200) for side in (400, 500, 600)], keep_ratio=True)
    crop = dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600), allow_negative_crop=True)
    assert choice == dict(type='RandomChoice', transforms=[[resize], [first_resize, crop, resize]])
    stock = Config.fromfile(Path(mmdet.__path__[0], '.mim/configs/dino/dino-4scale_r50_8xb2-12e_coco.py'))
    assert [{k: v for k, v in step.items() if k != 'backend_args'} for step in stock.train_pipeline] == (
        config.train_pipeline
    )
    assert loader.dataset.filter_cfg == dict(filter_empty_gt=True, min_size=32)  # of COCO, none is smaller
    assert loader.sampler == dict(type='InfiniteSampler', shuffle=True)
    assert loader.batch_sampler == dict(type='AspectRatioBatchSampler')
    assert config.total_batch == 16 == 8 * loader.batch_size
    for test in (config.val_dataloader, config.test_dataloader):
        assert test.dataset.pipeline[1] == dict(type='Resize', scale=(1333, 800), keep_ratio=True)
        assert test.batch_size == 1 and 'with_mask' not in str(test)
    assert config.val_evaluator.metric == config.test_evaluator.metric == 'bbox'


def test_schedule():
    """90,000 iterations without warmup, a tenth of the lr from iteration 82,500 on; evaluated every 5,000."""
    config = load('dino/convnext_t')
    assert config.train_cfg == dict(type='IterBasedTrainLoop', max_iters=90_000, val_interval=5_000)
    assert config.default_hooks.checkpoint == dict(type='CheckpointHook', by_epoch=False, interval=5_000)
    (steps,) = config.param_scheduler
    assert steps == dict(type='MultiStepLR', by_epoch=False, milestones=[82_500], gamma=0.1, begin=0, end=90_000)
    steps.update(milestones=[825], end=900)
    lrs = lrs_over_iterations(config, [0, 1, 824, 825, 899])
    assert lrs == {i: pytest.approx(1.0 if i < 825 else 0.1) for i in lrs}


def parameters(model: nn.Module):
    """Name, module and parameter of each parameter, as detectron2 goes through a model."""
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield f'{module_name}.{name}'.lstrip('.'), module, parameter


def param_groups(model: nn.Module, wrapper_cfg: dict) -> dict[str, dict]:
    optimizer = build_optim_wrapper(model, copy.deepcopy(wrapper_cfg)).optimizer
    assert type(optimizer) is torch.optim.AdamW
    groups = {id(p): group for group in optimizer.param_groups for p in group['params']}
    return {name: groups[id(p)] for name, p in model.named_parameters()}


def test_lr_and_weight_decay_of_every_parameter():
    """lr_factor_func 0.1 in the backbone, weight_decay_norm 0; of ConvNeXt's norms detectron2 knows none for a norm."""
    config = load('dino/convnext_t')
    assert config.optim_wrapper.clip_grad == dict(max_norm=0.1, norm_type=2)
    model = build_on_meta(config.model)
    groups = param_groups(model, config.optim_wrapper)
    for name, module, _ in parameters(model):
        is_backbone = name.startswith('backbone.')
        is_norm = isinstance(module, (nn.LayerNorm, nn.GroupNorm)) and not is_backbone
        group = groups[name]
        assert group['lr'] == pytest.approx(1e-5 if is_backbone else 1e-4, rel=1e-12), name
        assert group['weight_decay'] == (0 if is_norm else 1e-4), name
        assert group['betas'] == (0.9, 0.999) and group['eps'] == 1e-8
    for name in ('query_embedding.weight', 'level_embed', 'dn_query_generator.label_embedding.weight',
                 'encoder.layers.0.self_attn.sampling_offsets.weight', 'neck.convs.0.conv.bias'):  # fmt: skip
        assert (groups[name]['lr'], groups[name]['weight_decay']) == (1e-4, 1e-4)
    for name in ('neck.convs.0.gn.weight', 'decoder.norm.bias', 'memory_trans_norm.weight'):
        assert groups[name]['weight_decay'] == 0


@pytest.mark.parametrize('name', ['dino/convnext_t_layer_decay', 'dino/convnext_b_in22k_layer_decay'])
def test_layer_decay_of_every_parameter(name):
    """Of the backbone alone; embeddings have detrex's lr and weight decay, vectors no weight decay."""
    config, result = load(name), RESULTS[name]
    model = build_on_meta(config.model)
    groups = param_groups(model, config.optim_wrapper)
    ids, head_id = layer_ids(model, 'layer_wise')
    assert head_id == (7 if result.arch == 'tiny' else 13)
    is_trunk = ('backbone.downsample_layers', 'backbone.stages')
    assert {i for n, i in ids.items() if n.startswith(is_trunk)} == {*range(head_id)}
    for parameter_name, _, p in parameters(model):
        layer = ids[parameter_name]
        assert (layer == head_id) != parameter_name.startswith(is_trunk)
        group = groups[parameter_name]
        assert group['lr'] == pytest.approx(1e-4 * result.decay_rate ** (head_id - layer), rel=1e-12), parameter_name
        no_decay = p.ndim == 1 or parameter_name.endswith('.bias')
        assert group['weight_decay'] == (0 if no_decay else 1e-4), parameter_name
    for parameter_name in ('query_embedding.weight', 'level_embed', 'dn_query_generator.label_embedding.weight'):
        assert (groups[parameter_name]['lr'], groups[parameter_name]['weight_decay']) == (1e-4, 1e-4)


def test_layer_decay_takes_custom_keys_of_query_heads():
    """As Deformable DETR's sampling offsets, and embeddings without weight decay."""
    config = small_dino('dino/convnext_t_layer_decay')
    keys = dict(sampling_offsets=dict(lr_mult=0.1), embed=dict(decay_mult=0.0))
    config.optim_wrapper.paramwise_cfg.update(custom_keys=keys, norm_decay_mult=0.0)
    model = build_on_meta(config.model)
    groups = param_groups(model, config.optim_wrapper)
    for name, group in groups.items():
        lr = 1e-5 if 'sampling_offsets' in name else 1e-4
        if not name.startswith('backbone.'):
            assert group['lr'] == pytest.approx(lr), name
    for name in ('query_embedding.weight', 'level_embed', 'dn_query_generator.label_embedding.weight'):
        assert groups[name]['weight_decay'] == 0
    _, head_id = layer_ids(model, 'layer_wise')
    assert groups['backbone.downsample_layers.0.0.weight']['lr'] == pytest.approx(1e-4 * 0.7**head_id)


@pytest.mark.parametrize('size', COUNTS)
def test_counts(size):
    """None was published; DINO's authors have 279 G and 47 M for ResNet-50 with the same transformer."""
    result = RESULTS[f'dino/convnext_{size}']
    complexity = count_flops(load(result.recipe), result.size, result.counted)
    gflops, count = COUNTS[size]
    assert complexity.flops / 1e9 == pytest.approx(gflops, abs=0.01) and complexity.parameters == count
    text = re.sub(r'\s+', ' ', (ROOT / 'docs/recipes.md').read_text())
    assert f'{round(count / 1e6)}M and {round(gflops)}G for {size.upper()}' in text


def test_flops_by_hand():
    """What a layer of the encoder costs on 4 levels of an image of 64 x 128, and what 20 more queries do."""

    def count(key, value, counted=()):
        config = small_dino()
        config.merge_from_dict({f'model.{key}': value})
        return count_flops(config, (128, 64), counted).flops

    tokens, queries, c, hidden = 8 * 16 + 4 * 8 + 2 * 4 + 1 * 2, 20, 32, 32
    points = 4 * 4 * 4  # heads, levels, points: x, y and a weight of each
    deformable, ffn = c * 3 * points + c * c, 2 * c * hidden + hidden  # of a query; with a ReLU
    layer = tokens * (c * c + deformable + ffn)
    assert count('encoder.num_layers', 2) - count('encoder.num_layers', 1) == layer
    heads = 3 * c + 2 * c * c + 2 * c + 4 * c
    position = 2 * c * c + c * c
    query = 2 * (4 * c * c + deformable + ffn + heads + position)
    assert count('num_queries', 40) - count('num_queries', 20) == queries * query
    with_products = count('num_queries', 40, {'attention'}) - count('num_queries', 20, {'attention'})
    assert with_products == queries * query + 2 * 2 * c * (40**2 - 20**2)


@pytest.mark.parametrize('query', [128, 256, 64])
def test_sine_embedding_equals_detrex(query):
    """Of C / 2 sines for each coordinate, whatever number of them a distribution of mmdet gives."""
    from mmdet.models.layers.transformer.utils import coordinate_to_encoding

    torch.manual_seed(0)
    boxes = torch.rand(2, 5, 4)
    mlp = QueryPositionMLP(128)
    position = torch.arange(64)  # detrex's get_sine_pos_embed, with num_pos_feats 64
    angles = boxes[..., None] * 2 * torch.pi / 10000 ** (2 * (position // 2) / 64)
    sines = torch.where(position % 2 == 0, angles.sin(), angles.cos())
    expected = torch.cat([sines[..., i, :] for i in (1, 0, 2, 3)], -1)  # y, x, w, h
    for layer in mlp.layers[:1]:
        expected = layer(expected).relu()
    expected = mlp.layers[1](expected)
    torch.testing.assert_close(mlp(coordinate_to_encoding(boxes, num_feats=query)), expected)


def detrex_weights(reference) -> dict[str, torch.Tensor]:
    """A state dict by detrex's own names, with values that follow from them; the heads are in it twice."""
    shapes = {n: tuple(map(int, shape.split('x'))) for n, shape in zip(reference['names'], reference['shapes'])}
    weights = random_weights(shapes)
    return {name: weights[re.sub(r'^transformer\.decoder\.(?=class_|bbox_)', '', name)] for name in weights}


def reference_images() -> torch.Tensor:
    """Normalized images, padded to 64 x 96 pixels."""
    images = np.random.RandomState(0).standard_normal((2, 3, 64, 96)).astype(np.float32)
    images[1, :, 48:] = images[1, :, :, 64:] = 0
    return torch.from_numpy(images)


def reference_samples() -> list[DetDataSample]:
    """Of a batch of 64 x 96 pixels: an image of this size with three objects, and a smaller one with one."""
    samples = []
    for shape, boxes, labels in (
        ((64, 96), [[4, 4, 30, 40], [20, 10, 90, 60], [50, 2, 60, 12]], [0, 2, 1]),
        ((48, 64), [[8, 20, 40, 44]], [2]),
    ):
        sample = DetDataSample(metainfo=dict(img_shape=shape, batch_input_shape=(64, 96), scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(bboxes=torch.tensor(boxes, dtype=torch.float32), labels=torch.tensor(labels))
        samples.append(sample)
    return samples


def detrex_name(loss: str) -> str:
    layer, kind, part = re.fullmatch(r'(?:d(\d)\.)?(enc_|dn_)?loss_(cls|bbox|iou)', loss).groups()
    part = dict(cls='class', bbox='bbox', iou='giou')[part]
    return f'loss_{part}' + (f'_{kind[:-1]}' if kind else '') + (f'_{layer}' if layer else '')


def test_losses_and_outputs_are_detrexs(tmp_path):
    """With a file in detrex's names. The reference is the output of its own ConvNeXt, DINO, criterion and matcher."""
    reference = np.load(ROOT / 'tests/data/dino_detrex.npz')
    file = save_pth(tmp_path / 'detrex.pth', dict(model=detrex_weights(reference)))
    model = MODELS.build(small_dino().model)
    weights = load_model_weights(load_checkpoint(file), file, model)
    check_state_dict_matches(model, weights, file)
    model.load_state_dict(weights)
    torch.manual_seed(0)  # of the denoising noise
    losses = model.train()(reference_images(), reference_samples(), mode='loss')
    assert len(losses) == 15
    for name, value in losses.items():
        assert value.item() == pytest.approx(float(reference[detrex_name(name)]), rel=1e-4), name
    with torch.no_grad():
        features = model.eval().extract_feat(reference_images()[:1])
        state = model.forward_transformer(features, reference_samples()[:1])
        logits, boxes = model.bbox_head(state['hidden_states'], state['references'])
    np.testing.assert_allclose(logits[-1], reference['logits'], rtol=0, atol=1e-4)
    np.testing.assert_allclose(boxes[-1], reference['boxes'], rtol=0, atol=1e-4)


def test_building_does_not_change_the_config():
    config = small_dino()
    original = copy.deepcopy(config.model)
    MODELS.build(config.model)
    MODELS.build(config.model)
    assert config.model == original


@pytest.mark.parametrize('num_items', [(3, 2), (0, 0)], ids=['objects', 'none'])
def test_every_parameter_has_a_gradient(num_items):
    """Also of a batch without objects: DistributedDataParallel waits for all of them."""
    model = build(small_dino())
    data = model.data_preprocessor(batch(num_items=num_items), True)
    losses, _ = model.parse_losses(model(**data, mode='loss'))
    losses.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    still = [name for name, p in model.backbone.named_parameters() if not p.grad.any()]
    assert not still and 'norm0' not in dict(model.backbone.named_modules())
    assert {name.split('.')[1] for name, _ in model.backbone.named_parameters() if 'stages' in name} == set('0123')


def test_images_with_fewer_positions_than_queries_are_refused():
    config = small_dino()
    config.model.num_queries = 900
    model = build(config)
    data = model.data_preprocessor(batch(), True)
    with pytest.raises(
        UsageError, match='num_queries=900 is more than the 128 positions.*larger images.*model.num_queries'
    ):
        model(**data, mode='loss')


def test_initialization_equals_detrex():
    model = build(small_dino())
    for branch in model.bbox_head.cls_branches:
        torch.testing.assert_close(branch.bias, torch.full((3,), -torch.tensor(99.0).log().item()))
    for branch in model.bbox_head.reg_branches:
        assert not branch[-1].weight.any() and not branch[-1].bias.any()
    for attention in (model.encoder.layers[0].self_attn, model.decoder.layers[1].cross_attn):
        assert not attention.sampling_offsets.weight.any() and not attention.attention_weights.weight.any()
        assert attention.sampling_offsets.bias.abs().max() == 4  # points one to four cells away, in eight directions
        assert not attention.value_proj.bias.any() and not attention.output_proj.bias.any()
    for conv in model.neck.convs:
        assert not conv.conv.bias.any()
        bound = (6 / (conv.conv.weight.shape[0] + conv.conv.weight.shape[1])) ** 0.5
        assert 0.8 * bound < conv.conv.weight.abs().max() <= bound
    bound = (6 / (20 + 32)) ** 0.5
    assert 0.8 * bound < model.query_embedding.weight.abs().max() <= bound
    assert 0.8 < model.level_embed.std() < 1.2 and 0.7 < model.dn_query_generator.label_embedding.weight.std() < 1.3


def test_demo_trains(tmp_path, monkeypatch):
    """On the embedded data set: the loss falls, and every parameter of the backbone takes part."""
    toy_shapes.write(tmp_path / 'shapes', train=16, val=2, size=96)
    monkeypatch.setenv('SHAPES_ROOT', str(tmp_path / 'shapes'))
    config = load('demo/dino')
    model = build(config)
    wrapper = build_optim_wrapper(model, copy.deepcopy(config.optim_wrapper))
    config.train_dataloader.update(num_workers=0, persistent_workers=False, batch_size=2)
    batches = iter(Runner.build_dataloader(config.train_dataloader, seed=0))
    initial_weights = {name: parameter.clone() for name, parameter in model.backbone.named_parameters()}
    losses = [model.train_step(next(batches), wrapper)['loss'].item() for _ in range(30)]
    assert sum(losses[-8:]) < 0.75 * sum(losses[:8]), losses
    assert all(not torch.equal(p, initial_weights[name]) for name, p in model.backbone.named_parameters())


def test_weights_load_without_the_norm_of_an_unused_stage(tmp_path):
    """Of a classifier, and of another detector's backbone with four norms: what is there is there bit for bit."""
    weights = original_weights(TINY)
    file = save_pth(tmp_path / 'classifier.pth', dict(model=weights))
    model = build_with_weights(file)
    loaded = model.backbone.state_dict()
    for name, value in loaded.items():
        if not name.startswith('norm'):
            torch.testing.assert_close(value, weights[name], rtol=0, atol=0)
    assert sorted({name.split('.')[0] for name in loaded if name.startswith('norm')}) == ['norm1', 'norm2', 'norm3']
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'dino.pth')
    reloaded = build_with_weights(tmp_path / 'dino.pth')
    for name, value in reloaded.backbone.state_dict().items():
        torch.testing.assert_close(value, loaded[name], rtol=0, atol=0)


def build_with_weights(file: Path) -> nn.Module:
    config = small_dino()
    config.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(file))
    return build(config)
