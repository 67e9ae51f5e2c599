"""COCO's metric with a report: results by class, confusion matrix, precision-recall curves, worst images."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from mmdet.evaluation import CocoMetric
from mmengine.fileio import load
from mmengine.logging import print_log
from mmengine.registry import METRICS

from .coco_matches import Pair, class_results, confusion_matrix, evaluate_coco, load_detections, match_at_thresholds
from .report_files import (
    NUM_WORST_IMAGES,
    log_table,
    mean_of_numbers,
    plot_pr_curves,
    write_confusion_matrix,
    write_csv,
)
from .worst_images import draw_all, draw_detections, read_rgb

HEADER = ('class', 'objects', 'AP', 'AP50', 'score', 'precision', 'recall', 'F1')
IMAGE_HEADER = ('image', 'F1', 'right', 'wrong class', 'false', 'missed')
NAMES = {'bbox': 'boxes', 'segm': 'masks'}


@METRICS.register_module()
class DetectionReport(CocoMetric):
    """CocoMetric that also writes a report.

    Precision, recall and F1 are those at IoU 0.5 and at the score with the highest F1 of each class; so are the
    confusion matrix and the errors of each image.

    Args:
        report_dir: Folder for the report.
        channels: Fields of `ChannelReader` if images are not RGB.
        **kwargs: Arguments of CocoMetric.
    """

    def __init__(self, report_dir: str, channels: dict | None = None, **kwargs):
        super().__init__(**kwargs)
        self.report_dir, self.channels = Path(report_dir), channels

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Keep predictions as CocoMetric does, with the paths of their images."""
        start = len(self.results)
        super().process(data_batch, data_samples)
        for (gt, _), sample in zip(self.results[start:], data_samples):
            gt['img_path'] = sample.get('img_path', '')

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Compute the metrics and write the report."""
        metrics = super().compute_metrics(results)
        images = {gt['img_id']: gt for gt, _ in results}
        with TemporaryDirectory() as folder:
            files = self.results2json([pred for _, pred in results], f'{folder}/results')
            detections = {iou_type: load(files[iou_type]) for iou_type in NAMES if iou_type in files}
        iou_types = [metric for metric in self.metrics if metric in detections]
        for i, iou_type in enumerate(iou_types):
            self._report(iou_type, detections[iou_type], images, with_images=i == 0)
        print_log(f'report: {self.report_dir}', logger='current')
        return metrics

    def _report(self, iou_type: str, detections: list[dict], images: dict[int, dict], with_images: bool) -> None:
        if iou_type == 'segm':
            for detection in detections:
                detection.pop('bbox', None)  # as CocoMetric: areas are those of masks
        self.report_dir.mkdir(parents=True, exist_ok=True)
        gt = self._coco_api
        evaluation = evaluate_coco(gt, load_detections(gt, detections), self.cat_ids, iou_type, self.img_ids)
        category_ids, results = evaluation.params.catIds, class_results(evaluation)
        names = [result.name for result in results]
        pairs = match_at_thresholds(evaluation, results)
        self._write_classes(iou_type, results)
        counts, title = confusion_matrix(pairs, category_ids), 'at IoU 0.5 and the scores with the highest F1'
        file = self.report_dir / f'confusion_{iou_type}'
        write_confusion_matrix(file, counts, [*names, 'background'], f'{NAMES[iou_type]}, {title}')
        precision, recalls = evaluation.eval['precision'][..., 0, 0], evaluation.params.recThrs
        plot_pr_curves(precision, recalls, names, self.report_dir / f'pr_curves_{iou_type}.png', NAMES[iou_type])
        if with_images:
            self._write_images(pairs, images, dict(zip(category_ids, names)))

    def _write_classes(self, iou_type: str, results: Sequence) -> None:
        scales = np.array([100, 100, 1, 100, 100, 100])  # percent, but for the threshold
        values = scales * np.array([result[2:] for result in results], float)
        means = map(mean_of_numbers, values[~np.isnan(values[:, 0])].T)
        rows = [(*result[:2], *row) for result, row in zip(results, values.tolist())]
        rows.append(('mean', sum(result.num_objects for result in results), *means))
        write_csv(self.report_dir / f'classes_{iou_type}.csv', HEADER, rows)
        rows = [(*row[:4], '-' if np.isnan(row[4]) else f'{row[4]:.2f}', *row[5:]) for row in rows]
        log_table(f'{NAMES[iou_type]} by class; precision, recall and F1 at IoU 0.5 and this score:', HEADER, rows)

    def _write_images(self, pairs: Sequence[Pair], images: dict[int, dict], names: dict[int, str]) -> None:
        by_image = defaultdict(list)
        for pair in pairs:
            by_image[pair.image_id].append(pair)
        rows = {image_id: image_errors(by_image[image_id]) for image_id in images}
        order = sorted(rows, key=lambda image_id: (rows[image_id][0], -sum(rows[image_id][2:])))
        paths = {i: image['img_path'] or str(i) for i, image in images.items()}
        table = [(paths[i], 100 * rows[i][0], *rows[i][1:]) for i in order]
        write_csv(self.report_dir / 'images.csv', IMAGE_HEADER, table)
        worst = [i for i in order if sum(rows[i][2:])][:NUM_WORST_IMAGES]

        def draw(rank: int, file: Path) -> bool:
            image_id = worst[rank]
            path, size = paths[image_id], (images[image_id]['height'], images[image_id]['width'])
            image = read_rgb(path, size, self.backend_args, self.channels)
            if image is None:
                return False
            _, correct, wrong, false, missed = rows[image_id]
            counts = f'{correct} right, {wrong} of a wrong class, {false} false, {missed} missed'
            draw_detections(image, by_image[image_id], names, file, f'{Path(path).name}: {counts}')
            return True

        draw_all([paths[i] for i in worst], draw, self.report_dir / 'worst_images')


def image_errors(pairs: Sequence[Pair]) -> tuple[float, int, int, int, int]:
    """Return the F1 of an image (1 where there is nothing), and its pairs: correct, of a wrong class, false, missed."""
    correct = sum(pair.is_correct for pair in pairs)
    false, missed = (sum(ann is None for ann in anns) for anns in ([p.gt for p in pairs], [p.dt for p in pairs]))
    wrong = len(pairs) - correct - false - missed
    errors = 2 * wrong + false + missed
    return (2 * correct / (2 * correct + errors) if pairs else 1.0), correct, wrong, false, missed
