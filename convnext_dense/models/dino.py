"""mmdet's DINO with as many sines of a query's box as its authors' and detrex's code. Importing this needs mmdet."""

import copy

import torch
from mmdet.models.detectors import DINO
from mmdet.models.layers.transformer.utils import MLP
from mmengine.registry import MODELS

from ..errors import UsageError


class QueryPositionMLP(MLP):
    """Position of the queries, (..., C), from sines and cosines of their boxes, C / 2 for each of four coordinates.

    Distributions of mmdet give it other numbers of them: 128 for every C, or C. Their frequencies include those of
    C / 2, as every second, fourth, ... pair of a sine and a cosine.

    Args:
        embed_dims (int): C, a power of two of at most 256.
    """

    def __init__(self, embed_dims: int):
        super().__init__(embed_dims * 2, embed_dims, embed_dims, 2)
        self.num_pairs = embed_dims // 4

    def forward(self, sines: torch.Tensor) -> torch.Tensor:
        """Select the frequencies of (..., 4 * any number of sines) and run the layers."""
        pairs = sines.unflatten(-1, (4, -1, 2))
        step = pairs.shape[-2] // self.num_pairs
        return super().forward(pairs[..., ::step, :].flatten(-3))


@MODELS.register_module()
class DetrexDINO(DINO):
    """mmdet's DINO, the same in all of its distributions; its arguments are not changed by building it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*copy.deepcopy(args), **copy.deepcopy(kwargs))

    def _init_layers(self) -> None:
        super()._init_layers()
        self.decoder.ref_point_head = QueryPositionMLP(self.embed_dims)

    def pre_decoder(self, memory: torch.Tensor, *args, **kwargs) -> tuple[dict, dict]:
        """Choose the queries out of the positions of (N, positions, C), of which there have to be as many."""
        if memory.shape[1] < self.num_queries:
            raise UsageError(
                f'num_queries={self.num_queries} is more than the {memory.shape[1]} positions of the feature maps: use '
                'larger images, or a smaller model.num_queries'
            )
        return super().pre_decoder(memory, *args, **kwargs)
