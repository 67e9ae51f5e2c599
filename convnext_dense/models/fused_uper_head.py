"""A faster CPU implementation of mmseg's UPerHead, which `optimize` inserts into a model.

Importing this requires mmseg.
"""

import torch
from mmseg.models.decode_heads.psp_head import PPM
from mmseg.models.decode_heads.uper_head import UPerHead
from mmseg.models.utils import resize

from ..ops import dispatch
from .fused_heads import conv_of_upsampled

dispatch.remember_methods(PPM)


class FusedUPerHead(UPerHead):
    """mmseg's UPerHead with convolutions of upsampled feature maps that run before upsampling (`ops.upsampled_conv`).

    These are the bottlenecks of its pyramid pooling and its feature pyramid, nine tenths of its operations.
    """

    def psp_forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """Apply pyramid pooling to the last feature map."""
        if type(self.psp_modules) is not PPM or not dispatch.may_replace(self.psp_modules):
            return super().psp_forward(inputs)
        x = inputs[-1]
        maps = [x, *(module(x) for module in self.psp_modules)]
        return self._bottleneck(self.bottleneck, maps, self.psp_modules.align_corners)

    def _forward_feature(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """Return the feature map before the classifier, in the size of the first input."""
        if not dispatch.may_replace():
            return super()._forward_feature(inputs)
        inputs = self._transform_inputs(inputs)
        laterals = [convolution(x) for convolution, x in zip(self.lateral_convs, inputs)]
        laterals.append(self.psp_forward(inputs))
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + self._resize(laterals[i], laterals[i - 1])
        maps = [convolution(x) for convolution, x in zip(self.fpn_convs, laterals)]
        return self._bottleneck(self.fpn_bottleneck, [*maps, laterals[-1]], self.align_corners)

    def _bottleneck(self, module: torch.nn.Module, maps: list[torch.Tensor], align_corners: bool) -> torch.Tensor:
        out = conv_of_upsampled(module, maps, align_corners)
        if out is not None:
            return out
        return module(torch.cat([maps[0], *(self._resize(x, maps[0], align_corners) for x in maps[1:])], dim=1))

    def _resize(self, x: torch.Tensor, like: torch.Tensor, align_corners: bool | None = None) -> torch.Tensor:
        align_corners = self.align_corners if align_corners is None else align_corners
        return resize(x, size=like.shape[2:], mode='bilinear', align_corners=align_corners)
