"""The recipes of ConvNeXt's later results against their sources, value by value.

VMamba's table, ConvNeXt V2 (tables 6 and 7, A.3 and A.4), and mmdet's own configs of 1x, LSJ and RTMDet.
"""

import copy
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS

from convnext_dense.checkpoints import WEIGHT_URLS
from convnext_dense.config.evaluation import multiscale_factors, set_multiscale
from convnext_dense.config.recipe import training_precision
from convnext_dense.models.convnext import ARCHS
from convnext_dense.optim.layer_decay import layer_ids
from convnext_dense.paper.flops import build_on_meta, count_flops
from convnext_dense.paper.recipe_diff import diff_from_recipe
from convnext_dense.paper.results import CONVNEXT_V2, LATER_RESULTS, MMDET, VMAMBA, find_paper_result
from helpers.paths import ROOT
from helpers.recipes import load, lrs_over_iterations

SOURCES_HERE = (VMAMBA, CONVNEXT_V2, MMDET)  # the others have tests of their own
RESULTS = {result.recipe: result for result in LATER_RESULTS if result.source in SOURCES_HERE}
ONE_X = [name for name in RESULTS if name.endswith('_1x')]
LSJ = [name for name in RESULTS if name.endswith('_lsj')]
UPERNET = [name for name in RESULTS if name.startswith('upernet')]
STOCK = Path(mmdet.__path__[0], '.mim/configs')
# recipe -> arch, V2, drop path, lr, layer decay, weights; box AP and mask AP, or mIoU multi-scale; G; parameters.
SOURCES = {
    'mask_rcnn/convnext_s': (
        'small', False, 0.6, 1e-4, 0.95, 'convnext_small_1k_224', (47.9, 42.9), 348.43, 69_729_936
    ),
    'mask_rcnn/convnext_t_1x': (
        'tiny', False, 0.2, 1e-4, 0.95, 'convnext_tiny_1k_224', (44.2, 40.1), 262.11, 48_095_376
    ),
    'mask_rcnn/convnext_s_1x': (
        'small', False, 0.3, 1e-4, 0.95, 'convnext_small_1k_224', (45.4, 41.8), 348.43, 69_729_936
    ),
    'mask_rcnn/convnext_b_1x': (
        'base', False, 0.4, 1e-4, 0.95, 'convnext_base_1k_224', (47.0, 42.7), 485.58, 107_965_040
    ),
    'mask_rcnn/convnext_b_lsj': (
        'base', False, 0.4, 1e-4, 0.95, 'convnext_base_1k_224', (50.3, 44.9), 485.58, 107_965_040
    ),
    'mask_rcnn/convnext_l_lsj': (
        'large', False, 0.4, 1e-4, 0.95, 'convnext_large_1k_224_ema', (50.6, 45.1), 875.48, 216_875_568
    ),
    'mask_rcnn/convnextv2_b_lsj': (
        'base', True, 0.4, 1e-4, 0.95, 'convnextv2_base_1k_224_fcmae', (52.9, 46.6), 485.58, 108_091_376
    ),
    'mask_rcnn/convnextv2_l_lsj': (
        'large', True, 0.4, 1e-4, 0.95, 'convnextv2_large_1k_224_fcmae', (54.4, 47.7), 875.48, 217_065_072
    ),
    'mask_rcnn/convnextv2_h_lsj': (
        'huge', True, 0.4, 1e-4, 0.95, 'convnextv2_huge_1k_224_fcmae', (55.7, 48.9), 2524.61, 678_734_512
    ),
    'rtmdet/convnext_b': ('base', False, 0.7, 1e-3, 0.8, 'convnext_base_22k_1k_384', (53.1,), None, None),
    'upernet/convnext_l': (
        'large', False, 0.4, 1e-4, 0.9, 'convnext_large_1k_224_ema', (50.5,), 1573.27, 234_994_796
    ),
    'upernet/convnextv2_b': ('base', True, 0.3, 1e-4, 0.9, 'convnextv2_base_1k_224_ema', (52.1,), 1169.84, 122_229_292),
    'upernet/convnextv2_l': (
        'large', True, 0.4, 1e-4, 0.9, 'convnextv2_large_1k_224_ema', (53.7,), 1573.27, 235_184_300
    ),
    'upernet/convnextv2_h': (
        'huge', True, 0.4, 1e-4, 0.9, 'convnextv2_huge_1k_224_ema', (55.0,), 3272.42, 706_807_020
    ),
    'upernet/convnextv2_h_in22k': (
        'huge', True, 0.4, 1e-4, 0.9, 'convnextv2_huge_22k_384_ema', (57.0,), 5113.11, 706_807_020
    ),
}  # fmt: skip


def test_every_result_has_a_source():
    assert list(RESULTS) == list(SOURCES)
    assert all(result.source and result.released is None for result in LATER_RESULTS)


@pytest.mark.parametrize('name', SOURCES)
def test_recipe_values_equal_the_source(name):
    arch, is_v2, drop_path_rate, lr, decay_rate, weights, values, *_ = SOURCES[name]
    config, result = load(name), RESULTS[name]
    assert find_paper_result(config) is result and diff_from_recipe(config, result) == []
    backbone = config.model.backbone
    assert (backbone.arch, backbone.get('use_grn', False), backbone.drop_path_rate) == (arch, is_v2, drop_path_rate)
    assert backbone.init_cfg == dict(type='Pretrained', checkpoint=weights) and weights in WEIGHT_URLS
    assert config.optim_wrapper.optimizer.lr == lr and config.optim_wrapper.paramwise_cfg.decay_rate == decay_rate
    assert training_precision(config) == result.precision
    main = [value for metric, value in result.metrics.items() if metric in ('box AP', 'mask AP', 'mIoU multi-scale')]
    assert tuple(main) == values
    title = (ROOT / 'configs' / f'{name}.py').read_text().splitlines()[0]
    assert all(str(value) in title for value in values) and result.source in title
    channels = list(ARCHS[arch]['channels'])
    if result.is_detection:
        assert config.model.neck.in_channels == (channels[1:] if name.startswith('rtmdet') else channels)
    else:
        assert config.model.decode_head.in_channels == channels
        assert config.model.auxiliary_head.in_channels == channels[2]


@pytest.mark.parametrize('name', [name for name in SOURCES if not name.startswith('rtmdet')])
def test_counts_equal_published_values(name):
    *_, gflops, parameters = SOURCES[name]
    result = RESULTS[name]
    complexity = count_flops(load(name), result.size, result.counted)
    assert complexity.flops / 1e9 == pytest.approx(gflops, abs=0.01) and complexity.parameters == parameters
    assert round(gflops) == result.gflops and result.params_m in (None, round(parameters / 1e6))


@pytest.mark.parametrize(
    'name', ['mask_rcnn/convnext_t_1x', 'mask_rcnn/convnextv2_b_lsj', *UPERNET, 'rtmdet/convnext_b']
)
def test_lr_and_weight_decay_of_every_parameter(name):
    config, result = load(name), RESULTS[name]
    model = build_on_meta(config.model)
    wrapper_cfg = copy.deepcopy(config.optim_wrapper)
    del wrapper_cfg.type
    assert 'clip_grad' not in wrapper_cfg
    optimizer = build_optim_wrapper(model, wrapper_cfg).optimizer
    assert type(optimizer) is torch.optim.AdamW
    groups = {id(p): group for group in optimizer.param_groups for p in group['params']}
    n = 6 if result.arch == 'tiny' else 12
    ids, _ = layer_ids(model, 'layer_wise' if result.is_detection else 'stage_wise')
    for parameter_name, p in model.named_parameters():
        group = groups[id(p)]
        assert group['lr'] == pytest.approx(result.lr * result.decay_rate ** (n + 1 - ids[parameter_name]), rel=1e-12)
        no_decay = p.ndim == 1 or parameter_name.endswith('.bias')
        assert group['weight_decay'] == (0 if no_decay else 0.05), parameter_name
        assert group['betas'] == (0.9, 0.999) and group['eps'] == 1e-8


@pytest.mark.parametrize('name', ['mask_rcnn/convnext_s', *ONE_X, *LSJ])
def test_schedule_of_detectors(name):
    """Linear warmup over 500 iterations from 0.001, steps of 0.1 after epochs 8 and 11 of 12, or 27 and 33 of 36."""
    config = load(name)
    epochs, milestone1, milestone2 = (12, 8, 11) if name in ONE_X else (36, 27, 33)
    assert config.train_cfg == dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=1)
    n = 100  # iterations an epoch
    iterations = [
        0,
        1,
        499,
        500,
        milestone1 * n - 1,
        milestone1 * n,
        milestone2 * n - 1,
        milestone2 * n,
        epochs * n - 1,
    ]
    for iteration, lr in lrs_over_iterations(config, iterations, n).items():
        warmup = 1 - (1 - min(iteration / 500, 1)) * (1 - 1e-3)
        assert lr == pytest.approx(
            warmup * 0.1 ** ((iteration >= milestone1 * n) + (iteration >= milestone2 * n)), rel=1e-9
        )


def without_backend(pipeline: list) -> list[dict]:
    return [{key: value for key, value in step.items() if key != 'backend_args'} for step in pipeline]


def test_1x_schedule_equals_mmdet():
    """Images, epochs and steps of mmdet's Mask R-CNN Swin-T 1x, the table's other half."""
    stock = Config.fromfile(STOCK / 'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py')
    for name in ONE_X:
        config = load(name)
        assert (
            config.train_pipeline == without_backend(stock.train_pipeline) == config.train_dataloader.dataset.pipeline
        )
        assert config.train_cfg.max_epochs == stock.train_cfg.max_epochs
        assert config.param_scheduler[1].milestones == stock.param_scheduler[1].milestones
        assert config.total_batch == 16 == 8 * config.train_dataloader.batch_size


def test_lsj_equals_mmdet():
    stock = Config.fromfile(STOCK / 'common/lsj-100e_coco-instance.py')
    reference = load('mask_rcnn/convnext_t')
    for name in LSJ:
        config = load(name)
        assert (
            config.train_pipeline == without_backend(stock.train_pipeline) == config.train_dataloader.dataset.pipeline
        )
        assert config.test_dataloader == reference.test_dataloader
        assert config.total_batch == 32 == 8 * config.train_dataloader.batch_size
        # Of the settings of the test, soft-NMS alone differs from the paper's.
        assert config.model.test_cfg.rcnn.nms == dict(type='soft_nms', iou_threshold=0.5)
        config.model.test_cfg.rcnn.nms = reference.model.test_cfg.rcnn.nms
        assert config.model.test_cfg == reference.model.test_cfg
        assert config.model.train_cfg == reference.model.train_cfg


def test_detectors_differ_in_backbone_schedule_images_and_nms_only():
    reference = load('mask_rcnn/convnext_t').model
    for name in ('mask_rcnn/convnext_s', *ONE_X, *LSJ):
        model = load(name).model
        assert {**model, 'backbone': 0, 'neck': 0, 'test_cfg': 0} == {
            **reference, 'backbone': 0, 'neck': 0, 'test_cfg': 0
        }  # fmt: skip


def test_soft_nms_runs():
    """Through mmdet's head on a made detection: overlapping boxes stay, with lower scores."""
    config = load('mask_rcnn/convnextv2_b_lsj')
    config.model.backbone.update(arch='atto', init_cfg=None)
    config.model.neck.in_channels = [40, 80, 160, 320]
    from mmcv.ops import batched_nms

    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    results, _ = batched_nms(boxes, scores, torch.zeros(3).long(), dict(config.model.test_cfg.rcnn.nms))
    assert len(results) == 3 and results[-1, -1] < 0.2 < 0.7 < results[1, -1] + 1e-6
    hard, _ = batched_nms(boxes, scores, torch.zeros(3).long(), dict(type='nms', iou_threshold=0.5))
    assert len(hard) == 2
    assert MODELS.build(config.model).roi_head.test_cfg.nms.type == 'soft_nms'


@pytest.mark.parametrize('name', UPERNET)
def test_segmentors_differ_from_the_paper_in_test_scales_only(name):
    is_larger = name.endswith('in22k')
    config, reference = load(name), load('upernet/convnext_b_in22k' if is_larger else 'upernet/convnext_b')
    for part in ('train_dataloader', 'val_dataloader', 'train_cfg', 'param_scheduler', 'total_batch', 'val_evaluator'):
        assert config[part] == reference[part], part
    for model in (config.model, reference.model):
        model.backbone = model.decode_head.in_channels = model.auxiliary_head.in_channels = 0
    assert config.model == reference.model
    assert multiscale_factors(config) == (0.75, 0.875, 1.0, 1.125, 1.25)
    assert multiscale_factors(reference) == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    set_multiscale(config)
    (augmentation,) = (s for s in config.test_dataloader.dataset.pipeline if s['type'] == 'TestTimeAug')
    scales, flips = augmentation['transforms'][:2]
    sides = (480, 560, 640, 720, 800) if is_larger else (384, 448, 512, 576, 640)
    assert [scale['scale'] for scale in scales] == [(4 * side, side) for side in sides]
    assert [flip['prob'] for flip in flips] == [0.0, 1.0]


def test_rtmdet_cosine_starts_at_half():
    """Constant after a warmup of 1000 iterations, then half a cosine over the last 50 of 100 epochs down to 5 %."""
    config = load('rtmdet/convnext_b')
    assert config.train_cfg.max_epochs == 100 and config.total_batch == 128 == 4 * config.train_dataloader.batch_size
    cosine = config.param_scheduler[1]
    assert (cosine.begin, cosine.end, cosine.T_max, cosine.convert_to_iter_based) == (50, 100, 50, True)
    assert cosine.eta_min == pytest.approx(0.05 * config.optim_wrapper.optimizer.lr)
    switch = next(hook for hook in config.custom_hooks if hook.type == 'PipelineSwitchHook')
    assert switch.switch_epoch == 90 and 'CachedMosaic' not in [step.type for step in switch.switch_pipeline]


def test_rtmdet_trains_a_step():
    """Every stage learns, with three of four in `out_indices`; without stochastic depth, which might drop a block."""
    config = load('rtmdet/convnext_b')
    arch = dict(depths=(1, 1, 1, 1), channels=(16, 32, 64, 64))
    config.model.backbone.update(arch=arch, init_cfg=None, with_cp=False, drop_path_rate=0.0)
    config.model.neck.update(in_channels=[32, 64, 64], out_channels=32, num_csp_blocks=1)
    config.model.neck.norm_cfg.num_groups = 16
    config.model.bbox_head.update(in_channels=32, feat_channels=32, stacked_convs=1)
    model = MODELS.build(config.model)
    model.init_weights()
    initial = {name: parameter.clone() for name, parameter in model.backbone.named_parameters()}
    inputs = demo_mm_inputs(2, [[3, 64, 64], [3, 64, 64]])
    losses = model.train_step(inputs, build_optim_wrapper(model, copy.deepcopy(config.optim_wrapper)))
    assert all(torch.isfinite(value).all() for value in losses.values())
    assert 'norm0.weight' not in initial
    still = [name for name, parameter in model.backbone.named_parameters() if torch.equal(parameter, initial[name])]
    assert not still
