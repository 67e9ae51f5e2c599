"""Views of tensors, and a small model whose parameters may be views."""

import torch
from torch import nn

from convnext_dense.models.convnext import ConvNeXt


def strided(t):
    padded = t.new_full([2 * n for n in t.shape], float('nan'))
    return padded[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)


def sliced(dim):
    def view(t):
        d = min(dim, t.ndim - 1)
        return torch.cat([t, t + 1], d).narrow(d, 0, t.shape[d])

    return view


def expanded(dim):
    return lambda t: t.narrow(min(dim, t.ndim - 1), 0, 1).clone().expand_as(t)


def reversed_dimensions(t):
    order = [*reversed(range(t.ndim))]
    return t.permute(order).contiguous().permute(order)


# Views with a tensor's shape and, except for the expanded ones, its values.
VIEWS = {
    'strided': strided,
    'slice of channels': sliced(1),
    'slice of columns': sliced(3),
    'every second row': lambda t: torch.stack([t, t + 1], 1).flatten(0, 1)[::2],
    'transposed': lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    'reversed dimensions': reversed_dimensions,
    'expanded rows': expanded(0),
    'expanded channels': expanded(1),
    'expanded columns': expanded(3),
    'one value': lambda t: t.flatten()[:1].clone().view([1] * t.ndim).expand_as(t),
    'offset': lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
    'negated': lambda t: torch._neg_view(-t),
}


def build_model(widths, in_channels=4, **settings) -> ConvNeXt:
    """A small model. With 4 input channels the kernels can read the stem's weights without a copy."""
    torch.manual_seed(0)
    model = ConvNeXt(dict(depths=(1, 1), channels=widths), in_channels, out_indices=(0, 1), **settings)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def set_param_view(model, name, view) -> None:
    module_name, _, param_name = name.rpartition('.')
    value = VIEWS[view](model.get_parameter(name).detach())
    model.get_submodule(module_name)._parameters[param_name] = nn.Parameter(value)
