"""`predictions.json` is as good as what tools/test.py --out writes: the same AP by pycocotools."""

import contextlib
import io
import json
import pickle

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from convnext_dense.cli.predict import make_predict_parser, predict
from convnext_dense.datasets import toy_shapes
from helpers.paths import ROOT


def ap(coco, results, kind):
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def as_ground_truth(predictions, path):
    """A labeled split of some of the predictions themselves, a little displaced: made weights know no shapes."""
    annotations = []
    rng = np.random.RandomState(0)
    for annotation in predictions['annotations'][::7]:
        x, y, w, h = annotation['bbox']
        shift = rng.randint(0, 3)
        mask = np.roll(coco_mask.decode(annotation['segmentation']), shift, 1)
        if mask.sum() < 4:
            continue
        rle = coco_mask.encode(np.asfortranarray(mask))
        annotations.append(
            {
                **{key: annotation[key] for key in ('image_id', 'category_id', 'iscrowd')},
                'id': len(annotations) + 1,
                'bbox': [x + shift, y, w, h],
                'area': float(mask.sum()),
                'segmentation': {**rle, 'counts': rle['counts'].decode()},
            }
        )
    content = {key: predictions[key] for key in ('images', 'categories')}
    path.write_text(json.dumps({**content, 'annotations': annotations}))


@pytest.mark.parametrize('recipe', ['mask_rcnn', pytest.param('cascade', marks=pytest.mark.slow)])
def test_ap_is_that_of_the_test_tool(recipe, checkpoints, tmp_path, run_tool):
    root = tmp_path / 'shapes'
    toy_shapes.write(root, train=1, val=8, size=96)
    args = [checkpoints[recipe], root / 'val', '--device', 'cpu', '--no-pictures', '--out', tmp_path / 'out']
    assert predict(make_predict_parser('').parse_args([*map(str, args)])) == 0
    predictions = json.loads((tmp_path / 'out/predictions.json').read_text())
    labels = root / 'annotations/instances_val.json'
    as_ground_truth(predictions, labels)
    config = ROOT / f'configs/demo/{recipe}.py'
    process = run_tool(
        'test.py', config, checkpoints[recipe], '--out', tmp_path / 'test.pkl', '--work-dir', tmp_path / 'work',
        '--cfg-options', 'test_dataloader.num_workers=0', 'test_dataloader.persistent_workers=False',
        SHAPES_ROOT=str(root),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(labels)
    dumped = [
        dict(
            image_id=sample['img_id'], category_id=int(label) + 1, score=float(score),
            bbox=[box[0], box[1], box[2] - box[0], box[3] - box[1]], segmentation=rle,
        )
        for sample in pickle.loads((tmp_path / 'test.pkl').read_bytes())
        for label, score, box, rle in zip(
            *(sample['pred_instances'][key].tolist() for key in ('labels', 'scores', 'bboxes')),
            sample['pred_instances']['masks'],
        )
    ]  # fmt: skip
    for kind in ('bbox', 'segm'):
        by_tool = ap(coco, dumped, kind)
        ours = ap(coco, predictions['annotations'], kind)
        assert 0.05 < by_tool[0] < 0.95
        np.testing.assert_allclose(ours, by_tool, rtol=0, atol=1e-6)
