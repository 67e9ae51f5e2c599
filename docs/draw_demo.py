#!/usr/bin/env python
"""Draw the picture of README.md: ground truth above the predictions of a demo of Mask R-CNN, on a few toy images.

    python docs/draw_demo.py WORK_DIR docs/images/demo.png        (`make picture`: of the last demo)

The toy images are 128 pixels wide, so they are enlarged, and each label stands where it covers no object.
"""

import io
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from convnext_dense.checkpoints.io import load_checkpoint

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / 'configs/demo/mask_rcnn.py'
N_IMAGES, OBJECTS, SCORE_THRESHOLD = 3, (3, 4), 0.7
COLORS = ('#d62728', '#2ca02c', '#1f77b4', '#9467bd')  # of the classes in order
LABEL_HEIGHT, CHAR_WIDTH = 8, 4.0  # of the font below, in pixels of a toy image


def load_model(config: Config, work_dir: Path) -> torch.nn.Module:
    """The detector of a demo with its last checkpoint."""
    from mmdet.registry import MODELS

    checkpoint = (work_dir / 'last_checkpoint').read_text().strip()
    model = MODELS.build(config.model)
    model.load_state_dict(load_checkpoint(checkpoint)['state_dict'])
    return model.eval()


def instances(sample, threshold: float = 0.0) -> list[tuple[int, float | None, np.ndarray, np.ndarray]]:
    """Class id, score (None for ground truth), box (x1, y1, x2, y2) and mask (H, W) of each instance."""
    scores = sample.scores.tolist() if 'scores' in sample else [None] * len(sample.labels)
    masks = sample.masks.masks if hasattr(sample.masks, 'masks') else sample.masks.numpy()
    boxes = sample.bboxes.tensor if hasattr(sample.bboxes, 'tensor') else sample.bboxes
    rows = zip(sample.labels.tolist(), scores, boxes.numpy(), np.asarray(masks, bool))
    return [row for row in rows if row[1] is None or row[1] >= threshold]


def choose(model: torch.nn.Module, dataset) -> list[tuple[np.ndarray, list, list]]:
    """Image (H, W, RGB), ground truth and predictions of the first images with a few objects, each of another class."""
    from mmengine.dataset import pseudo_collate

    chosen = []
    for item in dataset:
        truth = instances(item['data_samples'].gt_instances)
        if len({label for label, *_ in truth}) == len(truth) and len(truth) in OBJECTS:
            with torch.no_grad():
                (result,) = model.test_step(pseudo_collate([item]))
            image = item['inputs'].permute(1, 2, 0).numpy()[:, :, ::-1]
            chosen.append((image, truth, instances(result.pred_instances.cpu(), SCORE_THRESHOLD)))
        if len(chosen) == N_IMAGES:
            return chosen
    return chosen


def place_label(text: str, mask: np.ndarray, occupied: np.ndarray) -> tuple[int, int] | None:
    """The left upper corner (x, y) for a label where it covers nothing, nearest to its object; None without room."""
    height, width = occupied.shape
    w, h = int(len(text) * CHAR_WIDTH) + 3, LABEL_HEIGHT
    pixels, places = np.argwhere(mask), []
    for y in range(1, height - h, 2):
        for x in range(1, width - w, 2):
            if not occupied[y : y + h, x : x + w].any():
                outside = np.maximum(0, np.maximum([y, x] - pixels, pixels - [y + h, x + w]))
                places.append((np.square(outside).sum(1).min(), abs(x + w / 2 - pixels[:, 1].mean()), x, y))
    if not places:
        return None
    *_, x, y = min(places)
    occupied[y : y + h, x : x + w] = True
    return x, y


def draw_instances(axes, image: np.ndarray, rows: list, class_names: tuple[str, ...], occupied: np.ndarray) -> None:
    """Boxes, outlines and labels of instances over an image."""
    axes.imshow(image, interpolation='bicubic')
    axes.set_axis_off()
    for label, score, box, mask in rows:
        color, (x1, y1, x2, y2) = COLORS[label], box
        axes.contour(mask, levels=[0.5], colors=[color], linewidths=2)
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, linewidth=1, linestyle='--'))
        text = class_names[label] + (f' {score:.2f}' if score is not None else '')
        place = place_label(text, mask, occupied)
        if place:
            frame = dict(facecolor=color, edgecolor='none', pad=1.5)
            axes.text(place[0] + 1, place[1] + 1, text, color='white', fontsize=11, va='top', bbox=frame)


def main(work_dir: str, out: str) -> None:
    """Draw the demo in `work_dir` into the file `out`."""
    config = Config.fromfile(CONFIG)
    init_default_scope('mmdet')
    from mmdet.registry import DATASETS

    chosen = choose(load_model(config, Path(work_dir)), DATASETS.build(config.test_dataloader.dataset))
    names = config.metainfo['classes']
    figure, axes = plt.subplots(2, len(chosen), figsize=(3.6 * len(chosen), 7.5), squeeze=False)
    for column, (image, truth, predictions) in enumerate(chosen):
        objects = np.any([mask for *_, mask in truth + predictions], axis=0)
        draw_instances(axes[0, column], image, truth, names, objects.copy())
        draw_instances(axes[1, column], image, predictions, names, objects.copy())
    for row, title in enumerate(('ground truth', 'predictions')):
        figure.text(0.012, 0.75 - row * 0.5, title, rotation=90, va='center', ha='center', fontsize=13)
    figure.subplots_adjust(left=0.025, right=0.998, bottom=0.004, top=0.996, wspace=0.02, hspace=0.02)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90)
    Image.open(buffer).convert('RGB').quantize(128, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == '__main__':
    if len(sys.argv) != 3 or not Path(sys.argv[1], 'last_checkpoint').is_file():
        sys.exit('error: give the work dir of a demo that has run (make demo), and the file to write')
    main(*sys.argv[1:])
