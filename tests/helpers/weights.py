"""Reproducible random weights."""

import zlib

import numpy as np
import torch
from torch import nn


def random_weights(shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
    """Weights that depend on name and shape only, as used for the reference features."""
    weights = {}
    for name, shape in shapes.items():
        r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        if name.endswith('gamma'):
            r = 0.5 + 0.1 * r
        elif len(shape) == 1:
            is_norm = name.endswith('weight') and ('norm' in name or name.startswith('downsample'))
            r = 0.1 * r + is_norm
        else:
            r = r / np.sqrt(np.prod(shape[1:]))
        weights[name] = torch.from_numpy(np.asarray(r, np.float32))
    return weights


def load_random_weights(model: nn.Module) -> None:
    """Give a model weights that follow from their names and shapes."""
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if not k.endswith('integral.project')}
    weights = random_weights(shapes)
    weights = {k: v.abs() + 0.5 if k.endswith('running_var') else v for k, v in weights.items()}
    model.load_state_dict(weights, strict=False)  # GFL's bins of distances stay
