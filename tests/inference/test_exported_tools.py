"""tools/predict.py and tools/test.py with exported models."""

import json
import pickle

import cv2
import numpy as np
import pytest
from PIL import Image

from convnext_dense.cli import predict as tool
from convnext_dense.errors import UsageError
from helpers.datasets import run
from helpers.exported import BOXES, make_meta, save_detector, save_openvino, save_segmentor
from helpers.processes import WITHOUT_WORKERS
from helpers.tools import DEMO, DETECTOR, WITH

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')


@pytest.fixture(scope='module')
def images(folder):
    (folder / 'photos').mkdir()
    for i, (height, width) in enumerate([(60, 90), (90, 60), (60, 90)]):
        image = np.zeros((height, width, 3), np.uint8)
        image[..., 2] = 102  # red
        cv2.imwrite(str(folder / f'photos/{i}.png'), image)
    return folder / 'photos'


def predict(*args):
    return tool.predict(tool.make_predict_parser('').parse_args([*map(str, args)]))


@pytest.mark.parametrize('suffix', ['.onnx', '.xml'])
def test_detections_of_a_folder(suffix, detector, images, tmp_path):
    path = detector
    if suffix == '.xml':
        pytest.importorskip('openvino')
        path = save_openvino(tmp_path / 'detector.xml', detector)
    assert predict(path, images, '--out', tmp_path / 'out', '--batch-size', 2) == 0
    content = json.loads((tmp_path / 'out/predictions.json').read_text())
    assert [c['name'] for c in content['categories']] == ['disc', 'square', 'triangle', 'cross']
    assert len(content['annotations']) == 6 and len(list((tmp_path / 'out/pictures').iterdir())) == 3
    annotation = content['annotations'][0]
    x1, y1, x2, y2 = BOXES[0] * [90, 60, 90, 60]
    assert annotation['bbox'] == pytest.approx([x1, y1, x2 - x1, y2 - y1]) and annotation['score'] == pytest.approx(0.4)
    assert annotation['category_id'] == 3 and annotation['segmentation']['size'] == [60, 90]
    assert predict(path, images, '--out', tmp_path / 'out', '--batch-size', 2, '--resume') == 0


def test_segmentation_of_a_folder(segmentor, images, tmp_path):
    assert predict(segmentor, images, '--out', tmp_path / 'out', '--device', 'cpu') == 0
    for i, size in enumerate([(90, 60), (60, 90), (90, 60)]):
        with Image.open(tmp_path / f'out/masks/{i}.png') as mask:
            assert mask.size == size and not np.asarray(mask).any()


BAD_INPUT = {
    'multiscale': ('segmentor', ['--multiscale'], 'multiscale for segmentation is not in an exported model'),
    'tile': ('segmentor', ['--tile', '64'], 'tile needs logits'),
    'precision': ('detector', ['--amp-dtype', 'bfloat16'], 'amp_dtype bfloat16: an exported model runs in'),
    'device': ('detector', ['--device', 'cuda'], 'onnxruntime-gpu'),
    'class': ('detector', ['--classes', 'dics'], "no class 'dics': did you mean disc?"),
    'config': ('detector', ['--config', str(DEMO)], 'is a model for detection, the config is for segmentation'),
}


@pytest.mark.parametrize('case', BAD_INPUT)
def test_bad_input_is_a_one_line_error_before_any_output(case, detector, segmentor, images, tmp_path):
    name, options, message = BAD_INPUT[case]
    path = dict(detector=detector, segmentor=segmentor)[name]
    with pytest.raises(UsageError) as error:
        predict(path, images, '--out', tmp_path / 'out', *options)
    assert message in str(error.value) and '\n' not in str(error.value) and not (tmp_path / 'out').exists()


def write_labels(root):
    """Replace the labels of a toy data set by the hand-made detector's predictions."""
    path = root / 'annotations/instances_val.json'
    content = json.loads(path.read_text())
    content['annotations'] = [
        dict(
            id=1 + 2 * k + i, image_id=image['id'], category_id=(3, 1)[i], iscrowd=0,
            bbox=[float(v) for v in (box[0], box[1], box[2] - box[0], box[3] - box[1])],
            area=float((box[2] - box[0]) * (box[3] - box[1])),
            segmentation=[[0, 0, image['width'], 0, image['width'], image['height'] / (2, 4)[i], 0,
                           image['height'] / (2, 4)[i]]],
        )
        for k, image in enumerate(content['images'])
        for i, box in enumerate(BOXES[:2] * np.float32([image['width'], image['height']] * 2))
    ]  # fmt: skip
    path.write_text(json.dumps(content))


@pytest.fixture
def toy_dataset(tmp_path, monkeypatch):
    from convnext_dense.datasets import toy_shapes

    toy_shapes.write(tmp_path / 'shapes', train=2, val=3, size=64)
    monkeypatch.setenv('SHAPES_ROOT', str(tmp_path / 'shapes'))
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'shapes'


def run_test(*args, name):
    return run('test.py', *args, '--work-dir', 'run', WITH, *WITHOUT_WORKERS, f'experiment_name={name}')


def assert_perfect(capsys):
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert 'box AP 100.0 ' in last_line and 'mask AP 100.0 ' in last_line


def test_test_tool_evaluates_a_detector(toy_dataset, detector, tmp_path, capsys):
    write_labels(toy_dataset)
    args = [DETECTOR, detector, '--out', 'out.pkl', '--report', 'report', '--show-dir', 'shown']
    assert run_test(*args, name='exported_detector') == 0
    assert_perfect(capsys)
    predictions = pickle.loads((tmp_path / 'out.pkl').read_bytes())
    assert len(predictions) == 3 and predictions[0]['pred_instances']['labels'].tolist() == [2, 0]
    assert (tmp_path / 'report/images.csv').is_file()
    assert len([p for p in (tmp_path / 'shown').rglob('*') if p.is_file()]) == 3
    config = next((tmp_path / 'run').rglob('config.py')).read_text()
    assert "type='ExportedModel'" in config and 'detector.onnx' in config


def test_test_tool_evaluates_a_segmentor(toy_dataset, tmp_path, capsys):
    """The labels are the hand-made segmentor's predictions: the strongest channel."""
    for path in (toy_dataset / 'val').glob('*.png'):
        image = cv2.imread(str(path))[..., ::-1]
        cv2.imwrite(str(toy_dataset / 'labels/val' / path.name), image.argmax(2).astype(np.uint8) + 1)
    path = save_segmentor(tmp_path / 'segmentor.onnx')
    assert run_test(DEMO, path, '--out', 'masks', '--report', 'report', name='exported_segmentor') == 0
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert float(last_line.split('aAcc')[1].split()[0]) > 95, (
        last_line
    )  # resizing to the test scale and back changes edges
    assert len(list((tmp_path / 'masks').iterdir())) == 3 and (tmp_path / 'report/images.csv').is_file()


BAD_TEST_INPUT = {
    'multiscale': ('segmentor', DEMO, ['--multiscale'], '--multiscale does not work with an exported model'),
    'compile': ('detector', DETECTOR, ['--compile'], '--compile does not work with an exported model'),
    'model': ('detector', DETECTOR, [WITH, 'model.test_cfg.rcnn.score_thr=0.1'], 'model.test_cfg.rcnn.score_thr does'),
    'task': ('segmentor', DETECTOR, [], 'is a model for segmentation, the config is for detection'),
    'file': ('text', DETECTOR, [], 'is not an ONNX model, or is truncated'),
    'none': ('absent', DETECTOR, [], "no checkpoint 'absent.onnx'"),
    'classes': ('three', DETECTOR, [], 'has 3 classes, the config has 4'),
}


@pytest.mark.parametrize('case', BAD_TEST_INPUT)
def test_bad_input_of_the_test_tool(case, toy_dataset, detector, segmentor, tmp_path, capsys):
    name, config, options, message = BAD_TEST_INPUT[case]
    (tmp_path / 'text.onnx').write_text('no model')
    paths = dict(detector=detector, segmentor=segmentor, text=tmp_path / 'text.onnx', absent='absent.onnx')
    if name == 'three':
        paths['three'] = save_detector(tmp_path / 'three.onnx', make_meta('mask_rcnn', classes=('a', 'b', 'c')))
    assert run('test.py', config, paths[name], '--work-dir', 'run', *options) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith('error: ') and message in line


def test_custom_data_must_have_the_classes_of_the_model(toy_dataset, detector, tmp_path, capsys):
    write_labels(toy_dataset)
    args = [
        '--data',
        toy_dataset,
        '--val-ann',
        toy_dataset / 'annotations/instances_val.json',
        '--val-images',
        toy_dataset / 'val',
    ]
    assert run_test(DETECTOR, detector, *args, name='exported_data') == 0
    assert_perfect(capsys)
    other_classes = save_detector(tmp_path / 'other.onnx', make_meta('mask_rcnn', classes=('cat', 'dog', 'cow', 'fox')))
    assert run_test(DETECTOR, other_classes, *args, name='exported_other') == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('error: ') and 'category-without-class' in error
