"""Multi-scale deformable attention that a tracer can follow: shapes of feature maps are sizes, not tensors."""

import copy

import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention, multi_scale_deformable_attn_pytorch
from torch import nn

from .sizes import to_tensor


def copy_with_shared_weights(model: nn.Module) -> nn.Module:
    """A copy of a model that can be changed, with the same parameters."""
    return copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})


class Levels(list):
    """Heights and widths of the feature maps, in place of mmdet's tensor; `valid` are those without the padding."""

    def __init__(self, feats, lines):
        super().__init__(tuple(feat.shape[-2:]) for feat in feats)
        self.valid = [tuple(line.sum() for line in pair) for pair in lines]


class DeformableAttention(MultiScaleDeformableAttention):
    """mmcv's pure PyTorch implementation of the attention, for feature maps whose shapes are `Levels`."""

    def forward(
        self, query, value=None, query_pos=None, key_padding_mask=None, reference_points=None, spatial_shapes=(), **_
    ):
        """Attend, as mmcv's does where the batch is first."""
        identity, value = query, self.value_proj(query if value is None else value)
        query = query if query_pos is None else query + query_pos
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0.0)
        shape = *query.shape[:2], self.num_heads, self.num_levels, self.num_points
        offsets = self.sampling_offsets(query).view(*shape, 2)
        weights = self.attention_weights(query).view(*shape[:3], -1).softmax(-1).view(shape)
        points = reference_points[:, :, None, :, None]
        if points.shape[-1] == 2:
            sizes = torch.stack([to_tensor(size, query.device).flip(0) for size in spatial_shapes])
            locations = points + offsets / sizes[:, None]
        else:
            locations = points[..., :2] + offsets / self.num_points * points[..., 2:] * 0.5
        value = value.unflatten(2, (self.num_heads, -1))
        output = multi_scale_deformable_attn_pytorch(value, spatial_shapes, locations, weights)
        return self.output_proj(output) + identity


def use_traceable_attention(model: nn.Module) -> None:
    """Replace mmcv's attention in a model."""
    for module in model.modules():
        if type(module) is MultiScaleDeformableAttention:
            module.__class__ = DeformableAttention


def cell_centers(level, valid):
    """Centers (h * w, 2), x and y, of the cells of a feature map, as fractions of the image."""
    y, x = ((torch.arange(n, device=part.device) + 0.5) / part for n, part in zip(level, valid))
    return torch.stack([x.expand(*level), y[:, None].expand(*level)], -1).flatten(0, 1)
