"""Faster CPU implementations of modules of mmcv and mmseg, which `optimize` puts into a model.

Each is a subclass of theirs, with the same parameters and names, that computes the same: in evaluation a batch norm and
a ReLU are folded into the convolution before them, anew in each pass, so that nothing goes stale when weights change.
Where a module is hooked or trained, on other devices and in other dtypes, theirs runs.
"""

import torch
from mmcv.cnn import ConvModule
from mmengine.model.utils import _BatchNormXd
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops import dispatch
from ..ops.head_kernels import is_plain
from ..ops.upsampled_conv import conv, supports_conv, supports_upsampled_conv, upsampled_conv

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm, _BatchNormXd)
dispatch.remember_methods(ConvModule, nn.Conv2d, nn.ReLU, *NORMS)


class FusedConvModule(ConvModule):
    """mmcv's ConvModule; without gradients its convolution, batch norm and ReLU are one call of oneDNN."""

    def forward(self, x: torch.Tensor, activate: bool = True, norm: bool = True) -> torch.Tensor:
        """Run the module on a map (N, C, H, W)."""
        folded = fold(self) if activate and norm and is_plain(x) and x.ndim == 4 else None
        if folded is None or not supports_conv(x, folded[0]):
            return super().forward(x, activate, norm)
        return conv(
            x, *folded[:2], self.conv.stride, self.conv.padding, self.conv.dilation, self.conv.groups, folded[2]
        )


dispatch.remember_methods(FusedConvModule)


def is_conv_norm_act(module: nn.Module) -> bool:
    """Whether a module is a convolution, perhaps a batch norm and perhaps a ReLU, which nothing watches or changes."""
    if type(module) not in (ConvModule, FusedConvModule) or module.order != ('conv', 'norm', 'act'):
        return False
    children = [*module.children()]
    convolution, *others = children
    if type(convolution) is not nn.Conv2d or convolution.padding_mode != 'zeros' or module.with_explicit_padding:
        return False
    if not isinstance(convolution.padding, tuple) or not all(type(m) in (*NORMS, nn.ReLU) for m in others):
        return False
    return dispatch.may_replace(module, *children)


def fold(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None, bool] | None:
    """Weight and bias of a convolution with the batch norm behind it, and whether a ReLU follows.

    None where gradients are wanted, statistics are those of the batch, or the module is of another kind.
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
    """A ConvModule of 3 x 3 pixels applied to maps, concatenated in the size of the first.

    None where the maps have to be upsampled and concatenated.
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
