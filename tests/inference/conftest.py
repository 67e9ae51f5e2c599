"""Checkpoints of the demo's models with random weights, and images to predict."""

import os

import cv2
import numpy as np
import pytest

from convnext_dense.inference.model import load_model
from helpers.checkpoints import CLASSES, draw_photo, save_checkpoint
from helpers.exported import save_detector, save_segmentor


@pytest.fixture(scope='session')
def checkpoints(tmp_path_factory):
    """Paths of checkpoints by recipe."""
    folder = tmp_path_factory.mktemp('checkpoints')
    return {recipe: save_checkpoint(recipe, folder / f'{recipe}.pth') for recipe in CLASSES}


@pytest.fixture(scope='session')
def predictors(checkpoints):
    """Models by recipe."""
    return {recipe: load_model(path, device='cpu') for recipe, path in checkpoints.items()}


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
