"""Test-time augmentation: one image at several scales, with and without flip."""

import copy
from collections.abc import Iterator

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose
from mmengine.structures import BaseDataElement

from ..config.evaluation import set_multiscale
from ..config.tree import iter_dicts
from ..errors import UsageError
from ..models.multiscale_tta import MultiScaleSegmentor
from .merging import detector_limits, merge_detections
from .preprocessing import is_resize

DETECTION_SCALE_FACTORS = (0.75, 1.0, 1.25)  # relative to the model's test scale


def check_scales(steps: list[dict]) -> None:
    """Raise UsageError if a test pipeline does not resize to a scale, from which the others follow."""
    if not any(map(is_resize, iter_dicts(steps))):
        raise UsageError("multiscale needs dict(type='Resize', scale=(long, short)) in test_dataloader's pipeline")


class SegmentationViews:
    """The paper's multi-scale test of a segmentor: probabilities are averaged over six scales and flips.

    Raises:
        UsageError: If the test pipeline, whose transforms for a loaded image are given, does not resize to a scale.
    """

    def __init__(self, model, steps: list[dict]):
        check_scales(steps)
        config = Config(
            dict(default_scope='mmseg', model=dict(), test_dataloader=dict(dataset=dict(pipeline=copy.deepcopy(steps))))
        )
        set_multiscale(config)
        self.pipeline = Compose(config.test_dataloader.dataset.pipeline)
        whole_mode_model = copy.copy(model)  # shares the parameters; the model itself keeps its sliding window
        whole_mode_model.test_cfg = ConfigDict({**(model.test_cfg or {}), 'mode': 'whole'})
        self.model = MultiScaleSegmentor(module=whole_mode_model)

    def predict(self, item: dict, with_logits: bool = False) -> BaseDataElement:
        """Predict an image.

        Args:
            item: Result of `pipeline`.
            with_logits: Whether the sample also gets the probabilities, as `seg_logits` (C, H, W).
        """
        return self.model.test_step({key: [[view] for view in views] for key, views in item.items()}, with_logits)[0]


class DetectionViews:
    """Multi-scale test of a detector: the detections at three scales and flips are merged.

    Raises:
        UsageError: If the test pipeline, whose transforms for a loaded image are given, does not resize to a scale.
    """

    def __init__(self, steps: list[dict]):
        check_scales(steps)
        self.pipelines = [Compose(_scaled(steps, factor)) for factor in DETECTION_SCALE_FACTORS]

    def predict(self, predictor, image: np.ndarray) -> BaseDataElement:
        """Predict an image (H, W, C) with a `Predictor`."""
        return merge_detections(self.iter_samples(predictor, image), *detector_limits(predictor.model))

    def iter_samples(self, predictor, image: np.ndarray) -> Iterator[BaseDataElement]:
        """Iterate over the predictions of all views, in pixels of the image."""
        for pipeline in self.pipelines:
            yield from predictor.forward([predictor.prepare(image, pipeline)])
            flipped = np.ascontiguousarray(image[:, ::-1])
            for sample in predictor.forward([predictor.prepare(flipped, pipeline)]):
                yield _unflipped(sample, image.shape[1])


def _scaled(steps: list[dict], factor: float) -> list[dict]:
    steps = copy.deepcopy(steps)
    for step in filter(is_resize, iter_dicts(steps)):
        step['scale'] = tuple(round(side * factor) for side in step['scale'])
    return steps


def _unflipped(sample: BaseDataElement, width: int) -> BaseDataElement:
    """Return the prediction of a horizontally flipped image in pixels of the image itself."""
    instances = sample.pred_instances
    x1, y1, x2, y2 = instances.bboxes.unbind(-1)
    instances.bboxes = torch.stack((width - x2, y1, width - x1, y2), -1)
    if 'masks' in instances:
        instances.masks = instances.masks.flip(-1)
    return sample
