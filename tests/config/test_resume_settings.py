"""Settings of resumed runs: compared with the checkpoint, refused, reported or overridden."""

import copy

import pytest
import torch
from mmengine.config import Config

from convnext_dense.config.batch_size import scale_batch
from convnext_dense.config.literal import parse_config_literal
from convnext_dense.config.resume import check_resume, compare_settings, set_resume
from convnext_dense.datasets import toy_shapes
from convnext_dense.engine.build import register_checkpoint_loader
from convnext_dense.engine.resume import OVERRIDE_KEY
from convnext_dense.engine.runner import ResumableRunner
from convnext_dense.errors import UsageError
from helpers.paths import ROOT
from helpers.recipes import load
from helpers.runs import run_config
from helpers.tools import one_line_error

CONFIGS = ROOT / 'configs'


@pytest.fixture(autouse=True)
def loader():
    """The checkpoint loader of the tools: the classic mmengine's own refuses its checkpoints since torch 2.6."""
    register_checkpoint_loader()


def load_changed(recipe, key, value):
    config = load(recipe)
    config.merge_from_dict({key: value})
    return config


# Settings that the state of an optimizer or of its schedules holds: key, value, what the line says.
STATE_SETTINGS = {
    'optim_wrapper.optimizer.lr': (0.01, 'was 0.0001, is 0.01'),
    'optim_wrapper.optimizer.weight_decay': (0.0, 'was 0.05, is 0.0'),
    'optim_wrapper.optimizer.betas': ([0.9, 0.99], 'is [0.9, 0.99]'),
    'optim_wrapper.optimizer.eps': (1e-6, 'is 1e-06'),
    'optim_wrapper.paramwise_cfg.decay_rate': (0.8, 'was 0.95, is 0.8'),
    'param_scheduler.1.milestones': ([20, 30], 'was [27, 33], is [20, 30]'),
    'param_scheduler.1.gamma': (0.5, 'is 0.5'),
    'param_scheduler.0.end': (1001, 'was 501, is 1001'),
    'param_scheduler.0.type': ('ConstantLR', "was 'LinearLR', is 'ConstantLR'"),
    'auto_scale_lr': (dict(enable=True, base_batch_size=16), 'is True'),
    'randomness.seed': (3, "was '(not set)', is 3"),
}


@pytest.mark.parametrize('key', STATE_SETTINGS)
def test_changed_state_settings_need_override(key):
    value, words = STATE_SETTINGS[key]
    config = load_changed('mask_rcnn/convnext_t', key, value)
    with pytest.raises(UsageError, match='would override yours .*--override.*load_from=x.pth') as error:
        compare_settings(load('mask_rcnn/convnext_t'), config, 'x.pth', False)
    assert key in str(error.value) and words in str(error.value)
    assert words in compare_settings(load('mask_rcnn/convnext_t'), config, 'x.pth', True)
    assert compare_settings(config, copy.deepcopy(config), 'x.pth', False) is None


@pytest.mark.parametrize(
    'key, value',
    [
        ('optim_wrapper.optimizer.type', 'SGD'),
        ('optim_wrapper.paramwise_cfg.decay_type', 'stage_wise'),
        ('optim_wrapper.constructor', 'DefaultOptimWrapperConstructor'),
    ],
)
def test_other_optimizer_is_always_refused(key, value):
    for override in (False, True):
        with pytest.raises(UsageError, match=f'state of another optimizer .*{key} was .*load_from=x.pth'):
            compare_settings(
                load('mask_rcnn/convnext_t'), load_changed('mask_rcnn/convnext_t', key, value), 'x.pth', override
            )


REPORTED = {
    'model.backbone.drop_path_rate': 0.6,
    'model.roi_head.bbox_head.loss_cls.loss_weight': 2.0,
    'train_dataloader.dataset.pipeline.2.prob': 0.0,
    'train_dataloader.dataset.filter_cfg.min_size': 1,
    'train_dataloader.dataset.data_root': 'elsewhere/',
    'train_dataloader.dataset.ann_file': 'other.json',
    'optim_wrapper.clip_grad': dict(max_norm=1.0),
    'train_cfg.val_interval': 5,
    'train_cfg.max_epochs': 40,
    'custom_hooks': [dict(type='EMAHook')],
}
UNREPORTED = {
    'work_dir': 'moved',
    'train_dataloader.num_workers': 9,
    'train_dataloader.batch_size': 1,
    'default_hooks.logger.interval': 1,
    'model.backbone.init_cfg.checkpoint': '/moved/convnext_tiny_1k_224.pth',
    'launcher': 'pytorch',
    'model.type': 'mmdet.MaskRCNN',
}


@pytest.mark.parametrize('key', [*REPORTED, *UNREPORTED])
def test_changed_settings_are_reported(key):
    value = REPORTED.get(key, UNREPORTED.get(key))
    line = compare_settings(
        load('mask_rcnn/convnext_t'), load_changed('mask_rcnn/convnext_t', key, value), 'x.pth', False
    )
    if key in UNREPORTED:
        assert line is None
    else:
        assert ('length' if 'max_epochs' in key else key) in line


def test_checkpoint_config_is_compared_as_text():
    """As text, tuples and all, and scaled to another number of GPUs."""
    new_config, old_config = load('upernet/convnext_t'), load('upernet/convnext_t')
    old_config.model.decode_head.in_channels = tuple(old_config.model.decode_head.in_channels)
    scale_batch(old_config, 2)
    scale_batch(new_config, 8)
    assert compare_settings(parse_config_literal(old_config.pretty_text), new_config, 'x.pth', False) is None
    for config, folder in ((old_config, '/old/run'), (new_config, '/new/run')):
        config.train_dataloader.dataset.ann_file = f'{folder}/data/train.json'
    assert compare_settings(parse_config_literal(old_config.pretty_text), new_config, 'x.pth', False) is None


def test_long_lists_are_truncated():
    config = load('mask_rcnn/convnext_t')
    config.model.roi_head.bbox_head = {f'a{i}': i for i in range(30)}
    line = compare_settings(load('mask_rcnn/convnext_t'), config, 'x.pth', False)
    assert line.count('was') == 8 and ' more' in line


# ---- `--override`: the config's settings instead of the checkpoint's -------------------------------------------------


def record(config, folder, start=None):
    """Run a training; return the optimizer settings at every optimizer step."""
    config.work_dir = str(folder)
    if start:
        config.load_from, config.resume, config[OVERRIDE_KEY] = str(start), True, True
    runner = ResumableRunner.from_cfg(config)
    actual = []
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    optimizer = runner.optim_wrapper.optimizer
    keys = ('lr', 'weight_decay', 'betas', 'initial_lr')
    optimizer.register_step_pre_hook(
        lambda *_: actual.append([{k: g[k] for k in keys} for g in optimizer.param_groups])
    )
    runner.train()
    return actual, runner


@pytest.mark.parametrize('batch_size', [4, 2])  # 2: two gradient accumulation steps
@pytest.mark.parametrize('unit', ['epochs', 'iterations'])
def test_override_equals_run_with_these_settings_from_start(tmp_path, unit, batch_size):
    initial, overridden = run_config(unit, batch_size), run_config(unit, batch_size)
    for config in (initial, overridden):
        config.default_hooks.checkpoint.interval = 1
    overridden.optim_wrapper.optimizer.update(lr=3e-3, weight_decay=0.2, betas=(0.8, 0.95))
    overridden.optim_wrapper.paramwise_cfg.decay_rate = 0.5
    overridden.param_scheduler[0].end = 4
    overridden.param_scheduler[1].update(dict(milestones=[2]) if unit == 'epochs' else dict(power=2.0))
    for config in (initial, overridden):
        scale_batch(config, 1)
    record(initial, tmp_path / 'first')
    expected, _ = record(copy.deepcopy(overridden), tmp_path / 'fresh')
    checkpoint_name = dict(epochs='epoch_1.pth', iterations=f'iter_{3 * (4 // batch_size)}.pth')[unit]
    actual, runner = record(copy.deepcopy(overridden), tmp_path / 'resumed', tmp_path / 'first' / checkpoint_name)
    steps_done = 4 if unit == 'epochs' else 3  # optimizer steps
    assert len(expected) == len(actual) + steps_done > len(actual) > 3
    for a, b in zip(expected[steps_done:], actual):
        for group, resumed_group in zip(a, b, strict=True):
            assert (
                resumed_group['lr'] == pytest.approx(group['lr'], rel=1e-12)
                and resumed_group['betas'] == group['betas']
            )
            assert resumed_group['weight_decay'] == group['weight_decay']
    state = next(iter(runner.optim_wrapper.optimizer.state.values()))
    assert state['step'] == len(expected)  # the moments are the checkpoint's


def test_override_with_other_param_groups_is_refused(tmp_path):
    config = run_config('epochs', 4)
    record(copy.deepcopy(config), tmp_path / 'first')
    config.optim_wrapper.paramwise_cfg.decay_type = 'stage_wise'
    with pytest.raises(UsageError, match='--override: the checkpoint has other parameter groups'):
        record(config, tmp_path / 'other', tmp_path / 'first/epoch_1.pth')


@pytest.mark.parametrize('batch_size, lr', [(4, 1e-2), (2, 1e-2), (1, 1e-2)])
def test_auto_scale_lr_counts_the_total_batch(tmp_path, batch_size, lr):
    """With accumulation up to base_batch_size the lr is unchanged; at half of that it is halved."""
    for base in (4, 8):
        config = run_config('epochs', batch_size)
        config.auto_scale_lr = dict(enable=True, base_batch_size=base)
        scale_batch(config, 1)
        config.work_dir = str(tmp_path / f'{base}')
        runner = ResumableRunner.from_cfg(config)
        wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        runner.scale_lr(wrapper, runner.auto_scale_lr)
        assert max(g['lr'] for g in wrapper.optimizer.param_groups) == pytest.approx(lr * 4 / base)


def test_resume_without_a_run(tmp_path):
    """A misspelled work dir is refused; a run without a checkpoint starts again."""
    config = Config(dict(work_dir=str(tmp_path / 'mistyped'), load_from=None, resume=False))
    for resume in ('last', None):
        config.resume = resume is None
        with pytest.raises(UsageError, match='mistyped contains no run to resume: leave out --resume'):
            set_resume(config, resume)
    (tmp_path / 'begun/20260101_000000').mkdir(parents=True)
    config.work_dir = str(tmp_path / 'begun')
    assert set_resume(config, 'last') is None and not config.resume
    with pytest.raises(UsageError, match='--override needs --resume'):
        check_resume(config, None, override=True)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    toy_shapes.write(folder, train=4, val=2, size=64)
    return folder


def test_from_command_line(run_tool, tmp_path, data):
    (tmp_path / 'c.py').write_text(
        f"_base_ = '{CONFIGS}/demo/mask_rcnn.py'\n"
        'model = dict(backbone=dict(arch=dict(_delete_=True, depths=[1, 1, 1, 1], channels=[8, 16, 24, 32])), '
        'neck=dict(in_channels=[8, 16, 24, 32]))\n'
        'train_dataloader = dict(num_workers=0, persistent_workers=False)\n'
        'val_dataloader = dict(num_workers=0, persistent_workers=False)\n'
        'train_cfg = dict(max_epochs=1, val_interval=9)\n'
        'default_hooks = dict(checkpoint=dict(interval=1), logger=dict(interval=1))\n'
    )
    train = ['train.py', 'c.py', '--work-dir', 'run']
    one_line_error(run_tool(*train, '--resume', SHAPES_ROOT=data), 'run contains no run to resume')
    process = run_tool(*train, '--resume', 'auto', SHAPES_ROOT=data)
    assert process.returncode == 0 and 'run contains no checkpoint' in process.stdout + process.stderr, process.stderr
    resume_args = [*train, '--resume', '--cfg-options', 'train_cfg.max_epochs=2', 'optim_wrapper.optimizer.lr=0.01']
    one_line_error(
        run_tool(*resume_args, SHAPES_ROOT=data), 'optim_wrapper.optimizer.lr was 0.0003, is 0.01', '--override'
    )
    process = run_tool(*resume_args, '--override', SHAPES_ROOT=data)
    output = process.stdout + process.stderr
    assert process.returncode == 0, process.stderr[-3000:]
    assert 'resumed with changed settings: length was 1, is 2; optim_wrapper.optimizer.lr was 0.0003' in output
    saved = torch.load(tmp_path / 'run/epoch_2.pth', weights_only=False)['optimizer']['param_groups']
    assert max(group['initial_lr'] for group in saved) == 0.01
