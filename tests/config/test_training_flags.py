"""Training aids as flags: what they change in a config, what they refuse, and one training with all of them."""

import json
import re
from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, init_default_scope

from convnext_dense.config.batch_size import scale_batch
from convnext_dense.config.training_aids import (
    freeze_backbone,
    scale_backbone_lr,
    set_early_stopping,
    set_ema,
    set_negatives,
)
from convnext_dense.datasets import toy_shapes
from convnext_dense.errors import UsageError
from helpers.paths import ROOT
from helpers.processes import WITHOUT_WORKERS
from helpers.recipes import load
from helpers.tools import DETECTOR, one_line_error

STOCK = Path(mmdet.__file__).parent / '.mim/configs'


def stock(name):
    init_default_scope('mmdet')
    return Config.fromfile(STOCK / f'{name}.py')


def test_early_stopping_monitors_the_main_metric():
    for recipe, metric, delta in (('demo/mask_rcnn', 'coco/bbox_mAP', 0.001), ('demo/upernet', 'mIoU', 0.1)):
        config = load(recipe)
        set_early_stopping(config, 4)
        hook = dict(type='EarlyStoppingHook', monitor=metric, rule='greater', min_delta=delta, patience=4)
        assert config.custom_hooks == [hook]
        with pytest.raises(UsageError, match='has an EarlyStoppingHook already'):
            set_early_stopping(config, 4)
    config.val_evaluator = dict(type='DumpResults')
    config.custom_hooks = None
    with pytest.raises(UsageError, match='needs an evaluation of box AP or mIoU'):
        set_early_stopping(config, 4)


def test_ema_is_counted_in_optimizer_steps():
    config = load('demo/mask_rcnn')
    set_ema(config, 0.99)
    assert config.custom_hooks[0].momentum == 0.01
    config.total_batch = 8
    scale_batch(config, 1)
    assert (config.custom_hooks[0].interval, config.custom_hooks[0].gamma) == (4, 40)
    config = stock('yolox/yolox_tiny_8xb8-300e_coco')
    with pytest.raises(UsageError, match='has an EMAHook already'):
        set_ema(config, 0.99)


def optimizer_of(config):
    model = MODELS.build(config.model)
    wrapper = dict(config.optim_wrapper)
    constructor = wrapper.pop('constructor', 'DefaultOptimWrapperConstructor')
    paramwise_cfg = wrapper.pop('paramwise_cfg', None)
    args = dict(type=constructor, optim_wrapper_cfg=wrapper, paramwise_cfg=paramwise_cfg)
    groups = OPTIM_WRAPPER_CONSTRUCTORS.build(args)(model).optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (g['lr'], g['weight_decay']) for g in groups for p in g['params']}


def test_backbone_lr_scales_backbone_groups_only():
    config, scaled_config = load('demo/mask_rcnn'), load('demo/mask_rcnn')
    scale_backbone_lr(scaled_config, 0.1)
    groups, scaled_groups = optimizer_of(config), optimizer_of(scaled_config)
    assert groups.keys() == scaled_groups.keys()
    for name, (lr, decay) in groups.items():
        is_backbone = name.startswith(('backbone.stages', 'backbone.downsample'))
        assert scaled_groups[name] == (pytest.approx(lr * (0.1 if is_backbone else 1), rel=1e-9), decay), name


def test_backbone_lr_of_other_constructors():
    config = stock('retinanet/retinanet_r50_fpn_1x_coco')
    config.model.backbone.init_cfg = None
    config.optim_wrapper.paramwise_cfg = dict(custom_keys={'backbone.layer4': dict(lr_mult=2.0)})
    scale_backbone_lr(config, 0.1)
    lrs = {name: lr for name, (lr, _) in optimizer_of(config).items()}
    assert lrs['backbone.layer3.0.conv1.weight'] == pytest.approx(0.001)
    assert lrs['backbone.layer4.0.conv1.weight'] == pytest.approx(0.002)
    assert lrs['bbox_head.retina_cls.weight'] == pytest.approx(0.01)
    config.optim_wrapper.paramwise_cfg = dict(norm_decay_mult=0.0)
    with pytest.raises(UsageError, match='--backbone-lr: give the factor in optim_wrapper.paramwise_cfg'):
        scale_backbone_lr(config, 0.1)
    config.optim_wrapper.paramwise_cfg.custom_keys = dict(backbone=dict(lr_mult=0.5))  # as in DINO's recipes
    scale_backbone_lr(config, 0.1)
    settings = optimizer_of(config)
    assert settings['backbone.layer3.0.bn1.weight'] == (pytest.approx(0.0005), 1e-4)
    assert settings['bbox_head.retina_cls.weight'] == (0.01, 1e-4)


@pytest.mark.parametrize('stages, number', [('0', 0), ('2', 2), ('4', 4), ('all', 4)])
def test_frozen_stages(stages, number):
    config = load('demo/mask_rcnn')
    freeze_backbone(config, stages)
    assert config.model.backbone.frozen_stages == number
    config = stock('retinanet/retinanet_r50_fpn_1x_coco')
    if stages != 'all':
        freeze_backbone(config, stages)
        assert config.model.backbone.frozen_stages == number


def test_training_on_images_without_objects():
    config = load('mask_rcnn/convnext_t')
    set_negatives(config, 'keep')
    assert config.train_dataloader.dataset.filter_cfg == dict(filter_empty_gt=False, min_size=32)
    assert load('mask_rcnn/convnext_t').val_dataloader == config.val_dataloader
    set_negatives(config, 'drop')
    assert config.train_dataloader.dataset.filter_cfg.filter_empty_gt
    config = stock('rtmdet/rtmdet_s_8xb32-300e_coco')
    set_negatives(config, 'keep')
    assert config.train_dataloader.dataset.filter_cfg.filter_empty_gt is False


BAD = {
    '--early-stop 0': (set_early_stopping, 0),
    '--ema 1: give a decay between 0 and 1': (set_ema, 1.0),
    '--ema nan': (set_ema, float('nan')),
    "--freeze 'x': give a number of stages, or all": (freeze_backbone, 'x'),
    '--freeze 5: the backbone has 4 stages': (freeze_backbone, '5'),
    '--backbone-lr 0: give a positive factor': (scale_backbone_lr, 0.0),
    '--backbone-lr inf': (scale_backbone_lr, float('inf')),
    '--negatives is for detection': (set_negatives, 'keep'),
}


@pytest.mark.parametrize('message', BAD)
def test_invalid_values_are_refused(message):
    function, value = BAD[message]
    config = load('demo/upernet')
    with pytest.raises(UsageError) as error:
        function(config, value)
    assert str(error.value).startswith(message) and '\n' not in str(error.value)


def test_training_with_all_flags(run_tool, tmp_path):
    """The backbone stays, heads and output norms are trained, with layer decay on; an image has no objects."""
    data = tmp_path / 'shapes'
    toy_shapes.write(data, train=4, val=2, size=64)
    content = json.loads((data / 'annotations/instances_train.json').read_text())
    first_id = content['images'][0]['id']
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] != first_id]
    (data / 'annotations/instances_train.json').write_text(json.dumps(content))
    aids = ('--early-stop', 5, '--ema', 0.9, '--freeze', 'all', '--backbone-lr', 0.5, '--negatives', 'keep')
    args = ('--work-dir', 'run', '--epochs', 2, '--image-size', 64, *aids)
    options = ('default_hooks.checkpoint.interval=1', *WITHOUT_WORKERS)
    process = run_tool('train.py', DETECTOR, *args, '--cfg-options', *options, SHAPES_ROOT=data)
    assert process.returncode == 0, process.stderr[-3000:]
    assert 'training on 4 images: 4 optimizer steps in 2 epochs' in process.stdout
    first_id, state2 = (torch.load(tmp_path / f'run/epoch_{i}.pth', weights_only=False) for i in (1, 2))
    assert 'ema_state_dict' in state2
    first_id, state2 = (state['state_dict'] for state in (first_id, state2))
    for name in first_id:
        is_frozen = name.startswith(('backbone.stages', 'backbone.downsample'))
        if is_frozen or name.endswith(('fc_cls.weight', 'norm3.weight')):
            assert torch.equal(first_id[name], state2[name]) == is_frozen, name
    process = run_tool('test.py', DETECTOR, 'run/epoch_2.pth', '--cfg-options', *WITHOUT_WORKERS, SHAPES_ROOT=data)
    assert process.returncode == 0, process.stderr[-3000:]
    one_line_error(run_tool('train.py', DETECTOR, '--freeze', 9, '--work-dir', 'x'), '--freeze 9: the backbone has 4')


def test_every_flag_is_documented(parse, capsys):
    pages = ''.join((ROOT / 'docs' / f'{page}.md').read_text() for page in ('training', 'datasets', 'resume'))
    with pytest.raises(SystemExit):
        parse('train.py', '--help')
    flags = {*re.findall(r'^  (?:-h, )?(--[\w-]+)', capsys.readouterr().out, re.MULTILINE)} - {'--help'}
    assert len(flags) > 30 and not [flag for flag in sorted(flags) if flag not in pages]
