"""Options of a prediction, which are checked before a model is built."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from ..datasets.tiles import DEFAULT_OVERLAP
from ..errors import UsageError


@dataclass(frozen=True)
class PredictOptions:
    """Options of one call of `Predictor.predict`, the same as those of tools/predict.py.

    Attributes:
        score_thr: Detections with lower scores are dropped; None to keep all that the model returns.
        classes: Names of the classes whose detections are returned, or to which segmentation is restricted; None for
            all.
        max_per_image: Maximum number of detections per image, those with the highest scores; None for the model's
            limit.
        batch_size: Images of equal size per batch.
        multiscale: Whether to average over scales and flips (segmentation) or to merge their boxes (detection).
        tile: Side of square tiles in pixels of the image; None for the image as a whole.
        overlap: Overlap of neighboring tiles as a fraction of their side.

    Raises:
        UsageError: If a value is out of range.
    """

    score_thr: float | None = None
    classes: Sequence[str] | None = None
    max_per_image: int | None = None
    batch_size: int = 1
    multiscale: bool = False
    tile: int | None = None
    overlap: float = DEFAULT_OVERLAP

    def __post_init__(self):
        if self.score_thr is not None and not 0 <= self.score_thr <= 1:
            raise UsageError(f'score_thr {self.score_thr}: give a number from 0 to 1')
        if self.max_per_image is not None and self.max_per_image < 1:
            raise UsageError(f'max_per_image {self.max_per_image}: give at least 1')
        if self.batch_size < 1:
            raise UsageError(f'batch_size {self.batch_size}: give at least 1')
        if self.tile is not None and self.tile < 1:
            raise UsageError(f'tile {self.tile}: give the side of a tile in pixels')
        if not 0 <= self.overlap < 1:
            raise UsageError(f'overlap {self.overlap}: give a fraction of the tile from 0 to below 1, such as 0.25')


def class_indices(names: Sequence[str] | None, classes: Sequence[str]) -> list[int] | None:
    """Return the indices of classes by name; None, for all of them, stays.

    Raises:
        UsageError: If the model has no class with one of these names.
    """
    if names is None:
        return None
    for name in names:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, 1)
            more = f' and {len(classes) - 10} more' if len(classes) > 10 else ''
            hint = f'did you mean {near[0]}?' if near else f'the model has {", ".join(classes[:10])}{more}'
            raise UsageError(f"no class '{name}': {hint}")
    return [list(classes).index(name) for name in names]
