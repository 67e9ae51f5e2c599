"""Reading of image files, arrays and PIL images."""

import io
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image

from convnext_dense.errors import UnreadableImageError, UsageError
from convnext_dense.inference.images import from_array, from_pil, read_image

RNG = np.random.RandomState(0)
SMOOTH = cv2.resize(RNG.randint(0, 255, (3, 4, 3), dtype=np.uint8), (48, 36), interpolation=cv2.INTER_CUBIC)  # RGB
# For each EXIF orientation, the transform from the upright image's array to the stored one's inverse.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def save(path, image, **kwargs):
    image.save(path, **kwargs)
    return path


def read_rgb(path):
    """The pixels of an image file, in RGB."""
    return read_image(path).pixels[..., ::-1]


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.tif', '.webp'])
@pytest.mark.parametrize('orientation', UPRIGHT)
def test_exif_orientation(suffix, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = dict(lossless=True) if suffix == '.webp' else {}
    path = save(tmp_path / f'photo{suffix}', Image.fromarray(SMOOTH), exif=exif, **options)
    expected = UPRIGHT[orientation](SMOOTH).astype(int)
    assert read_rgb(path).shape == expected.shape
    assert np.abs(read_rgb(path) - expected).mean() < (6 if suffix == '.jpg' else 1e-9)


def test_pixels_equal_those_of_training(tmp_path):
    """Color, gray, 16-bit and palette images equal OpenCV's, which mmdet's and mmseg's pipelines use."""
    gray = SMOOTH[..., 0]
    files = [
        save(tmp_path / 'color.jpg', Image.fromarray(SMOOTH)),
        save(tmp_path / 'color.png', Image.fromarray(SMOOTH)),
        save(tmp_path / 'gray.jpg', Image.fromarray(gray)),
        save(tmp_path / 'gray.png', Image.fromarray(gray)),
        save(tmp_path / 'cmyk.jpg', Image.fromarray(SMOOTH).convert('CMYK')),
        save(tmp_path / 'palette.png', Image.fromarray(SMOOTH).quantize(64)),
        save(tmp_path / 'gray.tif', Image.fromarray(gray)),
        save(tmp_path / 'color.bmp', Image.fromarray(SMOOTH)),
    ]
    cv2.imwrite(str(tmp_path / 'gray16.png'), gray.astype(np.uint16) * 257)
    cv2.imwrite(str(tmp_path / 'color16.png'), SMOOTH[..., ::-1].astype(np.uint16) * 257)
    for path in (*files, tmp_path / 'gray16.png', tmp_path / 'color16.png'):
        assert np.array_equal(read_image(path).pixels, cv2.imread(str(path))), path.name
        reference = np.repeat(gray[..., None], 3, 2) if 'gray' in path.name else SMOOTH
        assert np.abs(read_rgb(path).astype(int) - reference).mean() < 12, path.name
    assert np.array_equal(read_rgb(tmp_path / 'color16.png'), SMOOTH)


def test_transparent_pixels_are_white(tmp_path):
    rgba = np.dstack((SMOOTH, np.full(SMOOTH.shape[:2], 255, np.uint8)))
    rgba[:10] = 0  # black, but fully transparent
    rgba[10:20, :, 3] = 128
    for suffix, options in (('.png', {}), ('.webp', dict(lossless=True, exact=True)), ('.tif', {})):
        image = read_rgb(save(tmp_path / f'logo{suffix}', Image.fromarray(rgba), **options)).astype(int)
        assert (image[:10] == 255).all()
        assert np.abs(image[10:20] - (SMOOTH[10:20].astype(int) * 128 / 255 + 255 * 127 / 255)).max() <= 1
        assert np.array_equal(image[20:], SMOOTH[20:])
    palette = Image.fromarray(SMOOTH).quantize(8)
    transparent_index = palette.getpixel((0, 0))
    image = read_rgb(save(tmp_path / 'palette.png', palette, transparency=transparent_index))
    assert (image[np.asarray(palette) == transparent_index] == 255).all()


def test_first_frame_of_an_animation_is_read_with_a_note(tmp_path):
    frames = [Image.new('RGB', (20, 10), color) for color in ('red', 'green', 'blue')]
    for suffix in ('.gif', '.webp', '.png'):
        frames[0].save(tmp_path / f'a{suffix}', save_all=True, append_images=frames[1:])
        loaded = read_image(tmp_path / f'a{suffix}')
        assert loaded.note == 'the first of 3 frames'
        blue, green, red = loaded.pixels.reshape(-1, 3).T.astype(int)
        assert red.min() > 240 and max(green.max(), blue.max()) < 15
    assert read_image(save(tmp_path / 'still.gif', frames[0])).note == ''


def encode(image=None, **options):
    content = io.BytesIO()
    Image.fromarray(SMOOTH if image is None else image).save(content, **options)
    return content.getvalue()


@pytest.mark.parametrize(
    'name, content, reason',
    [
        ('empty.jpg', b'', 'the file is empty'),
        ('text.jpg', b'hello', 'not an image'),
        ('cut.jpg', encode(format='JPEG')[:600], 'damaged'),
        ('cut.png', encode(format='PNG')[:900], 'damaged'),
        ('cut.gif', encode(format='GIF')[:300], 'damaged'),
        ('cut.webp', encode(format='WEBP')[:100], 'damaged'),
        ('page.png', b'<html>', 'not an image'),
    ],
)
@pytest.mark.parametrize('color_type', ['color', 'grayscale'])
def test_unreadable_images_report_the_reason(name, content, reason, color_type, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableImageError, match=reason) as error:
        read_image(tmp_path / name, color_type)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['JPEG', 'PNG'])
def test_truncated_images_are_refused(name, tmp_path):
    """Some versions of OpenCV fill missing rows without an error."""
    content, path = encode(format=name), tmp_path / 'cut'
    for size in range(30, len(content) - 30, 40):
        path.write_bytes(content[:size])
        with pytest.raises(UnreadableImageError):
            read_image(path)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(UnreadableImageError, match='No such file'):
        read_image(tmp_path / 'none.jpg')
    (tmp_path / 'folder.jpg').mkdir()
    with pytest.raises(UnreadableImageError, match='folder'):
        read_image(tmp_path / 'folder.jpg')


def test_other_numbers_of_channels_are_read_as_in_training(tmp_path):
    path = save(tmp_path / 'color.png', Image.fromarray(SMOOTH))
    assert np.array_equal(read_image(path, 'grayscale').pixels, cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))
    deep = RNG.randint(0, 65535, (6, 5, 4), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / 'deep.png'), deep)
    assert np.array_equal(read_image(tmp_path / 'deep.png', 'unchanged').pixels, deep)
    assert np.array_equal(from_array(deep, None, 'unchanged'), deep)


def test_arrays_need_a_channel_order():
    bgr = SMOOTH[..., ::-1]
    assert np.array_equal(from_array(SMOOTH, 'rgb'), bgr) and np.array_equal(from_array(bgr, 'bgr'), bgr)
    deep = RNG.randint(0, 65536, SMOOTH.shape, dtype=np.uint16)
    assert np.array_equal(from_array(deep, 'bgr'), deep >> 8)
    assert np.array_equal(from_array(SMOOTH[..., 0], None), np.repeat(SMOOTH[..., :1], 3, 2))
    rgba = np.dstack((SMOOTH, np.zeros(SMOOTH.shape[:2], np.uint8)))
    assert (from_array(rgba, 'rgb') == 255).all()
    assert from_array(SMOOTH, 'rgb', 'grayscale').shape == SMOOTH.shape[:2]
    for invalid_array, word in (
        (SMOOTH, "channel_order='rgb'"),
        (SMOOTH / 255, 'float64'),
        (SMOOTH[..., :2], '2 channels'),
        (SMOOTH[None], 'shape'),
        (SMOOTH[:0], 'shape'),
    ):
        with pytest.raises(UsageError, match=word):
            from_array(invalid_array, None)


def test_pil_images_equal_their_files(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / 'turned.png', Image.fromarray(SMOOTH), exif=exif)
    with Image.open(path) as image:
        assert np.array_equal(from_pil(image), read_image(path).pixels)
    deep = RNG.randint(0, 65536, SMOOTH.shape[:2], dtype=np.uint16)
    assert np.array_equal(from_pil(Image.fromarray(deep))[..., 0], deep >> 8)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert from_pil(Image.fromarray(SMOOTH).convert('1')).shape == SMOOTH.shape
