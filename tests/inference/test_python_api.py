"""`load_model` and the predictor that it returns, as documented in README and docs/predict.md."""

import re

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import convnext_dense
from convnext_dense.errors import UsageError
from convnext_dense.inference.model import load_model
from helpers.checkpoints import save_checkpoint
from helpers.pages import README, code_blocks


def test_readme_example_runs(checkpoints, photos):
    (block,) = [code for language, code in code_blocks(README) if language == 'pycon']
    lines = re.findall(r'^>>> (.*)', block, re.MULTILINE)
    assert len(lines) == 3
    code = '\n'.join(lines).replace('work_dirs/mask_rcnn/convnext_t', str(checkpoints['mask_rcnn']))
    *statements, expression = re.sub(r"'photos/\d+\.png'", repr(str(photos[0])), code).splitlines()
    scope = {}
    exec('\n'.join(statements), scope)
    assert isinstance(eval(expression, scope), list)


def test_load_model_is_public():
    assert convnext_dense.load_model is load_model and 'load_model' in convnext_dense.__all__
    with pytest.raises(AttributeError, match='no attribute'):
        _ = convnext_dense.load_models


def test_result_types_of_one_image_and_a_list(predictors, photos):
    predictor = predictors['upernet']
    assert predictor.predict(photos[0]).pred_sem_seg.shape == cv2.imread(str(photos[0])).shape[:2]
    assert [type(sample).__name__ for sample in predictor.predict([str(photos[0])])] == ['SegDataSample']
    assert predictor.predict([]) == []


def test_options_equal_the_command_line(predictors, photos):
    predictor = predictors['mask_rcnn']
    all_instances = predictor.predict(photos[0]).pred_instances
    threshold = float(all_instances.scores.median())
    filtered = predictor.predict(photos[0], score_thr=threshold, classes=['disc'], max_per_image=3).pred_instances
    expected = all_instances[(all_instances.scores >= threshold) & (all_instances.labels == 0)][:3]
    assert torch.equal(filtered.scores, expected.scores) and torch.equal(filtered.masks, expected.masks)
    segmented = predictors['upernet'].predict(photos[0], classes=['disc']).pred_sem_seg.data
    assert set(segmented.unique().tolist()) <= {1, 255}
    for options, words in (
        (dict(score_thr=2), 'from 0 to 1'),
        (dict(classes=['disk']), 'did you mean disc'),
        (dict(batch_size=0), 'at least 1'),
        (dict(max_per_image=0), 'at least 1'),
        (dict(tile=0), 'side of a tile'),
    ):
        with pytest.raises(UsageError, match=words):
            predictor.predict(photos[0], **options)
    with pytest.raises(TypeError, match='score'):
        predictor.predict(photos[0], score=0.5)


def test_invalid_images_are_refused(predictors, tmp_path):
    (tmp_path / 'text.jpg').write_text('hello')
    for image, words in ((tmp_path / 'text.jpg', 'text.jpg: it is not an image'), (5, 'a int is not an image')):
        with pytest.raises(UsageError, match=words):
            predictors['mask_rcnn'].predict(image)
    with pytest.raises(UsageError, match='channel_order'):
        predictors['mask_rcnn'].predict(np.zeros((64, 64, 3), np.uint8))


def test_devices_and_precisions(checkpoints, photos):
    for device in ('cuda:9', 'toaster'):
        with pytest.raises(UsageError, match=f"no device '{device}'.*this machine has cpu"):
            load_model(checkpoints['upernet'], device=device)
    with pytest.raises(UsageError, match='float16, bfloat16'):
        load_model(checkpoints['upernet'], amp_dtype='float8')
    mixed = load_model(checkpoints['upernet'], device='cpu', amp_dtype='bfloat16').predict(photos[0])
    float32 = load_model(checkpoints['upernet'], device='cpu').predict(photos[0])
    assert (mixed.pred_sem_seg.data == float32.pred_sem_seg.data).float().mean() > 0.9


def test_draw_returns_a_pil_image(predictors, photos):
    for recipe in ('mask_rcnn', 'upernet'):
        picture = predictors[recipe].draw(photos[0], predictors[recipe].predict(photos[0]))
        assert isinstance(picture, Image.Image) and picture.mode == 'RGB'


def test_multiscale_segmentation(predictors, photos):
    predictor = predictors['upernet']
    multiscale = predictor.predict(photos[3], multiscale=True).pred_sem_seg.data
    single_scale = predictor.predict(photos[3]).pred_sem_seg.data
    assert multiscale.shape == single_scale.shape and not torch.equal(multiscale, single_scale)
    (sample,) = predictor.predict_arrays([predictor.read(photos[3])], multiscale=True, with_logits=True)
    assert torch.equal(sample.seg_logits.data.argmax(0, keepdim=True), multiscale)
    assert torch.allclose(sample.seg_logits.data.sum(0), torch.ones(multiscale.shape[1:]), atol=1e-4)
    assert predictor.model.test_cfg.mode == 'slide'  # as before


def test_flipped_views_of_a_detector_are_flipped_back(predictors, photos):
    predictor = predictors['mask_rcnn']
    image = predictor.read(photos[1])
    views = list(predictor.views.iter_samples(predictor, image))
    mirrored = list(predictor.views.iter_samples(predictor, np.ascontiguousarray(image[:, ::-1])))
    assert len(views) == 6
    flipped_back, mirrored_result = (
        views[1].pred_instances,
        mirrored[0].pred_instances,
    )  # the model sees the same pixels
    x1, y1, x2, y2 = mirrored_result.bboxes.unbind(-1)
    assert torch.equal(flipped_back.bboxes, torch.stack((image.shape[1] - x2, y1, image.shape[1] - x1, y2), -1))
    assert torch.equal(flipped_back.masks, mirrored_result.masks.flip(-1))


@pytest.mark.parametrize('n', [1, 4])
@pytest.mark.parametrize('recipe', ['mask_rcnn', 'upernet'])
def test_other_numbers_of_input_channels(recipe, n, tmp_path):
    """Files are read in grayscale or unchanged, and normalized as in training."""
    file = save_checkpoint(recipe, tmp_path / 'model.pth', **{'model.backbone.in_channels': n})
    predictor = load_model(file, device='cpu')
    assert predictor.color_type == {1: 'grayscale', 4: 'unchanged'}[n]
    pixels = np.random.RandomState(0).randint(0, 255, (70, 80, 4)[: 2 if n == 1 else 3], dtype=np.uint8)
    cv2.imwrite(str(tmp_path / 'image.png'), pixels)
    file_result, array_result = predictor.predict(tmp_path / 'image.png'), predictor.predict(pixels)
    (inputs,) = predictor.model.data_preprocessor(
        {k: [v] for k, v in predictor.prepare(predictor.read(tmp_path / 'image.png')).items()}, False
    )['inputs']
    assert inputs.shape[0] == n and abs(float(inputs.mean())) < 1
    if recipe == 'upernet':
        assert torch.equal(file_result.pred_sem_seg.data, array_result.pred_sem_seg.data)
    else:
        assert torch.equal(file_result.pred_instances.bboxes, array_result.pred_instances.bboxes)
