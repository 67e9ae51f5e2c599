"""Pictures of the images with the most errors: the ground truth next to the prediction."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from mmengine.fileio import get
from mmengine.logging import print_log

from ..channel_files import ChannelReader, to_rgb
from ..errors import UnreadableImageError
from .coco_matches import Pair

MAX_SIDE = 1000  # pixels of a panel's longer side
PANEL_INCHES = 6.5  # of a panel's longer side
CORRECT, WRONG_CLASS, WRONG = '#2ca02c', '#ff8c00', '#e0162b'


def read_rgb(
    path: str, size: tuple[int, int], backend_args: dict | None = None, channels: dict | None = None
) -> np.ndarray | None:
    """Read an image as it was tested: rotated as EXIF says if only then it has that size.

    Args:
        path: Path of the image.
        size: Height and width of the image in the test.
        backend_args: Arguments of the storage that the path belongs to.
        channels: Fields of `ChannelReader` if the image is not RGB, of which the first three channels are shown.

    Returns:
        Image (H, W, 3) in RGB; None if it cannot be read so.
    """
    from mmcv import imfrombytes

    try:
        if channels:
            return to_rgb(ChannelReader(**channels).read(path))
        content = get(path, backend_args)
        for flag in ('color', 'color_ignore_orientation'):
            image = imfrombytes(content, flag=flag, channel_order='rgb')
            if image is not None and image.shape[:2] == tuple(size):
                return image
    except (OSError, ValueError, UnreadableImageError):
        pass
    return None


def draw_all(paths: Sequence[str], draw: Callable[[int, Path], bool], folder: Path) -> None:
    """Draw images in their order into numbered files, and name those that cannot be drawn.

    Args:
        paths: Paths of the images, the worst first.
        draw: Draws an image, by its place in the order, into a file; returns whether it could.
        folder: Folder for the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    undrawn = [path for i, path in enumerate(paths) if not draw(i, folder / f'{i + 1:02}_{Path(path).stem[:80]}.jpg')]
    if undrawn:
        text = f'report: {len(undrawn)} of the worst images cannot be drawn, among them {undrawn[0]}'
        print_log(text, logger='current', level=logging.WARNING)


def draw_detections(image: np.ndarray, pairs: Sequence[Pair], names: dict[int, str], file: Path, title: str) -> None:
    """Draw objects on the left and detections on the right: correct ones green, of a wrong class orange, others red.

    Args:
        image: Image (H, W, 3) in RGB.
        pairs: Pairs of this image.
        names: Names of the classes by category id.
        file: Path of the picture.
        title: Title above the picture.
    """
    figure, axes = _panels(image, ['ground truth (red: missed)', 'detections (red: false)'], title)
    for pair in pairs:
        color = CORRECT if pair.is_correct else WRONG_CLASS if pair.gt and pair.dt else WRONG
        for axis, ann in zip(axes, (pair.gt, pair.dt)):
            if ann:
                score = f' {ann["score"]:.2f}' if 'score' in ann else ''
                _draw_box(axis, ann['bbox'], names[ann['category_id']] + score, color, image.shape[1])
    figure.savefig(file)


def _draw_box(axis, box: Sequence[float], text: str, color: str, width: int) -> None:
    from matplotlib.patches import Rectangle

    x, y, w, h = box
    axis.add_patch(Rectangle((x - 0.5, y - 0.5), w, h, fill=False, color=color, linewidth=1.5))
    is_right_half = x > width / 2
    axis.text(
        *(x + w if is_right_half else x, y),
        text,
        fontsize=7,
        color='white',
        ha='right' if is_right_half else 'left',
        va='bottom' if y > 12 else 'top',
        bbox=dict(facecolor=color, edgecolor='none', pad=0.8, alpha=0.8),
        clip_on=True,
    )


def draw_segmentation(
    image: np.ndarray,
    label: np.ndarray,
    pred: np.ndarray,
    names: Sequence[str],
    palette: Sequence[Sequence[int]],
    ignore_index: int,
    file: Path,
    title: str,
) -> None:
    """Draw an image, its ground truth, the prediction, and the pixels at which they differ.

    Args:
        image: Image (H, W, 3) in RGB.
        label: Class indices (H, W), or `ignore_index`.
        pred: Class indices (H, W).
        names: Names of the classes.
        palette: RGB color of each class.
        ignore_index: Label that is not evaluated.
        file: Path of the picture.
        title: Title above the picture.
    """
    from matplotlib.patches import Patch

    colors = np.zeros((256, 3), np.uint8)
    colors[: len(palette)] = palette
    valid = label != ignore_index
    errors = (image * 0.35 + 160).clip(0, 255).astype(np.uint8)
    errors[valid & (label != pred)] = (224, 22, 43)
    errors[~valid] = 0
    titles = ['image', 'ground truth (black: ignored)', 'prediction', 'errors']
    figure, axes = _panels(image, titles, title, columns=2)
    shown = np.where(valid[..., None], colors[label.clip(0, 255)], 0)
    for axis, content in zip(axes[1:], (shown, colors[pred], errors)):
        axis.images[0].set_data(_shrink(content))
    present = [i for i in np.union1d(label[valid], pred) if i < len(names)]
    handles = [Patch(color=colors[i] / 255, label=names[i]) for i in present]
    figure.legend(handles=handles, loc='outside lower center', ncols=min(len(handles) or 1, 6), fontsize=8)
    figure.savefig(file)


def default_palette(num_classes: int) -> list[tuple[int, int, int]]:
    """Return distinct colors for classes of a data set that names none."""
    from matplotlib import colormaps

    hues = (np.arange(num_classes) * 0.618034) % 1  # the golden ratio: neighbors differ
    return [tuple(int(255 * v) for v in colormaps['hsv'](hue)[:3]) for hue in hues]


def _shrink(image: np.ndarray) -> np.ndarray:
    """Return every n-th pixel of an image that is larger than its panel."""
    step = max(1, -(-max(image.shape[:2]) // MAX_SIDE))
    return image[::step, ::step]


def _panels(image: np.ndarray, titles: Sequence[str], title: str, columns: int = 0):
    """Return a figure of panels that all show an image, in its own coordinates."""
    from matplotlib.figure import Figure

    height, width = image.shape[:2]
    columns = columns or (len(titles) if height >= 0.6 * width else 1)  # wide images one above the other
    rows = -(-len(titles) // columns)
    scale = PANEL_INCHES / max(height, width)
    size = (columns * max(width * scale, 2), rows * (max(height * scale, 1) + 0.3) + 0.9)
    figure = Figure(figsize=size, dpi=100, layout='constrained')
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, text in zip(axes, titles):
        axis.imshow(_shrink(image), extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation='nearest')
        axis.set_title(text, fontsize=9)
        axis.set_axis_off()
    return figure, axes
