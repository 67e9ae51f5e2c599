"""What a form of a block is given."""

from typing import NamedTuple

import torch


class Settings(NamedTuple):
    dtype: torch.dtype  # of the products
    eps: float
    padding: tuple[int, int]
    factor: float  # of the branch: what stochastic depth scales it by
    with_cp: bool | str


class Parameters(NamedTuple):
    """Of a block, in the order in which it uses them."""

    depthwise: torch.Tensor
    depthwise_bias: torch.Tensor
    norm: torch.Tensor
    norm_bias: torch.Tensor
    linear1: torch.Tensor
    bias1: torch.Tensor
    linear2: torch.Tensor
    bias2: torch.Tensor
    gamma: torch.Tensor | None

    def cast(self, dtype: torch.dtype) -> 'Parameters':
        """As autocast has them: of convolutions and Linears in `dtype`, the others as they are. The former become
        contiguous: oneDNN wants biases so, and takes weights that are other views by a path many times slower."""
        names = ('depthwise', 'depthwise_bias', 'linear1', 'bias1', 'linear2', 'bias2')
        return self._replace(**{name: getattr(self, name).to(dtype).contiguous() for name in names})

    def branch_gradients(self, factor: float, of_linear2: torch.Tensor, of_bias2: torch.Tensor) -> tuple:
        """Gradients of linear2, bias2 and gamma from those of the first two before the branch's scale, in place."""
        if self.gamma is None:
            return of_linear2.mul_(factor), of_bias2.mul_(factor), None
        of_gamma = factor * ((of_linear2 * self.linear2).sum(1) + of_bias2 * self.bias2)
        scale = factor * self.gamma
        return of_linear2.mul_(scale[:, None]), of_bias2.mul_(scale), of_gamma
