"""`--cfg-options`: unknown keys are refused with the closest known one, and the user's values win over values derived
from other arguments."""

import logging

import pytest

from convnext_dense.config.batch_size import choose_batch, scale_batch
from convnext_dense.config.evaluation import set_multiscale
from convnext_dense.config.load import load_config
from convnext_dense.config.options import argument_names, merge_options, overridden_options
from convnext_dense.config.schedule import scale_schedule
from convnext_dense.datasets import toy_shapes
from convnext_dense.datasets.custom import DatasetRequest, apply_custom_data
from convnext_dense.errors import UsageError
from helpers.paths import ROOT
from helpers.recipes import load as read_recipe
from helpers.tools import one_line_error

CONFIGS = ROOT / 'configs'


def load(name):
    config = read_recipe(name)
    config.launcher = 'none'
    return config


# Unknown key -> the suggested key.
SUGGESTION_OF_KEY = {
    'modle.backbone.arch': 'model.backbone.arch',
    'model.bakbone.arch': 'model.backbone.arch',
    'optimizer.lr': 'optim_wrapper.optimizer.lr',
    'lr': 'optim_wrapper.optimizer.lr',
    'train_cfg.max_epoch': 'train_cfg.max_epochs',
    'train_cfg.val_intervall': 'train_cfg.val_interval',
    'model.backbone.with_pc': 'model.backbone.with_cp',
    'model.backbone.out_indexes': 'model.backbone.out_indices',
    'optim_wrapper.optimizer.weight_deacy': 'optim_wrapper.optimizer.weight_decay',
    'optim_wrapper.accumulative_count': 'optim_wrapper.accumulative_counts',
    'train_dataloader.batchsize': 'train_dataloader.batch_size',
    'train_dataloader.num_worker': 'train_dataloader.num_workers',
    'train_dataloader.dataset.indicess': 'train_dataloader.dataset.indices',
    'train_dataloader.dataset.pipeline.1.with_masks': 'train_dataloader.dataset.pipeline.1.with_mask',
    'val_evaluator.metrics': 'val_evaluator.metric',
    'default_hooks.checkpoint.intervals': 'default_hooks.checkpoint.interval',
    'default_hooks.checkpoints.interval': 'default_hooks.checkpoint.interval',
    'randomness.seeds': 'randomness.seed',
    'param_scheduler.1.gama': 'param_scheduler.1.gamma',
    'load_form': 'load_from',
    'auto_scale.enable': 'auto_scale_lr.enable',
    'model.backbone.arch.depths': None,
    'param_scheduler.7.end': None,
    'totally.different': None,
}


@pytest.mark.parametrize('key', SUGGESTION_OF_KEY)
def test_unknown_key_suggests_nearest(key):
    config = load('demo/mask_rcnn')
    original = config.to_dict()
    with pytest.raises(UsageError, match=r'has no .*write \+') as error:
        merge_options(config, {'train_cfg.val_interval': 2, key: 1})
    assert f'--cfg-options {key}: ' in str(error.value)
    if SUGGESTION_OF_KEY[key]:
        assert f'(did you mean {SUGGESTION_OF_KEY[key]}?)' in str(error.value)
    assert config.to_dict() == original  # nothing is merged
    if SUGGESTION_OF_KEY[key] or key == 'totally.different':
        assert merge_options(config, {f'+{key}': 1}) == {key: 1}
    else:
        with pytest.raises(UsageError, match='--cfg-options: '):
            merge_options(config, {f'+{key}': 1})


@pytest.mark.parametrize(
    'key, suggestion',
    [
        ('auto_scale_lr.enabl', 'auto_scale_lr.enable'),
        ('optim_wrapper.clip_grad.max_nor', 'optim_wrapper.clip_grad.max_norm'),
        ('env_cfg.mp_cfg.opencv_num_thread', 'env_cfg.mp_cfg.opencv_num_threads'),
        ('randomness.sed', 'randomness.seed'),
    ],
)
def test_unknown_key_of_omitted_part_is_refused(key, suggestion):
    config = load('demo/upernet')
    config.pop('auto_scale_lr', None), config.pop('randomness', None), config.env_cfg.pop('mp_cfg', None)
    with pytest.raises(UsageError, match=rf'\(did you mean {suggestion}\?\)'):
        merge_options(config, {key: 1})
    merge_options(config, {suggestion: 1})


@pytest.mark.parametrize(
    'key, value, words',
    [
        ('model', 5, 'model is a dict: give model.KEY=VALUE'),
        ('model.backbone', 'ConvNeXt', 'model.backbone is a dict'),
        ('optim_wrapper.optimizer', 'AdamW', 'optim_wrapper.optimizer is a dict'),
        (
            'optim_wrapper.optimizer.betas.0',
            0.8,
            'cannot be set: give all of optim_wrapper.optimizer.betas',
        ),
    ],
)
def test_value_in_place_of_dict_is_refused(key, value, words):
    with pytest.raises(UsageError, match=words):
        merge_options(load('demo/mask_rcnn'), {key: value})


def test_required_keys_may_not_be_none(tmp_path):
    path = str(CONFIGS / 'demo/mask_rcnn.py')
    for key in ('model', 'train_dataloader', 'optim_wrapper'):
        with pytest.raises(UsageError, match=f'has no {key}'):
            load_config(path, {key: None}, ('model', 'train_dataloader', 'optim_wrapper'))


VARIABLES = {
    'train_pipeline.1.with_mask': 'train_dataloader.dataset.pipeline.1.with_mask',
    'data_root': 'train_dataloader.dataset.data_root',
    'metainfo.classes': 'train_dataloader.dataset.metainfo.classes',
}


@pytest.mark.parametrize('key', VARIABLES)
def test_config_file_variable_is_refused(key):
    with pytest.raises(UsageError, match=f'is a variable of the config file.*set {VARIABLES[key]} instead'):
        merge_options(load('demo/mask_rcnn'), {key: 1})


def test_arguments_with_defaults_are_accepted():
    """Arguments of the configured classes, also of their base classes, and keys that mmengine reads."""
    for recipe, keys in {
        'demo/mask_rcnn': [
            *('model.backbone.with_cp', 'model.backbone.init_cfg.checkpoint', 'model.rpn_head.reg_decoded_bbox'),
            *('model.roi_head.bbox_head.init_cfg.type', 'model.data_preprocessor.batch_augments', 'model.init_cfg'),
            *('train_dataloader.dataset.indices', 'train_dataloader.dataset.lazy_init', 'train_dataloader.timeout'),
            *('val_dataloader.dataset.filter_cfg.min_size', 'val_evaluator.classwise', 'val_evaluator.prefix'),
            *(
                'optim_wrapper.clip_grad.max_norm',
                'optim_wrapper.optimizer.amsgrad',
                'optim_wrapper.accumulative_counts',
            ),
            *('default_hooks.checkpoint.save_best', 'default_hooks.logger.ignore_last', 'train_cfg.val_begin'),
            *('env_cfg.dist_cfg.timeout', 'auto_scale_lr.enable', 'randomness.deterministic', 'load_from', 'resume'),
            *(
                'find_unused_parameters',
                'custom_hooks',
                'compile',
                'visualizer.vis_backends',
                'total_batch',
                'work_dir',
            ),
            *('model.backbone._delete_', 'optim_wrapper.paramwise_cfg.decay_rate', 'param_scheduler.0.verbose'),
        ],
        'demo/upernet': [
            *('model.decode_head.norm_cfg.type', 'model.decode_head.sampler', 'model.test_cfg.stride'),
            *('train_dataloader.dataset.ignore_index', 'val_evaluator.output_dir', 'val_dataloader.dataset.indices'),
        ],
    }.items():
        for key in keys:
            merge_options(load(recipe), {key: None})


def test_argument_names_include_base_classes():
    class Base:
        def __init__(self, a, b=1):
            pass

    class Middle(Base):
        def __init__(self, *args, c, **kwargs):
            pass

    class Leaf(Middle):
        pass

    class Closed(Middle):
        def __init__(self, d):
            pass

    assert argument_names(Leaf) == {'a', 'b', 'c'} and argument_names(Closed) == {'d'}


def test_options_win_over_new_length():
    options = {'train_cfg.val_interval': 7, 'param_scheduler.0.end': 301, 'default_hooks.checkpoint.interval': 9}
    config, default = load('upernet/convnext_t'), load('upernet/convnext_t')
    merge_options(config, options)
    scale_schedule(config, iters=1600, options=options)
    scale_schedule(default, iters=1600)
    assert (config.train_cfg.max_iters, config.train_cfg.val_interval) == (1600, 7)
    assert config.param_scheduler[0].end == 301 and config.default_hooks.checkpoint.interval == 9
    assert default.train_cfg.val_interval == 160 and config.param_scheduler[1] == default.param_scheduler[1]
    assert overridden_options(config, options) == []
    with pytest.raises(UsageError, match='--iters 5 and --cfg-options train_cfg.max_iters: give one of them'):
        scale_schedule(config, iters=5, options={'train_cfg.max_iters': 10})


def test_options_win_over_auto_batch():
    assert choose_batch(1, 3, 16) == (2, 8) and choose_batch(1, 3, 16, 3) == (3, 5)
    options = {'train_dataloader.batch_size': 3}
    config = load('mask_rcnn/convnext_t')
    merge_options(config, options)
    line, level = scale_batch(config, 1, options=options)
    assert config.train_dataloader.batch_size == 3 and config.optim_wrapper.accumulative_counts == 5
    assert (
        level == logging.WARNING
        and line.startswith('total batch 15 = 1 process x 3 images')
        and overridden_options(config, options) == []
    )
    config = load('mask_rcnn/convnext_t')
    merge_options(config, options)
    scale_batch(config, 1)
    assert overridden_options(config, options) == [
        '--cfg-options train_dataloader.batch_size=3 became 2: other arguments, the data or the number of GPUs '
        'determine it'
    ]


def test_overridden_options_are_reported():
    config = load('demo/upernet')
    options = {'train_cfg.max_iters': 10, 'model.decode_head.in_channels': [1, 2], 'val_evaluator.prefix': 'a'}
    merge_options(config, options)
    config.train_cfg.max_iters, config.model.decode_head.in_channels = 80, (1, 2)
    config.val_evaluator.pop('prefix')
    changed_line, removed_line = overridden_options(config, options)
    assert 'train_cfg.max_iters=10 became 80' in changed_line and "val_evaluator.prefix='a' was removed" in removed_line
    for key, value in (('model.test_cfg.mode', 'slide'), ('test_dataloader.batch_size', 4)):
        with pytest.raises(UsageError, match=f'{key}={value}: --multiscale tests with'):
            set_multiscale(load('upernet/convnext_t'), {key: value})


@pytest.fixture(scope='module')
def toy_dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp('drawn') / 'shapes'
    toy_shapes.write(folder, train=5, val=3, size=64)
    return folder


@pytest.mark.parametrize('recipe', ['demo/mask_rcnn', 'demo/upernet'])
def test_options_win_over_custom_data(toy_dataset, tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    config = load(recipe)
    config.work_dir = 'run'
    options = {'train_dataloader.dataset.indices': 2, 'train_dataloader.dataset.lazy_init': True}
    merge_options(config, options)
    apply_custom_data(config, DatasetRequest(str(toy_dataset)), options=options)
    assert config.train_dataloader.dataset.indices == 2 and overridden_options(config, options) == []
    for key in (
        'train_dataloader.dataset.ann_file',
        'val_dataloader.dataset.data_prefix.img',
        'val_evaluator.ann_file',
    ):
        config = load(recipe)
        config.work_dir = 'run'
        with pytest.raises(UsageError, match=f'{key}=x: leave it out or --data'):
            apply_custom_data(config, DatasetRequest(str(toy_dataset)), options={key: 'x'})


def test_tools_refuse_unknown_keys(run_tool):
    config = CONFIGS / 'demo/mask_rcnn.py'
    for tool, extra_args in (('train.py', []), ('test.py', ['x.pth']), ('complexity.py', [])):
        if tool != 'test.py':
            process = run_tool(tool, config, *extra_args, '--cfg-options', 'modle.backbone.arch=atto')
            one_line_error(process, 'modle.backbone.arch', '(did you mean model.backbone.arch?)')
        process = run_tool(tool, config, *extra_args, '--cfg-options', 'train_cfg.max_epochs=[(1,2]')
        assert process.returncode == 2 and 'Imbalanced brackets' in process.stderr.splitlines()[-1]
        for option in ('++x=1', '+=1', '=1', 'a'):
            process = run_tool(tool, config, *extra_args, '--cfg-options', option)
            assert process.returncode == 2 and f"'{option}': give KEY=VALUE" in process.stderr.splitlines()[-1]
        process = run_tool(tool, config, *extra_args, '--cfg-options', "custom_hooks=[{'type': 'EmptyCacheHook'}]")
        assert process.returncode == 2 and 'a dict cannot be given here' in process.stderr.splitlines()[-1]
