"""Demo detectors with made weights, traced once."""

import pytest

from convnext_dense.export.files import onnx_to_openvino, write_onnx, write_pt2
from convnext_dense.export.program import ExportOptions, trace
from convnext_dense.inference.model import load_model
from helpers.checkpoints import save_checkpoint

DETECTORS = ('mask_rcnn', 'cascade')


@pytest.fixture(scope='session')
def checkpoints(tmp_path_factory):
    """Paths of checkpoints by recipe."""
    folder = tmp_path_factory.mktemp('checkpoints')
    return {recipe: save_checkpoint(recipe, folder / f'{recipe}.pth') for recipe in DETECTORS}


@pytest.fixture(scope='session')
def predictors(checkpoints):
    """Models by recipe."""
    return {recipe: load_model(path, device='cpu') for recipe, path in checkpoints.items()}


@pytest.fixture(scope='session')
def files(predictors, tmp_path_factory):
    """A function from a recipe to its exported files by suffix, which are written when they are first asked for."""
    written = {}

    def get(recipe):
        if recipe not in written:
            folder, traced = tmp_path_factory.mktemp(recipe), trace(predictors[recipe], ExportOptions())
            paths = {suffix: folder / f'detector{suffix}' for suffix in ('.pt2', '.onnx', '.xml')}
            write_pt2(traced, paths['.pt2'])
            write_onnx(traced, paths['.onnx'])
            onnx_to_openvino(paths['.onnx'], paths['.xml'], traced.meta)
            written[recipe] = paths
        return written[recipe]

    return get
