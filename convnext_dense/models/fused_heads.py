"""Faster CPU implementations of mmcv's ConvModule, which `optimize` inserts into a model.

The subclass has the same parameters, names and results: in evaluation, a batch norm and a ReLU are folded into the
convolution before them, again in each forward pass, so that nothing becomes stale when weights change. If a module has
hooks or is trained, and on other devices and dtypes, mmcv's implementation runs.
"""

import torch
from mmcv.cnn import ConvModule
from mmengine.model.utils import _BatchNormXd
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops import dispatch
from ..ops.conv import conv, supports_conv
from ..ops.head_kernels import is_plain
from ..ops.upsampled_conv import supports_upsampled_conv, upsampled_conv
from .fused_conv2d import FusedConv2d

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm, _BatchNormXd)
dispatch.remember_methods(ConvModule, nn.ReLU, *NORMS)


class FusedConvModule(ConvModule):
    """mmcv's ConvModule that without gradients runs convolution, batch norm and ReLU in a single call of oneDNN."""

    def forward(self, x: torch.Tensor, activate: bool = True, norm: bool = True) -> torch.Tensor:
        """Run the module on a feature map (N, C, H, W)."""
        folded = fold(self) if activate and norm and is_plain(x) and x.ndim == 4 else None
        if folded is None or not supports_conv(x, folded[0]):
            return super().forward(x, activate, norm)
        return conv(
            x, *folded[:2], self.conv.stride, self.conv.padding, self.conv.dilation, self.conv.groups, folded[2]
        )


dispatch.remember_methods(FusedConvModule)


def is_conv_norm_act(module: nn.Module) -> bool:
    """Whether a module is an unmodified convolution with an optional batch norm and ReLU, without hooks."""
    if type(module) not in (ConvModule, FusedConvModule) or module.order != ('conv', 'norm', 'act'):
        return False
    children = [*module.children()]
    convolution, *norm_and_act = children
    if (
        type(convolution) not in (nn.Conv2d, FusedConv2d)
        or convolution.padding_mode != 'zeros'
        or module.with_explicit_padding
    ):
        return False
    if not isinstance(convolution.padding, tuple) or not all(type(m) in (*NORMS, nn.ReLU) for m in norm_and_act):
        return False
    return dispatch.may_replace(module, *children)


def fold(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None, bool] | None:
    """Fold the batch norm of a module into its convolution; return weight, bias and whether a ReLU follows.

    Returns None if gradients are enabled, the norm uses batch statistics, or the module is not supported.
    """
    if torch.is_grad_enabled() or not is_conv_norm_act(module):
        return None
    weight, bias, relu = module.conv.weight, module.conv.bias, module.with_activation
    norm = module.norm
    if norm is None:
        return weight, bias, relu
    if not isinstance(norm, _BatchNorm) or norm.training or norm.running_mean is None or not is_plain(weight):
        return None
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    bias = -norm.running_mean if bias is None else bias - norm.running_mean
    bias = bias * scale if norm.bias is None else bias * scale + norm.bias
    return weight * scale[:, None, None, None], bias, relu


def conv_of_upsampled(module: nn.Module, maps: list[torch.Tensor], align_corners: bool) -> torch.Tensor | None:
    """Apply a 3 x 3 ConvModule to feature maps that are upsampled to the size of the first and concatenated.

    Returns None if this is not supported, so that the feature maps have to be upsampled and concatenated.
    """
    if not is_conv_norm_act(module):
        return None
    c = module.conv
    settings = (c.kernel_size, c.stride, c.padding, c.dilation, c.groups)
    if settings != ((3, 3), (1, 1), (1, 1), (1, 1), 1) or not supports_upsampled_conv(maps, c.weight):
        return None
    folded = fold(module)
    if folded is not None:
        return upsampled_conv(maps, *folded[:2], align_corners, folded[2])
    x = upsampled_conv(maps, c.weight, c.bias, align_corners)
    x = module.norm(x) if module.with_norm else x
    return module.activate(x) if module.with_activation else x
