"""Predictions equal mmdet's and mmseg's own inference, which accepts our configs and checkpoints."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope

from convnext_dense.inference.model import load_model
from helpers.paths import ROOT


def assert_equal_instances(actual, expected):
    assert len(actual) == len(expected)
    torch.testing.assert_close(actual.bboxes, expected.bboxes, rtol=0, atol=1e-3)
    torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=1e-5)
    assert torch.equal(actual.labels, expected.labels)
    assert torch.equal(torch.as_tensor(actual.masks), torch.as_tensor(expected.masks))


def count_missing(actual, expected) -> int:
    """How many of their detections are not among ours, in any order: boxes to 0.01 pixels, scores to 1e-4."""
    missing = 0
    for i in range(len(expected)):
        distance = (actual.bboxes - expected.bboxes[i]).abs().amax(1)
        near = (
            (distance < 1e-2)
            & ((actual.scores - expected.scores[i]).abs() < 1e-4)
            & (actual.labels == expected.labels[i])
        )
        if not near.any():
            missing += 1
            continue
        j = distance.masked_fill(~near, float('inf')).argmin()
        assert (torch.as_tensor(actual.masks)[j] != torch.as_tensor(expected.masks)[i]).float().mean() < 1e-3
    return missing


@pytest.fixture
def load_stock(monkeypatch, checkpoints):
    """Load a model with mmdet's and mmseg's own modules, without `optimize`."""

    def load(recipe):
        monkeypatch.setattr('convnext_dense.inference.model.optimize', lambda model: model)
        return load_model(checkpoints[recipe], device='cpu')

    return load


@pytest.mark.parametrize('recipe', ['mask_rcnn', 'cascade'])
def test_detections_equal_mmdet(recipe, checkpoints, predictors, photos, load_stock):
    """Equal with mmdet's modules; with optimized ones except for scores that tie within rounding.

    Random weights cause many ties: a few of a hundred detections fall on the other side of a threshold.
    """
    from mmdet.apis import inference_detector, init_detector

    detector = init_detector(str(ROOT / f'configs/demo/{recipe}.py'), str(checkpoints[recipe]), device='cpu')
    stock = load_stock(recipe)
    n_detections = n_missing = 0
    for path in photos[:10]:
        expected = inference_detector(detector, str(path)).pred_instances
        sample = predictors[recipe].predict(path)
        assert sample.img_path == str(path)
        n_missing += count_missing(sample.pred_instances, expected)
        assert_equal_instances(stock.predict(path).pred_instances, expected)
        n_detections += len(expected)
    assert n_detections > 500 and n_missing <= 0.01 * n_detections


def test_segmentation_equals_mmseg(checkpoints, predictors, photos, load_stock):
    """Equal with mmseg's modules; with optimized ones except for logits that tie within rounding."""
    from mmseg.apis import inference_model, init_model

    segmentor = init_model(str(ROOT / 'configs/demo/upernet.py'), str(checkpoints['upernet']), device='cpu')
    stock = load_stock('upernet')
    labels = set()
    for path in photos:
        expected = inference_model(segmentor, str(path)).pred_sem_seg.data
        sample = predictors['upernet'].predict(path)
        assert 'seg_logits' not in sample  # they would be the largest part of a result
        assert (sample.pred_sem_seg.data != expected).float().mean() < 1e-4
        assert torch.equal(stock.predict(path).pred_sem_seg.data, expected)
        labels |= set(expected.unique().tolist())
    assert len(labels) > 2


def test_batched_predictions_equal_single_ones(predictors, photos):
    for recipe, predictor in predictors.items():
        single = [predictor.predict(path) for path in photos[:6]]
        batch = predictor.predict([str(path) for path in photos[:6]], batch_size=4)
        for a, b in zip(single, batch):
            if predictor.task == 'segmentation':
                assert torch.equal(a.pred_sem_seg.data, b.pred_sem_seg.data), recipe
            else:
                torch.testing.assert_close(a.pred_instances.bboxes, b.pred_instances.bboxes, rtol=0, atol=1e-3)


def test_mmdet_functions_accept_the_model(predictors, photos):
    from mmdet.apis import inference_detector

    predictor = predictors['mask_rcnn']
    init_default_scope('mmdet')  # the last model that was loaded is mmseg's
    expected = inference_detector(predictor.model, str(photos[0]))
    assert_equal_instances(predictor.predict(photos[0]).pred_instances, expected.pred_instances)


@pytest.fixture
def derived_config(tmp_path):
    """A user's config with a base config of this package."""

    def write(recipe):
        path = tmp_path / f'my_{recipe}.py'
        path.write_text(f"_base_ = 'convnext_dense::demo/{recipe}.py'\n")
        return str(path)

    return write


@pytest.mark.parametrize('derived', [False, True])
def test_det_inferencer(derived, checkpoints, photos, derived_config):
    from mmdet.apis import DetInferencer

    config = derived_config('mask_rcnn') if derived else str(ROOT / 'configs/demo/mask_rcnn.py')
    inferencer = DetInferencer(config, str(checkpoints['mask_rcnn']), device='cpu', show_progress=False)
    images = dict(file=str(photos[0]), folder=str(photos[0].parent), array=cv2.imread(str(photos[0])))
    counts = {name: len(inferencer(image, batch_size=2)['predictions']) for name, image in images.items()}
    assert counts == dict(file=1, folder=30, array=1)


@pytest.mark.parametrize('derived', [False, True])
def test_mmseg_inferencer(derived, checkpoints, photos, derived_config):
    from mmseg.apis import MMSegInferencer

    config = derived_config('upernet') if derived else str(ROOT / 'configs/demo/upernet.py')
    inferencer = MMSegInferencer(config, str(checkpoints['upernet']), device='cpu')
    image = cv2.imread(str(photos[0]))
    for source in (str(photos[0]), image):
        assert inferencer(source)['predictions'].shape == image.shape[:2]
    assert len(inferencer(str(photos[0].parent))['predictions']) == 30


@pytest.mark.parametrize('derived', [False, True])
def test_mmdet_and_mmseg_functions_on_files_and_arrays(derived, checkpoints, photos, derived_config):
    from mmdet.apis import inference_detector, init_detector
    from mmseg.apis import inference_model, init_model

    paths, arrays = [str(photos[1])] * 2, [cv2.imread(str(photos[1]))] * 2  # mmseg requires equal sizes
    for recipe, init, infer in (
        ('mask_rcnn', init_detector, inference_detector),
        ('upernet', init_model, inference_model),
    ):
        config = derived_config(recipe) if derived else str(ROOT / f'configs/demo/{recipe}.py')
        model = init(config, str(checkpoints[recipe]), device='cpu')
        file_results, array_results = infer(model, paths), infer(model, arrays)
        assert len(file_results) == len(array_results) == 2
        if recipe == 'mask_rcnn':
            assert_equal_instances(file_results[0].pred_instances, array_results[1].pred_instances)
        else:
            assert torch.equal(file_results[0].pred_sem_seg.data, array_results[1].pred_sem_seg.data)


def test_load_model_with_a_derived_config(checkpoints, photos, derived_config, predictors):
    predictor = load_model(checkpoints['mask_rcnn'], derived_config('mask_rcnn'), 'cpu')
    expected = predictors['mask_rcnn'].predict(photos[1])
    assert_equal_instances(predictor.predict(photos[1]).pred_instances, expected.pred_instances)


def test_arrays_and_pil_images_equal_the_file(predictors, photos):
    from PIL import Image

    png = next(path for path in photos if path.suffix == '.png')  # decoders differ in JPEGs
    bgr, predictor = cv2.imread(str(png)), predictors['mask_rcnn']
    expected = predictor.predict(png).pred_instances
    for image, order in (
        (bgr, 'bgr'),
        (np.ascontiguousarray(bgr[..., ::-1]), 'rgb'),
        (bgr[..., ::-1], 'rgb'),
        (Image.open(png), None),
        (str(png), None),
    ):
        assert_equal_instances(predictor.predict(image, channel_order=order).pred_instances, expected)
