"""Errors and exit codes of the command line: misspelled arguments, closed output, full disks, bugs in user modules, a
second run in a work dir, a Python without torch."""

import errno
import inspect
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from convnext_dense.cli.exit import MAX_MESSAGE_CHARS, _message_and_code, printable
from convnext_dense.config.launch import check_launcher, is_rank0
from convnext_dense.config.load import load_config, resolve_config_path
from convnext_dense.config.preflight import check_levels
from convnext_dense.datasets import toy_shapes
from convnext_dense.engine.progress import BatchPartition
from convnext_dense.engine.resume import convert_progress
from convnext_dense.engine.work_dir_lock import lock_work_dir
from convnext_dense.errors import UsageError
from convnext_dense.models.convnext import ConvNeXt
from convnext_dense.ops import dispatch
from helpers.paths import ROOT
from helpers.tools import one_line_error

TOOLS = ROOT / 'tools'
DEMO = ROOT / 'configs/demo/mask_rcnn.py'
QUICK_OPTIONS = ['train_cfg.max_epochs=1', 'train_cfg.val_interval=9', 'default_hooks.checkpoint.interval=1']
QUICK_OPTIONS += [
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'default_hooks.logger.interval=1',
]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    toy_shapes.write(folder, train=4, val=2, size=64)
    return folder


@pytest.mark.parametrize(
    'tool, args, suggestion',
    [
        ('train.py', ['c.py', '--resum'], '--resume'),
        ('train.py', ['c.py', '--cfg-option', 'a=1'], '--cfg-options'),
        ('test.py', ['c.py', 'x.pth', '--multi-scale'], '--multiscale'),
        ('weights.py', ['inspect', 'x.pth', '--tabel'], '--table'),
        ('check_data.py', ['--data', 'x', '--jsn'], '--json'),
        ('plot_run.py', ['x', '--smoth', '1'], '--smooth'),
    ],
)
def test_misspelled_option_suggests_the_closest_match(run_tool, tool, args, suggestion):
    process = run_tool(tool, *args)
    assert process.returncode == 2 and process.stderr.splitlines()[-1].endswith(f' (did you mean {suggestion}?)')


def test_debug_shows_the_traceback(run_tool):
    assert 'Traceback' not in run_tool('complexity.py', 'nope.py').stderr
    process = run_tool('complexity.py', 'nope.py', '--debug')
    assert process.returncode == 2 and 'Traceback' in process.stderr
    assert process.stderr.splitlines()[-1].startswith("error: no config 'nope.py'")


@pytest.mark.parametrize(
    'error, code, words',
    [
        (UsageError('bad'), 2, 'error: bad'),
        (FileNotFoundError(2, 'No such file or directory', 'x.json'), 2, 'error: x.json: No such file'),
        (OSError(errno.ENOSPC, 'No space left on device'), 1, 'error: No space left on device: free some space'),
        (OSError(errno.EDQUOT, 'Disk quota exceeded', 'run/log'), 1, 'error: run/log: Disk quota exceeded'),
        (KeyboardInterrupt(), 130, 'interrupted; saved checkpoints are kept'),
        (OSError('of no file'), None, ''),
        (ValueError('a bug'), None, ''),
    ],
)
def test_error_messages_and_exit_codes(error, code, words):
    """Raised in a file of the package: this file would count as a user's module."""
    raise_code = compile('raise error', str(ROOT / 'convnext_dense/errors.py'), 'exec')
    try:
        exec(raise_code, {'error': error, '__name__': 'convnext_dense.errors'})
    except BaseException as exc:
        message_and_code = _message_and_code(exc.with_traceback(exc.__traceback__.tb_next))
    if code is None:
        assert message_and_code is None
    else:
        assert message_and_code[1] == code and message_and_code[0].startswith(words)


def test_printable():
    assert printable('a\x1b[31mred\x07 \udce9 b\ttab\u202e') == 'a\\x1b[31mred\\x07 \\udce9 b\\ttab\\u202e'
    assert printable('größe 図.png') == 'größe 図.png'
    assert (
        len(printable('x' * 10**6)) < MAX_MESSAGE_CHARS
        and printable('x' * MAX_MESSAGE_CHARS) == 'x' * MAX_MESSAGE_CHARS
    )


IMPORTS = """
custom_imports = dict(
    imports=['convnext_dense', 'convnext_dense.models.fp32_heads', 'mine'], allow_failed_imports=False)
"""
USER_MODULES = {  # source of a user module, and the error that it raises
    'at import': ('value = {}["missing"]', 'KeyError'),
    'when it is built': (
        'from mmengine.hooks import Hook\n'
        'from mmengine.registry import HOOKS\n'
        '@HOOKS.register_module()\n'
        'class Mine(Hook):\n'
        '    def __init__(self):\n'
        "        open('/nowhere/at/all')\n",
        'FileNotFoundError',
    ),
    'when it runs': (
        'from mmengine.hooks import Hook\n'
        'from mmengine.registry import HOOKS\n'
        '@HOOKS.register_module()\n'
        'class Mine(Hook):\n'
        '    def before_train(self, runner):\n'
        "        runner + 'text'\n",
        'TypeError',
    ),
}


@pytest.mark.parametrize('case', USER_MODULES)
def test_bug_in_a_user_module_shows_its_traceback(run_tool, tmp_path, data, case):
    text, kind = USER_MODULES[case]
    (tmp_path / 'mine.py').write_text(text)
    hook = '' if case == 'at import' else "custom_hooks = [dict(type='Mine')]\n"
    (tmp_path / 'c.py').write_text(f"_base_ = '{DEMO}'\n{IMPORTS}{hook}")
    process = run_tool(
        'train.py', 'c.py', '--work-dir', 'run', '--cfg-options', *QUICK_OPTIONS, SHAPES_ROOT=data, PYTHONPATH=tmp_path
    )
    assert process.returncode == 1, process.stderr[-3000:]
    assert 'Traceback' in process.stderr and 'mine.py' in process.stderr, process.stderr[-3000:]
    assert process.stderr.splitlines()[-1].startswith(kind), process.stderr[-500:]


def test_lost_connection_shows_traceback_with_debug(run_tool, tmp_path, data):
    raise_statement = "raise TimeoutError(110, 'Connection timed out')"
    (tmp_path / 'mine.py').write_text(USER_MODULES['when it runs'][0].replace("runner + 'text'", raise_statement))
    (tmp_path / 'c.py').write_text(f"_base_ = '{DEMO}'\n{IMPORTS}custom_hooks = [dict(type='Mine')]\n")
    for extra_args in ((), ('--debug',)):
        process = run_tool(
            *('train.py', 'c.py', '--work-dir', f'run{len(extra_args)}', *extra_args, '--cfg-options', *QUICK_OPTIONS),
            **dict(SHAPES_ROOT=data, PYTHONPATH=tmp_path),
        )
        assert process.returncode == 1
        words = 'error: a connection of mine was lost (TimeoutError: [Errno 110] Connection timed out)'
        assert process.stderr.splitlines()[-1].startswith(words), process.stderr[-3000:]
        assert ('Traceback' in process.stderr) == bool(extra_args)


COUNT_READS = """
import os, sys

def count(event, args):
    if event == 'open' and str(args[0]).endswith('.pth') and 'r' in (args[1] or ''):
        print(f'opened {os.path.basename(args[0])}', file=sys.stderr)

sys.addaudithook(count)
"""


def test_checkpoints_are_read_once_per_run(run_tool, tmp_path, data):
    """Opened as often as by `weights.py inspect`, with and without pretrained weights and custom data."""
    (tmp_path / 'sitecustomize.py').write_text(COUNT_READS)
    torch.save(ConvNeXt('atto').state_dict(), tmp_path / 'pretrained.pth')
    init_cfg = "dict(type='PretrainedConvNeXt', checkpoint='pretrained.pth')"
    (tmp_path / 'mine.py').write_text(f"_base_ = '{DEMO}'\nmodel = dict(backbone=dict(init_cfg={init_cfg}))")
    env = dict(SHAPES_ROOT=data, PYTHONPATH=tmp_path)
    train_process = run_tool(
        'train.py', 'mine.py', '--data', data, '--work-dir', 'run', '--cfg-options', *QUICK_OPTIONS, **env
    )
    assert train_process.returncode == 0, train_process.stderr[-3000:]
    checkpoint, two_epochs = 'run/epoch_1.pth', ['train_cfg.max_epochs=2', *QUICK_OPTIONS[1:]]
    n_reads = run_tool('weights.py', 'inspect', checkpoint, **env).stderr.count('opened epoch_1.pth')
    assert train_process.stderr.count('opened pretrained.pth') == n_reads > 0
    for command, n_pretrained in (
        (
            ('train.py', 'mine.py', '--data', data, '--work-dir', 'run', '--resume', '--cfg-options', *two_epochs),
            n_reads,
        ),
        (('train.py', DEMO, '--work-dir', 'new', '--cfg-options', *QUICK_OPTIONS, f'load_from={checkpoint}'), 0),
        (('test.py', 'mine.py', checkpoint), 0),
    ):
        process = run_tool(*command, **env)
        assert process.returncode == 0, process.stderr[-3000:]
        assert process.stderr.count('opened epoch_1.pth') == n_reads, command
        assert process.stderr.count('opened pretrained.pth') == n_pretrained, command
        assert (process.stdout + process.stderr).count(f'ConvNeXt on this CPU: {dispatch.backend_summary()}') == 1


def test_wrong_argument_of_a_user_class_is_a_one_line_error(run_tool, tmp_path, data):
    (tmp_path / 'mine.py').write_text(USER_MODULES['when it is built'][0].replace('self)', 'self, pace=1)'))
    (tmp_path / 'c.py').write_text(f"_base_ = '{DEMO}'\n{IMPORTS}custom_hooks = [dict(type='Mine', speed=3)]\n")
    process = run_tool(
        'train.py', 'c.py', '--work-dir', 'run', '--cfg-options', *QUICK_OPTIONS, SHAPES_ROOT=data, PYTHONPATH=tmp_path
    )
    one_line_error(process, 'the config cannot be built', "unexpected keyword argument 'speed'")


@pytest.mark.parametrize(
    'setting, words',
    [
        ('train_dataloader = dict(dataset=dict(indexes=6))', "unexpected keyword argument 'indexes'"),
        ('optim_wrapper = dict(optimizer=dict(lrr=1))', "unexpected keyword argument 'lrr'"),
        ("param_scheduler = [dict(type='StepLR')]", "missing 1 required positional argument: 'step_size'"),
    ],
)
def test_wrong_argument_of_a_late_built_object_is_a_one_line_error(setting, words, run_tool, tmp_path, data):
    (tmp_path / 'c.py').write_text(f"_base_ = '{DEMO}'\n{setting}\n")
    process = run_tool('train.py', 'c.py', '--work-dir', 'run', '--cfg-options', *QUICK_OPTIONS, SHAPES_ROOT=data)
    assert process.returncode == 2 and 'Traceback' not in process.stderr, process.stderr[-2000:]
    assert re.search(f'^error: the config cannot be built: .*{words}', process.stderr.splitlines()[-1])


# ---- closed output ---------------------------------------------------------------------------------------------------


def run_shell(command: str, folder: Path, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        ['bash', '-c', command], cwd=folder, text=True, capture_output=True, timeout=300, env={**os.environ, **env}
    )


def test_closed_pipe_ends_silently(tmp_path):
    """`| head -1` ends a table without an error message."""
    process = run_shell(f'{sys.executable} {TOOLS}/weights.py list | head -1; echo "${{PIPESTATUS[0]}}"', tmp_path)
    assert process.stderr == '' and process.stdout.splitlines()[0].startswith('name')
    process = run_shell(f'{sys.executable} -u {TOOLS}/weights.py list | true; echo "${{PIPESTATUS[0]}}"', tmp_path)
    assert process.stderr == '' and process.stdout.strip() in ('0', '141')


@pytest.mark.parametrize('redirection', ['| head -1', '>&- 2>&-', '2>&-', '> /dev/full'])
def test_training_continues_after_pipe_closes(tmp_path, data, redirection):
    train = f'{sys.executable} {TOOLS}/train.py {DEMO} --work-dir run --cfg-options {" ".join(QUICK_OPTIONS)}'
    process = run_shell(f'{train} {redirection}; echo "ended with ${{PIPESTATUS[0]}}"', tmp_path, SHAPES_ROOT=str(data))
    assert (tmp_path / 'run/epoch_1.pth').exists(), process.stderr[-3000:]
    assert 'ended with 0' in process.stdout and 'Traceback' not in process.stderr, process.stderr[-3000:]


# ---- where tools run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('tool', sorted(path.name for path in TOOLS.glob('*.py') if path.name != 'environment.py'))
def test_python_without_torch_is_a_one_line_error(tmp_path, tool):
    command = [sys.executable, '-S', '-E', TOOLS / tool, '--help']  # -S: nothing that is installed
    process = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1
    assert 'has no torch' in process.stderr and 'make setup' in process.stderr


def test_config_of_a_package_by_name(run_tool):
    assert Path(resolve_config_path('convnext_dense::cascade/convnext_t.py')).samefile(
        ROOT / 'configs/cascade/convnext_t.py'
    )
    assert 'rtmdet' in resolve_config_path('mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py')
    for name, words in {
        'nowhere::a/b.py': "no package 'nowhere'",
        'mmdet::a/b.py': "no config 'mmdet::a/b.py'",
    }.items():
        with pytest.raises(UsageError, match=words):
            resolve_config_path(name)
    process = run_tool('complexity.py', 'convnext_dense::mask_rcnn/convnext_t.py')
    assert process.returncode == 0 and '48,095,376' in process.stdout


def test_mmdet2_config_is_refused(run_tool, tmp_path):
    (tmp_path / 'old.py').write_text(
        "model = dict(type='MaskRCNN')\ndata = dict(samples_per_gpu=2)\noptimizer = dict(type='SGD', lr=0.02)\n"
        "runner = dict(type='EpochBasedRunner', max_epochs=12)\n"
    )
    one_line_error(run_tool('train.py', 'old.py'), 'old.py is a config of mmdet 2 or mmseg 0')


@pytest.mark.parametrize(
    'name, text, words',
    [
        ('c.yaml', '', 'a config consists of keys and values'),
        ('c.yaml', '- 1\n', 'a config consists of keys and values'),
        ('c.json', '[]', 'a config consists of keys and values'),
        ('c.json', '{"model": 5}', 'model is 5: give a dict'),
        ('c.py', 'model = None', 'has no model'),
        ('a::b.py', '', 'has no model'),
    ],
)
def test_invalid_config_files(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=words) as error:
        load_config(str(tmp_path / name), {})
    assert name in str(error.value) and '\n' not in str(error.value)
    with pytest.raises(UsageError, match="no config '../x::y.py'"):
        resolve_config_path('../x::y.py')


def test_circular_base_config_is_refused(tmp_path):
    (tmp_path / 'c.py').write_text("_base_ = 'c.py'")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)  # reached sooner
    try:
        with pytest.raises(UsageError, match='_base_ refers back to it') as error:
            load_config(str(tmp_path / 'c.py'), {})
    finally:
        sys.setrecursionlimit(limit)
    assert 'c.py' in str(error.value) and '\n' not in str(error.value)


def test_mismatched_feature_levels_are_refused(run_tool, tmp_path):
    check_levels(Config.fromfile(DEMO).model)
    check_levels(dict(neck=[dict(num_outs=3), dict(type='X')], rpn_head=dict(anchor_generator=dict(strides=[4, 8]))))
    (tmp_path / 'c.py').write_text(f"_base_ = '{DEMO}'\nmodel = dict(neck=dict(num_outs=4))")
    words = ['the neck returns 4 feature levels (num_outs)', 'rpn_head has anchors for 5']
    one_line_error(run_tool('train.py', 'c.py'), *words)


def test_launchers(monkeypatch):
    config = Config(dict(env_cfg=dict(dist_cfg=dict(backend='nccl'))))
    for launcher, variable in (('pytorch', 'WORLD_SIZE'), ('slurm', 'SLURM_NTASKS'), ('mpi', 'OMPI_COMM_WORLD_SIZE')):
        monkeypatch.setenv(variable, '2')
        with pytest.raises(UsageError, match=f'--launcher {launcher} needs a GPU for each process'):
            check_launcher(config, launcher)
    config.env_cfg.dist_cfg.backend = 'gloo'
    check_launcher(config, 'pytorch')
    with pytest.raises(UsageError, match='MASTER_ADDR is not set: .* mpirun -x MASTER_ADDR=ADDRESS'):
        check_launcher(config, 'mpi')
    check_launcher(Config(), 'none')
    for variable in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'):
        monkeypatch.delenv('RANK', raising=False)
        assert is_rank0()
        monkeypatch.setenv(variable, '1')
        assert not is_rank0()
        monkeypatch.delenv(variable)


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_second_run_in_a_work_dir_is_refused(start_tool, run_tool, tmp_path, data):
    config = [str(DEMO), '--work-dir', str(tmp_path / 'run'), '--epochs', '5000', '--cfg-options']
    config += [
        'default_hooks.logger.interval=1',
        'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
    ]
    first_run = start_tool(tmp_path / 'log', 'train.py', *config, SHAPES_ROOT=str(data))
    try:
        deadline = time.monotonic() + 120
        while 'Epoch(train)' not in first_run.output and time.monotonic() < deadline:
            time.sleep(0.2)
        second = run_tool('train.py', *config[:3], SHAPES_ROOT=data)
        one_line_error(second, 'run is in use by another run (process', 'another --work-dir')
        one_line_error(
            run_tool('train.py', *config[:3], '--resume', 'auto', SHAPES_ROOT=data), 'is in use by another run'
        )
    finally:
        os.kill(first_run.pid, signal.SIGKILL)
        first_run.wait()
    lock_work_dir(tmp_path / 'run')  # the lock is free immediately
    assert re.match(rf'process {os.getpid()} on ', (tmp_path / 'run/.lock').read_text())


def test_changed_data_order_is_reported():
    unknown = BatchPartition(world_size=1, batch_size=2, accumulation_steps=1, iters_per_epoch=8, num_images=16)
    old, new = replace(unknown, order_digest='a'), replace(unknown, order_digest='b')
    assert convert_progress(1, 8, old, new, True)[1].startswith('The training images have another order')
    for known in (old, unknown):
        assert convert_progress(1, 8, known, old, True) == (8, None)
    warning = convert_progress(1, 8, old, replace(new, world_size=2, batch_size=1), True)[1]
    assert 'total batch unchanged' in warning and 'another order' in warning
