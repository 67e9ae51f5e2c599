"""Resolving checkpoint and config; no code in a checkpoint file is executed."""

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
def edit_checkpoint(checkpoints, tmp_path):
    """Write a copy of a checkpoint with another meta."""

    def edit(recipe='mask_rcnn', replacement=('', ''), name='edited.pth', **meta):
        content = torch.load(checkpoints[recipe])
        content['meta']['cfg'] = content['meta']['cfg'].replace(*replacement)
        content['meta'].update(meta)
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return edit


def test_config_classes_and_palette_come_from_the_checkpoint(checkpoints):
    source = find_model(checkpoints['upernet'])
    assert source.task == 'segmentation' and source.classes == ('ground', 'disc', 'square', 'triangle', 'cross')
    assert source.palette[1] == (220, 60, 50)
    assert source.config.model.backbone.arch == 'atto'
    assert find_model(checkpoints['mask_rcnn']).config.test_dataloader.dataset.pipeline[1].scale == (128, 128)


def test_work_dir_resolves_to_its_best_or_last_checkpoint(checkpoints, tmp_path):
    for name in ('epoch_1.pth', 'epoch_2.pth'):
        shutil.copy(checkpoints['mask_rcnn'], tmp_path / name)
    (tmp_path / 'last_checkpoint').write_text('/moved/since/epoch_2.pth')
    assert find_model(tmp_path).file == str(tmp_path / 'epoch_2.pth')
    shutil.copy(checkpoints['mask_rcnn'], tmp_path / 'best_coco_bbox_mAP_epoch_1.pth')
    assert find_model(tmp_path).file == str(tmp_path / 'best_coco_bbox_mAP_epoch_1.pth')


def test_released_weights_have_their_recipe(monkeypatch, tmp_path):
    for name, recipe in RECIPES_BY_RELEASED.items():
        file = tmp_path / f'{name}.pth'
        torch.save({'model': {'backbone.x': torch.zeros(1)}}, file)
        monkeypatch.setattr(checkpoint_config, 'download', lambda source, file=file: str(file))
        expected = Config.fromfile(ROOT / f'configs/{recipe}.py')
        for checkpoint in (name, str(file)):
            source = find_model(checkpoint)
            assert source.config.model == expected.model
        assert len(source.classes) == len(source.palette) == {'detection': 80, 'segmentation': 150}[source.task]


def test_class_names_default_to_numbers(edit_checkpoint, photos):
    file = edit_checkpoint(replacement=('metainfo=dict(classes=(\n', 'metainfo=dict(classes=(\n'), dataset_meta=None)
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
def test_config_in_a_checkpoint_is_not_executed(attack, edit_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = edit_checkpoint(replacement=ATTACKS[attack])
    assert torch.load(file)['meta']['cfg'] != torch.load(edit_checkpoint(name='same.pth'))['meta']['cfg'], (
        'nothing replaced'
    )
    with pytest.raises(UsageError, match='--config') as error:
        load_model(file, device='cpu')
    assert '\n' not in str(error.value)
    assert not os.path.exists('EXECUTED')
    load_model(file, DEMO, 'cpu')  # the weights are valid


@pytest.mark.parametrize(
    'meta, words',
    [
        (dict(cfg=None), 'contains no config: give the config'),
        (dict(cfg='model = dict('), 'not plain data'),
        (dict(cfg="default_scope = 'mmdet'"), 'has no model'),
        (dict(cfg="model = dict(type='FPN')\ntest_dataloader = dict()\ndefault_scope = 'mmpretrain'"), 'default_scope'),
    ],
)
def test_invalid_configs_in_checkpoints_are_refused(meta, words, edit_checkpoint):
    with pytest.raises(UsageError, match=words) as error:
        find_model(edit_checkpoint(**meta))
    assert '\n' not in str(error.value)


def test_config_of_another_task_or_model_is_refused(checkpoints):
    with pytest.raises(UsageError, match='is a model for detection, the config is for segmentation'):
        find_model(checkpoints['mask_rcnn'], ROOT / 'configs/demo/upernet.py')
    with pytest.raises(UsageError, match='is a model for segmentation, the config is for detection'):
        find_model(checkpoints['upernet'], DEMO)
    with pytest.raises(UsageError, match='does not fit the config'):
        load_model(checkpoints['mask_rcnn'], ROOT / 'configs/demo/cascade.py', 'cpu')


def test_wrong_number_of_class_names_is_refused(edit_checkpoint):
    with pytest.raises(UsageError, match='names of 2 classes, but the model has 4'):
        load_model(edit_checkpoint(dataset_meta=dict(classes=('a', 'b'))), device='cpu')


def test_missing_and_invalid_checkpoints_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint '.*none.pth'"):
        find_model(tmp_path / 'none.pth')
    with pytest.raises(UsageError, match='contains no checkpoint'):
        find_model(tmp_path)
    (tmp_path / 'text.pth').write_text('hello')
    with pytest.raises(UsageError, match='cannot be read'):
        find_model(tmp_path / 'text.pth')
