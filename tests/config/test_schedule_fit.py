"""A recipe's schedule on few images: enough optimizer steps, warmup that ends, some twenty evaluations."""

import json
import logging

import pytest
from mmengine.config import Config

from convnext_dense.cli.prepare import TRAIN_STEPS, prepare
from convnext_dense.config.batch_size import scale_batch
from convnext_dense.config.recipe import accumulative_counts
from convnext_dense.config.schedule_fit import fit_schedule
from convnext_dense.config.training_set import count_training_images
from convnext_dense.datasets import toy_shapes
from convnext_dense.engine.datasets import SeededDataset
from helpers import planned_runs  # noqa: F401  (registers Planned)
from helpers.recipes import load, lrs_over_iterations
from helpers.tools import DETECTOR

CASCADE, UPERNET, MASK_RCNN = 'cascade/convnext_t', 'upernet/convnext_t', 'mask_rcnn/convnext_t'


def plan(config: Config, images: int, total: int) -> dict:
    """Steps, warmup, evaluations, and the lr relative to the config's at a tenth, half and the end of a training."""
    times = config.train_dataloader.dataset.get('times', 1)
    per_epoch = -(-images * times // total)
    epochs = config.train_cfg.get('max_epochs')
    steps = per_epoch * epochs if epochs else config.train_cfg.max_iters // accumulative_counts(config)
    length = epochs or config.train_cfg.max_iters
    places = [steps // 10, steps // 2, steps - 1]
    lrs = lrs_over_iterations(config, places, per_epoch if epochs else None)
    evaluations = -(-length // config.train_cfg.val_interval)
    warmup = config.param_scheduler[0].end - 1
    return dict(steps=steps, warmup=warmup, evaluations=evaluations, lrs=[lrs[place] for place in places])


def fitted(recipe: str, images: int, world_size: int = 1, **arguments) -> tuple[Config, list]:
    config = load(recipe)
    return config, fit_schedule(config, images, world_size, **arguments)


@pytest.mark.parametrize('images', [1, 9, 27, 90, 900])
@pytest.mark.parametrize('recipe', [CASCADE, UPERNET, MASK_RCNN])
def test_the_lr_leaves_warmup_and_there_are_enough_steps(recipe, images):
    config, notices = fitted(recipe, images)
    actual, before = plan(config, images, config.total_batch), plan(load(recipe), images, 16)
    assert 1000 <= actual['steps'] <= max(before['steps'], 1300)
    assert actual['warmup'] <= 0.1 * actual['steps'] and actual['warmup'] <= before['warmup']
    assert actual['warmup'] == before['warmup'] or actual['warmup'] >= 0.099 * actual['steps'] - 1
    spacious = actual['steps'] / actual['evaluations'] >= 1000
    assert actual['evaluations'] <= (before['evaluations'] if spacious else 20)
    tenth, half, end = actual['lrs']
    assert tenth > 0.85 and half > 0.45 and end < 0.011
    assert [notice.level for notice in notices] in ([], [logging.INFO])


@pytest.mark.parametrize('images, batch, lr', [(9, 4, 1e-4), (27, 4, 1e-4), (90, 8, 1.41e-4), (900, 16, 2e-4)])
def test_total_batch_is_one_that_the_images_fill(images, batch, lr):
    config, notices = fitted(CASCADE, images)
    assert (config.total_batch, config.optim_wrapper.optimizer.lr) == (batch, lr)
    assert (f'total batch {batch} instead of 16, lr {lr:g} instead of 0.0002' in notices[0].message) == (batch < 16)
    config.optim_wrapper.optimizer = dict(type='SGD', lr=0.02, momentum=0.9)
    config.total_batch = 16
    fit_schedule(config, images)
    assert config.optim_wrapper.optimizer.lr == 0.02 * batch / 16  # Adam's noise is not SGD's


def test_same_images_have_the_same_schedule_on_any_number_of_gpus():
    plans = []
    for world_size in (1, 2, 4):
        config, _ = fitted(CASCADE, 27, world_size)
        plans.append((config.total_batch, config.train_dataloader.dataset.times, config.param_scheduler))
        assert scale_batch(config, world_size).message.startswith(f'total batch 4 = {world_size} process')
    assert plans[0] == plans[1] == plans[2]


def test_large_data_sets_keep_the_recipe():
    for recipe, images in ((CASCADE, 118_000), (UPERNET, 20_210)):
        config, notices = fitted(recipe, images)
        assert config.pop('schedule_fit').times == 1
        assert config.to_dict() == load(recipe).to_dict() and notices == []


def test_what_the_command_line_sets_stays():
    options = {
        'train_dataloader.batch_size': 2,
        'param_scheduler.0.end': 31,
        'train_cfg.val_interval': 1,
        'default_hooks.checkpoint.interval': 3,
    }
    config, _ = fitted(CASCADE, 27, options=options)
    assert config.total_batch == 16 and config.param_scheduler[0].end == 501
    assert config.train_cfg.val_interval == config.default_hooks.checkpoint.interval == 1
    assert config.train_dataloader.dataset.type == 'RepeatDataset'
    config, _ = fitted(CASCADE, 27, options={'optim_wrapper.optimizer.lr': 2e-4})
    assert config.total_batch == 4 and config.optim_wrapper.optimizer.lr == 2e-4
    for fixed in (dict(fixed_length=True), dict(options={'train_cfg.max_epochs': 36})):
        config, _ = fitted(CASCADE, 27, **fixed)
        assert config.train_dataloader.dataset.type == 'CocoDataset' and config.train_cfg.max_epochs == 36
        assert config.param_scheduler[0].end == 26  # of 252 steps
    config, _ = fitted(UPERNET, 27, fixed_length=True)
    assert config.train_cfg.max_iters == 160_000


def test_a_resumed_run_continues_its_schedule():
    first, _ = fitted(CASCADE, 27)
    second = load(CASCADE)
    second.train_cfg.max_epochs = 72
    fit_schedule(second, 27, 2, fixed_length=True, record=first.schedule_fit)
    for key in ('param_scheduler', 'train_dataloader', 'optim_wrapper', 'total_batch', 'schedule_fit'):
        assert first[key] == second[key], key
    demo = load('demo/upernet')  # names no total batch: eight images on one GPU
    fit_schedule(demo, 9)
    again = load('demo/upernet')
    fit_schedule(again, 9, 2, record=demo.schedule_fit)
    assert demo.total_batch == again.total_batch == 4 and demo.optim_wrapper == again.optim_wrapper


def test_too_few_steps_are_a_warning_with_the_arguments_that_would_do():
    config = load(CASCADE)
    config.train_cfg.max_epochs = 4
    warning = fit_schedule(config, 27, fixed_length=True)[-1]
    assert warning.level == logging.WARNING and '28 optimizer steps are too few' in warning.message
    assert '--epochs 143,' in warning.message  # of seven steps each
    config.train_cfg.max_epochs = 143
    assert all(notice.level == logging.INFO for notice in fit_schedule(config, 27, fixed_length=True))
    config = load(UPERNET)
    config.train_cfg.max_iters = 100
    assert 'use --iters 1000,' in fit_schedule(config, 27, fixed_length=True)[-1].message


def test_what_follows_warmup_begins_where_it_ends():
    config = load(UPERNET)
    config.param_scheduler = [
        dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=1001),
        dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=False, begin=1000, end=2000, T_max=1000),
    ]
    config.train_cfg.max_iters = 2000
    fit_schedule(config, 900, fixed_length=True)
    first, second = config.param_scheduler
    assert (first.end, second.begin, second.end, second.T_max) == (201, 200, 2000, 1800)
    lrs = lrs_over_iterations(config, [100, 200, 1100, 1999])
    assert lrs[200] == pytest.approx(1, abs=0.01) and lrs[1100] == pytest.approx(0.5, abs=0.01) and lrs[1999] < 1e-3


def test_repetition_stays_within_the_wrappers_that_hooks_reach_for():
    config = load(MASK_RCNN)
    inner = config.train_dataloader.dataset
    config.train_dataloader.dataset = dict(type='MultiImageMixDataset', dataset=inner, pipeline=[])
    fit_schedule(config, 9)
    assert config.train_dataloader.dataset.type == 'MultiImageMixDataset'
    assert config.train_dataloader.dataset.dataset.type == 'RepeatDataset'


def test_a_pipeline_that_a_hook_sets_reaches_the_repeated_data_set():
    leaf = dict(type='Planned', plan=[1.0] * 3, _scope_='mmengine')
    dataset = SeededDataset(dict(type='RepeatDataset', times=2, dataset=leaf, _scope_='mmengine'))
    dataset.pipeline = lambda info: info['factor']
    assert len(dataset) == 6 and dataset.dataset.dataset.pipeline({'factor': 3}) == 3


@pytest.fixture
def few(tmp_path):
    toy_shapes.write(tmp_path / 'few', train=12, val=4, size=64)
    content = json.loads((tmp_path / 'few/annotations/instances_train.json').read_text())
    first = content['images'][0]['id']
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] != first]
    (tmp_path / 'few/annotations/instances_train.json').write_text(json.dumps(content))
    return tmp_path / 'few'


def test_images_without_objects_do_not_count(few, monkeypatch):
    monkeypatch.setenv('SHAPES_ROOT', str(few))
    assert count_training_images(load('demo/mask_rcnn')) == 11
    config = load('demo/mask_rcnn')
    config.train_dataloader.dataset.filter_cfg.filter_empty_gt = False
    assert count_training_images(config) == 12
    config.train_dataloader.dataset.type = 'Missing'
    assert count_training_images(config) is None


def test_only_custom_data_are_fitted(few, tmp_path, monkeypatch, parse):
    monkeypatch.setenv('SHAPES_ROOT', str(few))
    steps = [step for step in TRAIN_STEPS if step.name != 'lock']

    def prepared(*args):
        run = prepare(parse('train.py', DETECTOR, '--work-dir', tmp_path / 'run', *args), steps)
        return run.config, [notice.message for notice in run.notices]

    config, lines = prepared('--data', few)
    assert config.train_dataloader.dataset.type == 'RepeatDataset'
    assert any(line.startswith('schedule fitted to 11 training images: all images') for line in lines)
    for args in ((), ('--data', few, '--no-auto-schedule')):
        config, lines = prepared(*args)
        assert config.train_dataloader.dataset.type == 'CocoDataset' and config.param_scheduler[0].end == 101
        assert not any('fitted' in line or 'too few' in line for line in lines)
    config, lines = prepared('--data', few, '--epochs', 2)
    assert config.train_dataloader.dataset.type == 'CocoDataset' and config.train_cfg.max_epochs == 2
    assert any('12 optimizer steps are too few to learn from: use --epochs 167,' in line for line in lines)
