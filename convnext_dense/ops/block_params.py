"""What the operators of a ConvNeXt block take: its parameters and its settings."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

# What a block's forward pass saves for the backward pass; each level saves what the one before it saves, too.
SAVE_INPUT, SAVE_DWCONV, SAVE_HIDDEN = range(3)
PARAM_TYPES = (nn.Parameter, torch.Tensor)  # not classes derived from them, which may compute something else
GRN_EPS = 1e-6  # of global response normalization
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
    """Parameters of a block of C channels, in the order in which it uses them.

    `grn_gamma` and `grn_beta` are of global response normalization (V2), `gamma` is the layer scale; None for none.
    """

    dwconv_weight: torch.Tensor
    dwconv_bias: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    pwconv1_weight: torch.Tensor
    pwconv1_bias: torch.Tensor
    grn_gamma: torch.Tensor | None
    grn_beta: torch.Tensor | None
    pwconv2_weight: torch.Tensor
    pwconv2_bias: torch.Tensor
    gamma: torch.Tensor | None

    def present(self) -> list[torch.Tensor]:
        """The parameters that there are."""
        return [p for p in self if p is not None]

    def expected_shapes(self, channels: int, kernel_size: tuple[int, ...], hidden: int) -> list[tuple[int, ...]]:
        """The shapes that those parameters have to be of.

        Args:
            channels: Channels of the block.
            kernel_size: Of the depthwise convolution, (height, width).
            hidden: Channels of the hidden layer of the MLP.
        """
        c = channels
        grn = [] if self.grn_gamma is None else [(hidden,)] * 2
        shapes = [(c, 1, *kernel_size), (c,), (c,), (c,), (hidden, c), (hidden,), *grn, (c, hidden), (c,)]
        return shapes if self.gamma is None else [*shapes, (c,)]

    def cast(self, dtype: torch.dtype) -> 'BlockParams':
        """Cast as autocast does: parameters of convolutions and Linears to `dtype`, the others stay as they are.

        The former become contiguous: oneDNN requires it of biases, and takes other weights by a path many times slower.
        """
        names = ('dwconv_weight', 'dwconv_bias', 'pwconv1_weight', 'pwconv1_bias', 'pwconv2_weight', 'pwconv2_bias')
        return self._replace(**{name: getattr(self, name).to(dtype).contiguous() for name in names})

    @classmethod
    def of_present(cls, tensors: Sequence[torch.Tensor]) -> 'BlockParams':
        """Parameters from those that there are: their number says which.

        Raises:
            ValueError: A block has not so many.
        """
        n_without = len(cls._fields) - 3
        has_grn, has_gamma = divmod(len(tensors) - n_without, 2)
        if not n_without <= len(tensors) <= len(cls._fields):
            raise ValueError(f'a block has no {len(tensors)} parameters')
        grn, rest = (tensors[6:8], tensors[8:]) if has_grn else ((None, None), tensors[6:])
        return cls(*tensors[:6], *grn, *rest, *(() if has_gamma else (None,)))

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
