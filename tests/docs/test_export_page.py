"""The program in docs/export.md, run without PyTorch and OpenMMLab."""

import os
import re
import subprocess
import sys
import venv

import numpy as np
import pytest
from PIL import Image

from helpers.exported import BOXES, make_meta, save_detector, save_segmentor
from helpers.pages import PAGES, code_blocks

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
BLOCKED = ('torch', 'torchvision', 'cv2', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'convnext_dense', 'onnx')


@pytest.fixture(scope='module')
def program():
    section = PAGES['docs/export.md'].split('## ONNX Runtime alone')[1]
    (code,) = (code for language, code in code_blocks(section) if language == 'python')
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    return code


@pytest.fixture
def files(tmp_path, program):
    """The program, a detector with masks, a segmentor, and a photo that is red above and blue below."""
    pixels = np.zeros((90, 60, 3), np.uint8)
    pixels[:40, :, 0], pixels[40:, :, 2] = 255, 255
    Image.fromarray(pixels).save(tmp_path / 'photo.png')
    (tmp_path / 'consumer.py').write_text(program)
    save_detector(tmp_path / 'detector.onnx')
    save_segmentor(tmp_path / 'segmentor.onnx')
    return tmp_path


def check_program(files, run):
    lines = run('detector.onnx', 'photo.png').split('\n')
    label, score, *box = lines[0].split()
    assert label == 'triangle' and abs(float(score) - 40 / 90) < 0.01
    assert np.allclose([float(side) for side in box], BOXES[0] * [60, 90, 60, 90], atol=0.01)
    assert lines[1:] == ['']  # the second box has a score below 0.3
    with Image.open(files / 'mask.png') as mask:
        assert mask.size == (60, 90)
        assert np.array_equal(np.asarray(mask), np.repeat([255, 0], 45)[:, None].repeat(60, 1))
    assert run('segmentor.onnx', 'photo.png') == ''
    with Image.open(files / 'mask.png') as mask:
        assert np.array_equal(np.unique(mask), [0, 2])
        labels = np.asarray(mask)
        assert (labels[:38] == 0).all() and (labels[42:] == 2).all()


def test_program_runs_without_torch_and_openmmlab(files):
    code = f'import sys, runpy; sys.modules.update(dict.fromkeys({BLOCKED}))\nsys.argv = sys.argv[1:]'
    code += "\nrunpy.run_path(sys.argv[0], run_name='__main__')"

    def run(*args):
        command = [sys.executable, '-c', code, 'consumer.py', *args]
        result = subprocess.run(command, cwd=files, text=True, capture_output=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    check_program(files, run)


@pytest.mark.slow
def test_program_in_a_fresh_environment(files, tmp_path_factory):
    """Only the packages that the page lists are installed."""
    folder = tmp_path_factory.mktemp('environment')
    venv.create(folder, with_pip=True)
    python = folder / ('Scripts' if os.name == 'nt' else 'bin') / 'python'
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', 'onnxruntime', 'numpy', 'pillow'], check=True)
    installed = subprocess.run([python, '-m', 'pip', 'list'], text=True, capture_output=True, check=True).stdout
    assert not re.search(r'^(torch|mm\w+|onedl\S*|convnext\S*) ', installed, re.MULTILINE)

    def run(*args):
        command = [python, '-I', 'consumer.py', *args]
        return subprocess.run(command, cwd=files, text=True, capture_output=True, check=True).stdout

    check_program(files, run)


def test_resizing_equals_the_test_pipeline(program, tmp_path):
    """The inputs by the program and by the pipeline differ only by rounding."""
    import onnxruntime

    from convnext_dense import load_model

    photo = np.random.RandomState(0).randint(0, 255, (200, 333, 3)).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / 'photo.png')
    model = load_model(save_detector(tmp_path / 'detector.onnx', make_meta('mask_rcnn')))
    expected = model.prepare(photo[..., ::-1])['inputs'].flip(0).numpy()
    lines = program.split('inputs = ')[0]
    scope = {}
    argv, sys.argv = sys.argv, ['', str(tmp_path / 'detector.onnx'), str(tmp_path / 'photo.png')]
    try:
        exec(lines, scope)
    finally:
        sys.argv = argv
    assert scope['onnxruntime'] is onnxruntime
    difference = np.abs(scope['pixels'].transpose(2, 0, 1).astype(int) - expected.astype(int))
    assert difference.max() <= 1, difference.max()
