"""Predictions on a GPU equal those on the CPU."""

import numpy as np
import pytest
import torch

from convnext_dense.inference.model import load_model
from helpers.checkpoints import draw_photo, save_checkpoint

pytestmark = pytest.mark.gpu


def predict(recipe: str, path: str) -> dict:
    """Predictions on both devices, for whole images, views and tiles."""
    save_checkpoint(recipe, path)
    image = draw_photo(np.random.RandomState(0), 120, 150)
    results = {}
    for device in ('cpu', 'cuda'):
        model = load_model(path, device=device)
        for name, options in dict(plain={}, views=dict(multiscale=True), tiles=dict(tile=96)).items():
            sample = model.predict(image, channel_order='bgr', **options)
            key = 'pred_sem_seg' if recipe == 'upernet' else 'pred_instances'
            data = sample.get(key)
            results[device, name] = data.data if recipe == 'upernet' else data.scores
            assert results[device, name].device.type == 'cpu'
    results['amp'] = (
        load_model(path, device='cuda', amp_dtype='float16').predict(image, channel_order='bgr') is not None
    )
    return results


@pytest.mark.parametrize('recipe', ['mask_rcnn', 'upernet'])
def test_gpu_predictions_equal_cpu(recipe, run_on_gpu, tmp_path):
    results = run_on_gpu(predict, recipe, str(tmp_path / 'model.pth'))
    for name in ('plain', 'views', 'tiles'):
        cpu, gpu = results['cpu', name], results['cuda', name]
        if recipe == 'upernet':
            assert (cpu == gpu).float().mean() > 0.99
        else:
            torch.testing.assert_close(gpu[:10], cpu[:10], rtol=0, atol=5e-3)
    assert results['amp']
