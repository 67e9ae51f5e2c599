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


def summarize(config: Config, images: int, total_batch: int) -> dict:
    """Steps, warmup and evaluations of a training."""
    times = config.train_dataloader.dataset.get('times', 1)
    per_epoch = -(-images * times // total_batch)
    epochs = config.train_cfg.get('max_epochs')
    steps = per_epoch * epochs if epochs else config.train_cfg.max_iters // accumulative_counts(config)
    length = epochs or config.train_cfg.max_iters
    evaluations = -(-length // config.train_cfg.val_interval)
    warmup = config.param_scheduler[0].end - 1
    return dict(steps=steps, warmup=warmup, evaluations=evaluations, per_epoch=per_epoch if epochs else None)


def load_and_fit(recipe: str, images: int, world_size: int = 1, **arguments) -> tuple[Config, list]:
    config = load(recipe)
    return config, fit_schedule(config, images, world_size, **arguments)


@pytest.mark.parametrize('images', [1, 9, 27, 90, 900])
@pytest.mark.parametrize('recipe', [CASCADE, UPERNET, MASK_RCNN])
def test_fitted_schedule_has_enough_steps_after_warmup(recipe, images):
    config, notices = load_and_fit(recipe, images)
    actual, unfitted = summarize(config, images, config.total_batch), summarize(load(recipe), images, 16)
    assert 1000 <= actual['steps'] <= max(unfitted['steps'], 1300)
    assert actual['warmup'] <= 0.1 * actual['steps'] and actual['warmup'] <= unfitted['warmup']
    assert actual['warmup'] == unfitted['warmup'] or actual['warmup'] >= 0.099 * actual['steps'] - 1
    is_long = actual['steps'] / actual['evaluations'] >= 1000
    assert actual['evaluations'] <= (unfitted['evaluations'] if is_long else 20)
    steps_of_interest = [actual['steps'] // 10, actual['steps'] // 2, actual['steps'] - 1]
    lrs = lrs_over_iterations(config, steps_of_interest, actual['per_epoch'])  # relative to the config's
    lr_tenth, lr_half, lr_end = (lrs[step] for step in steps_of_interest)
    assert lr_tenth > 0.85 and lr_half > 0.45 and lr_end < 0.011
    assert [notice.level for notice in notices] in ([], [logging.INFO])


@pytest.mark.parametrize('images, batch, lr', [(9, 4, 1e-4), (27, 4, 1e-4), (90, 8, 1.41e-4), (900, 16, 2e-4)])
def test_total_batch_fits_the_number_of_images(images, batch, lr):
    config, notices = load_and_fit(CASCADE, images)
    assert (config.total_batch, config.optim_wrapper.optimizer.lr) == (batch, lr)
    assert (f'total batch {batch} instead of 16, lr {lr:g} instead of 0.0002' in notices[0].message) == (batch < 16)
    config.optim_wrapper.optimizer = dict(type='SGD', lr=0.02, momentum=0.9)
    config.total_batch = 16
    fit_schedule(config, images)
    assert config.optim_wrapper.optimizer.lr == 0.02 * batch / 16  # linear scaling for SGD


def test_schedule_is_the_same_for_any_number_of_gpus():
    plans = []
    for world_size in (1, 2, 4):
        config, _ = load_and_fit(CASCADE, 27, world_size)
        plans.append((config.total_batch, config.train_dataloader.dataset.times, config.param_scheduler))
        assert scale_batch(config, world_size).message.startswith(f'total batch 4 = {world_size} process')
    assert plans[0] == plans[1] == plans[2]


def test_large_datasets_keep_the_recipe():
    for recipe, images in ((CASCADE, 118_000), (UPERNET, 20_210)):
        config, notices = load_and_fit(recipe, images)
        assert config.pop('schedule_fit').times == 1
        assert config.to_dict() == load(recipe).to_dict() and notices == []


def test_command_line_settings_are_kept():
    options = {
        'train_dataloader.batch_size': 2,
        'param_scheduler.0.end': 31,
        'train_cfg.val_interval': 1,
        'default_hooks.checkpoint.interval': 3,
    }
    config, _ = load_and_fit(CASCADE, 27, options=options)
    assert config.total_batch == 16 and config.param_scheduler[0].end == 501
    assert config.train_cfg.val_interval == config.default_hooks.checkpoint.interval == 1
    assert config.train_dataloader.dataset.type == 'RepeatDataset'
    config, _ = load_and_fit(CASCADE, 27, options={'optim_wrapper.optimizer.lr': 2e-4})
    assert config.total_batch == 4 and config.optim_wrapper.optimizer.lr == 2e-4
    for kwargs in (dict(fixed_length=True), dict(options={'train_cfg.max_epochs': 36})):
        config, _ = load_and_fit(CASCADE, 27, **kwargs)
        assert config.train_dataloader.dataset.type == 'CocoDataset' and config.train_cfg.max_epochs == 36
        assert config.param_scheduler[0].end == 26  # of 252 steps
    config, _ = load_and_fit(UPERNET, 27, fixed_length=True)
    assert config.train_cfg.max_iters == 160_000


def test_resumed_run_continues_its_schedule():
    initial, _ = load_and_fit(CASCADE, 27)
    resumed = load(CASCADE)
    resumed.train_cfg.max_epochs = 72
    fit_schedule(resumed, 27, 2, fixed_length=True, record=initial.schedule_fit)
    for key in ('param_scheduler', 'train_dataloader', 'optim_wrapper', 'total_batch', 'schedule_fit'):
        assert initial[key] == resumed[key], key
    demo = load('demo/upernet')  # no total_batch: eight images on one GPU
    fit_schedule(demo, 9)
    resumed_demo = load('demo/upernet')
    fit_schedule(resumed_demo, 9, 2, record=demo.schedule_fit)
    assert demo.total_batch == resumed_demo.total_batch == 4 and demo.optim_wrapper == resumed_demo.optim_wrapper


def test_too_few_steps_warn_and_suggest_arguments():
    config = load(CASCADE)
    config.train_cfg.max_epochs = 4
    warning = fit_schedule(config, 27, fixed_length=True)[-1]
    assert warning.level == logging.WARNING and '28 optimizer steps are too few' in warning.message
    assert '--epochs 143,' in warning.message  # seven steps each
    config.train_cfg.max_epochs = 143
    assert all(notice.level == logging.INFO for notice in fit_schedule(config, 27, fixed_length=True))
    config = load(UPERNET)
    config.train_cfg.max_iters = 100
    assert 'use --iters 1000,' in fit_schedule(config, 27, fixed_length=True)[-1].message


def test_scheduler_after_warmup_starts_at_its_end():
    config = load(UPERNET)
    config.param_scheduler = [
        dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=1001),
        dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=False, begin=1000, end=2000, T_max=1000),
    ]
    config.train_cfg.max_iters = 2000
    fit_schedule(config, 900, fixed_length=True)
    warmup, cosine = config.param_scheduler
    assert (warmup.end, cosine.begin, cosine.end, cosine.T_max) == (201, 200, 2000, 1800)
    lrs = lrs_over_iterations(config, [100, 200, 1100, 1999])
    assert lrs[200] == pytest.approx(1, abs=0.01) and lrs[1100] == pytest.approx(0.5, abs=0.01) and lrs[1999] < 1e-3


def test_repeat_dataset_is_inside_multi_image_mix_dataset():
    config = load(MASK_RCNN)
    inner = config.train_dataloader.dataset
    config.train_dataloader.dataset = dict(type='MultiImageMixDataset', dataset=inner, pipeline=[])
    fit_schedule(config, 9)
    assert config.train_dataloader.dataset.type == 'MultiImageMixDataset'
    assert config.train_dataloader.dataset.dataset.type == 'RepeatDataset'


def test_pipeline_set_by_a_hook_reaches_the_repeated_dataset():
    leaf = dict(type='Planned', plan=[1.0] * 3, _scope_='mmengine')
    dataset = SeededDataset(dict(type='RepeatDataset', times=2, dataset=leaf, _scope_='mmengine'))
    dataset.pipeline = lambda info: info['factor']
    assert len(dataset) == 6 and dataset.dataset.dataset.pipeline({'factor': 3}) == 3


@pytest.fixture
def small_dataset(tmp_path):
    toy_shapes.write(tmp_path / 'few', train=12, val=4, size=64)
    content = json.loads((tmp_path / 'few/annotations/instances_train.json').read_text())
    first_id = content['images'][0]['id']
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] != first_id]
    (tmp_path / 'few/annotations/instances_train.json').write_text(json.dumps(content))
    return tmp_path / 'few'


def test_images_without_objects_do_not_count(small_dataset, monkeypatch):
    monkeypatch.setenv('SHAPES_ROOT', str(small_dataset))
    assert count_training_images(load('demo/mask_rcnn')) == 11
    config = load('demo/mask_rcnn')
    config.train_dataloader.dataset.filter_cfg.filter_empty_gt = False
    assert count_training_images(config) == 12
    config.train_dataloader.dataset.type = 'Missing'
    assert count_training_images(config) is None


def test_only_custom_data_are_fitted(small_dataset, tmp_path, monkeypatch, parse):
    monkeypatch.setenv('SHAPES_ROOT', str(small_dataset))
    steps = [step for step in TRAIN_STEPS if step.name != 'lock']

    def prepare_run(*args):
        run = prepare(parse('train.py', DETECTOR, '--work-dir', tmp_path / 'run', *args), steps)
        return run.config, [notice.message for notice in run.notices]

    config, lines = prepare_run('--data', small_dataset)
    assert config.train_dataloader.dataset.type == 'RepeatDataset'
    assert any(line.startswith('schedule fitted to 11 training images: all images') for line in lines)
    for args in ((), ('--data', small_dataset, '--no-auto-schedule')):
        config, lines = prepare_run(*args)
        assert config.train_dataloader.dataset.type == 'CocoDataset' and config.param_scheduler[0].end == 101
        assert not any('fitted' in line or 'too few' in line for line in lines)
    config, lines = prepare_run('--data', small_dataset, '--epochs', 2)
    assert config.train_dataloader.dataset.type == 'CocoDataset' and config.train_cfg.max_epochs == 2
    assert any('12 optimizer steps are too few to learn from: use --epochs 167,' in line for line in lines)
