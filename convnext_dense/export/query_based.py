"""mmdet's DETR, Deformable DETR and DINO as functions of a batch: what they compute in other shapes than they do.

Transformer and head are mmdet's own. Replaced is what takes shapes of feature maps as tensors or depends on the
number of images: a tracer has to know these shapes.
"""

from functools import partial

import torch
from mmdet.models import DETR, DINO, DeformableDETR
from mmdet.models.dense_heads import DeformableDETRHead, DETRHead, DINOHead
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..models.dino import DetrexDINO
from .boxes import require, take
from .deformable import Levels, cell_centers, copy_with_shared_weights, use_traceable_attention
from .sizes import to_tensor

METHODS = ('predict', 'extract_feat', 'forward_transformer', 'pre_transformer', 'forward_encoder', 'pre_decoder')
METHODS += ('forward_decoder', 'gen_encoder_output_proposals')
HEAD_METHODS = ('predict', 'predict_by_feat', '_predict_by_feat_single', 'forward')


class QueryBased(nn.Module):
    """Of images to boxes, scores and labels; an image has as many boxes as the model returns for each.

    Of a model in half precision, all but backbone and neck is float32.

    Raises:
        UsageError: If it is another detector than DETR, Deformable DETR or DINO, or has another head.
    """

    mask_form = None

    def __init__(self, model: DETR):
        super().__init__()
        require(model, (DetrexDINO, DINO, DeformableDETR, DETR), METHODS)
        require(model.bbox_head, (DINOHead, DeformableDETRHead, DETRHead), HEAD_METHODS)
        self.model = model = copy_with_shared_weights(model)
        for name, child in model.named_children():
            if name not in ('backbone', 'neck'):
                child.float()
        for parameter in model.parameters(recurse=False):
            parameter.data = parameter.data.float()
        if isinstance(model, DeformableDETR):
            _trace_deformable(model)
        else:
            model.pre_transformer = partial(_flatten_map, model)

    def forward(self, images: torch.Tensor, shape: tuple[int, int], scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Detect, as `two_stage.TwoStage` does."""
        model, head = self.model, self.model.bbox_head
        feats = [x.float() for x in model.extract_feat(images)]
        logits, boxes = (x[-1] for x in head(**model.forward_transformer(feats, (shape, images.shape[-2:]))))
        limit = head.test_cfg.get('max_per_img', logits.shape[1])
        if head.loss_cls.use_sigmoid:
            scores, indices = logits.sigmoid().flatten(1).topk(limit)
            labels, indices = indices % head.num_classes, indices // head.num_classes
        else:
            scores, labels = logits.softmax(-1)[..., :-1].max(-1)
            scores, indices = scores.topk(limit)
            labels = labels.gather(1, indices)
        size = to_tensor(shape, images.device).flip(0).repeat(2)
        boxes = bbox_cxcywh_to_xyxy(take(boxes, indices)) * size
        return torch.minimum(boxes, size).clamp(min=0) * scale, scores, labels


# ---- padding ---------------------------------------------------------------------------------------------------------


def _valid_lines(feat, shape, padded_shape):
    """Which rows (h,) and columns (w,) of a feature map (N, C, h, w) are in the images, as `F.interpolate` rounds."""
    lines = []
    for n, padded, valid in zip(feat.shape[-2:], padded_shape, shape):
        ratio = to_tensor([padded], feat.device) / to_tensor([n], feat.device)
        lines.append((torch.arange(n, device=feat.device) * ratio).floor() < valid)
    return lines


def _padding_mask(rows, columns):
    """The padding of a feature map, (1, h, w) of bool."""
    return ~(rows[:, None] & columns)[None]


def _is_padded(shape, padded_shape):
    return not all(statically_known_true(n == padded) for n, padded in zip(shape, padded_shape))


def _flatten_map(model, feats, shapes):
    """Replace `DETR.pre_transformer`."""
    feat = feats[-1]
    mask = _padding_mask(*_valid_lines(feat, *shapes))
    position = model.positional_encoding(mask).flatten(2).transpose(1, 2).expand(feat.shape[0], -1, -1)
    mask = mask.flatten(1).expand(feat.shape[0], -1) if _is_padded(*shapes) else None
    encoder_inputs = dict(feat=feat.flatten(2).transpose(1, 2), feat_mask=mask, feat_pos=position)
    return encoder_inputs, dict(memory_mask=mask, memory_pos=position)


# ---- feature maps of several sizes ----------------------------------------------------------------------------------


def _trace_deformable(model):
    """Replace what takes the shapes of feature maps as a tensor."""
    use_traceable_attention(model)
    model.pre_transformer = partial(_flatten_maps, model)
    model.gen_encoder_output_proposals = partial(_encoder_proposals, model)
    model.encoder.get_encoder_reference_points = _encoder_reference_points
    if isinstance(model, DINO):
        model.pre_decoder = partial(DINO.pre_decoder, model)  # DetrexDINO compares the sizes of maps with a number
        model.forward_decoder = partial(_decode_dino, model)


def _flatten_maps(model, feats, shapes):
    """Replace `DeformableDETR.pre_transformer`."""
    n = feats[0].shape[0]
    lines = [_valid_lines(feat, *shapes) for feat in feats]
    masks = [_padding_mask(*pair) for pair in lines]
    positions = [model.positional_encoding(mask) + model.level_embed[i, :, None, None] for i, mask in enumerate(masks)]
    feats_flat, positions, masks = (torch.cat([x.flatten(-2) for x in maps], -1) for maps in (feats, positions, masks))
    levels = Levels(feats, lines)
    ratios = [torch.stack([valid_w / w, valid_h / h]) for (h, w), (valid_h, valid_w) in zip(levels, levels.valid)]
    mask = masks.expand(n, -1) if _is_padded(*shapes) else None
    common = dict(
        spatial_shapes=levels, level_start_index=None, valid_ratios=torch.stack(ratios)[None].expand(n, -1, -1)
    )
    encoder_inputs = dict(feat=feats_flat.transpose(1, 2), feat_mask=mask, feat_pos=positions.transpose(1, 2))
    return encoder_inputs | common, dict(memory_mask=mask) | common


def _encoder_reference_points(spatial_shapes, valid_ratios, device):
    """Replace `DeformableDetrTransformerEncoder.get_encoder_reference_points`."""
    points = torch.cat([cell_centers(*level) for level in zip(spatial_shapes, spatial_shapes.valid)])
    return points[None, :, None] * valid_ratios[:, None]


def _encoder_proposals(model, memory, memory_mask, spatial_shapes):
    """Replace `DeformableDETR.gen_encoder_output_proposals`."""
    centers = [cell_centers(*level) for level in zip(spatial_shapes, spatial_shapes.valid)]
    proposals = torch.cat([torch.cat([x, torch.full_like(x, 0.05 * 2.0**i)], 1) for i, x in enumerate(centers)])
    dropped = ~((proposals > 0.01) & (proposals < 0.99)).all(-1, keepdim=True)[None]
    if memory_mask is not None:
        dropped = dropped | memory_mask[..., None]
    proposals = torch.log(proposals / (1 - proposals)).masked_fill(dropped, float('inf'))
    return model.memory_trans_norm(model.memory_trans_fc(memory.masked_fill(dropped, 0.0))), proposals


def _decode_dino(model, query, memory, memory_mask, dn_mask=None, **inputs):
    """Replace `DINO.forward_decoder`, which asks for the number of images."""
    states, references = model.decoder(
        query=query,
        value=memory,
        key_padding_mask=memory_mask,
        self_attn_mask=dn_mask,
        reg_branches=model.bbox_head.reg_branches,
        **inputs,
    )
    return dict(hidden_states=states, references=list(references))
