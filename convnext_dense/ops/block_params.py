"""What the operators of a ConvNeXt block take: its parameters and its settings."""

from typing import NamedTuple

import torch
from torch import nn

# What a block's forward pass saves for the backward pass; each level saves what the one before it saves, too.
SAVE_INPUT, SAVE_DWCONV, SAVE_HIDDEN = range(3)
PARAM_TYPES = (nn.Parameter, torch.Tensor)  # not classes derived from them, which may compute something else
HIDDEN_RATIO = 4  # hidden channels of the MLP for each channel of the block, in the paper


class BlockArgs(NamedTuple):
    """Settings of a block.

    Attributes:
        backend: 'avx512' or 'onednn'.
        dtype: Dtype of the matmul operands, float32 or bfloat16.
        eps: Epsilon of the LayerNorm.
        padding: Padding of the depthwise convolution, (height, width).
        keep_prob_scale: Factor of the branch under stochastic depth, 1 / (1 - drop rate).
        save_level: What to save for the backward pass: the input; also the depthwise convolution's output; also the
            hidden layer before GELU.
    """

    backend: str
    dtype: torch.dtype
    eps: float
    padding: tuple[int, int]
    keep_prob_scale: float
    save_level: int


class BlockParams(NamedTuple):
    """Parameters of a block of C channels, in the order in which it uses them; `gamma` is the layer scale."""

    dwconv_weight: torch.Tensor
    dwconv_bias: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    pwconv1_weight: torch.Tensor
    pwconv1_bias: torch.Tensor
    pwconv2_weight: torch.Tensor
    pwconv2_bias: torch.Tensor
    gamma: torch.Tensor | None

    def present(self) -> list[torch.Tensor]:
        """The parameters that there are: gamma only where the block has a layer scale."""
        return [*(self[:-1] if self.gamma is None else self)]

    def expected_shapes(self, channels: int, kernel_size: tuple[int, ...], hidden: int) -> list[tuple[int, ...]]:
        """The shapes that those parameters have to be of.

        Args:
            channels: Channels of the block.
            kernel_size: Of the depthwise convolution, (height, width).
            hidden: Channels of the hidden layer of the MLP.
        """
        c = channels
        shapes = [(c, 1, *kernel_size), (c,), (c,), (c,), (hidden, c), (hidden,), (c, hidden), (c,), (c,)]
        return shapes[: len(self.present())]

    def cast(self, dtype: torch.dtype) -> 'BlockParams':
        """Cast as autocast does: parameters of convolutions and Linears to `dtype`, the others stay as they are.

        The former become contiguous: oneDNN requires it of biases, and takes other weights by a path many times slower.
        """
        names = ('dwconv_weight', 'dwconv_bias', 'pwconv1_weight', 'pwconv1_bias', 'pwconv2_weight', 'pwconv2_bias')
        return self._replace(**{name: getattr(self, name).to(dtype).contiguous() for name in names})

    def scale_branch_grads(
        self, keep_prob_scale: float, grad_weight: torch.Tensor, grad_bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Gradients of pwconv2's weight and bias and of gamma.

        They follow from those of the first two for a branch without a scale, which are changed in place.
        """
        if self.gamma is None:
            return grad_weight.mul_(keep_prob_scale), grad_bias.mul_(keep_prob_scale), None
        grad_gamma = keep_prob_scale * ((grad_weight * self.pwconv2_weight).sum(1) + grad_bias * self.pwconv2_bias)
        scale = keep_prob_scale * self.gamma
        return grad_weight.mul_(scale[:, None]), grad_bias.mul_(scale), grad_gamma
