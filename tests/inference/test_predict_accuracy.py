"""`predictions.json` has the same AP by pycocotools as the output of tools/test.py --out."""

import contextlib
import io
import json
import pickle

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from convnext_dense.cli.predict import make_predict_parser, predict
from convnext_dense.datasets import toy_shapes
from helpers.datasets import predictions_as_labels
from helpers.paths import ROOT


def compute_ap(coco, results, kind):
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize('recipe', ['mask_rcnn', pytest.param('cascade', marks=pytest.mark.slow)])
def test_ap_equals_the_test_tool(recipe, checkpoints, tmp_path, run_tool):
    root = tmp_path / 'shapes'
    toy_shapes.write(root, train=1, val=8, size=96)
    args = [checkpoints[recipe], root / 'val', '--device', 'cpu', '--no-pictures', '--out', tmp_path / 'out']
    assert predict(make_predict_parser('').parse_args([*map(str, args)])) == 0
    predictions = json.loads((tmp_path / 'out/predictions.json').read_text())
    labels = root / 'annotations/instances_val.json'
    predictions_as_labels(predictions, labels)
    config = ROOT / f'configs/demo/{recipe}.py'
    process = run_tool(
        'test.py', config, checkpoints[recipe], '--out', tmp_path / 'test.pkl', '--work-dir', tmp_path / 'work',
        '--cfg-options', 'test_dataloader.num_workers=0', 'test_dataloader.persistent_workers=False',
        SHAPES_ROOT=str(root),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(labels)
    test_predictions = [
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
        expected = compute_ap(coco, test_predictions, kind)
        actual = compute_ap(coco, predictions['annotations'], kind)
        assert 0.05 < expected[0] < 0.95
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
