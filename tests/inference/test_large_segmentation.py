"""Large images are segmented as in mmseg, with less memory."""

import pytest
import torch

from convnext_dense.inference import large_segmentation


@pytest.fixture(scope='module')
def expected(predictors, photos):
    return [predictors['upernet'].predict(path).pred_sem_seg.data for path in photos[:8]]


@pytest.mark.parametrize('limit', [1, 20_000, 60_000])
def test_labels_equal_mmseg(limit, expected, predictors, photos, monkeypatch):
    predictor = predictors['upernet']
    monkeypatch.setattr(large_segmentation, 'MAX_LOGITS', limit)
    calls = []
    decide = large_segmentation._resize_and_decide
    monkeypatch.setattr(large_segmentation, '_resize_and_decide', lambda *args: calls.append(args) or decide(*args))
    for path, labels in zip(photos, expected):
        sample = predictor.predict(path)
        assert torch.equal(sample.pred_sem_seg.data, labels)
    assert len(calls) == 8 if limit == 1 else 0 < len(calls) <= 8
    (sample,) = predictor.predict_arrays([predictor.read(photos[0])], with_logits=True)
    assert sample.seg_logits.shape == sample.ori_shape  # all logits are returned on request
    assert 'postprocess_result' not in vars(predictor.model)


def test_logits_are_resized_in_chunks(monkeypatch):
    monkeypatch.setattr(large_segmentation, 'MAX_LOGITS', 200 * 200 * 3)
    num_channels = []
    interpolate = torch.nn.functional.interpolate

    def measure(x, size, **kwargs):
        num_channels.append(x.shape[1])
        return interpolate(x, size=size, **kwargs)

    monkeypatch.setattr(large_segmentation, 'interpolate', measure)
    logits = torch.rand(20, 30, 40, generator=torch.Generator().manual_seed(0))
    labels = large_segmentation._resize_and_decide(logits, (200, 200), False)
    resized = interpolate(logits[None], size=(200, 200), mode='bilinear', align_corners=False)[0]
    assert torch.equal(labels, resized.argmax(0, keepdim=True)) and num_channels == [3] * 6 + [2]
