"""Exported demo models on twenty images of different sizes, in ONNX Runtime and OpenVINO."""

import numpy as np
import pytest

from convnext_dense.export.check import FULL, compare_file
from convnext_dense.export.files import onnx_to_openvino, write_onnx
from convnext_dense.export.program import ExportOptions, trace
from convnext_dense.inference.model import load_model
from helpers.checkpoints import draw_photo, save_checkpoint


def draw_batches():
    """Twenty images (1, 3, H, W) with sides from 40 to 500 pixels, no two of a size."""
    rng = np.random.RandomState(0)
    sizes = zip(rng.permutation(np.linspace(40, 500, 20, dtype=int)), rng.permutation(np.arange(41, 501, 24)))
    for height, width in sizes:
        yield draw_photo(rng, height, width).transpose(2, 0, 1)[None]


@pytest.mark.slow
@pytest.mark.parametrize('recipe', ['mask_rcnn', 'cascade', 'upernet'])
def test_files_equal_the_model_on_twenty_sizes(recipe, tmp_path):
    predictor = load_model(save_checkpoint(recipe, tmp_path / 'model.pth'), device='cpu')
    traced = trace(predictor, ExportOptions())
    onnx_path, openvino_path = tmp_path / 'model.onnx', tmp_path / 'model.xml'
    write_onnx(traced, onnx_path)
    onnx_to_openvino(onnx_path, openvino_path, traced.meta)
    for path in (onnx_path, openvino_path):
        differences = compare_file(path, predictor, ExportOptions(), FULL, draw_batches())
        assert len({difference.images for difference in differences}) == 20
        for difference in differences:
            if recipe == 'upernet':
                assert difference.pixels >= 0.9999
            else:
                assert difference.detections and difference.unmatched <= 0.02 * difference.detections
                assert difference.mask_iou >= 0.999
