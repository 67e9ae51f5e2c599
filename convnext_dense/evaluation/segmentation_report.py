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

from .report_files import NUM_WORST_IMAGES, log_table, mean_of_numbers, write_confusion_matrix, write_csv
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
    maps: tuple[np.ndarray, np.ndarray] | None = None


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
        label, pred = (sample[key]['data'].squeeze(0).cpu().numpy() for key in ('gt_sem_seg', 'pred_sem_seg'))
        cells = count_confusions(pred, label, len(self.dataset_meta['classes']), self.ignore_index)
        correct, union, _, labeled = (area.double() for area in self.results[index])  # of each class
        miou, acc = float((correct / union).nanmean()), float(correct.sum() / labeled.sum())
        maps = None
        if self._is_among_worst(miou, index):
            maps = tuple(cv2.imencode('.png', indices.astype(np.uint16))[1] for indices in (label, pred))
        return ImageResult(sample.get('img_path', ''), miou, acc, cells, maps)

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
        correct, pred, label = map(torch.tensor, (matrix.diagonal() * 1.0, matrix.sum(0) * 1.0, matrix.sum(1) * 1.0))
        values = self.total_area_to_metrics(correct, pred + label - correct, pred, label, ['mIoU', 'mFscore'])
        columns = [100 * values[key] for key in ('IoU', 'Acc', 'Precision', 'Fscore')]
        pixels = 100 * label.numpy() / max(float(label.sum()), 1)
        rows = [(name, *map(float, row)) for name, *row in zip(classes, pixels, *columns)]
        rows.append(('mean', 100.0, *map(mean_of_numbers, columns)))
        write_csv(self.report_dir / 'classes.csv', HEADER, rows)
        log_table('by class, in percent:', HEADER, rows)
        write_confusion_matrix(self.report_dir / 'confusion', matrix, classes, 'pixels')

    def _write_images(self, images: Sequence[ImageResult], classes: Sequence[str]) -> None:
        order = sorted((image for image in images if not np.isnan(image.miou)), key=lambda image: image.miou)
        rows = [(image.path, 100 * image.miou, 100 * image.acc) for image in order]
        write_csv(self.report_dir / 'images.csv', IMAGE_HEADER, rows)
        worst = [image for image in order if image.maps][:NUM_WORST_IMAGES]
        palette = self.dataset_meta.get('palette') or default_palette(len(classes))

        def draw(place: int, file: Path) -> bool:
            label, pred = (cv2.imdecode(png, cv2.IMREAD_UNCHANGED).astype(np.int64) for png in worst[place].maps)
            image = read_rgb(worst[place].path, label.shape, channels=self.channels)
            if image is None:
                return False
            title = f'{Path(worst[place].path).name}: mIoU {100 * worst[place].miou:.1f}'
            draw_segmentation(image, label, pred, classes, palette, self.ignore_index, file, title)
            return True

        draw_all([image.path for image in worst], draw, self.report_dir / 'worst_images')


def count_confusions(
    pred: np.ndarray, label: np.ndarray, num_classes: int, ignore_index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Count the pixels of each pair of classes in two maps (H, W) of their indices.

    Returns:
        Flat indices (class of the ground truth * num_classes + predicted class) that occur, and their counts.
    """
    valid = (label != ignore_index) & (label < num_classes)
    cells = label[valid].astype(np.int64) * num_classes + pred[valid]
    return np.unique(cells, return_counts=True)
