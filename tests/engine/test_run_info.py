"""run.json: writing and reading the facts of a training session."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import convnext_dense
from convnext_dense.engine.run_info import ParamGroup, read_run_info
from convnext_dense.errors import UsageError
from helpers.paths import ROOT
from helpers.planned_runs import planned_run

BY_ITER = dict(by_epoch=False, max_iters=4)


def latest_session(work_dir):
    return max(path for path in work_dir.iterdir() if path.is_dir())


@pytest.fixture(scope='module')
def recorded_dir(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('run')
    planned_run([1.0] * 8, work_dir, accumulative_counts=2).train()
    return latest_session(work_dir)


@pytest.fixture
def log_dir(recorded_dir, tmp_path):
    """The log folder of a session, which a test may change."""
    return shutil.copytree(recorded_dir, tmp_path / recorded_dir.name)


def test_session_writes_run_json(log_dir):
    info = read_run_info(log_dir)
    assert (info.world_size, info.batch_size, info.accumulation_steps, info.total_batch) == (1, 2, 2, 4)
    assert (info.by_epoch, info.max_epochs, info.max_iters, info.iters_per_epoch) == (True, 1, 4, 4)
    assert (info.start_epoch, info.start_iter, info.precision, info.config_file) == (0, 0, 'float32', None)
    assert info.param_groups == [ParamGroup('decay', None, 0.01, 1.0, 0.01, 6)] and info.layer_lr_scales == {}
    assert info.versions['torch'] == torch.__version__
    assert info.versions['convnext_dense'] == convnext_dense.__version__


def test_resumed_session_records_start(tmp_path):
    planned_run([1.0] * 8, tmp_path / 'first').train()
    path = str(tmp_path / 'first/epoch_1.pth')
    two_epochs = dict(by_epoch=True, max_epochs=2)
    planned_run([1.0] * 8, tmp_path / 'again', train_cfg=two_epochs, load_from=path).train()
    info = read_run_info(latest_session(tmp_path / 'again'))
    assert (info.start_epoch, info.start_iter, info.max_iters) == (1, 4, 8)


def test_iteration_based_length(tmp_path):
    planned_run([1.0] * 8, tmp_path, train_cfg=BY_ITER).train()
    info = read_run_info(latest_session(tmp_path))
    assert (info.by_epoch, info.max_epochs, info.max_iters) == (False, None, 4)


def test_layer_lrs_before_warmup(start_tool, data, tmp_path):
    config = 'configs/demo/upernet.py'
    args = ['--work-dir', tmp_path / 'run', '--iters=1', '--cfg-options', 'train_dataloader.batch_size=4']
    process = start_tool(
        tmp_path / 'log',
        'train.py',
        ROOT / config,
        *args,
        'train_cfg.val_interval=9',
        SHAPES_ROOT=data,
    )
    assert process.wait() == 0, process.output
    info = read_run_info(latest_session(tmp_path / 'run'))
    assert info.config_file.endswith(config)
    base = max(group.lr for group in info.param_groups)
    scales = info.layer_lr_scales
    assert len(scales) > 4 and max(scales.values()) == 1.0 and scales[0] == min(scales.values())
    for group in info.param_groups:
        assert group.lr == pytest.approx(base * group.lr_scale) and group.num_params > 0
        assert group.name == f'layer_{group.layer_id}_{"decay" if group.weight_decay else "no_decay"}'


def test_missing_file_and_unknown_keys(log_dir, tmp_path):
    assert read_run_info(tmp_path) is None
    info = read_run_info(log_dir)
    content = json.loads((log_dir / 'run.json').read_text())
    (log_dir / 'run.json').write_text(json.dumps(content | dict(more=1, batch_size=3)))
    assert read_run_info(log_dir) == replace(info, batch_size=3)


@pytest.mark.parametrize(
    'text',
    ['', '{', '[]', '{}', 'null', '[' * 10000, '{"param_groups": [3]}', '{"param_groups": {}}'],
)
def test_damaged_file_is_reported(text, log_dir):
    (log_dir / 'run.json').write_text(text)
    with pytest.raises(UsageError, match='run.json is damaged'):
        read_run_info(log_dir)


@pytest.mark.parametrize('key, value', [('world_size', '8'), ('batch_size', 1.5), ('versions', []), ('by_epoch', 1)])
def test_values_of_wrong_type_are_refused(key, value, log_dir):
    content = json.loads((log_dir / 'run.json').read_text())
    (log_dir / 'run.json').write_text(json.dumps(content | {key: value}))
    with pytest.raises(UsageError, match=key):
        read_run_info(log_dir)
