"""Exported models of images of five channels and of one: the files take the values of image files."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from convnext_dense import load_model
from convnext_dense.channel_files import ChannelReader, read_channels
from convnext_dense.checkpoints.exported_files import read_exported
from convnext_dense.errors import UsageError
from convnext_dense.export.check import FULL, check_file, predict
from convnext_dense.export.files import onnx_to_openvino, write_onnx, write_pt2
from convnext_dense.export.program import ExportOptions, image_channels, trace
from convnext_dense.export.quantize import calibration_inputs
from convnext_dense.export.segmentor import ExportableSegmentor
from convnext_dense.inference.checkpoint_config import find_model
from helpers.channels import MEANS, STDS, made_image, save_tiff, write_channels
from helpers.checkpoints import CLASSES, save_checkpoint
from helpers.datasets import quick_options, run

pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('openvino')
ORDER = [3, 0, 4, 2, 1]
READERS = {
    'upernet': ChannelReader([i + 1 for i in ORDER], tuple(MEANS[ORDER]), tuple(STDS[ORDER]), 5, 'uint16'),
    'mask_rcnn': ChannelReader((1,), (MEANS[0],), (STDS[0],), 1, 'uint16'),
}
SMALL = {
    'upernet': {
        'model.backbone': dict(arch=dict(_delete_=True, depths=(1, 1), channels=(16, 32)), out_indices=(0, 1)),
        'model.decode_head': dict(in_channels=[16, 32], in_index=[0, 1], channels=16),
        'model.auxiliary_head': None,
        'model.test_cfg.mode': 'whole',
    },
    'mask_rcnn': {'model.backbone.arch': dict(_delete_=True, depths=(1, 1, 1, 1), channels=(40, 80, 160, 320))},
}


@pytest.fixture(scope='module', params=['upernet', pytest.param('mask_rcnn', marks=pytest.mark.slow)])
def exported(request, tmp_path_factory):
    """Reader, model, its files by suffix, and a TIFF."""
    recipe, folder = request.param, tmp_path_factory.mktemp(request.param)
    reader, files = READERS[recipe], {suffix: folder / f'model{suffix}' for suffix in ('.pth', '.onnx', '.xml', '.pt2')}
    predictor = load_model(save_checkpoint(recipe, files['.pth'], reader, **SMALL[recipe]), device='cpu')
    traced = trace(predictor, ExportOptions())
    write_onnx(traced, files['.onnx'])
    onnx_to_openvino(files['.onnx'], files['.xml'], traced.meta)
    write_pt2(traced, files['.pt2'])
    save_tiff(folder / 'image.tif', made_image(0, 128, (30, 50), reader.num_channels)[0])
    return reader, predictor, files, folder / 'image.tif'


@pytest.mark.parametrize('suffix', ['.onnx', '.xml', '.pt2'])
def test_results_equal_the_checkpoint(suffix, exported):
    """Of pictures in several sizes, of an image without values, and of a file."""
    reader, predictor, files, image = exported
    meta = read_exported(files[suffix]).meta
    assert (meta.input, meta.channels) == ('channels', len(reader.channels))
    assert meta.mean == tuple(reader.mean) and meta.std == tuple(reader.std)
    differences = check_file(files[suffix], predictor, ExportOptions())
    assert sum(difference.detections or 1 for difference in differences) > 4
    expected, actual = (model.predict(str(image)) for model in (predictor, load_model(files[suffix], device='cpu')))
    if predictor.task == 'segmentation':
        labels = expected.pred_sem_seg.data
        assert len(labels.unique()) > 1 and (labels == actual.pred_sem_seg.data).float().mean() >= FULL.pixels
    else:
        expected, actual = expected.pred_instances, actual.pred_instances
        assert len(expected) > 5 and len(actual) == len(expected)
        torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=1e-4)
        assert (actual.masks == expected.masks).float().mean() > 0.9999


def test_a_file_takes_the_values_of_an_image(exported):
    """Pixels without a value are NaN; the image has the size to which the test pipeline resizes."""
    _, predictor, files, image = exported
    if predictor.task != 'segmentation':
        pytest.skip('its image is resized')
    pixels = read_channels(image)
    (inputs,) = calibration_inputs(predictor, [str(image)], ExportOptions())
    np.testing.assert_allclose(inputs['images'][0], pixels[..., ORDER].transpose(2, 0, 1), 1e-6)
    pixels[40:60, 40:60, 4] = np.nan
    inputs['images'] = pixels[..., ORDER].transpose(2, 0, 1)[None]
    (segmentation,) = onnxruntime.InferenceSession(files['.onnx']).run(None, inputs)
    expected = predictor.predict(pixels).pred_sem_seg.data.numpy()
    assert len(np.unique(expected)) > 1 and (segmentation == expected).mean() >= FULL.pixels


def test_tools_take_the_file(exported, tmp_path, capsys):
    """tools/test.py and tools/predict.py do with the ONNX file what they do with the checkpoint."""
    _, predictor, files, _ = exported
    if predictor.task != 'segmentation':
        pytest.skip('one task is enough')
    write_channels(tmp_path / 'data', n_train=1)
    (tmp_path / 'data/classes.txt').write_text('\n'.join(CLASSES['upernet']))
    find_model(files['.pth']).config.dump(tmp_path / 'config.py')
    metrics = {}
    for suffix in ('.pth', '.onnx'):
        args = [tmp_path / 'config.py', files[suffix], '--data', tmp_path / 'data', '--work-dir', tmp_path / suffix]
        assert run('test.py', *args, '--cfg-options', *quick_options('channels')) == 0
        metrics[suffix] = float(re.search(r'^mIoU ([\d.]+)', capsys.readouterr().out, re.MULTILINE)[1])
        out = tmp_path / f'predicted{suffix}'
        assert run('predict.py', files[suffix], tmp_path / 'data/images/val', '--out', out) == 0
        assert len([*(out / 'masks').iterdir()]) == 2
    assert metrics['.pth'] > 1 and metrics['.onnx'] == pytest.approx(metrics['.pth'], abs=0.1)
    args[2:2] = ['--channels', '1,2']
    assert run('test.py', *args) == 2
    assert 'was trained on channels 4,1,5,3,2: leave it out' in capsys.readouterr().err


def test_inputs_of_the_exported_model(exported, monkeypatch):
    """Three channels stay in their order; zeros and padding to a fixed size are the mean; others are refused."""
    reader, predictor, files, _ = exported
    model = load_model(files['.onnx'], device='cpu').model
    sample = predictor.prepare(np.zeros((64, 64, len(reader.channels)), np.float32))['data_samples']
    with pytest.raises(UsageError, match=rf'images of 7 channels: .*onnx takes {len(reader.channels)}'):
        model.test_step(dict(inputs=[torch.zeros(7, 64, 64)], data_samples=[sample]))
    mean = np.float32([5, 6, 7])
    model.meta = dataclasses.replace(model.meta, channels=3, mean=(5, 6, 7), std=(1, 1, 1))
    monkeypatch.setattr(model, 'mean', mean)
    monkeypatch.setattr(model.session, 'size', (96, 96))
    images, _ = model._prepare([torch.zeros(3, 64, 64)], [sample])
    assert images.dtype == np.float32 and np.array_equal(images, np.zeros((1, 3, 96, 96)) + mean[:, None, None])


@pytest.mark.parametrize('channels, color_type', [(1, 'grayscale'), (5, 'unchanged')])
def test_backbones_of_other_channels_without_a_reader(channels, color_type, tmp_path):
    """Images that are read by `LoadImageFromFile`."""
    settings = {**SMALL['upernet'], 'model.backbone.in_channels': channels}
    predictor = load_model(save_checkpoint('upernet', tmp_path / 'model.pth', **settings), device='cpu')
    assert predictor.color_type == color_type and image_channels(predictor) == channels
    image = np.random.RandomState(0).randint(0, 256, (channels, 64, 96), np.uint8)
    with torch.no_grad():
        labels = ExportableSegmentor(predictor.model)(torch.from_numpy(image)[None], torch.tensor([64, 96]))
    expected = predict(predictor, image, (64, 96), ExportOptions()).pred_sem_seg.data
    assert len(expected.unique()) > 1 and torch.equal(labels.long(), expected)
