"""mmdet's DINO with the query position encoding of the original code and of detrex. Importing this requires mmdet."""

import copy

import torch
from mmdet.models.detectors import DINO
from mmdet.models.layers.transformer.utils import MLP
from mmengine.registry import MODELS

from ..errors import UsageError


class QueryPositionMLP(MLP):
    """Position encoding (..., C) of queries from sines and cosines of their boxes, C / 2 for each of four coordinates.

    mmdet's distributions pass other numbers of them: 128 for every C, or C. These contain the frequencies of C / 2 as
    every second, fourth, ... pair of sine and cosine.

    Args:
        embed_dims (int): C, a power of two up to 256.
    """

    def __init__(self, embed_dims: int):
        super().__init__(embed_dims * 2, embed_dims, embed_dims, 2)
        self.num_pairs = embed_dims // 4

    def forward(self, sines: torch.Tensor) -> torch.Tensor:
        """Select the frequencies from (..., 4 * number of sines and cosines) and run the layers."""
        pairs = sines.unflatten(-1, (4, -1, 2))
        step = pairs.shape[-2] // self.num_pairs
        return super().forward(pairs[..., ::step, :].flatten(-3))


@MODELS.register_module()
class DetrexDINO(DINO):
    """mmdet's DINO with the same result in all of its distributions; building it does not change its arguments."""

    def __init__(self, *args, **kwargs):
        super().__init__(*copy.deepcopy(args), **copy.deepcopy(kwargs))

    def _init_layers(self) -> None:
        super()._init_layers()
        self.decoder.ref_point_head = QueryPositionMLP(self.embed_dims)

    def pre_decoder(self, memory: torch.Tensor, *args, **kwargs) -> tuple[dict, dict]:
        """Choose the queries from the positions in `memory` (N, positions, C); raise UsageError if they are too few."""
        if memory.shape[1] < self.num_queries:
            raise UsageError(
                f'num_queries={self.num_queries} is more than the {memory.shape[1]} positions of the feature maps: use '
                'larger images, or a smaller model.num_queries'
            )
        return super().pre_decoder(memory, *args, **kwargs)
