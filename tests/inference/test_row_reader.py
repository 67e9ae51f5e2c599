"""Reading images by rows gives the same pixels as reading them at once."""

import importlib.util

import cv2
import numpy as np
import pytest
from PIL import Image

from convnext_dense.errors import UnreadableImageError
from convnext_dense.inference import row_reader
from convnext_dense.inference.images import read_image
from convnext_dense.inference.options import PredictOptions
from convnext_dense.inference.row_reader import RasterRowReader, RowReader, open_rows, whole_image_note
from convnext_dense.inference.tiling import predict_tiled
from helpers.fake_models import FakePredictor, segment_colors

needs_rasterio = pytest.mark.skipif(importlib.util.find_spec('rasterio') is None, reason='rasterio is not installed')
RNG = np.random.RandomState(0)
RGB = np.kron(RNG.randint(0, 256, (12, 10, 3)), np.ones((4, 4, 1))).astype(np.uint8)  # 48 x 40
WINDOWS = [(0, 16), (12, 28), (24, 40), (32, 48)]


def geotiff(path, pixels, **profile):
    import rasterio

    pixels = np.atleast_3d(pixels)
    height, width, count = pixels.shape
    with rasterio.open(path, 'w', 'GTiff', width, height, count, dtype=pixels.dtype, **profile) as file:
        file.write(np.moveaxis(pixels, -1, 0))


def save(path, image, opacity=None, **arguments):
    image = Image.fromarray(image)
    if opacity is not None:
        image.putalpha(Image.fromarray(opacity))
    image.save(path, **arguments)


FILES = {
    'rgb.tif': lambda path: save(path, RGB),
    'rgb.png': lambda path: save(path, RGB),
    'gray.png': lambda path: save(path, RGB[..., 0]),
    'deflate.tiff': lambda path: save(path, RGB, compression='tiff_adobe_deflate'),
    'palette.png': lambda path: Image.fromarray(RGB).quantize(16).save(path),
    'opacity.png': lambda path: save(path, RGB, opacity=RGB[::-1, :, 0]),
    'gray_opacity.png': lambda path: save(path, RGB[..., 0], opacity=RGB[..., 1]),
    'gray16.png': lambda path: cv2.imwrite(str(path), RGB[..., 0].astype(np.uint16) * 200),
    'rgb16.png': lambda path: cv2.imwrite(str(path), RGB.astype(np.uint16) * 200),
    'rgb16.tif': lambda path: cv2.imwrite(str(path), RGB.astype(np.uint16) * 200),
    'tiled.tif': lambda path: geotiff(path, RGB, tiled=True, blockxsize=16, blockysize=16, photometric='RGB'),
    'NAMED UPPER.TIF': lambda path: save(path, RGB),
}  # fmt: skip


@needs_rasterio
@pytest.mark.parametrize('color_type', ['color', 'grayscale'])
@pytest.mark.parametrize('name', FILES)
def test_rows_equal_the_whole_image(name, color_type, tmp_path):
    FILES[name](tmp_path / name)
    expected = read_image(tmp_path / name, color_type).pixels
    reader = open_rows(tmp_path / name, color_type)
    is_rounded = color_type == 'grayscale' or 'opacity' in name or '16' in name
    assert isinstance(reader, RasterRowReader) and reader.size == (48, 40)
    for top, bottom in WINDOWS:
        rows = reader.read(top, bottom)
        assert rows.dtype == np.uint8 and rows.shape == expected[top:bottom].shape
        assert abs(rows.astype(int) - expected[top:bottom]).max() <= is_rounded
    reader.close()


@needs_rasterio
def test_extra_bands_are_ignored(tmp_path):
    infrared = np.dstack([RGB, 255 - RGB])
    geotiff(tmp_path / 'bands.tif', infrared, photometric='RGB', alpha='NO')
    reader = open_rows(tmp_path / 'bands.tif')
    assert (reader.read(0, 48) == RGB[..., ::-1]).all()


@needs_rasterio
def test_each_row_is_read_once(tmp_path):
    save(tmp_path / 'x.png', RGB)
    reader = RasterRowReader(tmp_path / 'x.png', 'color')
    read_rows, calls = reader._read, []
    reader._read = lambda top, bottom: calls.append((top, bottom)) or read_rows(top, bottom)
    for window in WINDOWS:
        reader.read(*window)
    assert calls == [(0, 16), (16, 28), (28, 40), (40, 48)]


@needs_rasterio
def test_images_that_rasterio_reads_differently_are_read_completely(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / 'turned.png', RGB, exif=exif)
    expected = read_image(tmp_path / 'turned.png').pixels
    reader = open_rows(tmp_path / 'turned.png')
    assert type(reader) is RowReader and reader.size == (40, 48) and (reader.read(0, 40) == expected).all()
    assert type(open_rows(tmp_path / 'turned.png', 'unchanged')) is RowReader
    (tmp_path / 'text.tif').write_text('no image')
    with pytest.raises(UnreadableImageError):
        open_rows(tmp_path / 'text.tif')


@needs_rasterio
def test_truncated_file_is_reported(tmp_path):
    noise = RNG.randint(0, 256, (400, 300, 3)).astype(np.uint8)
    save(tmp_path / 'cut.png', noise)
    content = (tmp_path / 'cut.png').read_bytes()
    (tmp_path / 'cut.png').write_bytes(content[: len(content) // 2])
    predictor = FakePredictor('segmentation', segment_colors)
    with pytest.raises(UnreadableImageError, match='damaged'):
        predict_tiled(predictor, tmp_path / 'cut.png', PredictOptions(tile=64))


def test_without_rasterio_the_image_is_read_completely(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    monkeypatch.setattr(row_reader, 'LARGE', 48 * 40)
    for name, words in {'x.png': 'pip install rasterio', 'x.jpg': 'only TIFF and PNG'}.items():
        save(tmp_path / name, RGB)
        reader = open_rows(tmp_path / name)
        assert type(reader) is RowReader
        assert (reader.read(8, 20) == read_image(tmp_path / name).pixels[8:20]).all()
        assert words in whole_image_note(tmp_path / name)
    (tmp_path / 'y.png').write_text('no image')
    assert whole_image_note(tmp_path / 'y.png') == whole_image_note(tmp_path / 'gone.png') == ''
    monkeypatch.setattr(row_reader, 'LARGE', 48 * 40 + 1)
    assert whole_image_note(tmp_path / 'x.png') == ''


def test_tiles_of_a_file_equal_tiles_of_its_pixels(tmp_path):
    save(tmp_path / 'x.png', RGB)
    samples = [
        predict_tiled(FakePredictor('segmentation', segment_colors), image, PredictOptions(tile=16))
        for image in (tmp_path / 'x.png', str(tmp_path / 'x.png'), RGB[..., ::-1])
    ]
    assert (samples[0].pred_sem_seg.data == samples[2].pred_sem_seg.data).all()
    assert (samples[1].pred_sem_seg.data == samples[2].pred_sem_seg.data).all()
