"""Mask2Former that a tracer can follow: mmseg's for segmentation, and mmdet's for instances."""

from functools import partial

import torch
import torch.nn.functional as F
from mmdet.models import Mask2Former, Mask2FormerHead, MaskFormerFusionHead
from mmdet.models.layers import MSDeformAttnPixelDecoder
from torch import nn

from ..errors import UsageError
from ..ops.export_ops import NO_SCORE
from .boxes import require, take
from .deformable import Levels, cell_centers, copy_with_shared_weights, use_traceable_attention

HEAD_METHODS = ('forward', '_forward_head', 'predict')


def traceable_segmentor(model: nn.Module) -> nn.Module:
    """Return a segmentor of mmseg with the same parameters that takes no shapes of feature maps as tensors.

    Raises:
        UsageError: If its head or pixel decoder computes something else than mmseg's and mmdet's.
    """
    from mmseg.models.decode_heads import Mask2FormerHead

    require(model.decode_head, (Mask2FormerHead,), HEAD_METHODS)
    model = copy_with_shared_weights(model)
    _trace_pixel_decoder(model.decode_head)
    model.decode_head.predict = partial(_predict_logits, model.decode_head)
    return model


class Mask2FormerInstances(nn.Module):
    """Of images to boxes, scores, labels and masks of mmdet's Mask2Former; boxes are the bounds of masks.

    Of a model in half precision, all but backbone and neck is float32.

    Raises:
        UsageError: If a part of it computes something else than mmdet's, or it predicts panoptic segmentation.
    """

    mask_form = 'image'

    def __init__(self, model: Mask2Former):
        super().__init__()
        require(model, (Mask2Former,), ('predict', 'extract_feat'))
        require(model.panoptic_head, (Mask2FormerHead,), HEAD_METHODS)
        require(model.panoptic_fusion_head, (MaskFormerFusionHead,), ('predict', 'instance_postprocess'))
        self.test_cfg = model.panoptic_fusion_head.test_cfg
        if self.test_cfg.get('panoptic_on', True) or not self.test_cfg.get('instance_on', False):
            raise UsageError(
                f'{type(model).__name__} can be exported for instances alone: set panoptic_on=False and '
                'instance_on=True in its test_cfg'
            )
        self.model = copy_with_shared_weights(model)
        self.head = self.model.panoptic_head.float()
        self.n_things = model.panoptic_fusion_head.num_things_classes
        _trace_pixel_decoder(self.head)

    def forward(
        self, images: torch.Tensor, shape: tuple[int, int], scale: torch.Tensor, size: tuple[int, int]
    ) -> tuple[torch.Tensor, ...]:
        """Detect, as `TwoStage` does, with masks (N, K, height, width) of bool in images of `size`.

        Labels are -1 where a query is of no class of things. Masks are resized from `shape` by themselves.
        """
        logits, masks = (outputs[-1] for outputs in self.head([x.float() for x in self.model.extract_feat(images)], []))
        scores = logits.softmax(-1)[..., :-1]
        n_classes = scores.shape[2]
        scores, indices = scores.flatten(1).topk(self.test_cfg.get('max_per_image', 100))
        labels, queries = indices % n_classes, indices // n_classes
        masks = _resize(take(masks, queries), images.shape[-2:])[..., : shape[0], : shape[1]]
        masks = _resize(masks, size)
        scores, masks = scores * _mask_scores(masks), masks > 0
        scores, order = torch.where(labels < self.n_things, scores, NO_SCORE).sort(1, descending=True)
        is_thing = scores > NO_SCORE
        masks = take(masks, order) & is_thing[..., None, None]
        labels = torch.where(is_thing, labels.gather(1, order), -1)
        return mask_boxes(masks), scores.clamp(min=0), labels, masks


def _resize(masks, size):
    return F.interpolate(masks, size=size, mode='bilinear', align_corners=False)


def _mask_scores(masks):
    """Mean probabilities (N, K) of logits (N, K, h, w) above 0."""
    is_object = (masks > 0).float()
    return (masks.sigmoid() * is_object).flatten(2).sum(2) / (is_object.flatten(2).sum(2) + 1e-6)


def mask_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Bounds (N, K, 4) of masks (N, K, h, w) of bool, as mmdet's `mask2bbox`: 0 of empty masks."""
    (x1, x2), (y1, y2) = (_bounds(masks.any(dim)) for dim in (2, 3))
    return torch.stack([x1, y1, x2, y2], -1)


def _bounds(lines):
    """Index of the first of lines (N, K, n) that are true, and that behind the last, (N, K) of float32; 0 of none."""
    n = lines.shape[2]
    indices = torch.arange(n, device=lines.device)
    first = n - torch.where(lines, n - indices, 0).amax(2)
    return torch.where(lines.any(2), first, 0).float(), torch.where(lines, indices + 1, 0).amax(2).float()


def _trace_pixel_decoder(head):
    require(head.pixel_decoder, (MSDeformAttnPixelDecoder,), ('forward',))
    use_traceable_attention(head)
    head.pixel_decoder.forward = partial(_decode_pixels, head.pixel_decoder)


def _predict_logits(head, feats, batch_img_metas, test_cfg):
    """Replace `Mask2FormerHead.predict` of mmseg, which copies the sizes of images."""
    classes, masks = (outputs[-1] for outputs in head(feats, []))
    masks = _resize(masks, batch_img_metas[0]['img_shape'])
    return torch.einsum('bqc,bqhw->bchw', classes.softmax(-1)[..., :-1], masks.sigmoid())


def _decode_pixels(decoder, feats):
    """Replace `MSDeformAttnPixelDecoder.forward`."""
    n, n_rest = feats[0].shape[0], decoder.num_input_levels - decoder.num_encoder_levels
    maps = [conv(feat) for conv, feat in zip(decoder.input_convs, feats[::-1])]  # from low to high resolution
    lines = [[torch.ones(side, dtype=torch.bool, device=x.device) for side in x.shape[-2:]] for x in maps]
    levels = Levels(maps, lines)
    positions = [
        decoder.postional_encoding(~(rows[:, None] & columns)[None]) + embedding[:, None, None]
        for (rows, columns), embedding in zip(lines, decoder.level_encoding.weight)
    ]
    query, positions = (torch.cat([x.flatten(2) for x in parts], 2).transpose(1, 2) for parts in (maps, positions))
    points = torch.cat([cell_centers(*level) for level in zip(levels, levels.valid)])
    memory = decoder.encoder(
        query=query,
        query_pos=positions,
        key_padding_mask=None,
        spatial_shapes=levels,
        level_start_index=None,
        valid_ratios=None,
        reference_points=points[None, :, None].expand(n, -1, len(levels), -1),
    )
    parts = memory.transpose(1, 2).split([height * width for height, width in levels], 2)
    outputs = [part.unflatten(2, level) for part, level in zip(parts, levels)]
    for i in reversed(range(n_rest)):
        lateral = decoder.lateral_convs[i](feats[i])
        outputs.append(decoder.output_convs[i](lateral + _resize(outputs[-1], lateral.shape[-2:])))
    return decoder.mask_feature(outputs[-1]), outputs[: decoder.num_outs]
