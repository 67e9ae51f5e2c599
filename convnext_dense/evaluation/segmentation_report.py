"""mmseg's IoU metric with a report: results by class, confusion matrix, worst images."""

import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from mmengine.logging import print_log
from mmengine.registry import METRICS
from mmseg.evaluation import IoUMetric

from .plots import plot_confusion_matrix
from .report_files import NUM_WORST_IMAGES, log_table, percent, write_csv
from .worst_images import default_palette, draw_all, draw_segmentation, read_rgb

HEADER = ('class', 'pixels %', 'IoU', 'Acc', 'precision', 'F1')
IMAGE_HEADER = ('image', 'mIoU', 'aAcc')


class ImageResult(NamedTuple):
    """What the report keeps of an image.

    Attributes:
        path: Path of the image.
        miou: Mean IoU of the classes that the image or its prediction has; NaN where all is ignored.
        acc: Ratio of correct pixels.
        cells: Indices of the confusion matrix (flat) that are not 0, and their counts: an image has few classes.
        maps: Ground truth and prediction as PNG, of the worst images only.
    """

    path: str
    miou: float
    acc: float
    cells: tuple[np.ndarray, np.ndarray]
    maps: tuple[bytes, bytes] | None = None


@METRICS.register_module()
class SegmentationReport(IoUMetric):
    """IoUMetric that also writes a report.

    Args:
        report_dir: Folder for the report.
        channels: Fields of `ChannelReader` if images are not RGB.
        **kwargs: Arguments of IoUMetric.
    """

    def __init__(self, report_dir: str, channels: dict | None = None, **kwargs):
        super().__init__(**kwargs)
        self.report_dir, self.channels = Path(report_dir), channels
        self._worst = []  # heap of (-mIoU, index in self.results): only these keep their maps

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Keep areas as IoUMetric does, and the confusion matrix of each image."""
        if not self.results:
            self._worst = []
        start = len(self.results)
        super().process(data_batch, data_samples)
        for i, sample in enumerate(data_samples, start):
            self.results[i] = (self.results[i], self._image_result(sample, i))

    def _image_result(self, sample: dict, index: int) -> ImageResult:
        pred = sample['pred_sem_seg']['data'].squeeze(0).cpu().numpy()
        label = sample['gt_sem_seg']['data'].squeeze(0).cpu().numpy()
        cells = count_confusions(pred, label, len(self.dataset_meta['classes']), self.ignore_index)
        ious = class_ious(*cells, len(self.dataset_meta['classes']))
        miou = float(np.nanmean(ious)) if not np.isnan(ious).all() else np.nan
        acc = float((pred == label)[label != self.ignore_index].mean()) if len(cells[0]) else np.nan
        result = ImageResult(sample.get('img_path', ''), miou, acc, cells)
        return result._replace(maps=(_to_png(label), _to_png(pred))) if self._is_among_worst(miou, index) else result

    def _is_among_worst(self, miou: float, index: int) -> bool:
        """Return whether an image is among the worst so far; drop the maps of one that no longer is."""
        if np.isnan(miou) or miou == 1:
            return False
        item = (-miou, -index)
        if len(self._worst) < NUM_WORST_IMAGES:
            heapq.heappush(self._worst, item)
            return True
        dropped = heapq.heappushpop(self._worst, item)
        if dropped == item:
            return False
        areas, result = self.results[-dropped[1]]
        self.results[-dropped[1]] = (areas, result._replace(maps=None))
        return True

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Compute the metrics and write the report."""
        metrics = super().compute_metrics([areas for areas, _ in results])
        images = [ImageResult(*image) for _, image in results]  # gathered as plain tuples
        classes = list(self.dataset_meta['classes'])
        matrix = np.zeros(len(classes) ** 2, np.int64)
        for image in images:
            indices, counts = image.cells
            matrix[indices] += counts
        self.report_dir.mkdir(parents=True, exist_ok=True)
        self._write_classes(matrix.reshape(len(classes), -1), classes)
        self._write_images(images, classes)
        print_log(f'report: {self.report_dir}', logger='current')
        return metrics

    def _write_classes(self, matrix: np.ndarray, classes: Sequence[str]) -> None:
        correct, pred, label = (
            torch.from_numpy(a).double() for a in (matrix.diagonal().copy(), matrix.sum(0), matrix.sum(1))
        )
        values = self.total_area_to_metrics(correct, pred + label - correct, pred, label, ['mIoU', 'mFscore'])
        columns = [100 * values[key] for key in ('IoU', 'Acc', 'Precision', 'Fscore')]
        pixels = 100 * label.numpy() / max(float(label.sum()), 1)
        rows = [(name, *map(float, row)) for name, *row in zip(classes, pixels, *columns)]
        means = [float(c[~np.isnan(c)].mean()) if (~np.isnan(c)).any() else np.nan for c in columns]
        rows.append(('mean', 100.0, *means))
        write_csv(self.report_dir / 'classes.csv', HEADER, rows)
        log_table('by class, in percent:', HEADER, rows)
        write_csv(self.report_dir / 'confusion.csv', ['', *classes], [[n, *r] for n, r in zip(classes, matrix)])
        plot_confusion_matrix(matrix, classes, classes, self.report_dir / 'confusion.png', 'pixels')

    def _write_images(self, images: Sequence[ImageResult], classes: Sequence[str]) -> None:
        order = sorted((image for image in images if not np.isnan(image.miou)), key=lambda image: image.miou)
        rows = [(image.path, percent(image.miou), percent(image.acc)) for image in order]
        write_csv(self.report_dir / 'images.csv', IMAGE_HEADER, rows)
        worst = [image for image in order if image.maps][:NUM_WORST_IMAGES]
        palette = self.dataset_meta.get('palette') or default_palette(len(classes))

        def draw(place: int, file: Path) -> bool:
            label, pred = map(_from_png, worst[place].maps)
            image = read_rgb(worst[place].path, label.shape, channels=self.channels)
            if image is None:
                return False
            title = f'{Path(worst[place].path).name}: mIoU {percent(worst[place].miou):.1f}'
            draw_segmentation(image, label, pred, classes, palette, self.ignore_index, file, title)
            return True

        draw_all([image.path for image in worst], draw, self.report_dir / 'worst_images')


def count_confusions(
    pred: np.ndarray, label: np.ndarray, num_classes: int, ignore_index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Count the pixels of each pair of classes.

    Args:
        pred: Class indices (H, W).
        label: Class indices (H, W), or `ignore_index`.
        num_classes: Number of classes of the data set.
        ignore_index: Label that is not evaluated.

    Returns:
        Flat indices (class of the ground truth * num_classes + predicted class) that occur, and their counts.
    """
    valid = (label != ignore_index) & (label < num_classes)
    cells = label[valid].astype(np.int64) * num_classes + pred[valid]
    return np.unique(cells, return_counts=True)


def class_ious(cells: np.ndarray, counts: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the IoU of each class, NaN for one that is nowhere; arguments are the result of `count_confusions`."""
    label, pred = (np.bincount(index, counts, num_classes) for index in np.divmod(cells, num_classes))
    is_correct = cells // num_classes == cells % num_classes
    correct = np.bincount(cells[is_correct] // num_classes, counts[is_correct], num_classes)
    union = label + pred - correct
    return np.divide(correct, union, out=np.full(num_classes, np.nan), where=union > 0)


def _to_png(labels: np.ndarray) -> bytes:
    return cv2.imencode('.png', labels.astype(np.uint16))[1].tobytes()


def _from_png(content: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED).astype(np.int64)
