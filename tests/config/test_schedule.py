"""Scaling schedules of other projects, checked with mmengine's own schedulers; counts of hooks and models are scaled,
too. Invalid settings are one-line errors."""

import copy
from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope

from convnext_dense.config.batch_size import scale_batch
from convnext_dense.config.launch import world_size_from_env
from convnext_dense.config.schedule import scale_schedule
from convnext_dense.errors import UsageError
from helpers.paths import ROOT
from helpers.recipes import load
from helpers.tools import one_line_error

STOCK = Path(mmdet.__file__).parent / '.mim/configs'
YOLOX, RTMDET = 'yolox/yolox_tiny_8xb8-300e_coco', 'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco'
EPOCH = 50  # iterations


def stock(name):
    init_default_scope('mmdet')
    return Config.fromfile(STOCK / f'{name}.py', import_custom_modules=False)


def compute_lrs(config, epochs):
    """The lr relative to its base at every iteration, by mmengine's own schedulers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedulers = [
        PARAM_SCHEDULERS.build({**copy.deepcopy(cfg.to_dict()), 'optimizer': optimizer, 'epoch_length': EPOCH})
        for cfg in config.param_scheduler
    ]
    actual = []
    optimizer.step()  # torch wants it before the first step of a scheduler; the factors do not depend on it
    for i in range(epochs * EPOCH):
        actual.append(optimizer.param_groups[0]['lr'])
        for scheduler in schedulers:
            if not scheduler.by_epoch or (i + 1) % EPOCH == 0:
                scheduler.step()
    return actual


@pytest.mark.parametrize('epochs', [1, 2, 3, 4, 5, 10, 20, 30, 299])
def test_scaled_schedulers_are_contiguous(epochs):
    config = stock(YOLOX)
    scale_schedule(config, epochs=epochs)
    phases = [(s.begin, s.end) for s in config.param_scheduler]
    assert [begin for begin, _ in phases] == [0, *(end for _, end in phases[:-1])] and phases[-1][1] == epochs
    assert all(begin < end for begin, end in phases)
    assert any('Cosine' in str(s.type) for s in config.param_scheduler)
    assert config.custom_hooks[0].num_last_epochs == max(1, round(15 * epochs / 300))
    actual = compute_lrs(config, epochs)
    assert max(actual) > 0.97 and actual[-1] < (0.06 if epochs > 3 else 0.6)


@pytest.mark.parametrize('epochs', [1, 2, 3, 5, 7, 10, 20, 299])
def test_scaled_cosine_reaches_its_minimum(epochs):
    config = stock(RTMDET)
    config.param_scheduler[0].end = EPOCH  # for a data set of fifty batches
    scale_schedule(config, epochs=epochs)
    actual = compute_lrs(config, epochs)
    assert max(actual) == pytest.approx(1, abs=2e-3) and actual[-1] < 2e-3  # its minimum is an lr, not a ratio
    last_quarter = actual[int(0.75 * len(actual)) :]
    assert last_quarter == sorted(last_quarter, reverse=True)
    hook = config.custom_hooks[1]
    assert hook.switch_epoch == (round(280 * epochs / 300) if epochs > 9 else max(1, epochs - 1))


def test_removed_schedulers_are_reported():
    assert 'QuadraticWarmupLR, ConstantLR would last less than one epoch and are removed' in scale_schedule(
        stock(YOLOX), epochs=1
    )
    assert scale_schedule(stock(YOLOX), epochs=150).endswith('are scaled proportionally')


def make_config(*schedulers, epochs=100):
    return Config(dict(train_cfg=dict(by_epoch=True, max_epochs=epochs), param_scheduler=list(schedulers)))


@pytest.mark.parametrize('epochs, warmup_epochs', [(1, 0), (2, 1), (10, 1), (50, 2), (100, 5)])
def test_epoch_based_warmup_reaches_full_lr(epochs, warmup_epochs):
    init_default_scope('mmengine')
    config = make_config(dict(type='LinearLR', start_factor=0.1, by_epoch=True, begin=0, end=6))
    scale_schedule(config, epochs=epochs)
    actual = compute_lrs(config, epochs)
    assert actual[-1] == pytest.approx(1) and sum(lr < 0.99 for lr in actual) == warmup_epochs * EPOCH


def test_restart_periods_scale_proportionally():
    init_default_scope('mmengine')
    config = make_config(
        dict(type='CosineRestartLR', periods=[33, 2, 65], restart_weights=[1, 0.5, 0.25], eta_min=0, begin=0, end=100)
    )
    scale_schedule(config, epochs=7)
    assert (config.param_scheduler[0].periods, config.param_scheduler[0].restart_weights) == ([2, 5], [1, 0.25])
    assert compute_lrs(config, 7)[2 * EPOCH] == pytest.approx(0.25)


def test_model_and_hook_counts_are_scaled():
    config = stock('tood/tood_r50_fpn_1x_coco')
    scale_schedule(config, epochs=3)
    assert config.model.train_cfg.initial_epoch == 1
    config = stock('boxinst/boxinst_r50_fpn_ms-90k_coco')
    scale_schedule(config, iters=9_000)
    assert config.model.mask_head.warmup_iters == 1_000
    config.total_batch, config.train_dataloader.batch_size = 16, 2
    scale_batch(config, 1)
    assert config.model.mask_head.warmup_iters == 8_000
    config = stock(YOLOX)
    config.custom_hooks[0].pop('num_last_epochs')  # then the hook's default
    scale_schedule(config, epochs=100, options={'custom_hooks.1.interval': 2})
    assert config.custom_hooks[0].num_last_epochs == 5
    config = stock(YOLOX)
    scale_schedule(config, epochs=100, options={'custom_hooks.0.num_last_epochs': 15})
    assert config.custom_hooks[0].num_last_epochs == 15


INVALID_VALUES = {
    'total_batch': [-4, 'abc', 1.5, True],
    'train_dataloader.batch_size': [0, 'abc', -1, 2.5],
    'optim_wrapper.accumulative_counts': ['x', 0, -2],
    'train_cfg.max_iters': ['abc', 0, float('nan')],
    'train_cfg.val_interval': ['abc', 0],
    'train_cfg.val_begin': ['abc'],
    'train_cfg.dynamic_intervals': [[10, 2], [(1, 2, 3)], [('a', 2)], 5],
    'param_scheduler': [5, 'abc', [5]],
    'param_scheduler.0.end': [None, 'abc', [1]],
    'param_scheduler.1.begin': ['abc', 0.5],
    'param_scheduler.0.T_max': ['abc'],
    'param_scheduler.0.milestones': [3, ['a'], None],
    'default_hooks': [None, 5],
    'default_hooks.checkpoint': [5],
    'default_hooks.checkpoint.interval': ['abc'],
    'custom_hooks': [['EMAHook'], 5],
    'custom_hooks.0.begin_iter': ['abc', None],
    'optim_wrapper': [5, None],
    'train_dataloader': [None],
}


@pytest.mark.parametrize('key', INVALID_VALUES)
def test_wrong_value_types_are_refused(key):
    for value in INVALID_VALUES[key]:
        for scale in (lambda config: scale_schedule(config, iters=50), lambda config: scale_batch(config, 1)):
            config = load('upernet/convnext_t')
            config.custom_hooks = [dict(type='EMAHook')]
            parent_key, _, child_key = key.rpartition('.')
            node = config
            for name in parent_key.split('.') if parent_key else ():
                node = node[int(name) if name.isdigit() else name]
            node[child_key] = value
            with pytest.raises(UsageError) as error:
                scale(config)
            assert str(error.value).startswith(f'{key}') and ': give a' in str(error.value), error.value


def test_valid_value_types_pass():
    config = load('upernet/convnext_t')
    config.train_cfg.val_interval = 1e9
    config.train_cfg.dynamic_intervals = [[10, 2], (20, 3)]
    config.custom_hooks = config.param_scheduler = config.default_hooks.checkpoint = None
    scale_schedule(config, iters=80_000)
    scale_batch(config, 1)
    assert config.train_cfg.dynamic_intervals == [(40, 8), (80, 16)]
    config.param_scheduler = dict(type='CosineAnnealingLR', T_max=None, by_epoch=False, begin=0, end=80_001)
    scale_schedule(config, iters=320_000)
    config.total_batch = None
    assert scale_batch(config, 1) is None


@pytest.mark.parametrize('value', ['abc', '', '0', '-1', '1.5', '²'])
def test_world_size_that_is_no_number_is_refused(value, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', value)
    with pytest.raises(UsageError, match=f"--launcher pytorch: WORLD_SIZE='{value}' is not a number of processes"):
        world_size_from_env('pytorch')


def test_from_command_line(run_tool):
    config = ROOT / 'configs/demo/upernet.py'
    process = run_tool('train.py', config, '--launcher', 'pytorch', WORLD_SIZE='abc')
    one_line_error(process, "WORLD_SIZE='abc'")
