"""Written output: COCO JSON, indexed PNGs, pictures."""

import io
import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData, PixelData
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from convnext_dense.inference.coco_writer import CocoWriter, category_ids, to_annotations
from convnext_dense.inference.colors import class_colors, text_color
from convnext_dense.inference.drawing import draw
from convnext_dense.inference.mask_writer import encode_mask

CLASSES = ('cat', 'dog')


def make_instances(boxes, labels=None, scores=None, size=None):
    n = len(boxes)
    result = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels or [0] * n, dtype=torch.long),
        scores=torch.tensor(scores or [0.9] * n),
    )
    if size:
        masks = torch.zeros(n, *size, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes):
            mask[int(y1) : int(y2), int(x1) : int(x2)] = True
        result.masks = masks
    return result


class Sample(dict):
    """A data sample with one field."""

    def __getattr__(self, name):
        return self[name]


def test_annotations_in_coco_format():
    predictions = make_instances([[1, 2, 11, 7], [0.5, 0.5, 3.25, 4]], [1, 0], [0.75, 0.5], (20, 30))
    annotation0, annotation1 = to_annotations(predictions, [1, 2])
    assert (annotation0['category_id'], annotation0['bbox'], annotation0['score']) == (2, [1, 2, 10, 5], 0.75)
    assert annotation0['area'] == 50 and annotation0['iscrowd'] == 0
    assert np.array_equal(coco_mask.decode(annotation0['segmentation']), predictions.masks[0].numpy())
    assert annotation1['bbox'] == [0.5, 0.5, 2.75, 3.5]
    without_mask = to_annotations(make_instances([[0, 0, 4, 2]]), [1, 2])[0]
    assert without_mask['area'] == 8 and 'segmentation' not in without_mask
    rle_predictions = make_instances([[1, 2, 11, 7]])
    rle_predictions.masks = [coco_mask.encode(np.asfortranarray(predictions.masks[0].numpy().astype(np.uint8)))]
    assert to_annotations(rle_predictions, [2])[0]['segmentation'] == annotation0['segmentation']


def test_coco_classes_have_coco_category_ids():
    from mmdet.datasets import CocoDataset

    ids = category_ids(CocoDataset.METAINFO['classes'])
    assert (len(ids), ids[0], ids[11], ids[-1]) == (80, 1, 13, 90)  # stop sign is 13, toothbrush 90
    assert category_ids(CLASSES) == [1, 2]


def write_predictions(folder, names, **kwargs):
    writer = CocoWriter(folder, CLASSES, **kwargs)
    writer.use_numbers_of(names)
    for name in names:
        if name not in writer.done:
            writer.add(name, (20, 30), to_annotations(make_instances([[1, 2, 11, 7]] * 2, size=(20, 30)), [1, 2]))
    return writer


def test_file_is_a_coco_dataset(tmp_path, capsys):
    write_predictions(tmp_path, ['a.jpg', 'größe "x".jpg']).finish()
    coco = COCO(tmp_path / 'predictions.json')
    assert [image['file_name'] for image in coco.imgs.values()] == ['a.jpg', 'größe "x".jpg']
    assert sorted(coco.anns) == [1, 2, 3, 4] and [c['name'] for c in coco.cats.values()] == list(CLASSES)
    assert {a['image_id'] for a in coco.anns.values()} == {1, 2}
    assert coco.annToMask(coco.anns[1]).sum() == 50


def test_results_format_loads_into_pycocotools(tmp_path, capsys):
    write_predictions(tmp_path / '.', ['a.jpg', 'b.jpg'], name='data').finish()
    write_predictions(tmp_path, ['a.jpg', 'b.jpg'], format='results').finish()
    results = json.loads((tmp_path / 'predictions.json').read_text())
    assert set(results[0]) == {'image_id', 'category_id', 'bbox', 'score', 'segmentation'}
    assert len(COCO(tmp_path / 'data.json').loadRes(results).anns) == 4


def test_empty_predictions_are_a_valid_dataset(tmp_path, capsys):
    CocoWriter(tmp_path, CLASSES).finish()
    assert not COCO(tmp_path / 'predictions.json').anns
    CocoWriter(tmp_path, CLASSES, format='results').finish()
    assert json.loads((tmp_path / 'predictions.json').read_text()) == []


def test_numeric_file_names_are_image_ids(tmp_path):
    assert write_predictions(tmp_path, ['000000000139.jpg', '000000000285.jpg']).done == {}
    assert CocoWriter(tmp_path, CLASSES).done == {'000000000139.jpg': 139, '000000000285.jpg': 285}
    other_folder = tmp_path / 'other'
    other_folder.mkdir()
    write_predictions(other_folder, ['1.jpg', 'sub/1.jpg'])
    assert CocoWriter(other_folder, CLASSES).done == {'1.jpg': 1, 'sub/1.jpg': 2}


def test_killed_run_is_resumed(tmp_path, capsys):
    names = ['a.jpg', 'b.jpg', 'c.jpg']
    write_predictions(tmp_path, names)
    complete = (tmp_path / 'predictions.jsonl').read_bytes()
    for length in range(len(complete)):
        (tmp_path / 'predictions.jsonl').write_bytes(complete[:length])
        if length % 97 == 0:
            write_predictions(tmp_path, names).finish()
            assert (tmp_path / 'predictions.jsonl').read_bytes() == complete
    assert len(COCO(tmp_path / 'predictions.json').anns) == 6


def test_masks_are_indexed_pngs_with_the_palette():
    labels = np.array([[0, 1], [1, 255]])
    image = Image.open(io.BytesIO(encode_mask(labels, [(10, 20, 30), (40, 50, 60)])))
    assert image.mode == 'P' and np.array_equal(np.asarray(image), labels)
    assert np.array_equal(np.asarray(image.convert('RGB'))[0], [[10, 20, 30], [40, 50, 60]])


@pytest.mark.parametrize('n, min_distance', [(2, 100), (10, 50), (80, 15), (200, 8)])
def test_class_colors_are_distinguishable(n, min_distance):
    colors = np.array(class_colors(n), np.float32)
    lab = cv2.cvtColor(colors[None] / 255, cv2.COLOR_RGB2LAB)[0]
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1000 * np.eye(n)
    assert distances.min() > min_distance  # 2.3 is just noticeable
    assert class_colors(2, [(1, 2, 3), (4, 5, 6)]) == [(1, 2, 3), (4, 5, 6)]
    assert class_colors(2, [(1, 2, 3)] * 2) == class_colors(2)
    assert {text_color(tuple(map(int, color))) for color in colors} <= {(0, 0, 0), (255, 255, 255)}


def draw_boxes(size, boxes, scores=None, with_masks=False, **kwargs):
    sample = Sample(pred_instances=make_instances(boxes, None, scores, size if with_masks else None))
    return draw(np.full((*size, 3), 255, np.uint8), sample, CLASSES, [(200, 0, 0), (0, 0, 200)], **kwargs)


def test_picture_size():
    for size, expected in (((480, 640), (480, 640)), ((64, 128), (192, 384)), ((1, 1), (320, 320))):
        assert draw_boxes(size, [[0, 0, 1, 1]]).shape[:2] == expected
    assert max(draw_boxes((100, 9000), [[0, 0, 50, 50]]).shape) == 4096


def test_line_and_label_sizes_scale_with_the_image():
    def extent(size):
        picture = draw_boxes(size, [[size[1] // 4, size[0] // 4, size[1] // 2, size[0] // 2]])
        colored = (picture[..., 2] > 150) & (picture[..., 1] < 120)
        rows = colored[:, size[1] // 4 : size[1] // 2].mean(1) > 0.15
        return rows.sum() / size[0]

    small, large = extent((400, 600)), extent((2400, 3600))
    assert 0.02 < large < 0.06 and 0.7 < small / large < 1.5


def test_labels_do_not_cover_objects():
    boxes = [[100, 100, 200, 200], [100, 60, 200, 99], [100, 201, 200, 240], [400, 0, 500, 60], [590, 300, 639, 400]]
    scores = [0.91, 0.82, 0.73, 0.64, 0.55]
    texts = []
    picture = draw_boxes((480, 640), boxes, scores)
    for x1, y1, x2, y2 in boxes:
        inside = picture[y1 + 3 : y2 - 2, x1 + 3 : x2 - 2]
        texts.append((inside != 255).any())
    assert not any(texts)
    assert (picture == draw_boxes((480, 640), boxes, scores)).all()


def test_many_detections_low_scores_and_boxes_at_the_edge():
    rng = np.random.RandomState(0)
    corners = rng.randint(0, 400, (120, 2))
    boxes = np.hstack((corners, corners + rng.randint(1, 300, (120, 2)))).tolist()
    assert draw_boxes((480, 640), boxes).shape == (480, 640, 3)
    assert (draw_boxes((480, 640), boxes[:1], [0.1]) == 255).all()
    assert (draw_boxes((480, 640), boxes[:1], [0.1], score_thr=0.05) != 255).any()
    assert (draw_boxes((480, 640), []) == 255).all()


def test_masks_are_drawn_in_the_class_color():
    picture = draw_boxes((400, 400), [[100, 100, 300, 300]], with_masks=True)
    red, green = picture[200, 200, 2], picture[200, 200, 1]
    assert red > 200 > green > 100 and (picture[350, 350] == 255).all()
    rle = Sample(pred_instances=make_instances([[100, 100, 300, 300]]))
    mask = np.zeros((400, 400), np.uint8)
    mask[100:300, 100:300] = 1
    rle['pred_instances'].masks = [coco_mask.encode(np.asfortranarray(mask))]
    rle_picture = draw(np.full((400, 400, 3), 255, np.uint8), rle, CLASSES, [(200, 0, 0), (0, 0, 200)])
    assert np.array_equal(rle_picture, picture)


def test_segmentation_is_drawn_with_a_legend_below():
    labels = torch.zeros(1, 400, 500, dtype=torch.long)
    labels[:, 100:200] = 1
    labels[:, 300:] = 255
    sample = Sample(pred_sem_seg=PixelData(data=labels))
    image = np.full((400, 500, 3), 255, np.uint8)
    picture = draw(image, sample, CLASSES, [(200, 0, 0), (0, 0, 200)])
    assert picture.shape[0] > 400 and picture.shape[1] == 500
    assert picture[50, 50, 2] > picture[50, 50, 0] and picture[150, 50, 0] > picture[150, 50, 2]
    assert (picture[310:390] == 255).all()  # ignored pixels
    assert ((picture[400:] == (0, 0, 200)).all(-1)).sum() > 30  # red's square, BGR
    assert draw(image, sample, CLASSES, legend=False).shape == image.shape
