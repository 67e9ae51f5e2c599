"""Constants and assertions for tests of the tools."""

import numpy as np

from helpers.paths import ROOT

CONFIGS = ROOT / 'configs'
MEAN, STD = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])


def one_line_error(process, *words):
    assert process.returncode == 2, process.stderr
    assert 'Traceback' not in process.stderr + process.stdout
    line = process.stderr.strip().splitlines()[-1]
    assert line.startswith('error: '), process.stderr
    for word in words:
        assert word in line, line


TRAIN, TEST = 'train.py', 'test.py'
DEMO, DETECTOR = CONFIGS / 'demo/upernet.py', CONFIGS / 'demo/mask_rcnn.py'
WITH = '--cfg-options'
