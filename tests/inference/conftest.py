"""Checkpoints of the demo's models with random weights, and images to predict."""

import os
from collections.abc import Mapping

import cv2
import numpy as np
import pytest

from convnext_dense.inference.model import load_model
from helpers.checkpoints import CLASSES, draw_photo, save_checkpoint
from helpers.exported import save_detector, save_segmentor


class LazyMapping(Mapping):
    """A value for each key, which is made when it is first asked for."""

    def __init__(self, keys, make):
        self._keys, self._make, self._values = tuple(keys), make, {}

    def __getitem__(self, key):
        if key not in self._values:
            self._values[key] = self._make(key)
        return self._values[key]

    def __iter__(self):
        return iter(self._keys)

    def __len__(self):
        return len(self._keys)


@pytest.fixture(scope='session')
def checkpoints(tmp_path_factory):
    """Paths of checkpoints by recipe."""
    folder = tmp_path_factory.mktemp('checkpoints')
    return LazyMapping(CLASSES, lambda recipe: save_checkpoint(recipe, folder / f'{recipe}.pth'))


@pytest.fixture(scope='session')
def predictors(checkpoints):
    """Models by recipe."""
    return LazyMapping(CLASSES, lambda recipe: load_model(checkpoints[recipe], device='cpu'))


@pytest.fixture(scope='session')
def photos(tmp_path_factory):
    """Thirty images of different sizes and formats."""
    folder, rng = tmp_path_factory.mktemp('photos'), np.random.RandomState(0)
    for i in range(30):
        height, width = rng.randint(60, 160, 2)
        cv2.imwrite(os.path.join(folder, f'photo {i:02}.{("jpg", "png")[i % 2]}'), draw_photo(rng, height, width))
    return sorted(folder.iterdir())


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('exported')


@pytest.fixture(scope='module')
def detector(folder):
    return save_detector(folder / 'detector.onnx')


@pytest.fixture(scope='module')
def segmentor(folder):
    return save_segmentor(folder / 'segmentor.onnx')
