"""Mask2Former in a form that a tracer can follow."""

from functools import partial

import torch
import torch.nn.functional as F
from mmdet.models.layers import MSDeformAttnPixelDecoder
from torch import nn

from .boxes import require
from .deformable import Levels, cell_centers, copy_with_shared_weights, use_traceable_attention


def traceable_segmentor(model: nn.Module) -> nn.Module:
    """Return a model with the same parameters that takes no shapes of maps as tensors.

    Args:
        model: mmseg's EncoderDecoder with a Mask2FormerHead.

    Raises:
        UsageError: If its head or pixel decoder computes something else than mmseg's and mmdet's.
    """
    from mmseg.models.decode_heads import Mask2FormerHead

    require(model.decode_head, (Mask2FormerHead,), ('forward', '_forward_head', 'predict'))
    require(model.decode_head.pixel_decoder, (MSDeformAttnPixelDecoder,), ('forward',))
    model = copy_with_shared_weights(model)
    use_traceable_attention(model)
    head = model.decode_head
    head.predict = partial(_predict_logits, head)
    head.pixel_decoder.forward = partial(_decode_pixels, head.pixel_decoder)
    return model


def _predict_logits(head, feats, batch_img_metas, test_cfg):
    """Replace `Mask2FormerHead.predict` of mmseg, which copies the sizes of images."""
    classes, masks = (outputs[-1] for outputs in head(feats, []))
    masks = F.interpolate(masks, size=batch_img_metas[0]['img_shape'], mode='bilinear', align_corners=False)
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
        upsampled = F.interpolate(outputs[-1], size=lateral.shape[-2:], mode='bilinear', align_corners=False)
        outputs.append(decoder.output_convs[i](lateral + upsampled))
    return decoder.mask_feature(outputs[-1]), outputs[: decoder.num_outs]
