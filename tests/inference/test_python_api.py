"""`load_model` and what it returns, as the README and docs/predict.md show it."""

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


def test_the_example_of_the_readme_runs(checkpoints, photos):
    (block,) = [code for language, code in code_blocks(README) if language == 'pycon']
    lines = re.findall(r'^>>> (.*)', block, re.MULTILINE)
    assert len(lines) == 3
    code = '\n'.join(lines).replace('work_dirs/mask_rcnn/convnext_t', str(checkpoints['mask_rcnn']))
    *statements, expression = re.sub(r"'photos/\d+\.png'", repr(str(photos[0])), code).splitlines()
    scope = {}
    exec('\n'.join(statements), scope)
    assert isinstance(eval(expression, scope), list)


def test_it_is_public():
    assert convnext_dense.load_model is load_model and 'load_model' in convnext_dense.__all__
    with pytest.raises(AttributeError, match='no attribute'):
        _ = convnext_dense.load_models


def test_one_image_one_result_a_list_a_list(predictors, photos):
    predictor = predictors['upernet']
    assert predictor.predict(photos[0]).pred_sem_seg.shape == cv2.imread(str(photos[0])).shape[:2]
    assert [type(sample).__name__ for sample in predictor.predict([str(photos[0])])] == ['SegDataSample']
    assert predictor.predict([]) == []


def test_options_are_those_of_the_command(predictors, photos):
    predictor = predictors['mask_rcnn']
    every = predictor.predict(photos[0]).pred_instances
    threshold = float(every.scores.median())
    chosen = predictor.predict(photos[0], score_thr=threshold, classes=['disc'], max_per_image=3).pred_instances
    expected = every[(every.scores >= threshold) & (every.labels == 0)][:3]
    assert torch.equal(chosen.scores, expected.scores) and torch.equal(chosen.masks, expected.masks)
    segmented = predictors['upernet'].predict(photos[0], classes=['disc']).pred_sem_seg.data
    assert set(segmented.unique().tolist()) <= {1, 255}
    for options, words in (
        (dict(score_thr=2), 'from 0 to 1'),
        (dict(classes=['disk']), 'did you mean disc'),
        (dict(batch_size=0), 'from 1'),
        (dict(max_per_image=0), 'from 1'),
        (dict(tile=0), 'side of a tile'),
    ):
        with pytest.raises(UsageError, match=words):
            predictor.predict(photos[0], **options)
    with pytest.raises(TypeError, match='score'):
        predictor.predict(photos[0], score=0.5)


def test_what_is_no_image(predictors, tmp_path):
    (tmp_path / 'text.jpg').write_text('hello')
    for image, words in ((tmp_path / 'text.jpg', 'text.jpg: it is not an image'), (5, 'a int is no image')):
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
    plain = load_model(checkpoints['upernet'], device='cpu').predict(photos[0])
    assert (mixed.pred_sem_seg.data == plain.pred_sem_seg.data).float().mean() > 0.9


def test_a_picture_is_drawn_on_request(predictors, photos):
    for recipe in ('mask_rcnn', 'upernet'):
        picture = predictors[recipe].draw(photos[0], predictors[recipe].predict(photos[0]))
        assert isinstance(picture, Image.Image) and picture.mode == 'RGB'


def test_a_segmentor_at_several_scales_is_the_papers_test(predictors, photos):
    predictor = predictors['upernet']
    multi = predictor.predict(photos[3], multiscale=True).pred_sem_seg.data
    plain = predictor.predict(photos[3]).pred_sem_seg.data
    assert multi.shape == plain.shape and not torch.equal(multi, plain)
    (sample,) = predictor.predict_arrays([predictor.read(photos[3])], multiscale=True, with_logits=True)
    assert torch.equal(sample.seg_logits.data.argmax(0, keepdim=True), multi)
    assert torch.allclose(sample.seg_logits.data.sum(0), torch.ones(multi.shape[1:]), atol=1e-4)
    assert predictor.model.test_cfg.mode == 'slide'  # as before


def test_flipped_views_of_a_detector_are_flipped_back(predictors, photos):
    predictor = predictors['mask_rcnn']
    image = predictor.read(photos[1])
    views = list(predictor.views.iter_samples(predictor, image))
    mirrored = list(predictor.views.iter_samples(predictor, np.ascontiguousarray(image[:, ::-1])))
    assert len(views) == 6
    flipped_back, of_mirror = views[1].pred_instances, mirrored[0].pred_instances  # the same pixels to the model
    x1, y1, x2, y2 = of_mirror.bboxes.unbind(-1)
    assert torch.equal(flipped_back.bboxes, torch.stack((image.shape[1] - x2, y1, image.shape[1] - x1, y2), -1))
    assert torch.equal(flipped_back.masks, of_mirror.masks.flip(-1))


@pytest.mark.parametrize('n', [1, 4])
@pytest.mark.parametrize('recipe', ['mask_rcnn', 'upernet'])
def test_other_numbers_of_input_channels(recipe, n, tmp_path):
    """Files are read in gray or unchanged, and normalized as training does."""
    file = save_checkpoint(recipe, tmp_path / 'model.pth', **{'model.backbone.in_channels': n})
    predictor = load_model(file, device='cpu')
    assert predictor.color_type == {1: 'grayscale', 4: 'unchanged'}[n]
    pixels = np.random.RandomState(0).randint(0, 255, (70, 80, 4)[: 2 if n == 1 else 3], dtype=np.uint8)
    cv2.imwrite(str(tmp_path / 'image.png'), pixels)
    of_file, of_array = predictor.predict(tmp_path / 'image.png'), predictor.predict(pixels)
    (inputs,) = predictor.model.data_preprocessor(
        {k: [v] for k, v in predictor.prepare(predictor.read(tmp_path / 'image.png')).items()}, False
    )['inputs']
    assert inputs.shape[0] == n and abs(float(inputs.mean())) < 1
    if recipe == 'upernet':
        assert torch.equal(of_file.pred_sem_seg.data, of_array.pred_sem_seg.data)
    else:
        assert torch.equal(of_file.pred_instances.bboxes, of_array.pred_instances.bboxes)
