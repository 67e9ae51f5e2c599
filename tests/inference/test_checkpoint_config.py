"""Which checkpoint and which config: nothing of a file is executed."""

import os
import shutil

import pytest
import torch
from mmengine.config import Config

from convnext_dense.errors import UsageError
from convnext_dense.inference import checkpoint_config
from convnext_dense.inference.checkpoint_config import RECIPES_BY_RELEASED, find_model
from convnext_dense.inference.model import load_model
from helpers.paths import ROOT

DEMO = ROOT / 'configs/demo/mask_rcnn.py'


@pytest.fixture
def edited(checkpoints, tmp_path):
    """A copy of a checkpoint with another meta."""

    def edit(recipe='mask_rcnn', replace=('', ''), name='edited.pth', **meta):
        content = torch.load(checkpoints[recipe])
        content['meta']['cfg'] = content['meta']['cfg'].replace(*replace)
        content['meta'].update(meta)
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return edit


def test_a_checkpoint_brings_config_classes_and_colors(checkpoints):
    source = find_model(checkpoints['upernet'])
    assert source.task == 'segmentation' and source.classes == ('ground', 'disc', 'square', 'triangle', 'cross')
    assert source.palette[1] == (220, 60, 50)
    assert source.config.model.backbone.arch == 'atto'
    assert find_model(checkpoints['mask_rcnn']).config.test_dataloader.dataset.pipeline[1].scale == (128, 128)


def test_a_work_dir_is_its_best_checkpoint_else_its_last(checkpoints, tmp_path):
    for name in ('epoch_1.pth', 'epoch_2.pth'):
        shutil.copy(checkpoints['mask_rcnn'], tmp_path / name)
    (tmp_path / 'last_checkpoint').write_text('/moved/since/epoch_2.pth')
    assert find_model(tmp_path).file == str(tmp_path / 'epoch_2.pth')
    shutil.copy(checkpoints['mask_rcnn'], tmp_path / 'best_coco_bbox_mAP_epoch_1.pth')
    assert find_model(tmp_path).file == str(tmp_path / 'best_coco_bbox_mAP_epoch_1.pth')


def test_a_released_name_brings_its_recipe(monkeypatch, tmp_path):
    for name, recipe in RECIPES_BY_RELEASED.items():
        file = tmp_path / f'{name}.pth'
        torch.save({'model': {'backbone.x': torch.zeros(1)}}, file)
        monkeypatch.setattr(checkpoint_config, 'download', lambda source, file=file: str(file))
        expected = Config.fromfile(ROOT / f'configs/{recipe}.py')
        for asked in (name, str(file)):
            source = find_model(asked)
            assert source.config.model == expected.model
        assert len(source.classes) == len(source.palette) == {'detection': 80, 'segmentation': 150}[source.task]


def test_without_names_of_classes_there_are_numbers(edited, photos):
    file = edited(replace=('metainfo=dict(classes=(\n', 'metainfo=dict(classes=(\n'), dataset_meta=None)
    config = Config.fromfile(DEMO)
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        config[loader].dataset.pop('metainfo')
        config[loader].dataset.type = 'BaseDetDataset'
    predictor = load_model(file, config, 'cpu')
    assert predictor.classes == ('class 0', 'class 1', 'class 2', 'class 3')


ATTACKS = {
    'a function of a module': ("type='MaskRCNN'", "type='subprocess.Popen', args=['touch', 'EXECUTED']"),
    'a function of a known package': ("type='MaskRCNN'", "type='mmengine.dump', obj='x', file='EXECUTED'"),
    'an expression that mmcv evaluates': ("type='nms'", "type=\"__import__('os').system('touch EXECUTED')\""),
    'an expression that mmdet evaluates': (
        'anchor_generator=dict(',
        "bbox_roi=dict(type='CameraMotionCompensation', warp_mode=\"__import__('os').system('touch EXECUTED')\"),\n"
        '            anchor_generator=dict(',
    ),
    'a pickle in the place of class weights': (
        'loss_cls=dict(',
        "loss_cls=dict(class_weight='weights.pkl', ",
    ),
    'a transform': ("type='Resize'", "type='os.system'"),
    'a scope': ("type='FPN'", "_scope_='os', type='FPN'"),
    'an import': ("imports=[\n        'convnext_dense',", "imports=[\n        'antigravity',"),
    'a call': ("default_scope = 'mmdet'", "default_scope = __import__('os').system('touch EXECUTED')"),
}


@pytest.mark.parametrize('attack', ATTACKS)
def test_a_config_in_a_checkpoint_executes_nothing(attack, edited, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = edited(replace=ATTACKS[attack])
    assert torch.load(file)['meta']['cfg'] != torch.load(edited(name='same.pth'))['meta']['cfg'], 'nothing replaced'
    with pytest.raises(UsageError, match='--config') as error:
        load_model(file, device='cpu')
    assert '\n' not in str(error.value)
    assert not os.path.exists('EXECUTED')
    load_model(file, DEMO, 'cpu')  # the weights are good


@pytest.mark.parametrize(
    'meta, words',
    [
        (dict(cfg=None), 'contains no config: give the config'),
        (dict(cfg='model = dict('), 'not plain data'),
        (dict(cfg="default_scope = 'mmdet'"), 'has no model'),
        (dict(cfg="model = dict(type='FPN')\ntest_dataloader = dict()\ndefault_scope = 'mmpretrain'"), 'default_scope'),
    ],
)
def test_unusable_configs_in_checkpoints(meta, words, edited):
    with pytest.raises(UsageError, match=words) as error:
        find_model(edited(**meta))
    assert '\n' not in str(error.value)


def test_a_config_of_another_task_or_model(checkpoints):
    with pytest.raises(UsageError, match='is a model for detection, the config is for segmentation'):
        find_model(checkpoints['mask_rcnn'], ROOT / 'configs/demo/upernet.py')
    with pytest.raises(UsageError, match='is a model for segmentation, the config is for detection'):
        find_model(checkpoints['upernet'], DEMO)
    with pytest.raises(UsageError, match='does not fit the config'):
        load_model(checkpoints['mask_rcnn'], ROOT / 'configs/demo/cascade.py', 'cpu')


def test_names_of_another_number_of_classes(edited):
    with pytest.raises(UsageError, match='names of 2 classes, but the model has 4'):
        load_model(edited(dataset_meta=dict(classes=('a', 'b'))), device='cpu')


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint '.*none.pth'"):
        find_model(tmp_path / 'none.pth')
    with pytest.raises(UsageError, match='contains no checkpoint'):
        find_model(tmp_path)
    (tmp_path / 'text.pth').write_text('hello')
    with pytest.raises(UsageError, match='cannot be read'):
        find_model(tmp_path / 'text.pth')
