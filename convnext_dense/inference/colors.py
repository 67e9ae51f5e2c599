"""Colors of classes that can be told apart."""

import colorsys
from collections.abc import Sequence

Color = tuple[int, int, int]  # RGB
GOLDEN_RATIO = 0.618033988749895  # steps of it along a circle never come close to an earlier place
LIGHTNESS, SATURATION = (0.5, 0.68, 0.36), (0.95, 0.6)


def class_colors(n: int, palette: Sequence[Color] = ()) -> list[Color]:
    """Return a color for each class.

    Args:
        n: Number of classes.
        palette: Of the data set; used if it has a different color for each class.

    Returns:
        RGB colors.
    """
    if len(palette) == n == len({tuple(color) for color in palette}):
        return [tuple(color) for color in palette]
    return [_color(i) for i in range(n)]


def text_color(background: Color) -> Color:
    """Return black or white, whichever is easier to read on a color (luma of ITU-R BT.601)."""
    red, green, blue = background
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


def _color(i: int) -> Color:
    """The color of class `i`: hues by the golden ratio, in turns of lightness and saturation."""
    lightness = LIGHTNESS[i % len(LIGHTNESS)]
    saturation = SATURATION[i // len(LIGHTNESS) % len(SATURATION)]
    return tuple(round(255 * value) for value in colorsys.hls_to_rgb((i * GOLDEN_RATIO) % 1, lightness, saturation))
