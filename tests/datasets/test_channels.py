"""Data sets of images that are not RGB: their channels are found and measured, and a config takes them."""

from importlib import import_module

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image

from convnext_dense.channel_files import ChannelReader
from convnext_dense.checkpoints.pretrained import load_backbone
from convnext_dense.config.channels import channel_reader, set_channels
from convnext_dense.config.mixed_images import set_mosaic
from convnext_dense.config.tree import iter_dicts
from convnext_dense.datasets.channels import Moments, parse_channels
from convnext_dense.datasets.custom import DatasetRequest, apply_custom_data
from convnext_dense.datasets.write_dataset import write_tiles
from convnext_dense.errors import UsageError
from convnext_dense.inference.dataset_pictures import write_pictures
from convnext_dense.models.convnext import ConvNeXt
from helpers.channels import made_image, save_tiff, write_channels
from helpers.datasets import check_dataset, load_recipe
from helpers.files import error_message

READER = ChannelReader((1, 2, 3, 4, 5), (1.0,) * 5, (2.0,) * 5, 5, 'uint16')
ARCH = dict(depths=(1, 1, 1, 1), channels=(8, 8, 8, 8))


def test_moments_are_those_of_all_values():
    rng = np.random.RandomState(0)
    images = [rng.normal(1e5, 3, (n, n + 1, 3)) for n in (1, 7, 40)]
    images[1][2, 3, 1], images[2][0, :, 0] = np.nan, np.inf
    total = Moments(*np.zeros((3, 3)))
    for image in images:
        total = total.add(Moments.of_pixels(image))
    values = np.concatenate([image.reshape(-1, 3) for image in images])
    values[~np.isfinite(values)] = np.nan
    assert np.allclose(total.mean, np.nanmean(values, 0), rtol=1e-12)
    assert np.allclose(np.sqrt(total.m2 / total.count), np.nanstd(values, 0), rtol=1e-9)


@pytest.mark.parametrize('task', ['segmentation', 'detection'])
def test_mean_and_std_are_those_of_the_training_images(task, tmp_path):
    pixels = write_channels(tmp_path).reshape(-1, 5).astype(float)
    data, _ = check_dataset(tmp_path, task)
    assert not data.report.problems and data.channels['channels'] == (1, 2, 3, 4, 5)
    assert np.allclose(data.channels['mean'], pixels.mean(0), rtol=1e-12)
    assert np.allclose(data.channels['std'], pixels.std(0), rtol=1e-12)
    assert (data.channels['num_channels'], data.channels['dtype']) == (5, 'uint16')
    line = next(fact for fact in data.report.facts if 'channels' in fact)
    assert line.startswith('images of 5 channels of uint16; channels 1,2,3,4,5, on the training images: mean ')
    order, _ = check_dataset(tmp_path, task, channels=(4, 1))
    assert np.array_equal(order.channels['mean'], [data.channels['mean'][i] for i in (3, 0)])


@pytest.mark.parametrize('task', ['segmentation', 'detection'])
def test_a_config_takes_the_channels(task, tmp_path):
    write_channels(tmp_path / 'data')
    config = load_recipe('demo/upernet' if task == 'segmentation' else 'demo/mask_rcnn')
    config.work_dir = str(tmp_path / 'work')
    lines = apply_custom_data(config, DatasetRequest(str(tmp_path / 'data'), channels=(5, 2, 1, 3)))
    assert config.model.backbone.in_channels == 4
    last_line = 'data: 4 input channels, normalized by their mean and std'
    assert lines[-1] == last_line + ', RandomBrightnessContrast for PhotoMetricDistortion' * (task == 'segmentation')
    reader = channel_reader(config)
    assert reader.channels == [5, 2, 1, 3]
    init_default_scope(config.default_scope)
    for split in ('train', 'val'):
        sample = DATASETS.build(config[f'{split}_dataloader'].dataset)[0]
        assert sample['inputs'].dtype == torch.float32 and len(sample['inputs']) == 4
        assert abs(sample['inputs'].mean()) < 2  # of thousands that are in the files
    model = MODELS.build(config.model)
    batch = dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']])
    prepared = model.data_preprocessor(batch)['inputs']
    height, width = sample['inputs'].shape[1:]
    assert torch.equal(prepared[0, :, :height, :width], sample['inputs'])  # normalized once, in this order
    manifest = tmp_path / 'work/data/data.json'
    second_config = load_recipe('demo/upernet' if task == 'segmentation' else 'demo/mask_rcnn')
    second_config.work_dir = str(tmp_path / 'work')
    request, written = DatasetRequest(str(tmp_path / 'data'), channels=(5, 2, 1, 3)), manifest.stat().st_mtime_ns
    apply_custom_data(second_config, request)  # out of the cache
    assert channel_reader(second_config) == reader and manifest.stat().st_mtime_ns == written
    checkpoint = tmp_path / 'model.pth'
    torch.save(dict(state_dict={}, meta=dict(cfg=second_config.pretty_text)), checkpoint)
    apply_custom_data(second_config, request, checkpoint=str(checkpoint))  # as a training that is resumed
    assert channel_reader(second_config) == reader and manifest.stat().st_mtime_ns == written
    means = {f'{split}_dataloader.dataset.pipeline.0.mean': [0.0] * 4 for split in ('train', 'val', 'test')}
    second_config.merge_from_dict(means)
    torch.save(dict(state_dict={}, meta=dict(cfg=second_config.pretty_text)), checkpoint)
    apply_custom_data(second_config, request, checkpoint=str(checkpoint))  # trained on other images
    assert channel_reader(second_config).mean == [0.0] * 4


def test_rgb_stays_as_it_is(toy_dataset, tmp_path):
    config = load_recipe('demo/upernet')
    config.work_dir = str(tmp_path / 'work')
    original = config.model.backbone.to_dict(), [dict(step) for step in config.train_dataloader.dataset.pipeline]
    apply_custom_data(config, DatasetRequest(str(toy_dataset)))
    assert (config.model.backbone.to_dict(), [dict(s) for s in config.train_dataloader.dataset.pipeline]) == original
    assert config.model.data_preprocessor.mean == [123.675, 116.28, 103.53]
    assert channel_reader(config) is None


def test_channels_of_rgb_images(toy_dataset, tmp_path):
    """By `--channels` also images of 8 bits are measured: one channel, or others in another order."""
    images = [np.array(Image.open(path)) for path in sorted((toy_dataset / 'train').iterdir())]
    for channels in ((3, 1), (2,)):
        data, _ = check_dataset(toy_dataset, 'segmentation', channels=channels)
        values = np.stack(images)[..., [c - 1 for c in channels]].reshape(-1, len(channels))
        assert np.allclose(data.channels['mean'], values.mean(0)) and np.allclose(data.channels['std'], values.std(0))


def test_other_files_are_dropped(tmp_path):
    write_channels(tmp_path)
    save_tiff(tmp_path / 'images/train/1.tif', made_image(1)[0][..., :4])
    save_tiff(tmp_path / 'images/train/2.tif', made_image(2)[0].astype(np.float32))
    (tmp_path / 'images/train/3.tif').write_bytes(b'no image')
    _, codes = check_dataset(tmp_path, 'segmentation')
    assert {c: codes[c].examples for c in ('channel-count-mismatch', 'value-type-mismatch', 'truncated-image')} == {
        'channel-count-mismatch': ['1.tif: 4 channels of uint16, 0.tif has 5 channels of uint16'],
        'value-type-mismatch': ['2.tif: 5 channels of float32, 0.tif has 5 channels of uint16'],
        'truncated-image': ['3.tif'],
    }  # fmt: skip


def test_other_files_among_rgb_are_named(tmp_path):
    """Five channels, which OpenCV cannot read, are dropped; 16 bits are read as 8 bits."""
    write_channels(tmp_path)
    for path in tmp_path.rglob('*.tif'):
        save_tiff(path, made_image(0)[0][..., :3].astype(np.uint8))
    save_tiff(tmp_path / 'images/train/1.tif', made_image(1)[0].astype(np.uint8))
    save_tiff(tmp_path / 'images/train/2.tif', made_image(2)[0][..., :3])
    save_tiff(tmp_path / 'images/train/3.tif', made_image(3)[0][..., :1].astype(np.float32))
    for task in ('segmentation', 'detection'):
        data, codes = check_dataset(tmp_path, task)
        names = ('channel-count-mismatch', 'value-type-mismatch', 'channels-read-as-rgb')
        assert {name: codes[name].examples[0].rsplit('/')[-1] for name in names} == {
            'channel-count-mismatch': '1.tif: 5 channels of uint8, 0.tif is RGB of 8 bits',
            'value-type-mismatch': '3.tif: 1 channel of float32, 0.tif is RGB of 8 bits',
            'channels-read-as-rgb': '2.tif: 3 channels of uint16, 0.tif is RGB of 8 bits',
        }
        assert data.channels is None and len(data.report.problems) == 2


def test_a_single_channel(tmp_path):
    write_channels(tmp_path, channels=1)
    data, _ = check_dataset(tmp_path, 'segmentation')
    assert any(fact.startswith('images of 1 channel of uint16; channels 1, ') for fact in data.report.facts)
    config = load_recipe('demo/upernet')
    assert set_channels(config, ChannelReader(**data.channels)).startswith('1 input channel, normalized')


def test_a_fourth_channel_may_be_opacity(tmp_path):
    """As GDAL calls that of four channels of 8 bits: they stay RGB, and that is reported."""
    write_channels(tmp_path)
    for path in tmp_path.rglob('*.tif'):
        pixels = made_image(0)[0][..., :4].astype(np.uint8)
        save_tiff(path, pixels, photometric='RGB', alpha='YES')
    data, codes = check_dataset(tmp_path, 'segmentation')
    assert codes['fourth-channel'].count == 1 and data.channels is None and not data.report.problems
    data, codes = check_dataset(tmp_path, 'segmentation', channels=(1, 2, 3, 4))
    assert 'fourth-channel' not in codes and np.allclose(data.channels['mean'], pixels.reshape(-1, 4).mean(0))


def test_a_constant_channel_is_said(tmp_path):
    write_channels(tmp_path)
    for path in tmp_path.rglob('*.tif'):
        pixels = made_image(0)[0]
        pixels[..., 3] = 7
        save_tiff(path, pixels)
    data, codes = check_dataset(tmp_path, 'segmentation')
    assert codes['constant-channel'].examples == ['channel 4'] and data.channels['std'][3] == 1


def test_arrays_as_images(tmp_path):
    pixels = write_channels(tmp_path)
    for path in tmp_path.rglob('*.tif'):
        np.save(path.with_suffix('.npy'), made_image(int(path.stem))[0])
        path.unlink()
    data, _ = check_dataset(tmp_path, 'segmentation')
    assert [image for image, _ in data.splits['train']] == [f'images/train/{i}.npy' for i in range(len(pixels))]
    assert not data.report.problems and data.channels['num_channels'] == 5
    for split in ('train', 'val'):
        file = tmp_path / f'annotations/instances_{split}.json'
        file.write_text(file.read_text().replace('.tif', '.npy'))
    assert not check_dataset(tmp_path, 'detection')[0].report.problems


@pytest.mark.parametrize('text', ['', '0', '1,1', 'a', '1,,2', '-1', '1.5'])
def test_numbers_that_are_no_channels(text):
    with pytest.raises(UsageError, match='--channels'):
        parse_channels(text)
    assert parse_channels(' 3, 1') == (3, 1) and parse_channels(None) is None


def test_more_channels_than_there_are(tmp_path):
    write_channels(tmp_path)
    line = error_message(lambda: check_dataset(tmp_path, 'segmentation', channels=(1, 6)))
    assert '--channels 6' in line and line.endswith('has 5')


def test_pretrained_stems(tmp_path):
    """As timm's adapt_input_conv: RGB repeated and times 3/C; of one channel the sum."""
    pretrained = ConvNeXt(ARCH)
    torch.save(pretrained.state_dict(), tmp_path / 'rgb.pth')
    stem = pretrained.downsample_layers[0][0].weight
    for channels, expected in ((5, stem[:, [0, 1, 2, 0, 1]] * 3 / 5), (1, stem.sum(1, keepdim=True))):
        model = ConvNeXt(ARCH, in_channels=channels)
        load_backbone(model, tmp_path / 'rgb.pth')
        assert torch.allclose(model.downsample_layers[0][0].weight, expected)
    config = load_recipe('upernet/convnext_t')
    assert 'the pretrained stem repeats RGB times 3/5, as in timm' in set_channels(config, READER)


def test_pretrained_swin_takes_rgb_alone():
    import_module('convnext_dense.models.swin_segmentation')
    config = load_recipe('upernet/swin_t')
    init_default_scope('mmseg')
    assert 'are adapted for ConvNeXt alone' in error_message(set_channels, config, READER)
    config = load_recipe('upernet/swin_t')
    config.model.backbone.init_cfg = None
    set_channels(config, READER)
    assert config.model.backbone.in_channels == 5


def test_all_pipelines_are_changed():
    """RTMDet's second stage lies in a hook, and its mosaics are of three channels."""
    config = load_recipe('rtmdet/convnext_b')
    config.model.backbone.init_cfg = None
    line = set_channels(config, READER)
    parts = (config.train_dataloader, config.val_dataloader, config.test_dataloader, config.custom_hooks)
    types = {part.get('type') for part in iter_dicts(parts)}
    assert not types & {'LoadImageFromFile', 'YOLOXHSVRandomAug', 'CachedMosaic', 'CachedMixUp'}
    assert types > {'LoadImageChannels', 'RandomBrightnessContrast', 'RandomResize'}
    pads = [step['pad_val']['img'] for step in iter_dicts(parts) if step.get('type') == 'Pad']
    assert pads and set(pads) == {0.0}
    assert 'for YOLOXHSVRandomAug, without CachedMixUp, CachedMosaic, which need RGB' in line


def test_big_images_are_cut_into_tiles_elsewhere(tmp_path):
    write_channels(tmp_path / 'data')
    data, _ = check_dataset(tmp_path / 'data', 'segmentation')
    with pytest.raises(UsageError, match='--tile writes images of 8 bits'):
        write_tiles(data, 32, 0, str(tmp_path / 'out'))


def test_pictures_of_the_data_set(tmp_path):
    write_channels(tmp_path / 'data')
    data, _ = check_dataset(tmp_path / 'data', 'segmentation')
    write_pictures(load_recipe('demo/upernet'), data, str(tmp_path / 'pictures'))
    sheet = cv2.imread(str(tmp_path / 'pictures/segmentation_images.png'))
    assert sheet.shape[2] == 3 and sheet.std() > 10


def test_mosaics_are_for_rgb():
    config = load_recipe('demo/mask_rcnn')
    set_channels(config, ChannelReader((1, 2, 3), (1.0,) * 3, (2.0,) * 3, 3, 'uint16'))
    assert '--mosaic is for RGB' in error_message(set_mosaic, config)
