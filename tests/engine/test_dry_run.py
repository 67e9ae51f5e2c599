"""`--dry-run`: everything is checked, two batches are drawn, time and memory are measured, and nothing is saved."""

import re
import time

import cv2
import numpy as np
import pytest

from convnext_dense.engine import dry_run
from helpers.planned_runs import LossByPlan, planned_run
from helpers.processes import WITHOUT_WORKERS
from helpers.tools import DEMO, DETECTOR, one_line_error


@pytest.mark.parametrize('config, images', [(DETECTOR, 2), (DEMO, 4)])
def test_dry_run_output(run_tool, tmp_path, data, config, images):
    args = ('--dry-run', '--work-dir', 'run', '--image-size', 64, '--data', data, '--seed', 0)
    process = run_tool('train.py', config, *args, '--cfg-options', *WITHOUT_WORKERS)
    assert process.returncode == 0, process.stderr[-3000:]
    out = process.stdout
    assert 'data: ' in out and 'schedule fitted to 8 training images' in out and 'training on 8 images' in out
    assert re.search(r'dry run: an iteration takes [\d.]+ s and [\d.]+ GiB of memory; [\d,]+ of them about', out)
    assert not [*tmp_path.rglob('*.pth')] and (tmp_path / f'run/{config.name}').is_file()
    (picture,) = tmp_path.glob('run/*/batches.png')
    pixels = cv2.imread(str(picture))
    assert pixels.shape[0] % 2 == 0 and pixels.shape[1] % images == 0
    for row in np.split(pixels, 2):
        for cell in np.split(row, images, axis=1):
            assert cell.std() > 5
    assert 'wandb' not in (tmp_path / f'run/{config.name}').read_text()


@pytest.mark.parametrize('slow_iteration, steps', [(0, 1), (1e9, 2)])
def test_slow_iterations_are_not_repeated(tmp_path, monkeypatch, slow_iteration, steps):
    monkeypatch.setattr(dry_run, 'SLOW_ITERATION', slow_iteration)
    monkeypatch.setattr(dry_run, 'draw_batch', lambda *_: [np.zeros((8, 8, 3), np.uint8)])
    run, train_steps, original = planned_run([1.0] * 8, tmp_path), [], LossByPlan.train_step
    monkeypatch.setattr(
        LossByPlan, 'train_step', lambda *args, **kwargs: train_steps.append(1) or original(*args, **kwargs)
    )
    dry_run.dry_run(run, draw=None)
    assert len(train_steps) == steps
    (picture,) = tmp_path.glob('*/batches.png')
    assert cv2.imread(str(picture)).shape == (16, 8, 3) and not [*tmp_path.rglob('*.pth')]


def test_bad_input_is_a_one_line_error(run_tool, tmp_path):
    process = run_tool('train.py', DETECTOR, '--dry-run', '--data', 'nowhere', '--work-dir', 'run')
    one_line_error(process, 'nowhere does not exist')


def test_heartbeat(monkeypatch, capsys):
    monkeypatch.setattr(dry_run, 'HEARTBEAT_SECONDS', 0.05)
    for enabled in (True, False):
        with dry_run.heartbeat(enabled):
            time.sleep(0.3)
        lines = capsys.readouterr().err.splitlines()
        assert (len(lines) >= 2) == enabled and all(line.startswith('dry run: at work for') for line in lines)


def test_stack_rows():
    rows = [[np.full((2, 3, 3), value, np.uint8) for value in (1, 2)], [np.full((1, 2, 3), 3, np.uint8)]]
    picture = dry_run.stack_rows(rows)
    assert picture.shape == (4, 6, 3) and (picture[:2, 3:] == 2).all()
    assert (picture[2, :2] == 3).all() and (picture[3] == 255).all()
