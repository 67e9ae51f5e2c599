"""Trainings on images of five channels of 16 bits: evaluated, resumed to the bit, tested, predicted, dry-run."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub

from convnext_dense.config.channels import channel_reader
from helpers.channels import write_channels
from helpers.datasets import DETECTOR, SEGMENTOR, quick_options, run

SMALL = ('--image-size', 64, '--no-auto-schedule')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('channels') / 'data'
    return root, write_channels(root).reshape(-1, 5).astype(float)


def last_metric(name):
    """Return a metric of the last evaluation in this process."""
    return MessageHub.get_current_instance().get_scalar(f'val/{name}').current()


def test_a_segmentor(data, tmp_path, capsys):
    root, pixels = data
    args = [SEGMENTOR, '--data', root, *SMALL, '--channels', '5,1,2', '--seed', 0]
    options = ['--cfg-options', 'default_hooks.checkpoint.interval=2', 'train_cfg.val_interval=4']
    options += ['model.backbone.drop_path_rate=0.1', *quick_options('channels')]
    assert run('train.py', *args, '--work-dir', tmp_path / 'a', '--iters', 4, *options) == 0
    miou = last_metric('mIoU')
    config = Config.fromfile(tmp_path / 'a/upernet.py')
    reader = channel_reader(config)
    assert reader.channels == [5, 1, 2] and config.model.backbone.get('in_channels', 3) == 3
    assert np.allclose(reader.mean, pixels.mean(0)[[4, 0, 1]]) and np.allclose(reader.std, pixels.std(0)[[4, 0, 1]])
    in_checkpoint = torch.load(tmp_path / 'a/iter_4.pth', weights_only=False)
    assert channel_reader(Config.fromstring(in_checkpoint['meta']['cfg'], '.py')) == reader

    (tmp_path / 'b').mkdir()
    shutil.copy(tmp_path / 'a/iter_2.pth', tmp_path / 'b')
    resumed = [*args, '--work-dir', tmp_path / 'b', '--iters', 4, '--resume', tmp_path / 'b/iter_2.pth', *options]
    assert run('train.py', *resumed) == 0
    resumed_checkpoint = torch.load(tmp_path / 'b/iter_4.pth', weights_only=False)
    for name, tensor in in_checkpoint['state_dict'].items():
        assert torch.equal(tensor, resumed_checkpoint['state_dict'][name]), name

    capsys.readouterr()
    test = [SEGMENTOR, tmp_path / 'a/iter_4.pth', '--data', root, '--image-size', 64, '--work-dir', tmp_path / 't']
    pictures = ['--show-dir', tmp_path / 'shown', '--report', tmp_path / 'report']
    assert run('test.py', *test, *pictures, '--cfg-options', *quick_options('channels')) == 0
    assert f'{miou:.2f}' in capsys.readouterr().out
    assert channel_reader(Config.fromfile(tmp_path / 't/test/upernet.py')) == reader
    assert len([*(tmp_path / 'shown').rglob('*.png')]) == 2
    assert len([*(tmp_path / 'report/worst_images').iterdir()]) == 2
    assert run('test.py', *test[:-1], tmp_path / 'u', '--channels', '1,2,5') == 2
    assert 'was trained on channels 5,1,2: leave it out' in capsys.readouterr().err

    out = tmp_path / 'predicted'
    assert run('predict.py', tmp_path / 'a/iter_4.pth', root / 'images/val', '--out', out, '--tile', 48) == 0
    assert {path.name for path in (out / 'masks').iterdir()} == {'0.png', '1.png'}
    assert cv2.imread(str(out / 'pictures/0.jpg')).std() > 10


def test_a_detector(data, tmp_path):
    root, _ = data
    args = [DETECTOR, '--data', root, '--work-dir', tmp_path / 'work', *SMALL, '--epochs', 1]
    assert run('train.py', *args, '--cfg-options', 'train_cfg.val_interval=1', *quick_options('channels')) == 0
    config = Config.fromfile(tmp_path / 'work/mask_rcnn.py')
    assert config.model.backbone.in_channels == 5
    assert 0 <= last_metric('coco/segm_mAP') <= 1
    out = tmp_path / 'predicted'
    assert run('predict.py', tmp_path / 'work/epoch_1.pth', root / 'images/val', '--out', out) == 0
    assert len(json.loads((out / 'predictions.json').read_text())['images']) == 2
