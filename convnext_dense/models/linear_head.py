"""A linear segmentation head for the features of a frozen backbone. Importing this requires mmseg."""

import torch
from mmcv.cnn import build_norm_layer
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS


@MODELS.register_module()
class LinearHead(BaseDecodeHead):
    """Dropout of channels, batch norm and a 1 x 1 convolution, as in the evaluation of DINOv3.

    mmseg's FCNHead without convolutions lacks the norm.

    Args:
        in_channels (int): Channels of the feature map.
        norm_cfg (dict): Config of the batch norm.
        **kwargs: Arguments of mmseg's BaseDecodeHead.
    """

    def __init__(self, in_channels: int, norm_cfg: dict, **kwargs):
        super().__init__(in_channels, channels=in_channels, norm_cfg=norm_cfg, **kwargs)
        self.norm = build_norm_layer(norm_cfg, in_channels)[1]

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return the logits (N, num_classes, H, W) for the feature map at `in_index`."""
        x = self._transform_inputs(inputs)
        if self.dropout is not None:
            x = self.dropout(x)
        return self.conv_seg(self.norm(x))
