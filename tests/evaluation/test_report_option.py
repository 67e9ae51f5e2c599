"""`tools/test.py --report` as a user runs it."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from convnext_dense.config.evaluation import set_report
from convnext_dense.errors import UsageError
from helpers.datasets import run
from helpers.processes import WITHOUT_WORKERS
from helpers.tools import DEMO, DETECTOR, WITH


@pytest.mark.parametrize('config', [DETECTOR, DEMO])
def test_test_tool_writes_a_report(config, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('SHAPES_ROOT', data)
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    torch.save({'state_dict': MODELS.build(cfg.model).state_dict()}, 'w.pth')
    options = [*WITHOUT_WORKERS, f'experiment_name=report_{config.stem}']
    args = ['test.py', config, 'w.pth', '--work-dir', 'run', '--report']
    assert run(*args, 'report', WITH, *options) == 0
    names = {path.name for path in (tmp_path / 'report').iterdir()}
    suffix = '_segm' if config == DETECTOR else ''
    assert {'images.csv', 'worst_images', f'classes{suffix}.csv', f'confusion{suffix}.png'} <= names
    assert 'by class' in capsys.readouterr().out
    assert run(*args, 'report', WITH, *options) == 2  # nothing is overwritten
    assert "--report 'report' already exists" in capsys.readouterr().err


def test_report_dir():
    config = Config(dict(work_dir='run/test', default_scope='mmdet', test_evaluator=dict(type='mmdet.CocoMetric')))
    set_report(config, None)
    assert config.test_evaluator.type == 'mmdet.CocoMetric'
    set_report(config, '')
    (metric,) = config.test_evaluator
    assert metric.type == 'DetectionReport' and '/run/test/report_2' in metric.report_dir


@pytest.mark.parametrize('evaluator', [dict(type='VOCMetric'), dict(type='IoUMetric', format_only=True), []])
def test_metrics_without_a_report_are_refused(evaluator):
    with pytest.raises(UsageError, match='--report needs'):
        set_report(Config(dict(work_dir='run', test_evaluator=evaluator)), '')
