"""Predictions on images of any number of channels: by rows, in tiles, from arrays, and what is refused."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from convnext_dense.channel_files import ChannelReader, to_rgb
from convnext_dense.config.channels import set_channels
from convnext_dense.errors import UnreadableImageError, UsageError
from convnext_dense.inference.drawing import to_bgr
from convnext_dense.inference.images import read_image
from convnext_dense.inference.inputs import find_inputs
from convnext_dense.inference.model import load_model
from convnext_dense.inference.row_reader import RasterRowReader, RowReader, open_rows, read_reduced
from helpers.channels import MEANS, STDS, made_image, save_tiff
from helpers.datasets import load_recipe

READER = ChannelReader((4, 1, 3), tuple(MEANS[[3, 0, 2]]), tuple(STDS[[3, 0, 2]]), 5, 'uint16')


@pytest.fixture(scope='module')
def tiff(tmp_path_factory):
    path = tmp_path_factory.mktemp('channels') / 'image.tif'
    pixels = made_image(0, side=200)[0]
    save_tiff(path, pixels, tiled=True, blockxsize=32, blockysize=32)
    return path, pixels


def test_rows_are_those_of_the_whole_image(tiff):
    path, pixels = tiff
    image = read_image(path, READER).pixels
    assert np.array_equal(image, (pixels[..., [3, 0, 2]] - np.float32(READER.mean)) / np.float32(READER.std))
    reader = open_rows(path, READER)
    assert type(reader) is RasterRowReader and reader.size == (200, 200)
    for top, bottom in ((0, 90), (40, 130), (150, 200)):
        assert np.array_equal(reader.read(top, bottom), image[top:bottom])
    reader.close()
    np.save(path.with_suffix('.npy'), pixels)
    reader = open_rows(path.with_suffix('.npy'), READER)
    assert type(reader) is RowReader and np.array_equal(reader.read(0, 200), image)


def test_other_files_are_refused(tiff, tmp_path):
    save_tiff(tmp_path / 'four.tif', tiff[1][..., :4])
    (tmp_path / 'text.tif').write_text('no image')
    for function in (read_image, open_rows):
        for name, reason in (('four.tif', '4 channels of uint16'), ('text.tif', ''), ('gone.tif', '')):
            with pytest.raises(UnreadableImageError, match=reason):
                function(tmp_path / name, READER)


def test_pictures(tiff):
    """The first three channels, from red to blue; reduced in strips as at once."""
    path, _ = tiff
    image = read_image(path, READER).pixels
    assert np.array_equal(to_bgr(image), to_rgb(image)[..., ::-1])
    picture, size = read_reduced(path, READER)
    assert size == (200, 200) and np.array_equal(picture, to_bgr(image))


def test_arrays_in_folders_without_images(tmp_path):
    np.save(tmp_path / 'a.npy', np.ones((4, 4)))
    assert [file.file_name for file in find_inputs([str(tmp_path)]).images] == ['a.npy']
    save_tiff(tmp_path / 'b.tif', np.ones((4, 4, 2), np.uint16))
    assert [file.file_name for file in find_inputs([str(tmp_path)]).images] == ['b.tif']


def build(folder, task, reader, stem=None):
    """Return a model of random weights that reads channels, from a checkpoint."""
    config = load_recipe('demo/upernet' if task == 'segmentation' else 'demo/mask_rcnn')
    config.model.backbone.arch = dict(depths=(1, 1, 1, 1), channels=(40, 80, 160, 320))
    set_channels(config, reader)
    names = ('field', 'soil', 'a', 'b', 'c')[: 5 if task == 'segmentation' else 4]
    config.test_dataloader.dataset.metainfo = dict(classes=names)
    init_default_scope(config.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    weights = model.state_dict()
    key = 'backbone.downsample_layers.0.0.weight'
    if stem is not None:
        weights = {**stem, key: stem[key][:, [0, 2, 1]]}
    file = folder / f'{task}.pth'
    torch.save(dict(state_dict=weights, meta=dict(cfg=Config(config.to_dict()).pretty_text)), file)
    return load_model(file, device='cpu'), weights


@pytest.mark.parametrize('task', ['segmentation', 'detection'])
def test_permuted_channels_and_stem_give_the_same(task, tiff, tmp_path):
    (tmp_path / 'other').mkdir()
    model, weights = build(tmp_path, task, READER)
    order = [0, 2, 1]
    permuted = ChannelReader(*(tuple(values[i] for i in order) for values in READER[:3]), *READER[3:])
    permuted_model, _ = build(tmp_path / 'other', task, permuted, weights)
    path, pixels = tiff
    key = 'pred_sem_seg' if task == 'segmentation' else 'pred_instances'
    options = {} if task == 'segmentation' else dict(max_per_image=5)
    result, permuted_result = (getattr(m.predict(str(path), **options), key) for m in (model, permuted_model))
    if task == 'segmentation':
        assert result.data.unique().numel() > 1 and (result.data == permuted_result.data).float().mean() > 0.999
    else:
        assert len(result) == 5 and torch.allclose(result.scores, permuted_result.scores, atol=1e-4)
    for array in (pixels, pixels[..., [3, 0, 2]]):  # all channels of the files, or those of the model
        array_result = getattr(model.predict(array, **options), key)
        name = 'data' if task == 'segmentation' else 'bboxes'
        assert torch.equal(getattr(array_result, name), getattr(result, name))
    sample = model.predict(str(path), tile=128, **options)
    assert sample.ori_shape == (200, 200) and model.draw(str(path), sample).size[0] >= 200
    with pytest.raises(UsageError, match='an image of 4 channels: the model takes 3 or 5'):
        model.predict(pixels[..., :4])
