"""Weights under other libraries' names."""

import re
from pathlib import Path

import torch

from convnext_dense.models.convnext import ConvNeXt
from helpers.weights import random_weights


def chain(*rules):
    """A function that applies one substitution after the other, as the libraries' conversion scripts do."""

    def rename(name):
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return name

    return rename


def torchvision(name):
    name = re.sub(r'^downsample_layers\.(\d)\.(\d)', lambda m: f'features.{2 * int(m[1])}.{m[2]}', name)
    name = re.sub(r'^stages\.(\d)\.(\d+)', lambda m: f'features.{2 * int(m[1]) + 1}.{m[2]}', name)
    layers = dict(dwconv='block.0', norm='block.2', pwconv1='block.3', pwconv2='block.5', gamma='layer_scale')
    name = re.sub(r'(?<=\d\.)(dwconv|norm|pwconv1|pwconv2|gamma)', lambda m: layers[m[1]], name)
    return name.replace('norm.', 'classifier.0.').replace('head.', 'classifier.2.')


# From the original's names to each library's; the reference file proves these for tiny.
RENAMES = {
    'timm 1.0.31 convnext_tiny': chain(
        (r'^downsample_layers\.0\.', 'stem.'),
        (r'^stages\.(\d)\.(\d+)', r'stages.\1.blocks.\2'),
        (r'^downsample_layers\.(\d)\.(\d)', r'stages.\1.downsample.\2'),
        ('dwconv', 'conv_dw'),
        ('pwconv', 'mlp.fc'),
        (r'grn\.gamma', 'mlp.grn.weight'),
        (r'grn\.beta', 'mlp.grn.bias'),
        (r'^head\.', 'head.fc.'),
        (r'^norm\.', 'head.norm.'),
    ),
    'torchvision 0.29.2 convnext_tiny': torchvision,
    'transformers 5.23.0 ConvNextForImageClassification tiny': chain(
        (r'^downsample_layers\.0\.0', 'convnext.embeddings.patch_embeddings'),
        (r'^downsample_layers\.0\.1', 'convnext.embeddings.layernorm'),
        (r'^downsample_layers\.(\d)\.(\d)', r'convnext.encoder.stages.\1.downsampling_layer.\2'),
        (r'^stages\.(\d)\.(\d+)', r'convnext.encoder.stages.\1.layers.\2'),
        (r'^norm\.', 'convnext.norm.'),
        (r'\.norm\.', '.layernorm.'),
        (r'(\d\.)gamma', r'\1layer_scale_parameter'),
        (r'grn\.gamma', 'grn.weight'),
        (r'grn\.beta', 'grn.bias'),
        (r'^head\.', 'classifier.'),
    ),
    'transformers 5.23.0 DINOv3ConvNextModel tiny': chain(
        (r'^downsample_layers\.(\d)\.(\d)', r'model.stages.\1.downsample_layers.\2'),
        (r'^stages\.(\d)\.(\d+)', r'model.stages.\1.layers.\2'),
        ('dwconv', 'depthwise_conv'),
        ('pwconv', 'pointwise_conv'),
        (r'(^|\.)norm\.', r'\1layer_norm.'),
    ),
    'mmpretrain 1.3.6 ConvNeXt tiny': chain(
        ('dwconv', 'depthwise_conv'),
        ('pwconv', 'pointwise_conv'),
        (r'^norm\.', 'norm3.'),
    ),
}
TIMM, TORCHVISION, TRANSFORMERS, DINOV3, MMPRETRAIN = RENAMES
HEADLESS = [DINOV3, MMPRETRAIN]
SHAPES = {  # of a tensor whose shape is not the original's
    TORCHVISION: lambda name, t: t[:, None, None] if name.endswith('layer_scale') else t,
}


def original_weights(arch, grn=False, head=5) -> dict[str, torch.Tensor]:
    model = ConvNeXt(arch, out_indices=-1, use_grn=grn)
    out_channels = model.channels[-1]
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.startswith('norm')}
    shapes |= {
        'norm.weight': (out_channels,),
        'norm.bias': (out_channels,),
        'head.weight': (head, out_channels),
        'head.bias': (head,),
    }
    weights = random_weights(shapes)
    return {n: t.reshape(1, 1, 1, -1) if '.grn.' in n else t for n, t in weights.items()}


def rename_to_library(weights, library) -> dict[str, torch.Tensor]:
    if library in HEADLESS:
        weights = {n: t for n, t in weights.items() if not n.startswith('head.')}
    shape = SHAPES.get(library, lambda name, t: t)
    return {RENAMES[library](n): shape(RENAMES[library](n), t) for n, t in weights.items()}


def save_pth(path: Path, content) -> Path:
    torch.save(content, path)
    return path
