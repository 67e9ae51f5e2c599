"""Read images of any file format, upright as a person sees them, and convert them for a model."""

import io
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..channel_files import ChannelReader, damaged
from ..datasets.check_images import FORMATS, MAX_BYTES
from ..datasets.files import open_regular, read_bytes
from ..errors import UnreadableImageError, UsageError, count

BACKGROUND = 255  # white, behind transparent pixels
ORIENTATION = 0x0112  # EXIF tag
COLOR_TYPES = ('color', 'grayscale', 'unchanged')  # mmcv's
ColorType = str | ChannelReader  # one of these, or a reader for other channels than RGB
CHANNEL_ORDERS = ('rgb', 'bgr')


class LoadedImage(NamedTuple):
    """An image that was read.

    Attributes:
        pixels (np.ndarray): (H, W, C) BGR of uint8, or (H, W) for a grayscale model; the values in the file for
            'unchanged'; the result of `ChannelReader.read` for other channels.
        note (str): Note for the user, such as that it is the first of several frames; '' for none.
    """

    pixels: np.ndarray
    note: str = ''


def read_image(path: str | Path, color_type: ColorType = 'color') -> LoadedImage:
    """Read an image file.

    Colors are read with OpenCV, as in training, but EXIF orientation is applied, and transparent pixels become white.

    Args:
        path: Path of the file.
        color_type: 'color', 'grayscale' or 'unchanged', as in the config's `LoadImageFromFile`, or the reader of other
            channels.

    Raises:
        UnreadableImageError: If the file cannot be read; the message is the reason without the path.
    """
    try:
        if isinstance(color_type, ChannelReader):
            open_regular(path, MAX_BYTES).close()
            return LoadedImage(color_type.read(path))
        data = read_bytes(path, MAX_BYTES)
    except OSError as error:
        raise UnreadableImageError(error.strerror or str(error)) from error
    if not data:
        raise UnreadableImageError('the file is empty')
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _decode(data, image, color_type)
    except (UnidentifiedImageError, Image.DecompressionBombError):
        return LoadedImage(_decode_with_opencv(data, color_type))  # OpenCV may know it, and has its own size limit
    except UnreadableImageError:
        raise
    except Exception as error:  # decoders raise any exception for a broken file
        raise damaged(error) from error


def from_pil(image: Image.Image, color_type: ColorType = 'color') -> np.ndarray:
    """Return the pixels of a PIL image in the form of `read_image`, with its EXIF orientation applied."""
    image = ImageOps.exif_transpose(image)
    if isinstance(color_type, ChannelReader):
        return _from_channels(np.asarray(image), color_type)
    if color_type == 'unchanged':
        pixels = np.asarray(image)
        return pixels[..., ::-1] if pixels.ndim == 3 and pixels.shape[2] == 3 else pixels
    if image.mode.startswith('I'):  # 16 bits, which Pillow would clip at 255
        return from_array(_to_uint8(np.asarray(image)), None, color_type)
    if _has_alpha(image):
        image = image.convert('RGBA')
        background = Image.new('RGBA', image.size, (BACKGROUND,) * 4)
        image = Image.alpha_composite(background, image)
    return from_array(np.asarray(image.convert('RGB')), 'rgb', color_type)


def from_array(array: np.ndarray, channel_order: str | None, color_type: ColorType = 'color') -> np.ndarray:
    """Return the pixels of an array in the form of `read_image`.

    Args:
        array: (H, W) or (H, W, C) of uint8 or uint16; four channels are color and alpha. For a model of other channels
            than RGB: all channels of a file, or those of the model in its order.
        channel_order: 'rgb' or 'bgr'; required for color.
        color_type: As for `read_image`; with 'unchanged', the array is returned unchanged.

    Raises:
        UsageError: If the shape, the data type or the channel order cannot be used.
    """
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise UsageError(f'an array of shape {array.shape} is not an image: give (height, width, channels)')
    if isinstance(color_type, ChannelReader):
        return _from_channels(array, color_type)
    if color_type == 'unchanged':
        return array
    if array.dtype not in (np.uint8, np.uint16):
        raise UsageError(f'an image of {array.dtype}: give uint8, or uint16 of the full range')
    array = _to_uint8(array)
    channels = array.shape[2] if array.ndim == 3 else 1
    if channels == 1:
        gray = array.reshape(array.shape[:2])
        return gray if color_type == 'grayscale' else cv2.cvtColor(gray, cv2.COLOR_GRAY2BGR)
    if channels not in (3, 4):
        raise UsageError(f'an image of {channels} channels: give 1, 3 or 4')
    if channel_order not in CHANNEL_ORDERS:
        raise UsageError("arrays can be RGB or BGR: give channel_order='rgb' or channel_order='bgr' (cv2.imread)")
    if channels == 4:
        alpha = array[..., 3:].astype(np.float32) / 255
        array = np.rint(array[..., :3] * alpha + BACKGROUND * (1 - alpha)).astype(np.uint8)
    bgr = array if channel_order == 'bgr' else np.ascontiguousarray(array[..., ::-1])
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY) if color_type == 'grayscale' else bgr


def _from_channels(array: np.ndarray, reader: ChannelReader) -> np.ndarray:
    """Return the pixels of an array in the form of `ChannelReader.read`."""
    array = array if array.ndim == 3 else array[..., None]
    num_channels = array.shape[2]
    if num_channels == reader.num_channels:
        array = array[..., [channel - 1 for channel in reader.channels]]
    elif num_channels != len(reader.channels):
        counts = ' or '.join(map(str, sorted({reader.num_channels, len(reader.channels)})))
        raise UsageError(f'an image of {count(num_channels, "channel")}: the model takes {counts}')
    return reader.normalize(array.astype(np.float32))


def _decode(data: bytes, image: Image.Image, color_type: str) -> LoadedImage:
    """Decode a file that Pillow knows: with OpenCV if both give the same result, otherwise with Pillow."""
    n_frames = getattr(image, 'n_frames', 1) if image.format in ('GIF', 'WEBP', 'PNG') else 1
    note = f'the first of {n_frames} frames' if n_frames > 1 else ''
    if color_type == 'unchanged':
        return LoadedImage(_decode_with_opencv(data, color_type), note)
    oriented = image.format not in ('JPEG', 'TIFF') and image.getexif().get(ORIENTATION, 1) != 1
    if n_frames > 1 or oriented or _has_alpha(image):
        return LoadedImage(from_pil(image, color_type), note)
    if image.format == 'JPEG':  # decoding at an eighth of the size reads to the end of the file in a third of the time
        image.draft('L', (image.width // 8, image.height // 8))
    if image.format in ('JPEG', 'PNG'):  # some versions of OpenCV silently fill in truncated parts
        image.load()
    try:
        return LoadedImage(_decode_with_opencv(data, color_type))
    except UnreadableImageError:
        with Image.open(io.BytesIO(data), formats=FORMATS) as pil_image:
            return LoadedImage(from_pil(pil_image, color_type))


def _decode_with_opencv(data: bytes, color_type: str) -> np.ndarray:
    import mmcv  # the backbone can be imported without mmcv

    try:
        pixels = mmcv.imfrombytes(data, flag=color_type)
    except cv2.error as error:
        raise damaged(error) from error
    if pixels is None:
        raise UnreadableImageError('it is not an image, or damaged')
    return pixels


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La') or 'transparency' in image.info


def _to_uint8(array: np.ndarray) -> np.ndarray:
    """Return the high byte of each 16-bit value, as OpenCV reads 16-bit files."""
    return array if array.dtype == np.uint8 else np.clip(array // 256, 0, 255).astype(np.uint8)
