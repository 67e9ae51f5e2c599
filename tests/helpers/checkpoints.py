"""Checkpoints of the demo's models with random weights that detect something in noise, and images for them."""

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

from convnext_dense.channel_files import ChannelReader
from convnext_dense.config.channels import set_channels
from helpers.paths import ROOT
from helpers.weights import load_random_weights

CLASSES = {
    'mask_rcnn': ('disc', 'square', 'triangle', 'cross'),
    'cascade': ('disc', 'square', 'triangle', 'cross'),
    'upernet': ('ground', 'disc', 'square', 'triangle', 'cross'),
    'mask2former': ('ground', 'disc', 'square', 'triangle', 'cross'),
}


def save_checkpoint(recipe: str, path, reader: ChannelReader | None = None, **model_settings):
    """Save a checkpoint as a training of a demo recipe does; its detector detects something in noise."""
    config = Config.fromfile(ROOT / f'configs/demo/{recipe}.py')
    config.merge_from_dict(model_settings)
    init_default_scope(config.default_scope)
    if reader:
        set_channels(config, reader)
    model = MODELS.build(config.model)
    load_random_weights(model)
    if recipe == 'upernet':
        model = balance_classes(model)
    meta = dict(cfg=config.pretty_text, dataset_meta=dict(classes=CLASSES[recipe]))
    if config.default_scope == 'mmseg':
        meta['dataset_meta']['palette'] = [[90, 90, 90], [220, 60, 50], [140, 220, 60], [60, 200, 200], [150, 60, 220]]
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return path


@torch.no_grad()
def balance_classes(model):
    """Make a segmentor with random weights predict all its classes: its logits get equal means over noise."""
    model = revert_sync_batchnorm(model)
    in_channels = model.backbone.downsample_layers[0][0].in_channels
    noise = torch.rand(2, in_channels, 128, 128, generator=torch.Generator().manual_seed(0)) * 4 - 2
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    model.train()(noise)
    logits = model.eval()(noise)
    model.decode_head.conv_seg.bias -= logits.mean((0, 2, 3))
    return model


def draw_photo(rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    """Colored blobs on a smooth background."""
    photo = cv2.resize(rng.randint(0, 255, (4, 4, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(6):
        center = (int(rng.randint(width)), int(rng.randint(height)))
        cv2.circle(
            photo, center, int(rng.randint(4, max(min(height, width) // 3, 5))), rng.randint(0, 255, 3).tolist(), -1
        )
    return photo
