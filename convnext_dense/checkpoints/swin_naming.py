"""Rename Swin weights of the original code to the names of mmdet and mmseg."""

import re
from collections.abc import Mapping

import torch

# (pattern of the original's name, name in mmdet and mmseg)
RENAMES = (
    (re.compile(r'^layers\.'), 'stages.'),
    (re.compile(r'^patch_embed\.proj\.'), 'patch_embed.projection.'),
    (re.compile(r'(\.blocks\.\d+\.attn)\.'), r'\1.w_msa.'),
    (re.compile(r'(\.blocks\.\d+)\.mlp\.fc1\.'), r'\1.ffn.layers.0.0.'),
    (re.compile(r'(\.blocks\.\d+)\.mlp\.fc2\.'), r'\1.ffn.layers.1.'),
)
PREFIX_RE = re.compile(r'^(.*?)(?:layers|stages)\.0\.blocks\.0\.norm1\.weight$')
MERGING_RE = re.compile(r'^layers\.\d+\.downsample\.(?:reduction|norm)\.')


def rename_swin(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Rename the Swin in a state dict from the original's names to those of mmdet and mmseg.

    Args:
        tensors: A state dict of a backbone, or of a model that contains one.

    Returns:
        The same tensors; those of the Swin are renamed behind its prefix and reordered as in mmdet. None if the names
        are not those of a Swin of the original code, mmdet or mmseg.
    """
    prefix = next((match[1] for match in map(PREFIX_RE.match, tensors) if match), None)
    if prefix is None:
        return None
    if f'{prefix}stages.0.blocks.0.norm1.weight' in tensors:
        return dict(tensors)
    renamed = {}
    for name, tensor in tensors.items():
        new_name = name.removeprefix(prefix)
        if name.startswith(prefix) and MERGING_RE.match(new_name):
            tensor = _to_unfold_order(tensor)
        for pattern, replacement in RENAMES if name.startswith(prefix) else ():
            new_name = pattern.sub(replacement, new_name)
        renamed[prefix + new_name if name.startswith(prefix) else name] = tensor
    return renamed


def _to_unfold_order(tensor: torch.Tensor) -> torch.Tensor:
    """Reorder the last dimension, 4 C, of a downsampling layer.

    The original concatenates the channels of four pixels, those of a column first; torch's Unfold, which mmdet uses,
    returns the four pixels of each channel, those of a row first.
    """
    *leading, channels = tensor.shape
    if channels % 4:
        return tensor  # not a Swin; the wrong shape is reported later
    pixels = tensor.reshape(*leading, 2, 2, channels // 4)  # column, row, channel
    return pixels.transpose(-3, -2).flatten(-3, -2).transpose(-2, -1).flatten(-2)
