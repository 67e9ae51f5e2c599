"""Distinguishable colors for classes."""

from collections.abc import Sequence
from functools import cache

import cv2
import numpy as np

Color = tuple[int, int, int]  # RGB
LEVELS = 9  # values of red, green and blue from which colors are chosen
LIGHTNESS, MIN_CHROMA = (30, 85), 25  # in CIELAB; excludes black, white and gray, which are frequent in images


def class_colors(n: int, palette: Sequence[Color] = ()) -> list[Color]:
    """Return a color for each of `n` classes: those of the palette if all are different, else distinguishable ones."""
    if len(palette) == n == len({tuple(color) for color in palette}):
        return [tuple(color) for color in palette]
    colors = _distinct_colors()
    return [colors[i % len(colors)] for i in range(n)]


def text_color(background: Color) -> Color:
    """Return black or white, whichever is more legible on a color (luma of ITU-R BT.601)."""
    red, green, blue = background
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


@cache
def _distinct_colors(n: int = 256) -> list[Color]:
    """Return colors, each as different as possible from all earlier ones: farthest points in CIELAB, from red on."""
    levels = np.linspace(0, 255, LEVELS).round()
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing='ij'), -1).reshape(-1, 3).astype(np.float32)
    lab = cv2.cvtColor(rgb[None] / 255, cv2.COLOR_RGB2LAB)[0]
    is_usable = (LIGHTNESS[0] <= lab[:, 0]) & (lab[:, 0] <= LIGHTNESS[1]) & (np.hypot(*lab[:, 1:].T) >= MIN_CHROMA)
    rgb, lab = rgb[is_usable], lab[is_usable]
    chosen = [int(np.abs(rgb - (255, 0, 0)).sum(1).argmin())]
    distances = np.full(len(lab), np.inf)
    while len(chosen) < min(n, len(lab)):
        distances = np.minimum(distances, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(distances.argmax()))
    return [tuple(int(value) for value in rgb[i]) for i in chosen]
