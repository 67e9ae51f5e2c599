"""Tiles and views with tools/predict.py and `load_model`, with the demo's models."""

import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from convnext_dense.cli import predict as tool
from convnext_dense.errors import UsageError
from convnext_dense.inference.cropped_mask import decode_window
from convnext_dense.inference.drawing import draw, picture_size
from convnext_dense.inference.images import read_image
from convnext_dense.inference.row_reader import read_reduced


def predict(*args):
    """Run the tool in this process; return its exit code."""
    return tool.predict(tool.make_predict_parser('').parse_args([*map(str, args), '--device', 'cpu']))


@pytest.fixture(scope='module')
def large_image(tmp_path_factory, photos):
    """Photos next to each other: 300 x 400."""
    path = tmp_path_factory.mktemp('large') / 'large.png'
    rows = [np.hstack([cv2.resize(cv2.imread(str(photos[3 * i + j])), (134, 150)) for j in range(3)]) for i in range(2)]
    cv2.imwrite(str(path), np.vstack(rows)[:, :400])
    return path


def test_tiled_detection_with_the_tool(large_image, checkpoints, predictors, tmp_path):
    out = tmp_path / 'out'
    assert predict(checkpoints['mask_rcnn'], large_image, '--out', out, '--tile', 160, '--batch-size', 2) == 0
    content = json.loads((out / 'predictions.json').read_text())
    assert [(i['width'], i['height']) for i in content['images']] == [(400, 300)]
    sample = predictors['mask_rcnn'].predict(large_image, tile=160)
    instances = sample.pred_instances
    assert len(content['annotations']) == len(instances) > 10
    assert [a['score'] for a in content['annotations']] == pytest.approx(instances.scores.tolist(), abs=1e-5)
    assert all(mask['size'] == [300, 400] for mask in instances.masks)
    for box, mask in zip(instances.bboxes.tolist(), instances.masks):
        if not coco_mask.area(mask):
            continue
        x, y, w, h = coco_mask.toBbox(mask)
        assert x >= box[0] - 1 and y >= box[1] - 1 and x + w <= box[2] + 1 and y + h <= box[3] + 1
    assert Image.open(out / 'pictures/large.jpg').size == (400, 300)


@pytest.mark.parametrize('recipe', ['mask_rcnn', 'upernet'])
def test_one_tile_equals_the_whole_image(large_image, predictors, recipe):
    model = predictors[recipe]
    untiled, tiled = model.predict(large_image), model.predict(large_image, tile=400)
    if recipe == 'upernet':
        assert (untiled.pred_sem_seg.data == tiled.pred_sem_seg.data).all()
        return
    order = untiled.pred_instances.scores.argsort(descending=True, stable=True)
    expected = untiled.pred_instances[order]
    assert torch.equal(expected.bboxes, tiled.pred_instances.bboxes)
    assert torch.equal(expected.labels, tiled.pred_instances.labels)
    masks = np.stack([coco_mask.decode(mask) for mask in tiled.pred_instances.masks])
    assert (masks == expected.masks.numpy()).all()


@pytest.mark.parametrize('options', [[], ['--multiscale'], ['--classes', 'disc', 'cross']])
def test_tiled_segmentation_with_the_tool(large_image, checkpoints, predictors, tmp_path, options):
    out = tmp_path / 'out'
    assert predict(checkpoints['upernet'], large_image, '--out', out, '--tile', 160, *options) == 0
    mask = np.asarray(Image.open(out / 'masks/large.png'))
    keywords = dict(
        multiscale='--multiscale' in options, classes=options[1:] or None if options[:1] == ['--classes'] else None
    )
    expected = predictors['upernet'].predict(large_image, tile=160, **keywords).pred_sem_seg.data[0].numpy()
    assert np.array_equal(mask, expected) and mask.shape == (300, 400)
    if options[:1] == ['--classes']:
        assert set(np.unique(mask)) <= {1, 4, 255}


def test_logits_outside_overlaps_equal_the_tiles(large_image, predictors):
    """Where a pixel lies in one tile only, its logits are those of the tile as an image."""
    model, image = predictors['upernet'], read_image(large_image).pixels
    (sample,) = model.predict_arrays([image], tile=160, overlap=0.1, with_logits=True)
    (single_tile,) = model.predict_arrays([image[:160, :160]], with_logits=True)
    torch.testing.assert_close(sample.seg_logits.data[:, :60, :60], single_tile.seg_logits.data[:, :60, :60])


def test_multiscale_detection_with_the_tool(photos, checkpoints, predictors, tmp_path):
    out = tmp_path / 'out'
    assert predict(checkpoints['mask_rcnn'], *photos[:2], '--out', out, '--multiscale', '--no-pictures') == 0
    content = json.loads((out / 'predictions.json').read_text())
    samples = predictors['mask_rcnn'].predict(photos[:2], multiscale=True)
    assert len(content['annotations']) == sum(len(sample.pred_instances) for sample in samples)
    for photo, sample in zip(photos, samples):
        instances = sample.pred_instances
        assert instances.masks.shape == (len(instances), *cv2.imread(str(photo)).shape[:2])
        assert 0 < len(instances) <= 100 and (instances.scores.diff() <= 0).all()


def test_flipped_views_are_flipped_back(photos, predictors):
    """The views of a flipped image are the same six, flipped."""
    model, image = predictors['mask_rcnn'], read_image(photos[1]).pixels
    samples = model.predict_arrays([image, np.ascontiguousarray(image[:, ::-1])], multiscale=True)
    a, b = (sample.pred_instances for sample in samples)
    boxes = b.bboxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([1, 0, 1, 0]) * image.shape[1]
    torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(a.bboxes[:5], boxes[:5], atol=1e-2, rtol=0)
    assert (a.masks[:5] == b.masks[:5].flip(-1)).float().mean() > 0.999


def test_unreadable_files_in_tiles_are_reported(predictors, checkpoints, tmp_path, capsys):
    (tmp_path / 'text.tif').write_text('no image')
    with pytest.raises(UsageError, match='text.tif: '):
        predictors['upernet'].predict(tmp_path / 'text.tif', tile=64)
    args = (checkpoints['upernet'], tmp_path / 'text.tif', '--out', tmp_path / 'out', '--tile', 64)
    assert predict(*args) == 1
    assert f'skipped {tmp_path / "text.tif"}: ' in capsys.readouterr().err


@pytest.mark.parametrize('seed', range(5))
def test_window_of_a_mask_is_decoded(seed):
    rng = np.random.RandomState(seed)
    bitmap = (rng.rand(30, 40) < rng.choice([0, 0.5, 1])).astype(np.uint8, order='F')
    rle = coco_mask.encode(bitmap)
    for left, top, right, bottom in [(0, 0, 40, 30), (3, 5, 17, 9), (39, 29, 40, 30)]:
        expected = bitmap[top:bottom, left:right]
        assert (decode_window(rle, (left, top, right, bottom)) == expected).all()
        text = {**rle, 'counts': rle['counts'].decode()}
        assert (decode_window(text, (left, top, right, bottom)) == expected).all()


def test_reduced_image_is_drawn_like_the_full_one(predictors, large_image, tmp_path, monkeypatch):
    monkeypatch.setattr('convnext_dense.inference.drawing.MIN_SIDE', 50)
    monkeypatch.setattr('convnext_dense.inference.drawing.MAX_SIDE', 200)
    assert picture_size((300, 400)) == (150, 200)
    full_image = read_image(large_image).pixels
    reduced, size = read_reduced(large_image)
    assert size == (300, 400)
    assert abs(reduced.astype(int) - cv2.resize(full_image, (200, 150), interpolation=cv2.INTER_AREA)).max() <= 1
    model = predictors['mask_rcnn']
    sample = model.predict(large_image, tile=160)
    pictures = [draw(image, sample, model.classes, score_thr=0.0, size=size) for image in (full_image, reduced)]
    assert pictures[0].shape == pictures[1].shape == (150, 200, 3)
    assert (abs(pictures[0].astype(int) - pictures[1]) <= 2).mean() > 0.999
