"""Draw predictions and annotations, legible at any image size."""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.structures import BaseDataElement, InstanceData
from PIL import Image, ImageDraw, ImageFont

from ..channel_files import to_rgb
from .colors import Color, class_colors, text_color
from .cropped_mask import decode_window
from .mask_writer import IGNORED

MIN_SIDE, MAX_SIDE = 320, 4096  # range of the longer side in pixels, to which other images are resized
SCORE_THR = 0.3  # default score threshold
BLENDED_ROWS = 256  # rows that are blended at a time
OPACITY = 0.45  # opacity of masks
MAX_DRAWN = 300  # maximum number of detections in a picture


def draw(
    image: np.ndarray,
    sample: BaseDataElement,
    classes: Sequence[str],
    palette: Sequence[Color] = (),
    score_thr: float = SCORE_THR,
    legend: bool = True,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Draw a prediction onto its image.

    Args:
        image: (H, W, C) BGR of uint8, or grayscale; a large image may already be reduced to the size of the picture.
        sample: Data sample with `pred_instances` or `pred_sem_seg`, in pixels of the original image.
        classes: Names of the classes.
        palette: RGB color of each class. Defaults to distinguishable colors.
        score_thr: Detections with lower scores are not drawn.
        legend: Whether to add the class names below a segmentation.
        size: (H, W) of the original image if `image` is reduced.

    Returns:
        (h, w, 3) BGR of uint8, in the size of the original image if its longer side has `MIN_SIDE` to `MAX_SIDE`
        pixels, plus the legend.
    """
    size = size or image.shape[:2]
    scale, picture = picture_scale(size), _resized(to_bgr(image), picture_size(size))
    colors = class_colors(len(classes), palette)
    if 'pred_sem_seg' in sample:
        labels = sample.pred_sem_seg.data.squeeze(0).cpu().numpy().astype(np.uint8, copy=False)
        return _draw_segmentation(picture, labels, classes, colors, legend)
    instances = sample.pred_instances
    keep = (instances.scores >= score_thr).nonzero().flatten()
    best = instances.scores[keep].argsort(descending=True, stable=True)[:MAX_DRAWN]
    return _draw_instances(picture.copy(), instances[keep[best]].cpu(), scale, classes, colors)


def draw_ground_truth(
    image: np.ndarray, sample: BaseDataElement, classes: Sequence[str], palette: Sequence[Color], side: int
) -> np.ndarray:
    """Draw the annotations of a sample of a training pipeline onto its image.

    Args:
        image: (H, W, C) BGR of uint8, or grayscale.
        sample: Data sample with `gt_instances` or `gt_sem_seg`, in pixels of the image.
        classes: Names of the classes.
        palette: RGB color of each class; empty for distinguishable colors.
        side: Longer side of the picture in pixels, without the legend.

    Returns:
        (h, w, 3) BGR of uint8.
    """
    scale, colors = side / max(image.shape[:2]), class_colors(len(classes), palette)
    size = tuple(max(round(length * scale), 1) for length in image.shape[:2])
    picture = _resized(to_bgr(image), size)
    if 'gt_sem_seg' in sample:
        labels = sample.gt_sem_seg.data.squeeze(0).cpu().numpy().astype(np.uint8)
        return _draw_segmentation(picture, labels, classes, colors, legend=True)
    truth = sample.gt_instances
    boxes = getattr(truth.bboxes, 'tensor', truth.bboxes)
    instances = InstanceData(bboxes=boxes * scale, labels=truth.labels)
    if len(truth) and 'masks' in truth:
        masks = [cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST) for mask in truth.masks.to_ndarray()]
        instances.masks = torch.from_numpy(np.stack(masks) > 0)
    return _draw_instances(picture.copy(), instances, 1.0, classes, colors)


def write_caption(picture: np.ndarray, text: str) -> np.ndarray:
    """Return a picture (H, W, 3) with a line of text above it, which is clipped if it is too long."""
    height = font_size(picture.shape[:2])
    band = Image.new('RGB', (picture.shape[1], 2 * height), 'white')
    ImageDraw.Draw(band).text((2, height), text, fill='black', font=_font(height), anchor='lm')
    return np.vstack((np.asarray(band)[..., ::-1], picture))


def picture_scale(size: tuple[int, int]) -> float:
    """Return the factor by which an image of size (H, W) is resized before drawing."""
    long_side = max(size)
    if long_side > MAX_SIDE:
        return MAX_SIDE / long_side
    return float(-(-MIN_SIDE // long_side)) if long_side < MIN_SIDE else 1.0


def picture_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return the size (h, w) of the picture of an image of size (H, W), without a legend."""
    return tuple(max(round(side * picture_scale(size)), 1) for side in size)


def line_width(size: tuple[int, int]) -> int:
    """Return the line width in a picture of size (H, W), in pixels."""
    return max(1, round(max(size) / 350))


def font_size(size: tuple[int, int]) -> int:
    """Return the font size in a picture of size (H, W), in pixels."""
    return max(10, round(max(size) / 50))


def to_bgr(image: np.ndarray) -> np.ndarray:
    """Convert an image with any number of channels and data type to (H, W, 3) BGR of uint8 for display.

    An image of float32 with negative values is taken as normalized by a `ChannelReader`; its first three channels are
    shown as red, green and blue.
    """
    if image.dtype == np.float32 and image.min(initial=0) < 0:
        return np.ascontiguousarray(to_rgb(image)[..., ::-1])
    image = image if image.ndim == 3 else image[..., None]
    image = image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, 2)
    if image.dtype != np.uint8:
        top = 65535 if image.dtype == np.uint16 else max(float(image.max(initial=1)), 1e-12)
        image = np.clip(image.astype(np.float32) * (255 / top), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(image)


def _resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if picture.shape[:2] == size:
        return picture
    method = cv2.INTER_AREA if max(size) < max(picture.shape) else cv2.INTER_NEAREST
    return cv2.resize(picture, size[::-1], interpolation=method)


def _draw_instances(
    picture: np.ndarray, instances: InstanceData, scale: float, classes: Sequence[str], colors: Sequence[Color]
) -> np.ndarray:
    height, width = picture.shape[:2]
    thickness = line_width((height, width))
    boxes = (instances.bboxes.numpy() * scale).round().astype(int).reshape(-1, 4)
    boxes = np.clip(boxes, 0, [width - 1, height - 1] * 2)
    labels = instances.labels.tolist()
    masks = instances.masks if 'masks' in instances else [None] * len(labels)
    for i in reversed(range(len(labels))):  # the highest score on top
        bgr = colors[labels[i]][::-1]
        if masks[i] is not None:
            _blend_mask(picture, _mask_in_box(masks[i], boxes[i], scale), boxes[i], bgr, thickness)
        cv2.rectangle(picture, boxes[i][:2].tolist(), boxes[i][2:].tolist(), bgr, thickness)
    texts = [classes[label] for label in labels]
    if 'scores' in instances:
        texts = [f'{text} {score:.2f}' for text, score in zip(texts, instances.scores.tolist())]
    return _draw_labels(picture, texts, boxes, [colors[label] for label in labels])


def _mask_in_box(mask: torch.Tensor | np.ndarray | dict, box: np.ndarray, scale: float) -> np.ndarray:
    """The part of an instance mask, (H, W) or COCO RLE, inside a box of the picture, in pixels of the picture."""
    height, width = mask['size'] if isinstance(mask, dict) else mask.shape
    x1, y1, x2, y2 = box
    window = [int(x1 / scale), int(y1 / scale), math.ceil((x2 + 1) / scale), math.ceil((y2 + 1) / scale)]
    left, top, right, bottom = np.minimum(window, [width - 1, height - 1, width, height]).tolist()
    if isinstance(mask, dict):
        inside = decode_window(mask, (left, top, right, bottom))
    else:
        inside = np.asarray(mask[top:bottom, left:right]).view(np.uint8)
    size = (int(x2 - x1 + 1), int(y2 - y1 + 1))
    return np.ascontiguousarray(inside) if scale == 1 else cv2.resize(inside, size, interpolation=cv2.INTER_NEAREST)


def _blend_mask(picture: np.ndarray, inside: np.ndarray, box: np.ndarray, bgr: Color, thickness: int) -> None:
    """Draw the part of a mask inside its box, with its contour."""
    x1, y1, x2, y2 = box
    area = picture[y1 : y2 + 1, x1 : x2 + 1]
    _blend(area, np.full_like(area, bgr), inside)
    contours, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(picture, contours, -1, bgr, thickness, offset=(int(x1), int(y1)))


def _blend(picture: np.ndarray, colors: np.ndarray, mask: np.ndarray) -> None:
    """Blend colors (H, W, 3) into a picture (H, W, 3) in place, where the mask (H, W) is not 0."""
    cv2.copyTo(cv2.addWeighted(picture, 1 - OPACITY, colors, OPACITY, 0), mask, picture)


def _draw_labels(picture: np.ndarray, texts: Sequence[str], boxes: np.ndarray, colors: Sequence[Color]) -> np.ndarray:
    """Write a label next to each box, at the place where it hides the least of objects and other labels."""
    if not texts:
        return picture
    height, width = picture.shape[:2]
    font, pad = _font(font_size((height, width))), max(1, line_width((height, width)))
    label_boxes = np.zeros((0, 4))
    for i, text in enumerate(texts):
        left, top, right, bottom = font.getbbox(text)
        size = (right - left + 2 * pad, bottom - top + 2 * pad)
        places = np.array([_move_into(place, size, (width, height)) for place in _label_places(boxes[i], size)])
        other_boxes = np.delete(boxes, i, 0)
        # Hiding another label makes it unreadable; an object is only partly hidden.
        hidden = [_intersections(places, each).sum(1) for each in (label_boxes, other_boxes, boxes[i : i + 1])]
        costs = 10 * hidden[0] + hidden[1] + hidden[2]
        x, y = places[int(costs.argmin())][:2]
        label = Image.new('RGB', tuple(map(int, size)), colors[i])  # not the whole picture, which may have 50 MB
        ImageDraw.Draw(label).text((pad - left, pad - top), text, fill=text_color(colors[i]), font=font)
        area = picture[int(y) : int(y + size[1]), int(x) : int(x + size[0])]
        area[:] = np.asarray(label)[: area.shape[0], : area.shape[1], ::-1]
        label_boxes = np.vstack((label_boxes, [[x, y, x + size[0], y + size[1]]]))
    return picture


def _intersections(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The intersection areas (N, M) of boxes (N, 4) and (M, 4)."""
    low, high = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    return (high - low).clip(0).prod(2)


def _label_places(box: np.ndarray, size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Iterate over possible upper left corners of a label, the best first: around the box, then in it."""
    (x1, y1, x2, y2), (width, height) = box.tolist(), size
    yield x1, y1 - height
    yield x1, y2 + 1
    yield x2 - width, y1 - height
    yield x2 - width, y2 + 1
    yield x2 + 1, y1
    yield x1 - width, y1
    yield x2 + 1, y2 - height
    yield x1 - width, y2 - height
    yield x1, y1
    yield x2 - width, y2 - height


def _move_into(place: tuple[int, int], size: tuple[int, int], picture: tuple[int, int]) -> tuple[int, int, int, int]:
    """The rectangle (x1, y1, x2, y2) of a label, moved into the picture."""
    x, y = (max(min(p, limit - s), 0) for p, s, limit in zip(place, size, picture))
    return x, y, x + size[0], y + size[1]


def _draw_segmentation(
    picture: np.ndarray, labels: np.ndarray, classes: Sequence[str], colors: Sequence[Color], legend: bool
) -> np.ndarray:
    counts = cv2.calcHist([labels], [0], None, [256], [0, 256]).ravel()
    if labels.shape != picture.shape[:2]:
        labels = cv2.resize(labels, picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    table = np.zeros((256, 3), np.uint8)
    table[: len(colors)] = np.asarray(colors, np.uint8)[:, ::-1]
    present = [i for i in np.argsort(-counts, kind='stable') if counts[i] and i < len(classes)]
    entries = [(classes[i], colors[i]) for i in present]
    below = _legend(picture.shape[:2], entries) if legend else picture[:0]
    height, width = picture.shape[:2]
    result = np.empty((height + len(below), width, 3), np.uint8)
    result[:height], result[height:] = picture, below
    for top in range(0, height, BLENDED_ROWS):  # saves memory: a picture has up to 4096 x 4096 pixels
        rows = slice(top, min(top + BLENDED_ROWS, height))
        _blend(result[rows], table[labels[rows]], (labels[rows] != IGNORED).view(np.uint8))
    return result


def _legend(size: tuple[int, int], entries: Sequence[tuple[str, Color]]) -> np.ndarray:
    """Draw class names next to their colors, in rows of the picture's width: (h, W, 3) BGR."""
    height, width = font_size(size), size[1]
    font, gap = _font(height), max(2, height // 3)
    places, x, row = [], gap, 0
    for text, color in entries:
        length = height + gap + int(font.getlength(text)) + 2 * gap
        if x > gap and x + length > width:
            x, row = gap, row + 1
        places.append((x, row * (height + gap) + gap, text, color))
        x += length
    image = Image.new('RGB', (width, (row + 1) * (height + gap) + 2 * gap), 'white')
    canvas = ImageDraw.Draw(image)
    for x, y, text, color in places:
        canvas.rectangle((x, y, x + height - 1, y + height - 1), fill=color, outline='black')
        canvas.text((x + height + gap, y + height // 2), text, fill='black', font=font, anchor='lm')
    return np.asarray(image)[..., ::-1]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans, which is part of matplotlib (a dependency of mmengine) and covers most alphabets."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), 'fonts/ttf/DejaVuSans.ttf')), size)
