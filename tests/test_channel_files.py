"""Images of any number of channels, read as tifffile, NumPy and Pillow read them."""

import cv2
import numpy as np
import pytest
from PIL import Image

from convnext_dense.channel_files import (
    ChannelReader,
    FileLayout,
    describe_file,
    explain_errors,
    read_channels,
    to_rgb,
)
from convnext_dense.engine.channel_transforms import LoadImageChannels, RandomBrightnessContrast
from convnext_dense.engine.datasets import read_error
from convnext_dense.errors import UnreadableImageError, UsageError
from helpers.channels import save_tiff

tifffile = pytest.importorskip('tifffile')

RNG = np.random.RandomState(0)
PIXELS = RNG.randint(0, 2**16, (40, 50, 5)).astype(np.uint16)
BYTES = PIXELS.astype(np.uint8)
FLOATS = RNG.normal(size=(40, 50, 5)).astype(np.float32)


def contiguous(path, pixels):
    tifffile.imwrite(path, pixels, planarconfig='contig', photometric='minisblack')


def first(pixels):
    return np.moveaxis(pixels, -1, 0)


FILES = {  # how a file is written, its suffix, what it holds, and its type of values
    'samples': (lambda path: contiguous(path, PIXELS), '.tif', PIXELS),
    'planes': (
        lambda path: tifffile.imwrite(path, first(PIXELS), planarconfig='separate', photometric='minisblack'),
        '.tiff', PIXELS,
    ),
    'pages': (lambda path: tifffile.imwrite(path, first(PIXELS), photometric='minisblack'), '.tif', PIXELS),
    'ImageJ': (lambda path: tifffile.imwrite(path, first(PIXELS), imagej=True), '.tif', PIXELS),
    'rows as pages': (lambda path: tifffile.imwrite(path, PIXELS), '.tif', PIXELS),
    'floats': (lambda path: contiguous(path, FLOATS), '.tif', FLOATS),
    'one channel': (lambda path: tifffile.imwrite(path, PIXELS[..., 0]), '.tif', PIXELS[..., :1]),
    'GeoTIFF, LZW': (lambda path: save_tiff(path, PIXELS, compress='lzw', predictor=2), '.tif', PIXELS),
    'GeoTIFF, tiled': (
        lambda path: save_tiff(path, FLOATS, compress='deflate', tiled=True, blockxsize=16, blockysize=16),
        '.tif', FLOATS,
    ),
    'array': (lambda path: np.save(path, PIXELS), '.npy', PIXELS),
    'array, channels first': (lambda path: np.save(path, first(FLOATS)), '.npy', FLOATS),
    'gray array': (lambda path: np.save(path, PIXELS[..., 0]), '.npy', PIXELS[..., :1]),
    'RGB': (lambda path: Image.fromarray(BYTES[..., :3]).save(path), '.png', BYTES[..., :3]),
    'RGBA': (lambda path: Image.fromarray(BYTES[..., :4]).save(path), '.png', BYTES[..., :4]),
    'PNG of 16 bits': (lambda path: cv2.imwrite(str(path), PIXELS[..., :3][..., ::-1]), '.png', PIXELS[..., :3]),
    'gray PNG of 16 bits': (lambda path: Image.fromarray(PIXELS[..., 0]).save(path), '.png', PIXELS[..., :1]),
}  # fmt: skip


@pytest.mark.parametrize('kind', FILES)
def test_values_are_those_of_the_file(kind, tmp_path):
    write, suffix, expected = FILES[kind]
    path = tmp_path / f'image{suffix}'
    write(path)
    pixels = read_channels(path)
    assert pixels.dtype == np.float32 and np.array_equal(pixels, expected.astype(np.float32))
    assert describe_file(path)[:4] == (*expected.shape, str(expected.dtype))
    order = list(range(expected.shape[2], 0, -1))[:3]
    assert np.array_equal(read_channels(path, order), pixels[..., [i - 1 for i in order]])
    assert read_error(str(path)) is None


RGB_FILES = {  # whether files are RGB to the tools
    'gray, 8 bits': (lambda path: tifffile.imwrite(path, PIXELS[..., 0].astype(np.uint8)), True),
    'RGB, 8 bits': (lambda path: tifffile.imwrite(path, BYTES[..., :3]), True),
    'opacity': (
        lambda path: tifffile.imwrite(path, BYTES[..., :4], photometric='rgb', extrasamples=['unassalpha']),
        True,
    ),
    'infrared': (
        lambda path: tifffile.imwrite(path, BYTES[..., :4], photometric='rgb', extrasamples=['unspecified']),
        False,
    ),
    'pages of 8 bits': (
        lambda path: tifffile.imwrite(path, first(PIXELS).astype(np.uint8), photometric='minisblack'),
        True,
    ),
    'RGB, 16 bits': (lambda path: tifffile.imwrite(path, PIXELS[..., :3], photometric='rgb'), False),
    'five channels': (lambda path: contiguous(path, PIXELS.astype(np.uint8)), False),
}


@pytest.mark.parametrize('kind', RGB_FILES)
def test_what_is_rgb(kind, tmp_path):
    write, is_rgb = RGB_FILES[kind]
    write(tmp_path / 'x.tif')
    assert describe_file(tmp_path / 'x.tif').is_rgb == is_rgb


def test_pixels_without_a_value_become_the_mean(tmp_path):
    pixels = FLOATS.copy()
    pixels[3, 4, 1], pixels[5, 6], pixels[7, 8, 0], pixels[9, 9, 2] = -9999, -9999, np.nan, np.inf
    save_tiff(tmp_path / 'x.tif', pixels, nodata=-9999)
    reader = ChannelReader((2, 1, 3), (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), 5, 'float32')
    image = reader.read(tmp_path / 'x.tif')
    expected = (FLOATS[..., [1, 0, 2]] - (1, 2, 3)) / (4, 5, 6)
    expected[3, 4, 0], expected[5, 6], expected[7, 8, 1], expected[9, 9, 2] = 0, 0, 0, 0
    assert image.dtype == np.float32 and np.allclose(image, expected, atol=1e-6)


def broken_files(folder):
    (folder / 'text.tif').write_text('no image')
    contiguous(folder / 'cut.tif', PIXELS)
    content = (folder / 'cut.tif').read_bytes()
    (folder / 'cut.tif').write_bytes(content[: len(content) // 2])
    band = (
        '<VRTRasterBand dataType="UInt16" band="1"><SimpleSource><SourceFilename>{}</SourceFilename>'
        '</SimpleSource></VRTRasterBand>'
    )
    contiguous(folder.parent / 'secret.tif', PIXELS)  # which a file that names others does not reach
    vrt = f'<VRTDataset rasterXSize="50" rasterYSize="40">{band.format(folder.parent / "secret.tif")}</VRTDataset>'
    (folder / 'vrt.tif').write_text(vrt)
    np.save(folder / 'objects.npy', np.array([{}], object))
    np.save(folder / 'complex.npy', np.ones((4, 4), complex))
    np.save(folder / 'line.npy', np.ones(4))
    np.savez(folder / 'x.npz', a=np.ones((4, 4)))
    (folder / 'x.npz').rename(folder / 'archive.npy')
    (folder / 'text.png').write_text('no image')
    return sorted(path for path in folder.iterdir())


def test_broken_files_are_named(tmp_path):
    (tmp_path / 'files').mkdir()
    for path in broken_files(tmp_path / 'files'):
        with pytest.raises(UnreadableImageError), explain_errors():
            read_channels(path)
        assert read_error(str(path)), path
        with pytest.raises(UnreadableImageError, match=str(path)):
            LoadImageChannels([1], [0], [1], 5, 'uint16')(dict(img_path=str(path)))


def test_other_channels_than_the_models_are_refused(tmp_path):
    contiguous(tmp_path / 'x.tif', PIXELS[..., :4])
    reader = ChannelReader((1, 2), (0, 0), (1, 1), 5, 'uint16')
    with pytest.raises(UnreadableImageError, match='it has 4 channels of uint16, the model takes files of 5 of uint16'):
        reader.read(tmp_path / 'x.tif')
    contiguous(tmp_path / 'x.tif', FLOATS)
    with pytest.raises(UnreadableImageError, match='5 channels of float32'):
        reader.read(tmp_path / 'x.tif')


def test_without_rasterio_the_extra_is_named(tmp_path, monkeypatch):
    contiguous(tmp_path / 'x.tif', PIXELS)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'convnext_dense\[multichannel\]'"):
        read_channels(tmp_path / 'x.tif')
    assert read_error(str(tmp_path / 'x.tif')) is None


def test_transform_loads_as_mmcv_does(tmp_path):
    contiguous(tmp_path / 'x.tif', PIXELS)
    step = LoadImageChannels([5, 1], [100.0, 200.0], [10.0, 20.0], 5, 'uint16')
    results = step(dict(img_path=str(tmp_path / 'x.tif'), other=1))
    assert np.allclose(results['img'], (PIXELS[..., [4, 0]] - (100.0, 200.0)) / (10.0, 20.0), rtol=1e-6)
    assert results['img_shape'] == results['ori_shape'] == (40, 50) and results['other'] == 1
    assert 'uint16' in repr(step)


@pytest.mark.parametrize('channels', [1, 2, 5, 13])
def test_brightness_and_contrast(channels):
    """Half of the images are brightened, half have another contrast, and all channels change alike."""
    np.random.seed(0)
    image = np.linspace(-2, 2, 8 * 8 * channels, dtype=np.float32).reshape(8, 8, channels)
    deltas, factors = [], []
    for _ in range(400):
        changed = RandomBrightnessContrast()(dict(img=image.copy()))['img']
        assert changed.dtype == np.float32 and changed.shape == image.shape
        factor, delta = np.polyfit(image.ravel().astype(float), changed.ravel().astype(float), 1)
        assert np.allclose(changed, image * factor + delta, atol=1e-5)
        deltas.append(delta)
        factors.append(factor)
    deltas, factors = np.array(deltas), np.array(factors)
    assert 0.4 < (np.abs(deltas) > 1e-4).mean() < 0.6 and 0.4 < (np.abs(factors - 1) > 1e-4).mean() < 0.6
    assert np.abs(deltas).max() <= 0.5 and np.abs(deltas).max() > 0.45
    assert 0.5 <= factors.min() < 0.55 and 1.45 < factors.max() <= 1.5


def test_pictures_show_the_first_three_channels():
    image = np.zeros((2, 2, 5), np.float32)
    image[0, 0], image[0, 1] = (-2, 0, 2, 9, 9), (-7, 1, 7, 0, 0)
    assert to_rgb(image)[0].tolist() == [[0, 127, 255], [0, 191, 255]]
    assert to_rgb(image[..., :2])[0, 1].tolist() == [0, 0, 0] and to_rgb(image[..., 1])[0].tolist() == [
        [127] * 3,
        [191] * 3,
    ]


def test_layout_is_plain_data():
    assert FileLayout(1, 2, 3, 'uint8')._asdict()['num_channels'] == 3
