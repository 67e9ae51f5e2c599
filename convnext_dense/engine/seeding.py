"""Seeds of all random number generators."""

import random

import numpy as np
import torch


def seed_everything(*key: int) -> None:
    """Seed Python's, numpy's and torch's random numbers by some whole numbers, as independent for neighbours as for
    others."""
    state = np.random.SeedSequence(key).generate_state(8)
    random.seed(int(state[0]) << 32 | int(state[1]))
    np.random.seed(state[2:6])
    torch.manual_seed(int(state[6]) << 32 | int(state[7]))


class SeededIndex(int):
    """An index into a data set, with the numbers that seed its augmentations."""

    def __new__(cls, index: int, key: tuple[int, ...]):
        draw = super().__new__(cls, index)
        draw.key = key
        return draw

    def __getnewargs__(self):
        return int(self), self.key
