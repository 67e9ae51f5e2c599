"""TensorBoard and W&B receive what the local log has; the others are called as their packages want it."""

import copy
import importlib.util
import json
import struct
import sys

import pytest
from mmengine.config import Config
from mmengine.registry import VISBACKENDS

import convnext_dense
from convnext_dense.config.trackers import TRACKERS, NoCodeWandbVisBackend, add_trackers
from convnext_dense.errors import UsageError
from helpers.recipes import load
from helpers.tools import DEMO, TRAIN, WITH, one_line_error

WANDB = importlib.util.find_spec('wandb') is not None


def read_scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """The run's own log: (step, value) by name."""
    (file,) = folder.glob('*/vis_data/scalars.json')
    actual = {}
    for line in file.read_text().splitlines():
        record = json.loads(line)
        step = record.pop('step')
        for name, value in record.items():
            actual.setdefault(name, []).append((step, value))
    return actual


def test_trackers_log_what_local_log_has(run_tool, data, short, tmp_path):
    arguments = [TRAIN, DEMO, '--work-dir', 'run', '--loggers', 'tensorboard', *(['wandb'] if WANDB else [])]
    options = [*short, 'train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'default_hooks.logger.interval=1']
    (tmp_path / 'private.py').write_text('')
    env = dict(SHAPES_ROOT=data, WANDB_MODE='offline', WANDB_SILENT='true', WANDB_DIR='')
    process = run_tool(*arguments, WITH, *options, **env)
    assert process.returncode == 0, process.stderr[-3000:]
    expected = read_scalars(tmp_path / 'run')
    assert {'loss', 'lr', 'base_lr', 'mIoU', 'decode.loss_ce'} < set(expected) and len(expected['loss']) == 2

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = tmp_path.glob('run/*/vis_data/events.out.tfevents.*')
    accumulator = EventAccumulator(str(events), size_guidance=dict(scalars=0)).Reload()
    actual = {name: [(e.step, e.value) for e in accumulator.Scalars(name)] for name in accumulator.Tags()['scalars']}
    assert actual.keys() == expected.keys()
    for name, points in actual.items():
        assert [step for step, _ in points] == [step for step, _ in expected[name]], name
        assert [v for _, v in points] == pytest.approx([v for _, v in expected[name]], rel=1e-6), name  # float32
    if WANDB:
        offline = read_offline(next(tmp_path.glob('run/*/vis_data/wandb/offline-run-*/*.wandb')))
        assert offline['run'] == ('demo-upernet', 'run') and not offline['files']
        values = {name: [v for _, v in points] for name, points in expected.items() if name != 'iter'}
        assert offline['history'] == values
        assert offline['iters'] == [1, 2, 2]  # the evaluation's, too


def iter_records(file):
    """Records of a W&B file: a header, then a LevelDB log: 32 KiB blocks with parts of records (crc, length, kind)."""
    content, position, record = file.read_bytes(), 7, b''
    assert content.startswith(b':W&B')
    while position < len(content):
        block_bytes = 32768 - position % 32768
        if block_bytes < 7:
            position += block_bytes
            continue
        length, kind = struct.unpack('<HB', content[position + 4 : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # all of it, or the last part
            yield record
            record = b''


def read_offline(file) -> dict:
    """What W&B would upload: names, its history without its own columns, artifacts of code."""
    from wandb.proto.wandb_internal_pb2 import Record

    actual = dict(history={}, iters=[], files=[])
    for content in iter_records(file):
        record = Record()
        record.ParseFromString(content)
        kind = record.WhichOneof('record_type')
        if kind == 'run':
            actual['run'] = (record.run.project, record.run.display_name)
        elif kind == 'artifact':
            actual['files'].append(record.artifact.name)
        for item in record.history.item:
            name, value = '/'.join(item.nested_key) or item.key, json.loads(item.value_json)
            if name == 'iter':
                actual['iters'].append(value)
            elif not name.startswith('_'):
                actual['history'].setdefault(name, []).append(value)
    return actual


def backend_types(config: Config) -> list[str]:
    return [backend['type'] for backend in config.visualizer.vis_backends]


@pytest.fixture
def no_wandb(monkeypatch):
    """Settings do not need the package itself."""
    monkeypatch.setitem(sys.modules, 'wandb', type(sys)('wandb'))
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.delenv('WANDB_PROJECT', raising=False)


def test_existing_backends_are_kept(no_wandb, monkeypatch, tmp_path):
    config = load('cascade/convnext_t')
    config.work_dir = 'work_dirs/a'
    add_trackers(config, [])
    assert backend_types(config) == ['LocalVisBackend']
    add_trackers(config, ['wandb', 'tensorboard', 'wandb'])
    assert config.visualizer.type == 'DetLocalVisualizer'
    assert backend_types(config) == ['LocalVisBackend', 'NoCodeWandbVisBackend', 'TensorboardVisBackend']
    init = config.visualizer.vis_backends[1].init_kwargs
    assert (init.project, init.name, init.resume) == ('cascade-convnext_t', 'a', 'allow')
    original = copy.deepcopy(config.to_dict())
    add_trackers(config, ['tensorboard', 'wandb'])
    assert config.to_dict() == original

    monkeypatch.setenv('WANDB_PROJECT', 'mine')
    (tmp_path / 'my.py').write_text("work_dir = 'x'")
    minimal = Config.fromfile(tmp_path / 'my.py')
    add_trackers(minimal, ['wandb'])
    assert minimal.visualizer.type == 'Visualizer' and backend_types(minimal) == [
        'LocalVisBackend',
        'NoCodeWandbVisBackend',
    ]
    assert 'project' not in minimal.visualizer.vis_backends[1].init_kwargs
    user_config = Config(
        dict(visualizer=dict(type='Visualizer', vis_backends=[dict(type='WandbVisBackend', commit=False)]))
    )
    add_trackers(user_config, ['wandb'])
    assert user_config.visualizer.vis_backends == [dict(type='WandbVisBackend', commit=False)]


def test_resumed_run_continues_wandb_run(no_wandb, tmp_path):
    def start_run(resumed: bool) -> str:
        config = load('upernet/convnext_t')
        config.work_dir = str(tmp_path)
        add_trackers(config, ['wandb'], resumed)
        folder = tmp_path / f'2026010{len(list(tmp_path.iterdir())) + 1}_120000/vis_data'
        folder.mkdir(parents=True)
        config.dump(folder / 'config.py')
        return config.visualizer.vis_backends[1].init_kwargs.id

    run_id = start_run(False)
    assert start_run(True) == run_id
    new_run_id = start_run(False)
    assert new_run_id != run_id and start_run(True) == new_run_id
    (tmp_path / '20260105_120000/vis_data').mkdir(parents=True)
    (tmp_path / '20260105_120000/vis_data/config.py').write_text('visualizer = dict(')
    assert start_run(True) == new_run_id


class Package(type(sys)):
    """Stands for a package and whatever is called of it; remembers the calls by name."""

    def __init__(self, name, calls=None):
        super().__init__(name)
        self.__dict__.update(calls={} if calls is None else calls, __path__=[])

    def __getattr__(self, name):
        return Package(name, self.calls)

    def __getitem__(self, key):
        return Package(key, self.calls)

    def __setitem__(self, key, value):
        self.calls.setdefault('set', []).append(((key, value), {}))

    def __call__(self, *args, **kwargs):
        self.calls.setdefault(self.__name__, []).append((args, kwargs))
        return Package(self.__name__, self.calls)


# By tracker: what starts a run, its arguments, what logs numbers, and variables that it reads.
STARTS = {
    'mlflow': ('set_experiment', ('upernet-convnext_t',), {}, 'log_metrics', {}),
    'clearml': ('init', (), dict(project_name='upernet-convnext_t', task_name='a'), 'report_scalar', {}),
    'dvclive': ('Live', (), dict(save_dvc_exp=False), 'log_metric', {}),
    'aim': ('Run', (), dict(experiment='upernet-convnext_t'), 'track', {}),
    'neptune': ('init_run', (), dict(mode='offline', name='a', source_files=[]), 'append', {}),
    'mlflow at a server': ('set_tracking_uri', ('http://x',), {}, 'log_metrics', dict(MLFLOW_TRACKING_URI='http://x')),
    'neptune online': ('init_run', (), dict(name='a'), 'append', dict(NEPTUNE_API_TOKEN='t', NEPTUNE_PROJECT='w/p')),
}


@pytest.mark.parametrize('name', STARTS)
def test_other_trackers_get_the_numbers(name, monkeypatch, tmp_path):
    start, args, kwargs, log, env = STARTS[name]
    for variable in ('MLFLOW_TRACKING_URI', 'MLFLOW_EXPERIMENT_NAME', 'CLEARML_PROJECT', 'NEPTUNE_API_TOKEN'):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    tracker, calls = TRACKERS[name.split()[0]], {}
    for module in (*tracker.modules, 'neptune.types'):
        monkeypatch.setitem(sys.modules, module, Package(module, calls))
    monkeypatch.chdir(tmp_path)
    config = load('upernet/convnext_t')
    config.work_dir = str(tmp_path / 'work_dirs/a')
    add_trackers(config, [name.split()[0]])
    settings = config.visualizer.vis_backends[1]
    backend = VISBACKENDS.build({**settings, 'save_dir': str(tmp_path / 'vis_data')})
    backend.add_config(config)
    backend.add_scalars(dict(loss=0.5, mIoU=41.5), step=3)
    actual_args, actual_kwargs = calls[start][0]
    assert actual_args == args and kwargs.items() <= actual_kwargs.items()
    assert 'mode' not in actual_kwargs or 'mode' in kwargs
    read_scalars = repr(calls[log])
    assert '0.5' in read_scalars and '41.5' in read_scalars
    assert '.pth' not in settings.get('artifact_suffix', ())


def test_wandb_without_a_network(no_wandb, tmp_path):
    stand_in = sys.modules['wandb']
    stand_in.Error = type('CommError', (Exception,), {})

    def init(**settings):
        raise stand_in.Error('Run initialization has timed out after 90.0 sec.\nPlease try increasing the timeout')

    stand_in.init = init
    with pytest.raises(UsageError, match='timed out after 90.0 sec; set WANDB_MODE=offline'):
        VISBACKENDS.build(dict(type='NoCodeWandbVisBackend', save_dir=str(tmp_path))).add_config(Config())


def test_bad_input(run_tool, monkeypatch):
    """Before data are looked for: there are none."""
    config = load('upernet/convnext_t')
    for name, tracker in TRACKERS.items():
        monkeypatch.setitem(sys.modules, tracker.modules[-1], None)
        with pytest.raises(UsageError, match=f'--loggers {name}: .*pip install {name}'):
            add_trackers(config, [name])
    if WANDB:
        command = [TRAIN, DEMO, '--loggers', 'wandb', WITH, 'train_dataloader.dataset.data_root=gone']
        process = run_tool(*command, HOME='/nonexistent', NETRC='/nonexistent', WANDB_API_KEY='')
        one_line_error(process, '--loggers wandb', 'wandb login', 'WANDB_MODE=offline')


def test_old_backend_name_is_registered():
    assert VISBACKENDS.get('RunWandbVisBackend') is VISBACKENDS.get('NoCodeWandbVisBackend') is NoCodeWandbVisBackend
    assert convnext_dense.RunWandbVisBackend is NoCodeWandbVisBackend
