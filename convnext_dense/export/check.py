"""Whether an exported file computes what its model does: both run on the same images."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mmengine.structures import BaseDataElement

from ..channel_files import denormalize
from ..config.channels import channel_reader
from ..datasets.toy_shapes import draw
from ..errors import UsageError
from ..inference.model import Predictor
from ..inference.sessions import session_class
from .preprocessing import Preprocess
from .program import EXAMPLE_SIZE, ExportOptions, image_channels, input_dtype

# Odd, portrait, larger than what was traced.
SIZES = EXAMPLE_SIZE, (255, 317), (352, 208), (416, 544)


@dataclass(frozen=True)
class Tolerance:
    """How far results may differ.

    Attributes:
        box: Pixels.
        score: Of detections.
        mask_iou: Least overlap of the masks of a detection.
        unmatched: Maximum fraction of detections without a partner: of scores that tie, either may come first.
        pixels: Minimum fraction of equal pixels in segmentation masks.
        logits: Part of the largest logit.
    """

    box: float = 1e-2
    score: float = 1e-4
    mask_iou: float = 0.999
    unmatched: float = 0.01
    pixels: float = 0.9999
    logits: float = 1e-4


FULL, HALF = Tolerance(), Tolerance(2, 0.02, 0.9, 0.05, 0.99, 0.02)
INT8 = Tolerance(10, 0.3, 0, 1, 0, 1)  # of which detections are partners; no limits


@dataclass
class Difference:
    """How far the results on an image differ; None where a model has no such results.

    Attributes:
        images: Number, height and width of the images.
        detections: Number that the model found.
        unmatched: Detections of the model or of the file without a partner.
        box: Largest difference of a coordinate, in pixels.
        score: Largest difference of a score.
        mask_iou: Least overlap of masks.
        pixels: Fraction of equal pixels in segmentation masks.
        logits: Largest difference of a logit, as a part of the largest one.
    """

    images: tuple[int, int, int]
    detections: int | None = None
    unmatched: int | None = None
    box: float | None = None
    score: float | None = None
    mask_iou: float | None = None
    pixels: float | None = None
    logits: float | None = None

    def known(self) -> dict[str, object]:
        """Return what is not None, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        n, height, width = self.images
        texts = [text.format(value) for name, value in self.known().items() if (text := TEXTS.get(name))]
        return f'{n} x {height} x {width}: {", ".join(texts)}'


TEXTS = dict(
    detections='{} detections',
    unmatched='{} without a partner',
    box='boxes {:.1e} px',
    score='scores {:.1e}',
    mask_iou='masks IoU {:.5f}',
    pixels='{:.4%} of the pixels equal',
    logits='logits {:.1e} of the largest',
)


def check_file(path: Path, predictor: Predictor, options: ExportOptions) -> list[Difference]:
    """Compare a file with its model; UsageError if the results differ by more than rounding.

    Arguments but the tolerance, and the result, are those of `compare_file`.
    """
    tolerance = HALF if options.half else FULL
    differences = compare_file(path, predictor, options, tolerance)
    _check_tolerance(differences, tolerance, path)
    if not any(d.detections for d in differences) and predictor.task == 'detection':
        message = 'the model detects nothing in the images of the check: what it detects in others was not compared'
        print(f'warning: {message}', file=sys.stderr)
    return differences


def compare_file(
    path: Path,
    predictor: Predictor,
    options: ExportOptions,
    tolerance: Tolerance,
    batches: Iterable[np.ndarray] | None = None,
) -> list[Difference]:
    """Run a file and its model on images and print the differences.

    Args:
        path: The file.
        predictor: The model, in float32.
        options: With which it was exported.
        tolerance: Within which detections are partners.
        batches: Images (N, C, H, W) of uint8, RGB, or of the values of other channels; by default of several sizes, and
            one that is black, or has no values.
    """
    session = session_class(path)(str(path), torch.device('cpu'))
    differences = []
    for images in batches or _default_batches(predictor, options):
        # Results are resized to the size of an original image.
        output_size = None if options.input == 'raw' else (images.shape[2] * 5 // 4, images.shape[3] * 3 // 4)
        actual = session.run(as_input(images, predictor, options), output_size)
        expected = [predict(predictor, image, output_size, options) for image in images]
        differences.append(_compare(images, actual, expected, options, tolerance))
        print(differences[-1], flush=True)
    return differences


def _default_batches(predictor: Predictor, options: ExportOptions) -> Iterator[np.ndarray]:
    """Batches of images (N, C, H, W) as files hold them: of the sizes, then a black one, or one without values."""
    rng = np.random.RandomState(0)
    crop = predictor.model.test_cfg.get('crop_size')
    sizes = [options.size] if options.size else [*SIZES, *([(crop[0] * 5 // 4, crop[1])] if crop else [])]
    channels, reader = image_channels(predictor), channel_reader(predictor.config)
    for i, (height, width) in enumerate(sizes):
        pictures = [draw(rng, max(height, width)).image[:height, :width] for _ in range(2 if i == 0 else 1)]
        images = np.stack(pictures).transpose(0, 3, 1, 2)
        images = images[:, [c % 3 for c in range(channels)]]
        yield denormalize(images / 64 - 2, reader.mean, reader.std) if reader else images
    shape = 1, channels, *sizes[0]
    yield np.full(shape, np.nan, np.float32) if reader else np.zeros(shape, np.uint8)


def as_input(images: np.ndarray, predictor: Predictor, options: ExportOptions) -> np.ndarray:
    """Return images (N, C, H, W) as the exported file takes them."""
    tensor = torch.from_numpy(images)
    if options.input == 'raw':
        tensor = _preprocess(tensor, predictor)
    return tensor.to(input_dtype(predictor, options)).numpy()


def _preprocess(images: torch.Tensor, predictor: Predictor) -> torch.Tensor:
    return Preprocess(predictor.model.data_preprocessor, channel_reader(predictor.config))(images)


@torch.inference_mode()
def predict(
    predictor: Predictor, image: np.ndarray, output_size: tuple[int, int] | None, options: ExportOptions
) -> BaseDataElement:
    """Predict an image (C, H, W) with the model itself; results are in pixels of `output_size`."""
    tensor = torch.from_numpy(image)
    if predictor.task == 'detection':
        from mmdet.structures import DetDataSample as DataSample
    else:
        from mmseg.structures import SegDataSample as DataSample
    if output_size is None:
        tensor = _preprocess(tensor[None], predictor)[0]
    shape = tuple(tensor.shape[1:])
    original = output_size or shape
    scale = (shape[1] / original[1], shape[0] / original[0])
    sample = DataSample(metainfo=dict(img_shape=shape, ori_shape=original, pad_shape=shape, scale_factor=scale))
    if output_size is None:
        sample.set_metainfo(dict(batch_input_shape=shape))
        return predictor.model.predict(tensor[None], [sample])[0]
    packed = _as_packed(image, predictor)
    return predictor.model.test_step(dict(inputs=[packed], data_samples=[sample]))[0]


def _as_packed(image: np.ndarray, predictor: Predictor) -> torch.Tensor:
    """An image (C, H, W) as the test pipeline packs it."""
    reader = channel_reader(predictor.config)
    if reader:
        return torch.from_numpy(np.moveaxis(reader.normalize(np.moveaxis(image, 0, -1)), -1, 0))
    return torch.from_numpy(image).flip(0) if len(image) == 3 else torch.from_numpy(image)


# ---- differences -----------------------------------------------------------------------------------------------------


def _compare(images, actual, expected, options, tolerance) -> Difference:
    difference = Difference((images.shape[0], *images.shape[2:]))
    if 'segmentation' in actual:
        labels = np.concatenate([sample.pred_sem_seg.data.numpy() for sample in expected])
        difference.pixels = float((actual['segmentation'] == labels).mean())
    elif 'logits' in actual:
        logits = np.stack([sample.seg_logits.data.numpy() for sample in expected])
        difference.logits = float(np.abs(actual['logits'] - logits).max() / np.abs(logits).max())
    else:
        _compare_detections(actual, expected, options, tolerance, difference)
    return difference


def _compare_detections(actual, expected, options, tolerance, difference):
    difference.detections, difference.unmatched, difference.box, difference.score = 0, 0, 0.0, 0.0
    for i, sample in enumerate(expected):
        reference = sample.pred_instances
        count = int((actual['labels'][i] >= 0).sum())
        pairs = match(
            (actual['boxes'][i, :count], actual['scores'][i, :count], actual['labels'][i, :count]),
            (reference.bboxes.numpy(), reference.scores.numpy(), reference.labels.numpy()),
            tolerance,
        )
        difference.detections += len(reference)
        difference.unmatched += len(reference) - len(pairs) + count - len(pairs)
        for a, b in pairs:
            distance = np.abs(actual['boxes'][i, a] - reference.bboxes[b].numpy()).max()
            difference.box = max(difference.box, float(distance))
            difference.score = max(difference.score, float(abs(actual['scores'][i, a] - reference.scores[b].numpy())))
        if 'masks' in actual and options.masks == 'image':
            ious = [mask_iou(actual['masks'][i, a], reference.masks[b].numpy()) for a, b in pairs]
            difference.mask_iou = min([difference.mask_iou or 1.0, *ious])


def match(actual: tuple, expected: tuple, tolerance: Tolerance) -> list[tuple[int, int]]:
    """Pairs of detections, given as boxes (n, 4), scores (n,) and labels (n,), that agree; each is in one pair."""
    distance = np.abs(actual[0][:, None] - expected[0][None]).max(-1, initial=0)
    agree = distance <= tolerance.box
    agree &= np.abs(actual[1][:, None] - expected[1][None]) <= tolerance.score
    agree &= actual[2][:, None] == expected[2][None]
    pairs, matched = [], set()
    for a in range(len(agree)):
        partners = [b for b in np.flatnonzero(agree[a]) if b not in matched]
        if partners:
            best = min(partners, key=lambda b: distance[a, b])
            matched.add(best)
            pairs.append((a, int(best)))
    return pairs


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    """IoU of two masks; 1 if they differ in one pixel, which rounding may flip and which is 0.1 % of a small mask."""
    if (a ^ b).sum() <= 1:
        return 1.0
    return float((a & b).sum() / (a | b).sum())


def _check_tolerance(differences: list[Difference], tolerance: Tolerance, path: Path) -> None:
    detections = sum(d.detections or 0 for d in differences)
    unmatched = sum(d.unmatched or 0 for d in differences)
    worst = {
        'detections without a partner': unmatched > tolerance.unmatched * 2 * max(detections, 1),
        'masks': any(d.mask_iou is not None and d.mask_iou < tolerance.mask_iou for d in differences),
        'segmentation masks': any(d.pixels is not None and d.pixels < tolerance.pixels for d in differences),
        'logits': any(d.logits is not None and d.logits > tolerance.logits for d in differences),
    }
    wrong = [name for name, is_wrong in worst.items() if is_wrong]
    if wrong:
        hint = 'train longer if the model has hardly been trained, or write it unchecked by --no-check'
        raise UsageError(
            f'{path.name} does not compute what the model does ({", ".join(wrong)}), and is not kept: {hint}'
        )
