"""Seeding of all random number generators."""

import random

import numpy as np
import torch


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and torch with a key of non-negative integers; different keys give independent numbers."""
    state = np.random.SeedSequence(key).generate_state(8)
    random.seed(int(state[0]) << 32 | int(state[1]))
    np.random.seed(state[2:6])
    torch.manual_seed(int(state[6]) << 32 | int(state[7]))


class SeededIndex(int):
    """An index into a data set with the key that seeds the augmentations of its sample.

    Attributes:
        seed_key: Arguments for `seed_everything`.
    """

    def __new__(cls, index: int, seed_key: tuple[int, ...]):
        """Create an int with a key."""
        self = super().__new__(cls, index)
        self.seed_key = seed_key
        return self

    def __getnewargs__(self):
        return int(self), self.seed_key
