"""The multi-scale test of ADE20K against a reference implementation that holds all views in memory."""

import os
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope
from torch.nn.functional import interpolate

from convnext_dense.config.evaluation import SCALE_FACTORS, set_multiscale
from convnext_dense.datasets import toy_shapes
from convnext_dense.errors import UsageError
from convnext_dense.models.multiscale_tta import _resize_rows
from helpers.paths import ROOT
from helpers.recipes import SEGMENTATION, load
from helpers.tools import MEAN, STD, one_line_error

DEMO = ROOT / 'configs/demo/upernet.py'


def small_config(seed=0, **settings) -> Config:
    """A config that tests at (512, 128), with a small random model whose output depends on the position."""
    config = load('demo/upernet')
    config.merge_from_dict(settings)
    torch.manual_seed(seed)
    return config


def build_model(config: Config) -> torch.nn.Module:
    init_default_scope('mmseg')
    from mmengine.model import revert_sync_batchnorm

    model = revert_sync_batchnorm(MODELS.build(config.model)).eval()
    for name, p in model.named_parameters():
        if 'conv_seg' in name:
            torch.nn.init.normal_(p, std=0.5)
    return model


def prepare_views(config: Config, image: np.ndarray, tmp_path) -> dict:
    """One image through the config's test pipeline, collated as by the data loader."""
    path = str(tmp_path / 'image.png')
    cv2.imwrite(path, image)
    cv2.imwrite(str(tmp_path / 'label.png'), np.zeros(image.shape[:2], np.uint8))
    pipeline = Compose([TRANSFORMS.build(step) for step in config.test_dataloader.dataset.pipeline])
    sample = dict(img_path=path, seg_map_path=str(tmp_path / 'label.png'), reduce_zero_label=True, seg_fields=[])
    return pseudo_collate([pipeline(sample)])


def reference(model, image: np.ndarray, long: int, short: int) -> torch.Tensor:
    """Reference implementation of the protocol: the mean of the softmax of all views."""
    height, width = image.shape[:2]
    views = []
    for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
        scale = min(int(long * ratio) / max(height, width), int(short * ratio) / min(height, width))
        size = int(width * scale + 0.5), int(height * scale + 0.5)
        resized = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)[..., ::-1].astype(np.float32)
        x = torch.from_numpy((resized - MEAN) / STD).permute(2, 0, 1)[None]
        for flip in (False, True):
            x_view = x.flip(3) if flip else x
            logits = model.decode_head(model.backbone(x_view))
            logits = interpolate(logits, x.shape[2:], mode='bilinear', align_corners=False)
            logits = logits.flip(3) if flip else logits
            logits = interpolate(logits, (height, width), mode='bilinear', align_corners=False)
            views.append(logits.softmax(1)[0])
    return torch.stack(views).mean(0)


@pytest.mark.parametrize('size', [(150, 233), (211, 140), (160, 160)], ids=str)
def test_equals_reference_implementation(size, tmp_path):
    config = small_config()
    resize = next(step for step in config.test_dataloader.dataset.pipeline if step.type == 'Resize')
    resize.scale = (256, 64)
    set_multiscale(config)
    model = build_model(config)
    image = cv2.resize(np.random.RandomState(0).randint(0, 256, (9, 9, 3)).astype(np.uint8), size[::-1])
    data = prepare_views(config, image, tmp_path)
    with torch.no_grad():
        samples, (actual,) = model.probabilities(data)
        expected = reference(model.module, image, 256, 64)
    assert actual.shape == (5, *size)
    assert (actual - expected).abs().max() < 1e-6
    assert expected.argmax(0).unique().numel() > 1
    (sample,) = model.test_step(prepare_views(config, image, tmp_path))
    assert torch.equal(sample.pred_sem_seg.data[0], actual.argmax(0))
    assert sample.gt_sem_seg.shape == size and samples[0].gt_sem_seg.shape == size
    assert 'seg_logits' not in sample


def test_binary_segmentation_applies_one_sigmoid(tmp_path):
    config = small_config()
    config.model.decode_head.update(num_classes=2, out_channels=1, threshold=0.4)
    config.model.decode_head.loss_decode = dict(type='CrossEntropyLoss', use_sigmoid=True)
    config.model.pop('auxiliary_head')
    set_multiscale(config)
    model = build_model(config)
    image = np.random.RandomState(1).randint(0, 256, (40, 60, 3)).astype(np.uint8)
    with torch.no_grad():
        _, (actual,) = model.probabilities(prepare_views(config, image, tmp_path))
    assert actual.shape == (1, 40, 60) and actual.min() > 0 and actual.max() < 1
    (sample,) = model.test_step(prepare_views(config, image, tmp_path))
    assert torch.equal(sample.pred_sem_seg.data, (actual > 0.4).float())


@pytest.mark.parametrize('name', SEGMENTATION)
@pytest.mark.parametrize('size', [(427, 640), (640, 427), (500, 500)], ids=['landscape', 'portrait', 'square'])
def test_sizes_of_the_views(name, size, tmp_path):
    config = load(name)
    set_multiscale(config)
    assert config.model.module.test_cfg.mode == 'whole'
    data = prepare_views(config, np.zeros((*size, 3), np.uint8), tmp_path)
    long, short = (2560, 640) if name.endswith('in22k') else (2048, 512)
    expected = []
    for r in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
        scale = min(int(long * r) / max(size), int(short * r) / min(size))
        expected += [(3, int(size[0] * scale + 0.5), int(size[1] * scale + 0.5))] * 2
    assert [tuple(view[0].shape) for view in data['inputs']] == expected
    flips = [view[0].flip for view in data['data_samples']]
    assert flips == [False, True] * 6
    if size == (500, 500):
        assert expected[-1][1] == int(short * 1.75)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('size', [(7, 9), (64, 50), (200, 31), (1, 1)], ids=str)
def test_resized_rows_equal_torch(align_corners, size):
    logits = torch.randn(3, 23, 17, generator=torch.Generator().manual_seed(0))
    resized = interpolate(logits[None], size, mode='bilinear', align_corners=align_corners)[0]
    for n_rows in (1, 5, size[0]):
        for top in range(0, size[0] - n_rows + 1, n_rows):
            rows = _resize_rows(logits, top, n_rows, size, align_corners)
            torch.testing.assert_close(rows, resized[:, top : top + n_rows], rtol=0, atol=1e-5)


MEASURE = """
import sys, torch
sys.path[:0] = [{tests!r}, {tests!r} + '/models']
from pathlib import Path
import numpy as np
import test_multiscale_tta as t
from convnext_dense.config import evaluation
config = t.small_config()
config.model.decode_head.num_classes = 150
evaluation.SCALE_FACTORS = {ratios}
evaluation.set_multiscale(config)
model = t.build_model(config)
image = np.random.RandomState(0).randint(0, 256, (700, 1000, 3)).astype(np.uint8)
data = t.prepare_views(config, image, Path({folder!r}))
used = lambda key: int(next(x for x in open('/proc/self/status') if x.startswith(key)).split()[1])
open('/proc/self/clear_refs', 'w').write('5')  # reset the peak
before = used('VmRSS')
if {reference}:
    with torch.no_grad():
        model.module.test_step(dict(inputs=data['inputs'][0], data_samples=data['data_samples'][0]))
else:
    model.test_step(data)
print(used('VmHWM') - before)
"""


def test_memory_does_not_grow_with_the_number_of_views(tmp_path):
    """At most 1.3 times the memory of mmseg's own prediction of the largest view."""

    def peak(ratios, reference):
        code = MEASURE.format(tests=str(ROOT / 'tests'), ratios=ratios, folder=str(tmp_path), reference=reference)
        # Freed memory is returned to the system immediately: measure tensors, not the allocator's cache.
        env = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '1000000', 'OMP_NUM_THREADS': '2'}
        process = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
        assert process.returncode == 0, process.stderr
        return int(process.stdout.split()[-1])

    multiscale, largest_view = peak(SCALE_FACTORS, False), peak(SCALE_FACTORS[-1:], True)
    assert multiscale < 1.3 * largest_view, (multiscale, largest_view)


def test_from_command_line(run_tool, tmp_path):
    data = tmp_path / 'shapes'
    toy_shapes.write(data, train=2, val=3, size=64)
    config = small_config()
    model = build_model(config)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'w.pth')
    arguments = ['test.py', DEMO, tmp_path / 'w.pth', '--out', tmp_path / 'out', '--multiscale']
    process = run_tool(*arguments, '--show-dir', tmp_path / 'pictures', SHAPES_ROOT=str(data))
    assert process.returncode == 0, process.stderr[-3000:]
    assert re.search(r'mIoU \d', process.stdout.splitlines()[-1])
    for progress in ('1/3', '2/3', '3/3'):
        assert progress in process.stderr
    assert len(list((tmp_path / 'pictures').rglob('*.png'))) == 3
    for file in (data / 'val').glob('*.png'):
        with torch.no_grad():
            expected = reference(model, cv2.imread(str(file)), 512, 128).argmax(0).numpy()
        actual = cv2.imread(str(tmp_path / 'out' / file.name), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(actual, expected + 1)


def test_invalid_uses_of_multiscale(run_tool, tmp_path):
    torch.save({}, tmp_path / 'w.pth')
    data = tmp_path / 'shapes'
    toy_shapes.write(data, train=2, val=2, size=64)
    detector = ['test.py', ROOT / 'configs/demo/mask_rcnn.py', tmp_path / 'w.pth', '--multiscale']
    one_line_error(run_tool(*detector, SHAPES_ROOT=str(data)), '--multiscale', 'COCO')
    config = load('demo/upernet')
    config.test_dataloader.dataset.pipeline = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
    with pytest.raises(UsageError, match='Resize'):
        set_multiscale(config)
