"""`--image-size` scales all sizes of a recipe proportionally, for training, testing and prediction."""

from pathlib import Path

import mmdet
import pytest
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope

from convnext_dense.cli.prepare import TEST_STEPS, TRAIN_STEPS, prepare
from convnext_dense.config.image_size import set_image_size
from convnext_dense.errors import UsageError
from helpers.processes import WITHOUT_WORKERS
from helpers.recipes import load
from helpers.tools import CONFIGS, DEMO, WITH, one_line_error

CASCADE = CONFIGS / 'cascade/convnext_t.py'


def test_detection_scales_and_crops():
    config = load('cascade/convnext_t')
    line = set_image_size(config, 400)
    assert line == 'image size 400 instead of 800: all sizes of the recipe times 0.5'
    resize_only, resize_and_crop = config.train_dataloader.dataset.pipeline[3].transforms
    assert resize_only[0].scales[0] == (240, 666) and resize_only[0].scales[-1] == (400, 666)
    assert resize_and_crop[0].scales == [(200, 666), (250, 666), (300, 666)] and resize_and_crop[1].crop_size == (
        192,
        300,
    )
    for loader in (config.val_dataloader, config.test_dataloader):
        assert loader.dataset.pipeline[1].scale == (666, 400)
    assert config.model == load('cascade/convnext_t').model
    assert set_image_size(config, 400) is None


def test_segmentation_crops_and_windows():
    config = load('upernet/convnext_t')
    set_image_size(config, 256)
    assert config.model.data_preprocessor['size'] == (256, 256)
    assert config.model.test_cfg == dict(mode='slide', crop_size=(256, 256), stride=(170, 170))
    steps = {step.type: step for step in config.train_dataloader.dataset.pipeline}
    assert steps['RandomResize'].scale == (1024, 256) and steps['RandomResize'].ratio_range == (0.5, 2.0)
    assert steps['RandomCrop'].crop_size == (256, 256) and steps['RandomCrop'].cat_max_ratio == 0.75


def test_recipes_of_mmdet():
    init_default_scope('mmdet')
    stock = Path(mmdet.__file__).parent / '.mim/configs'
    config = Config.fromfile(stock / 'yolox/yolox_s_8xb8-300e_coco.py')
    set_image_size(config, 320)
    assert config.train_dataloader.dataset.pipeline[0].img_scale == (320, 320)  # of 640
    assert config.model.data_preprocessor.batch_augments[0].random_size_range == (240, 400)
    assert config.model.data_preprocessor.batch_augments[0].size_divisor == 32
    config = Config.fromfile(stock / 'rtmdet/rtmdet_s_8xb32-300e_coco.py')
    set_image_size(config, 1280)
    assert config.custom_hooks[1].switch_pipeline[2].scale == (1280, 1280)  # of 640
    pad = next(step for step in config.test_dataloader.dataset.pipeline if step.type == 'Pad')
    assert pad['size'] == (1280, 1280)


def test_relative_sizes_are_kept_and_shared_dicts_are_scaled_once():
    crop = ConfigDict(type='RandomCrop', crop_type='relative_range', crop_size=(0.3, 1.0))
    pipeline = [crop, ConfigDict(type='Resize', scale=(100, 50))]
    loader = dict(dataset=dict(pipeline=pipeline))
    config = Config(dict(model=dict(), train_dataloader=loader, test_dataloader=loader))
    set_image_size(config, 100)
    for part in (config.train_dataloader, config.test_dataloader):
        assert part.dataset.pipeline[1].scale == (200, 100) and part.dataset.pipeline[0].crop_size == (0.3, 1.0)


def test_invalid_sizes_are_refused():
    with pytest.raises(UsageError, match='^--image-size 16: give at least 32 pixels$'):
        set_image_size(load('demo/upernet'), 16)
    config = load('demo/upernet')
    config.val_dataloader = config.test_dataloader = None
    with pytest.raises(UsageError, match='^--image-size needs dict'):
        set_image_size(config, 64)


def steps_without_data(steps):
    return [step for step in steps if step.name not in ('data_files', 'lock')]


def test_flags_set_the_config(parse, tmp_path):
    args = ('train.py', DEMO, '--work-dir', tmp_path / 'run', '--image-size', 64, '--seed', 7, '--batch-size', 3)
    run = prepare(parse(*args, '--accumulate', 5), steps_without_data(TRAIN_STEPS))
    config = run.config
    assert config.randomness.seed == 7 and config.model.test_cfg.crop_size == (64, 64)
    assert config.train_dataloader.batch_size == 3 and config.optim_wrapper.accumulative_counts == 5
    assert config.train_cfg.max_iters == 5 * 400  # as many optimizer steps as before
    (tmp_path / 'model.pth').write_bytes(b'')
    test = prepare(
        parse('test.py', DEMO, tmp_path / 'model.pth', '--work-dir', tmp_path, '--image-size', 64),
        steps_without_data(TEST_STEPS),
    )
    assert test.config.test_dataloader.dataset.pipeline[1].scale == (256, 64)


def test_other_total_batch_is_reported(parse, tmp_path):
    args = ('train.py', CASCADE, '--work-dir', tmp_path, '--accumulate', 2, '--amp-dtype')
    steps = [step for step in steps_without_data(TRAIN_STEPS) if step.name != 'pretrained']
    lines = [notice.message for notice in prepare(parse(*args, 'float32'), steps).notices]
    assert "total batch 4 instead of the recipe's 16: results may differ from the paper" in lines
    assert any(line.startswith('total batch 4 = 1 process x 2 images x 2 gradient') for line in lines)


def test_invalid_flags_are_one_line_errors(run_tool):
    for args, words in (
        (('--batch-size', 0), "argument --batch-size: '0': give an integer from 1"),
        (('--accumulate', 'x'), "argument --accumulate: 'x': give an integer from 1"),
        (('--seed', -1), "argument --seed: '-1': give an integer from 0 to 4294967295"),
    ):
        process = run_tool('train.py', DEMO, *args)
        assert process.returncode == 2 and process.stderr.strip().splitlines()[-1].endswith(words)
    for args, words in (
        (('--seed', 1, WITH, 'randomness.seed=2'), '--seed and --cfg-options randomness.seed: give one of them'),
        (('--accumulate', 2, '--no-auto-batch'), '--accumulate and --no-auto-batch: give one of them'),
        (('--image-size', 8), '--image-size 8: give at least 32'),
    ):
        one_line_error(run_tool('train.py', DEMO, '--work-dir', 'run', *args, SHAPES_ROOT='.'), words)


def test_training_testing_and_prediction_at_another_size(run_tool, tmp_path, data):
    env = dict(SHAPES_ROOT=data)
    workers = ('--cfg-options', *WITHOUT_WORKERS)
    args = ('--work-dir', 'run', '--iters', 1, '--image-size', 64, '--seed', 3, '--batch-size', 2, '--accumulate', 2)
    process = run_tool('train.py', DEMO, *args, *workers, **env)
    assert process.returncode == 0, process.stderr[-2000:]
    assert 'total batch 4 = 1 process x 2 images x 2 gradient accumulation steps' in process.stdout
    assert (
        'image size 64 instead of 128' in process.stdout and 'training on 8 images: 1 optimizer step' in process.stdout
    )
    assert 'These metrics come from only 4 images' in process.stdout
    process = run_tool('test.py', DEMO, 'run/iter_2.pth', '--image-size', 96, *workers, **env)
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.strip().splitlines()[-1].endswith('(from only 4 images)')
    for size, code in ((64, 0), (7, 2)):
        process = run_tool('predict.py', 'run', f'{data}/val', '--out', f'out{size}', '--image-size', size)
        assert process.returncode == code, process.stderr[-2000:]
    one_line_error(process, '--image-size 7: give at least 32')
