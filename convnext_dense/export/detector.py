"""mmdet's detectors as one traceable function of images, with results of padded shapes.

What follows the backbone is mmdet's, written for a batch: where mmdet drops boxes, these are given a score of -1 and
stay, so that every shape follows from that of the images.
"""

import torch
from mmdet.models import MaskFormer, SingleStageDetector, TwoStageDetector
from mmdet.models.detectors.base_detr import DetectionTransformer
from torch import nn

from ..channel_files import ChannelReader
from ..errors import UsageError
from .mask2former import Mask2FormerInstances
from .one_stage import PAA, YOLOX, OneStage
from .preprocessing import Preprocess
from .query_based import QueryBased
from .rtmdet_ins import RTMDetIns
from .sizes import known_size, to_tensor, with_unknown_size
from .two_stage import TwoStage


def one_stage(model: SingleStageDetector) -> OneStage:
    """A one-stage detector by its head, which decides how it comes to results."""
    head = getattr(model, 'bbox_head', None)
    return next((kind for kind in (YOLOX, PAA, RTMDetIns) if isinstance(head, kind.heads)), OneStage)(model)


KINDS = {  # MaskFormer is derived from SingleStageDetector
    MaskFormer: Mask2FormerInstances,
    TwoStageDetector: TwoStage,
    SingleStageDetector: one_stage,
    DetectionTransformer: QueryBased,
}


class ExportableDetector(nn.Module):
    """A detector as a function of images.

    Args:
        model: mmdet's model, in evaluation mode.
        raw: Whether images are as the data preprocessor returns them, and results are in their pixels.
        masks: 'image' for masks in the size of the image, 'box' for those of the mask head.
        reader: As of `Preprocess`.

    Raises:
        UsageError: If a part of the model is of a class whose computation is not known here.
    """

    def __init__(self, model: nn.Module, raw: bool = False, masks: str = 'image', reader: ChannelReader | None = None):
        super().__init__()
        self.detect = _kind(model)(model)
        if masks == 'box' and self.detect.mask_form == 'image':
            raise UsageError(f'{type(model).__name__} has no masks in boxes: its masks are those of the image')
        self.preprocess = nn.Identity() if raw else Preprocess(model.data_preprocessor, reader)
        self.raw, self.masks, self.dtype = raw, masks, next(model.backbone.parameters()).dtype
        self.output_names = ['boxes', 'scores', 'labels', *(['masks'] if self.detect.mask_form else [])]

    def forward(self, images: torch.Tensor, output_size: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Detect the objects of a batch of images.

        Args:
            images: (N, C, H, W) as `Preprocess` takes them; with `raw` normalized and padded.
            output_size: (2,), int64: height and width of the images that these were resized from. Not with `raw`.

        Returns:
            Boxes (N, K, 4) as x1, y1, x2, y2 in pixels of `output_size`, scores (N, K) in descending order, labels
            (N, K) of int64, which are -1 where an image has fewer objects than K, and masks: (N, K, height, width) of
            bool, or probabilities (N, K, 28, 28) of each box.
        """
        images = with_unknown_size(images)
        shape = images.shape[-2:]
        if self.raw:
            scale = torch.ones(4, device=images.device)
        else:  # from pixels of the input to those of `output_size`
            scale = (output_size / to_tensor(shape, images.device)).flip(0).repeat(2)
        images = self.preprocess(images).to(self.dtype)
        if not self.detect.mask_form or self.masks == 'box':
            return self.detect(images, shape, scale)
        size = shape if self.raw else known_size(output_size)
        if self.detect.mask_form == 'image':
            return self.detect(images, shape, scale, size)
        boxes, scores, labels, masks = self.detect(images, shape, scale)
        return boxes, scores, labels, paste_masks(masks, boxes, size) >= self.detect.test_cfg.mask_thr_binary


def _kind(model):
    for cls, kind in KINDS.items():
        if isinstance(model, cls):
            return kind
    names = ' or '.join(cls.__name__ for cls in KINDS)
    raise UsageError(f'{type(model).__name__} cannot be exported: only {names} can')


def paste_masks(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Masks (N, K, h, w) of boxes (N, K, 4) in images of a size: (N, K, height, width).

    Bilinear interpolation with zeros outside, as mmdet's with `grid_sample`, is a product with a matrix on each side.
    """
    rows = _interpolation(boxes[..., 1], boxes[..., 3], masks.shape[-2], size[0])
    columns = _interpolation(boxes[..., 0], boxes[..., 2], masks.shape[-1], size[1])
    return rows @ masks @ columns.transpose(-1, -2)


def _interpolation(start, end, n_source, n_target):
    """Weights (N, K, n_target, n_source) of the pixels of a mask in those of the image along one axis."""
    pixels = torch.arange(n_target, device=start.device, dtype=torch.float32) + 0.5
    positions = (pixels - start[..., None]) / (end - start).clamp(min=1e-6)[..., None] * n_source - 0.5
    sources = torch.arange(n_source, device=start.device, dtype=torch.float32)
    return (1 - (positions[..., None] - sources).abs()).clamp(min=0)
