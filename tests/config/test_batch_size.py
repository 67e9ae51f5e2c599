"""Total batch, weights and lr at every optimizer step are the same on any number of GPUs."""

import logging
import os

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.runner import Runner

from convnext_dense.channel_files import ChannelReader
from convnext_dense.config.batch_size import check_accumulation_unchanged, choose_batch, scale_batch
from convnext_dense.config.channels import adapt_input_channels, set_channels
from convnext_dense.config.launch import world_size_from_env
from convnext_dense.config.literal import parse_config_literal
from convnext_dense.config.schedule import scale_schedule
from convnext_dense.datasets import toy_shapes
from convnext_dense.errors import Notice, UsageError
from helpers.paths import ROOT
from helpers.processes import WITHOUT_WORKERS
from helpers.recipes import load, lrs_over_iterations
from helpers.runs import run_config
from helpers.tools import one_line_error


@pytest.mark.parametrize(
    'world_size, max_per_gpu, expected',
    [
        (8, 2, (2, 1)), (1, 2, (2, 8)), (2, 2, (2, 4)), (4, 2, (2, 2)), (16, 2, (1, 1)), (1, 16, (16, 1)),
        (1, 4, (4, 4)), (1, 12, (8, 2)), (2, 16, (8, 1)),
        # not divisible: the closest total
        (3, 2, (1, 5)), (5, 2, (1, 3)), (6, 2, (1, 3)), (7, 2, (2, 1)), (12, 2, (1, 1)), (32, 2, (1, 1)),
    ],
)  # fmt: skip
def test_images_and_accumulation(world_size, max_per_gpu, expected):
    n, k = expected
    assert choose_batch(world_size, max_per_gpu, 16) == expected
    nearest = min(abs(world_size * i * j - 16) for i in range(1, max_per_gpu + 1) for j in range(1, 17))
    assert abs(world_size * n * k - 16) == nearest


def test_eight_gpus_keep_recipe_unchanged():
    for name in ('cascade/convnext_t', 'upernet/convnext_t'):
        config, untouched = load(name), load(name)
        assert scale_batch(config, 8) == Notice('total batch 16 = 8 processes x 2 images')
        assert config.to_dict() == untouched.to_dict()


def test_accumulation_scales_every_iteration_count():
    config = load('upernet/convnext_t')
    config.train_cfg.dynamic_intervals = [(100_000, 8_000)]
    line, level = scale_batch(config, 2)
    assert config.train_dataloader.batch_size == 2 and config.optim_wrapper.accumulative_counts == 4
    assert config.train_cfg.max_iters == 640_000 and config.train_cfg.val_interval == 64_000
    assert config.train_cfg.dynamic_intervals == [(400_000, 32_000)]
    assert config.default_hooks.checkpoint.interval == 64_000
    assert config.param_scheduler == load('upernet/convnext_t').param_scheduler  # counts optimizer steps
    assert level == logging.INFO and '640000 iterations are 160000 optimizer steps' in line
    assert 'batch norm sees 4 images per iteration' in line

    config = load('cascade/convnext_t')
    line, level = scale_batch(config, 1)
    assert config.train_cfg == load('cascade/convnext_t').train_cfg and config.default_hooks.checkpoint.interval == 1
    assert level == logging.INFO and 'batch norm' in line
    assert 'total batch 16 = 1 process x 2 images x 8 gradient accumulation steps' in line
    assert 'batch norm' not in scale_batch(load('mask_rcnn/convnext_t'), 1)[0]


def test_indivisible_batch_warns_with_both_numbers():
    line, level = scale_batch(load('mask_rcnn/convnext_t'), 3)
    assert (
        level == logging.WARNING and 'total batch 15 = 3 processes x 1 image x 5' in line and "recipe's is 16" in line
    )


def test_configs_that_are_not_scaled():
    config = load('cascade/convnext_t')
    line, level = scale_batch(config, 1, keep_config=True)
    assert level == logging.WARNING and 'total batch 2 ' in line and "recipe's is 16" in line
    assert config.to_dict() == load('cascade/convnext_t').to_dict()
    config.optim_wrapper.accumulative_counts = 8  # set by the user
    assert scale_batch(config, 1) == Notice(
        'total batch 16 = 1 process x 2 images x 8 gradient accumulation steps'
        '; batch norm sees 2 images per iteration, 16 in the recipe'
    )
    assert scale_batch(load('demo/upernet'), 4) is None


def test_schedule_that_cannot_be_scaled_is_refused():
    config = load('cascade/convnext_t')
    config.param_scheduler[1].convert_to_iter_based = True
    with pytest.raises(UsageError, match='MultiStepLR with convert_to_iter_based'):
        scale_batch(config, 1)
    scale_batch(config, 8)


@pytest.mark.parametrize(
    'launcher, name', [('pytorch', 'WORLD_SIZE'), ('slurm', 'SLURM_NTASKS'), ('mpi', 'OMPI_COMM_WORLD_SIZE')]
)
def test_world_size_from_env(launcher, name, monkeypatch):
    monkeypatch.setenv(name, '6')
    assert (world_size_from_env(launcher), world_size_from_env('none')) == (6, 1)


def train(folder: str, unit: str, batch_size: int, world_size: int) -> dict:
    """Final weights and the lr of the first group at every optimizer step."""
    config = run_config(unit, batch_size)
    scale_batch(config, world_size)
    config.launcher = 'pytorch' if world_size > 1 else 'none'
    config.work_dir = folder
    runner = Runner.from_cfg(config)
    lrs = []
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    optimizer = runner.optim_wrapper.optimizer
    optimizer.register_step_pre_hook(lambda *_: lrs.append(optimizer.param_groups[0]['lr']))
    runner.train()
    model = runner.model.module if world_size > 1 else runner.model
    return dict(lrs=lrs, weights=model.state_dict(), files=sorted(f for f in os.listdir(folder) if f.endswith('.pth')))


def run_rank(rank: int, folder: str, unit: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank))
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    result = train(f'{folder}/two', unit, 2, 2)
    torch.save(result, f'{folder}/result{rank}')
    dist.destroy_process_group()


@pytest.mark.parametrize('unit', ['epochs', 'iterations'])
def test_accumulated_runs_end_with_equal_weights(tmp_path, unit):
    """Four images on one process, two on each of two, and two on one with gradient accumulation: the same run."""
    single = train(str(tmp_path / 'one'), unit, 4, 1)
    accumulated = train(str(tmp_path / 'added'), unit, 2, 1)
    torch.multiprocessing.spawn(run_rank, (str(tmp_path), unit), nprocs=2)
    distributed = torch.load(tmp_path / 'result0')
    assert len(single['lrs']) == (12 if unit == 'epochs' else 7) and len(set(single['lrs'])) > 3
    for result in (accumulated, distributed):
        assert result['lrs'] == pytest.approx(single['lrs'], rel=1e-12)
        for name, tensor in single['weights'].items():
            torch.testing.assert_close(result['weights'][name], tensor, rtol=1e-8, atol=1e-9)
    if unit == 'iterations':
        assert accumulated['files'] == [f'iter_{2 * i}.pth' for i in sorted(range(1, 8), key=lambda i: str(2 * i))]
    else:
        assert accumulated['files'] == ['epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth']


def test_resume_under_another_accumulation_is_refused(tmp_path):
    folder = str(tmp_path / 'run')
    train(folder, 'iterations', 2, 1)
    meta = torch.load(tmp_path / 'run/iter_14.pth', weights_only=False)['meta']
    same_accumulation, other_accumulation = run_config('iterations', 2), run_config('iterations', 1)
    scale_batch(same_accumulation, 1)
    scale_batch(other_accumulation, 1)
    check_accumulation_unchanged(same_accumulation, meta, 'iter_14.pth')
    with pytest.raises(UsageError, match=r'iter_14.pth .* 2 gradient accumulation steps, this run has 4'):
        check_accumulation_unchanged(other_accumulation, meta, 'iter_14.pth')
    check_accumulation_unchanged(run_config('iterations', 4), {}, 'a checkpoint of another origin')


def test_from_command_line(run_tool, tmp_path):
    data = tmp_path / 'shapes'
    toy_shapes.write(data, train=8, val=2, size=64)
    options = [
        *WITHOUT_WORKERS,
        'train_cfg.max_iters=1', 'train_cfg.val_interval=1', 'default_hooks.checkpoint.interval=1',
        'train_dataloader.batch_size=4', 'total_batch=8', 'default_hooks.logger.interval=1',
    ]  # fmt: skip
    command = ['train.py', ROOT / 'configs/demo/upernet.py', '--work-dir', tmp_path / 'run', '--cfg-options', *options]
    process = run_tool(*command, SHAPES_ROOT=str(data))
    assert process.returncode == 0, process.stderr[-3000:]
    assert 'total batch 8 = 1 process x 4 images x 2 gradient accumulation steps' in process.stdout + process.stderr
    assert (tmp_path / 'run/iter_2.pth').exists()
    process = run_tool(*command, 'train_dataloader.batch_size=2', '--resume', SHAPES_ROOT=str(data))
    assert process.returncode == 0, process.stderr[-3000:]
    assert (
        'Resumed with 1 x 2 (was 1 x 4) images per iteration; total batch unchanged' in process.stdout + process.stderr
    )
    assert 'iter: 4' in process.stdout + process.stderr
    process = run_tool(*command, 'train_cfg.max_iters=3', '--resume', '--no-auto-batch', SHAPES_ROOT=str(data))
    one_line_error(process, 'the total batch was 8, now it is 4', '1 (was 2) gradient accumulation steps')


@pytest.mark.parametrize('name', ['mask_rcnn/convnext_t', 'upernet/convnext_t'])
def test_grayscale_input(name):
    config = load(name)
    assert adapt_input_channels(config) is None and config.to_dict() == load(name).to_dict()
    config.model.backbone.in_channels = 1
    assert '1 input channel: images are read as grayscale' in adapt_input_channels(config)
    preprocessor = config.model.data_preprocessor
    assert preprocessor.mean == [pytest.approx((123.675 + 116.28 + 103.53) / 3)] and not preprocessor.bgr_to_rgb
    for split in ('train', 'val', 'test'):
        pipeline = config[f'{split}_dataloader'].dataset.pipeline
        assert pipeline[0] == dict(type='LoadImageFromFile', color_type='grayscale')
        assert 'PhotoMetricDistortion' not in str(pipeline)
    assert adapt_input_channels(config) is None  # a second call changes nothing


@pytest.mark.parametrize('channels', [(2,), (1, 4)])
def test_inputs_of_chosen_channels_stay(channels):
    config = load('upernet/convnext_t')
    set_channels(config, ChannelReader(channels, [0.0], [1.0], 4, 'uint8'))
    expected = config.to_dict()
    assert adapt_input_channels(config) is None and config.to_dict() == expected


@pytest.mark.parametrize('name', ['mask_rcnn/convnext_t', 'upernet/convnext_t'])
def test_more_channels_than_rgb(name):
    config = load(name)
    config.model.backbone.in_channels = 4
    assert '4 input channels: images are read unchanged' in adapt_input_channels(config)
    assert config.model.data_preprocessor.std == [pytest.approx((58.395 + 57.12 + 57.375) / 3)]
    assert config.train_dataloader.dataset.pipeline[0].color_type == 'unchanged'


@pytest.mark.parametrize('task, in_channels', [('mask_rcnn', 1), ('mask_rcnn', 4), ('upernet', 1), ('upernet', 4)])
def test_other_inputs_train_and_test(run_tool, tmp_path, task, in_channels):
    data = tmp_path / 'shapes'
    toy_shapes.write(data, train=4, val=2, size=64)
    if in_channels == 4:
        for file in [*data.glob('train/*.png'), *data.glob('val/*.png')]:
            image = cv2.imread(str(file))
            cv2.imwrite(str(file), np.concatenate([image, image[..., :1]], 2))
    length = 'train_cfg.max_epochs=1' if task == 'mask_rcnn' else 'train_cfg.max_iters=1'
    options = [*WITHOUT_WORKERS, length, 'train_cfg.val_interval=1', f'model.backbone.in_channels={in_channels}']
    config = ROOT / f'configs/demo/{task}.py'
    process = run_tool('train.py', config, '--work-dir', 'run', '--cfg-options', *options, SHAPES_ROOT=str(data))
    assert process.returncode == 0, process.stderr[-3000:]
    assert f'{in_channels} input channel' in process.stdout + process.stderr


def test_scaled_schedule_of_a_detector():
    config = load('cascade/convnext_t')
    assert scale_schedule(config) is None and config.to_dict() == load('cascade/convnext_t').to_dict()
    assert '12 epochs instead of 36' in scale_schedule(config, epochs=12)
    assert config.train_cfg == dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
    warmup, steps = config.param_scheduler
    assert warmup.end == 1 + round(500 / 3) and (steps.milestones, steps.end) == ([9, 11], 12)
    assert config.default_hooks.checkpoint.interval == 1


@pytest.mark.parametrize('iters', [20_000, 80_000, 320_000])
def test_scaled_schedule_of_a_segmentor_has_the_papers_lr_curve(iters):
    config, paper = load('upernet/convnext_t'), load('upernet/convnext_t')
    scale_schedule(config, iters=iters)
    assert config.train_cfg.max_iters == iters
    assert config.train_cfg.val_interval == config.default_hooks.checkpoint.interval == iters // 10
    fractions = [0, 0.005, 0.01, 0.25, 0.5, 0.9]
    actual = lrs_over_iterations(config, [int(fraction * iters) for fraction in fractions])
    expected = lrs_over_iterations(paper, [int(fraction * 160_000) for fraction in fractions])
    assert list(actual.values()) == pytest.approx(list(expected.values()), rel=0.01)


def test_scaled_length_on_fewer_gpus():
    config = load('upernet/convnext_t')
    scale_schedule(config, iters=40_000)
    scale_batch(config, 2)
    assert config.train_cfg.max_iters == 160_000 and config.optim_wrapper.accumulative_counts == 4
    assert config.param_scheduler[1].end == 40_001  # counts optimizer steps


@pytest.mark.parametrize(
    'name, length, words',
    [
        ('cascade/convnext_t', dict(iters=10), '--iters: this config counts epochs: use --epochs'),
        ('upernet/convnext_t', dict(epochs=10), '--epochs: this config counts iterations: use --iters'),
        ('upernet/convnext_t', dict(iters=0), '--iters 0: give a positive number'),
    ],
)
def test_invalid_lengths_are_refused(name, length, words):
    with pytest.raises(UsageError, match=words):
        scale_schedule(load(name), **length)


def test_very_short_trainings_keep_their_order():
    config = load('mask_rcnn/convnext_t')
    scale_schedule(config, epochs=1)
    warmup, steps = config.param_scheduler
    assert warmup.end == 1 + round(500 / 36) and steps.milestones == [1] and steps.end == 1


@pytest.mark.parametrize('name', ['cascade/convnext_l_in22k', 'upernet/convnext_t', 'demo/mask_rcnn'])
def test_parse_dumped_config(name):
    text = load(name).pretty_text
    assert parse_config_literal(text).to_dict() == Config.fromstring(text, '.py').to_dict()


def test_parse_unusual_values():
    config = Config(dict(a={'b.c': 1, 2: (1,)}, d=[-1.5, float('inf'), None, {1}], e='x', f=dict()))
    assert parse_config_literal(config.pretty_text).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    'text',
    [
        "open('ran', 'w')",
        "a = open('ran', 'w')",
        'import os',
        'a = (lambda: 1)()',
        'a = [x for x in (1,)]',
        'a = dict(',
    ],
)
def test_config_text_with_code_is_refused(text):
    with pytest.raises(UsageError, match='not plain data'):
        parse_config_literal(text)


def test_batch_norm_of_one_image_is_refused():
    config = load('upernet/convnext_t')
    config.train_dataloader.batch_size = 1
    with pytest.raises(UsageError, match='at least two images per iteration'):
        scale_batch(config, 1)
    scale_batch(config, 2)


def test_accumulation_without_default_hooks_and_with_ema():
    config = Config(dict(model={}, total_batch=4, train_dataloader=dict(batch_size=2), train_cfg=dict(max_iters=10)))
    config.optim_wrapper = dict(optimizer=dict(type='SGD', lr=1.0))
    config.custom_hooks = [dict(type='EMAHook', begin_iter=3), dict(type='NumClassCheckHook')]
    scale_batch(config, 1)
    assert config.default_hooks == dict(param_scheduler=dict(type='UpdateParamSchedulerHook'))
    assert config.custom_hooks == [dict(type='EMAHook', begin_iter=6, interval=2), dict(type='NumClassCheckHook')]
