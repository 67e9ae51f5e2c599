"""A faster CPU implementation of torch's Conv2d, which `optimize` inserts into a model."""

import torch
from torch import nn

from ..ops import dispatch
from ..ops.conv import conv, prefers_conv3x3, supports_conv


class FusedConv2d(nn.Conv2d):
    """torch's Conv2d for 3 x 3 kernels, which runs in a kernel of `ops`, also in training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve a feature map (N, C, H, W)."""
        if not dispatch.may_replace(self) or not supports_conv(x, self.weight) or not prefers_conv3x3(x, self.weight):
            return super().forward(x)
        return conv(x, self.weight, self.bias, self.stride, self.padding)


dispatch.remember_methods(nn.Conv2d, FusedConv2d)


def is_conv3x3(module: nn.Module) -> bool:
    """Whether a module is exactly torch's Conv2d, with 3 x 3 kernels, and a stride and a padding of 1."""
    if type(module) is not nn.Conv2d:
        return False
    settings = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups, module.padding_mode)
    return settings == ((3, 3), (1, 1), (1, 1), (1, 1), 1, 'zeros')
