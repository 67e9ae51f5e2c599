"""Rename the parameters of detrex's DINO to those of mmdet's."""

import re
from collections.abc import Mapping

import torch

MARK = 'transformer.tgt_embed.weight'  # a name that only detrex has
# (pattern of detrex's name, mmdet's name); the first match applies.
RENAMES = (
    (r'neck\.((?:extra_)?convs\.\d+)\.norm\.', r'neck.\1.gn.'),
    (r'transformer\.((?:en|de)coder\.layers\.\d+)\.attentions\.0\.', r'\1.self_attn.'),
    (r'transformer\.(decoder\.layers\.\d+)\.attentions\.1\.', r'\1.cross_attn.'),
    (r'transformer\.((?:en|de)coder\.layers\.\d+)\.ffns\.0\.layers\.0\.0\.', r'\1.ffn.layers.0.0.'),
    (r'transformer\.((?:en|de)coder\.layers\.\d+)\.ffns\.0\.layers\.1\.', r'\1.ffn.layers.1.'),
    (r'transformer\.((?:en|de)coder)\.', r'\1.'),
    (r'transformer\.level_embeds$', 'level_embed'),
    (r'transformer\.tgt_embed\.', 'query_embedding.'),
    (r'transformer\.enc_output\.', 'memory_trans_fc.'),
    (r'transformer\.enc_output_norm\.', 'memory_trans_norm.'),
    (r'class_embed\.', 'bbox_head.cls_branches.'),
    (r'bbox_embed\.(\d+)\.layers\.0\.', r'bbox_head.reg_branches.\1.0.'),
    (r'bbox_embed\.(\d+)\.layers\.1\.', r'bbox_head.reg_branches.\1.2.'),
    (r'bbox_embed\.(\d+)\.layers\.2\.', r'bbox_head.reg_branches.\1.4.'),
    (r'label_enc\.', 'dn_query_generator.label_embedding.'),
)
DUPLICATE_RE = re.compile(r'transformer\.decoder\.(?:class|bbox)_embed\.')  # copies of the heads in the decoder


def rename_detrex(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the parameters of detrex's DINO to those of mmdet's; state dicts of other models are unchanged."""
    if MARK not in tensors:
        return dict(tensors)
    return {_rename(name): tensor for name, tensor in tensors.items() if not DUPLICATE_RE.match(name)}


def _rename(name: str) -> str:
    for pattern, replacement in RENAMES:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return name
