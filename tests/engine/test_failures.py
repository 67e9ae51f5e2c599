"""Failures during training: diagnosis, skipped steps, replaced images, no processes left behind."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import EpochBasedTrainLoop
from torch import nn
from torch.utils.data import DataLoader

from convnext_dense import errors
from convnext_dense.config.training import set_checkpoint_retention, set_max_unreadable
from convnext_dense.datasets import toy_shapes
from convnext_dense.engine import failures
from convnext_dense.engine.build import register_checkpoint_loader
from convnext_dense.engine.datasets import IMAGE_SUFFIXES, read_error
from convnext_dense.engine.failures import diagnose, saved_activation_bytes
from convnext_dense.engine.loops import ResumableEpochLoop
from convnext_dense.errors import RunInterrupted, TrainingError, UsageError
from convnext_dense.models.convnext import ConvNeXt
from helpers.paths import ROOT
from helpers.planned_runs import Planned, planned_run

SMALL = ('train_dataloader.batch_size=2', 'total_batch=4', 'default_hooks.logger.interval=1')


@pytest.fixture
def data(tmp_path):
    toy_shapes.write(tmp_path / 'shapes', train=8, val=2, size=64)
    return tmp_path / 'shapes'


@pytest.fixture
def train(start_tool, data, tmp_path):
    def start(*options, length='--iters=4', log='run.log', extra_args=(), config='upernet', work_dir=None, **env):
        config = ROOT / f'configs/demo/{config}.py'
        args = [
            config,
            '--work-dir',
            work_dir or tmp_path / 'run',
            length,
            *extra_args,
            '--cfg-options',
            *SMALL,
            *options,
        ]
        return start_tool(tmp_path / log, 'train.py', *args, SHAPES_ROOT=str(data), **env)

    return start


def last_line(process) -> str:
    return process.output.strip().splitlines()[-1]


def wait_for_training(process) -> None:
    while 'Iter(train)' not in process.output:
        time.sleep(0.05)
        assert process.process.is_alive(), process.output


def running_processes(*sessions: int, timeout: float = 15) -> list[str]:
    """Processes of these sessions (one per tool) that still run after `within` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        remaining = []
        for folder in Path('/proc').glob('[0-9]*'):
            with suppress(OSError):  # the process has just ended
                state, *numbers = folder.joinpath('stat').read_text().rpartition(') ')[2].split()[:4]
                if int(numbers[2]) in sessions and state != 'Z':
                    remaining.append(folder.joinpath('cmdline').read_text().replace('\0', ' '))
        if not remaining or time.monotonic() > deadline:
            return remaining
        time.sleep(0.1)


def break_images(data: Path, names, split='train') -> None:
    for n, name in enumerate(names):
        path = data / split / f'{name:06d}.png'
        path.write_bytes([b'', b'no image', path.read_bytes()[:200]][n % 3])


@pytest.mark.parametrize('extra_args, n_bad, exit_code', [((), 1, 0), (('--max-unreadable', '3'), 3, 0), ((), 2, 1)])
def test_unreadable_images_are_reported_and_replaced(extra_args, n_bad, exit_code, train, data, tmp_path):
    break_images(data, range(2, 2 + n_bad))
    process = train(extra_args=extra_args, length='--iters=8')
    assert process.wait() == exit_code, process.output
    for n in range(2, 2 + n_bad):
        assert process.output.count(f'{n:06d}.png: ') >= 1
    if exit_code:
        line = last_line(process)
        assert line.startswith('error: 2 images cannot be read') and '--max-unreadable' in line, line
        assert 'interrupted.pth; resume with --resume' in line
    else:
        assert f'({n_bad}/' in process.output and process.output.count('; replaced by another sample (') == n_bad


@pytest.mark.parametrize('suffix', IMAGE_SUFFIXES)
def test_read_error_for_every_image_suffix(suffix, tmp_path):
    for name in (f'a{suffix}', f'b{suffix.upper()}'):
        (tmp_path / name).write_bytes(b'no image')
        assert read_error(str(tmp_path / name)) == 'not a valid image'
    (tmp_path / 'c.pkl').write_bytes(b'no image')
    assert read_error(str(tmp_path / 'c.pkl')) is None  # read by a pipeline of its own


def test_unreadable_evaluation_image_is_an_error(train, data):
    break_images(data, [1], 'val')
    process = train()
    assert process.wait() == 1
    assert last_line(process).startswith('error: ') and last_line(process).endswith('000001.png: the file is empty')


def test_killed_dataloader_worker_is_diagnosed(train, tmp_path):
    process = train(length='--iters=4000')
    wait_for_training(process)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    start = time.monotonic()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait(60) == 1 and time.monotonic() - start < 60
    line = last_line(process)
    assert line.startswith('error: ') and 'DataLoader worker was killed' in line, process.output
    assert 'num_workers' in line
    assert not running_processes(process.pid)


def test_worker_signal_during_diagnosis_is_diagnosed(tmp_path, monkeypatch):
    errors_of_worker = [RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. ')]

    def interrupted_diagnose(error, *args):
        if errors_of_worker:
            raise errors_of_worker.pop()
        return diagnose(error, *args)

    def disconnect(runner):
        raise ConnectionResetError(104, 'Connection reset by peer')

    monkeypatch.setattr('convnext_dense.engine.runner.diagnose', interrupted_diagnose)
    with pytest.raises(TrainingError, match='a DataLoader worker was killed'):
        planned_run([1.0] * 4, tmp_path, hooks=[Caller(1, disconnect)]).train()


def test_killed_run_leaves_no_processes(train, data):
    """Also with workers that block on a full pipe."""
    shutil.rmtree(data)
    toy_shapes.write(data, train=24, val=2, size=256)
    workers = 'train_dataloader.num_workers=2', 'train_dataloader.batch_size=4', 'total_batch=4'
    process = train(*workers, length='--epochs=100', config='mask_rcnn')
    while 'Epoch(train)' not in process.output:
        time.sleep(0.05)
        assert process.process.is_alive(), process.output
    time.sleep(2)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not running_processes(process.pid)


def test_workers_exit_with_parent_for_every_start_method(tmp_path):
    for method in ('fork', 'spawn', 'forkserver'):
        code = (
            'import time\n'
            'from functools import partial\n'
            'from torch.utils.data import DataLoader\n'
            'from convnext_dense.engine.workers import worker_init\n\n'
            "if __name__ == '__main__':\n"
            f'    options = dict(num_workers=2, multiprocessing_context={method!r}, persistent_workers=True)\n'
            '    loader = DataLoader([*range(8)], worker_init_fn=partial(worker_init, None), **options)\n'
            '    print(sum(len(batch) for batch in loader), flush=True)\n'
            '    time.sleep(60)\n'
        )
        (tmp_path / 'loads.py').write_text(code)
        command = [sys.executable, tmp_path / 'loads.py']
        with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
            assert process.stdout.readline() == b'8\n'
            process.kill()
        assert not running_processes(process.pid), method


@pytest.mark.parametrize(
    'error', [ConnectionResetError(104, 'Connection reset by peer'), EOFError(), FileNotFoundError(2, 'No such file')]
)
def test_worker_disconnect_is_diagnosed(error):
    batches = iter(DataLoader(list(range(8)), num_workers=1))
    batches._data_queue = Mock(get=Mock(side_effect=error))
    with pytest.raises(type(error)) as exc_info:
        next(batches)
    assert diagnose(exc_info.value).startswith('a DataLoader worker was killed')


def test_worker_signal_while_another_error_is_written(tmp_path, monkeypatch):
    """Reading from the worker fails first; torch's SIGCHLD handler raises while the rank writes the error file."""
    message, write = 'DataLoader worker (pid 1) is killed by signal: Killed.', failures.write_atomic
    signals = iter([RuntimeError(message)])

    def interrupted(path, content):
        for error in signals:
            raise error
        write(path, content)

    monkeypatch.setattr(failures, 'write_atomic', interrupted)
    monkeypatch.setattr('convnext_dense.engine.runner.get_world_size', lambda: 2)
    monkeypatch.setattr(torch.distributed, 'new_group', lambda **_: None)
    runner = planned_run(['no number'], tmp_path)
    with pytest.raises(TrainingError, match=r'^rank 0: a DataLoader worker was killed \(is killed by signal: Killed'):
        runner.train()
    assert 'DataLoader worker' in (Path(runner.log_dir) / failures.RANK_ERROR_FILE.format(0)).read_text()


@pytest.mark.parametrize('world_size', [1, 2])
def test_lost_connection_means_peer_only_if_distributed(world_size, monkeypatch):
    monkeypatch.setattr('convnext_dense.engine.failures.get_world_size', lambda: world_size)
    peer_lost_message = 'lost connection to another rank'
    gloo_error = RuntimeError('[gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:31445')
    assert (
        diagnose(gloo_error) == peer_lost_message
        if world_size > 1
        else diagnose(gloo_error).startswith('a connection was lost (Runtime')
    )
    assert (diagnose(torch.distributed.DistStoreError('timed out')) == peer_lost_message) == (world_size > 1)

    try:  # as storage and trackers do: an error of their own class with the actual one as its cause
        try:
            raise ConnectionResetError(104, 'Connection reset by peer')
        except ConnectionResetError as error:
            raise Exception('failed to upload') from error
    except Exception as error:
        assert diagnose(error) == (
            'a connection of test_failures was lost (ConnectionResetError: [Errno 104] Connection reset by peer): '
            'check that the other end is up; --resume continues from the last checkpoint, --debug shows the traceback'
        )
    assert diagnose(FileNotFoundError(2, 'No such file')) is None


DDP = ['model_wrapper_cfg.type=MMDistributedDataParallel', 'model_wrapper_cfg.device_ids=None']
DDP += ['env_cfg.dist_cfg.backend=gloo', 'model.decode_head.norm_cfg.type=BN', 'model.auxiliary_head.norm_cfg.type=BN']


def start_two_ranks(train, options=()):
    with socket.socket() as free_socket:
        free_socket.bind(('127.0.0.1', 0))
        port = str(free_socket.getsockname()[1])
    return [
        train(
            *DDP,
            *options,
            length='--iters=4000',
            log=f'rank{rank}.log',
            extra_args=('--launcher', 'pytorch'),
            **dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port),
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize('killed', [0, 1])
def test_killed_rank_ends_other_ranks(killed, train):
    ranks = start_two_ranks(train)
    wait_for_training(ranks[0])
    os.kill(ranks[killed].pid, signal.SIGKILL)
    start = time.monotonic()
    surviving_rank = ranks[1 - killed]
    assert surviving_rank.wait(60) == 1 and time.monotonic() - start < 60
    assert f'rank {killed} exited without an error message' in last_line(surviving_rank), surviving_rank.output
    assert not running_processes(*(rank.pid for rank in ranks))


TORCHRUN = """
import os, runpy, sys, torch
torch.set_num_threads(1)
torch.distributed.init_process_group('gloo')  # mmengine's own start wants a GPU
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.parametrize('killed', ['torchrun', 'rank'])
def test_killed_torchrun_or_rank_leaves_no_processes(killed, data, tmp_path):
    (tmp_path / 'start.py').write_text(TORCHRUN)
    options = [*SMALL, *DDP, 'train_dataloader.num_workers=2']
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node=2', '--rdzv-backend=c10d']
    command += ['--rdzv-endpoint=localhost:0', tmp_path / 'start.py', ROOT / 'tools/train.py']
    command += [ROOT / 'configs/demo/upernet.py', '--launcher=pytorch', '--iters=4000', '--work-dir', tmp_path / 'run']
    log = tmp_path / 'log'
    with open(log, 'w') as out:
        agent = subprocess.Popen(
            [*command, '--cfg-options', *options],
            **dict(stdout=out, stderr=out, start_new_session=True, env={**os.environ, 'SHAPES_ROOT': str(data)}),
        )
    try:
        while 'Iter(train)' not in log.read_text():
            time.sleep(0.05)
            assert agent.poll() is None, log.read_text()
        ranks = Path(f'/proc/{agent.pid}/task/{agent.pid}/children').read_text().split()
        os.kill(agent.pid if killed == 'torchrun' else int(ranks[0]), signal.SIGKILL)
        assert agent.wait(60) != 0
        assert not running_processes(*map(int, ranks), agent.pid, timeout=30), log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)
    words = 'stopped by SIGHUP. ' if killed == 'torchrun' else 'error: lost connection to another rank: rank '
    assert words in log.read_text(), log.read_text()[-3000:]


def test_error_of_other_rank_is_reported(train, tmp_path):
    ranks = start_two_ranks(train)
    wait_for_training(ranks[0])
    children = Path(f'/proc/{ranks[1].pid}/task/{ranks[1].pid}/children').read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert [rank.wait(60) for rank in ranks] == [1, 1]
    for rank in ranks:
        assert 'rank 1: a DataLoader worker was killed' in last_line(rank), rank.output
    assert not running_processes(*(rank.pid for rank in ranks))


def test_signal_to_one_rank_stops_all_with_one_checkpoint(train, tmp_path):
    ranks = start_two_ranks(train)
    wait_for_training(ranks[0])
    os.killpg(ranks[1].pid, signal.SIGTERM)
    assert [rank.wait(60) for rank in ranks] == [143, 143], ranks[0].output
    saved = torch.load(tmp_path / 'run/interrupted.pth', weights_only=False)
    assert saved['meta']['batch_partition']['world_size'] == 2
    assert not running_processes(*(rank.pid for rank in ranks))
    resumed = train(length='--iters=4000', extra_args=('--resume',), log='alone.log')
    wait_for_training(resumed)
    os.kill(resumed.pid, signal.SIGKILL)
    resumed.wait()
    assert 'Resumed with 1 x 2 (was 2 x 2) images per iteration; total batch unchanged' in resumed.output
    assert f'iter: {2 * saved["meta"]["iter"]}' in resumed.output  # two accumulated batches instead of one


@pytest.mark.skipif(os.geteuid() != 0, reason='mounts a small disk')
def test_full_disk_skips_checkpoint_and_continues(train, tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=100m', 'none', disk], capture_output=True).returncode:
        pytest.skip('no disk can be mounted here')
    try:
        process = train('default_hooks.checkpoint.interval=2', length='--iters=8', work_dir=disk / 'run')
        checkpoint = disk / 'run/iter_4.pth'
        while not (disk / 'run/last_checkpoint').exists():
            time.sleep(0.02)
            assert process.process.is_alive(), process.output
        filler = disk / 'filler'
        with open(filler, 'wb', buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(2**16))
        assert process.wait() == 0, process.output
        assert 'MB more' in process.output and 'Keeping ' in process.output
        assert 'Traceback' not in process.output
        assert (disk / 'run/last_checkpoint').read_text() == str(checkpoint)
        torch.load(checkpoint, weights_only=False)
        assert not list((disk / 'run').glob('*.part'))
        filler.unlink()
        shutil.copytree(disk / 'run', tmp_path / 'run')  # a larger disk
    finally:
        subprocess.run(['umount', disk], check=True)
    resumed = train('default_hooks.checkpoint.interval=2', length='--iters=8', extra_args=('--resume',))
    assert resumed.wait() == 0, resumed.output
    assert (tmp_path / 'run/last_checkpoint').read_text().endswith('iter_16.pth')


NAN, INF = float('nan'), float('inf')


@pytest.mark.parametrize('factor', [NAN, INF, 0.0])
def test_nonfinite_steps_are_skipped_and_finally_stop_the_run(factor, tmp_path):
    reference = planned_run([1.0] * 4, tmp_path / 'fine')
    reference.train()
    runner = planned_run([1.0] * 4 + [1.0, factor] * 5 + [1.0] * 2, tmp_path / 'run')
    images = 'image_9.png' if factor else ''
    with pytest.raises(
        TrainingError,
        match=f'3 optimizer steps in a row.*{images}.*learning rate.*interrupted.pth; resume with',
    ):
        runner.train()
    saved = torch.load(tmp_path / 'run/interrupted.pth', weights_only=False)
    assert saved['meta']['iter'] == 5
    for name, value in reference.model.state_dict().items():
        if value.is_floating_point():  # the last valid state: after two optimizer steps
            assert torch.equal(saved['state_dict'][name], value), name
    steps = {int(state['step']) for state in saved['optimizer']['state'].values()}
    assert steps == {2}


def test_single_nonfinite_steps_are_reported_and_training_continues(tmp_path):
    runner = planned_run([1.0, 1.0, NAN, 1.0, 1.0, 1.0, 1.0, 1.0], tmp_path)
    runner.train()
    assert all(t.isfinite().all() for t in runner.model.state_dict().values())
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert log.count('Non-finite loss or gradient (image_2.png, image_3.png): optimizer step skipped') == 1


def test_nonfinite_batch_skips_its_accumulated_step(tmp_path):
    plan = [1.0] * 8 + [NAN] + [1.0] * 7
    runner = planned_run(plan, tmp_path, accumulative_counts=4)
    runner.train()
    steps = {int(state['step']) for state in runner.optim_wrapper.optimizer.state.values()}
    assert steps == {1} and all(t.isfinite().all() for t in runner.model.state_dict().values())


def test_health_check_false(tmp_path):
    runner = planned_run([1.0, 1.0, NAN, 1.0, 1.0, 1.0], tmp_path, cfg=dict(health_check=False))
    runner.train()
    assert any(not t.isfinite().all() for t in runner.model.state_dict().values())
    assert 'Non-finite' not in next(tmp_path.glob('*/*.log')).read_text()


def test_signal_saves_without_health_check(tmp_path):
    def terminate(runner):
        os.kill(os.getpid(), signal.SIGTERM)

    runner = planned_run([1.0] * 8, tmp_path, hooks=[Caller(1, terminate)], cfg=dict(health_check=False))
    with pytest.raises(RunInterrupted, match='stopped by SIGTERM. Saved .*interrupted.pth'):
        runner.train()
    assert torch.load(tmp_path / 'interrupted.pth', weights_only=False)['meta']['iter'] == 2


def test_ema_ignores_nonfinite_batch(tmp_path):
    runner = planned_run([1.0, 1.0, NAN, 1.0, 1.0, 1.0], tmp_path, hooks=[dict(type='EMAHook', update_buffers=True)])
    runner.train()
    saved = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)
    for part in ('state_dict', 'ema_state_dict'):
        assert all(value.isfinite().all() for value in saved[part].values()), part


@pytest.mark.parametrize(
    'losses, accumulation, warnings',
    [
        ([0.0] * 49 + [1.0] + [0.0] * 49, 1, 0),
        ([0.0] * 50, 1, 1),
        ([1.0] + [0.0] * 50 + [1.0] + [0.0] * 60, 1, 1),
        ([1.0, 0.0, 0.0, 0.0] * 60, 4, 0),
        ([0.0] * 100, 2, 1),
        ([0.0] * 98, 2, 0),
    ],
)
def test_long_zero_loss_warns_once(losses, accumulation, warnings, tmp_path, monkeypatch):
    plan = [factor for factor in losses for _ in range(2)]  # two images per batch
    runner, lines = planned_run(plan, tmp_path, model='Scaled', accumulative_counts=accumulation), []
    monkeypatch.setattr(runner.logger, 'warning', lambda line, *_: lines.append(line))
    runner.train()
    lines = [line for line in lines if 'The loss was exactly 0 in 50 optimizer steps in a row' in line]
    assert len(lines) == warnings
    assert all('a single class' in line and 'tools/check_data.py' in line for line in lines)


class Caller(Hook):
    """Calls something at the n-th iteration."""

    def __init__(self, n, call):
        self.n, self.call = n, call

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.n:
            self.call(runner)


def test_pipeline_set_by_hook_is_used(tmp_path):
    paths = []

    def new_pipeline(info):
        paths.append(info['img_path'])
        return Planned.sample(info)

    def switch(runner):
        runner.train_loop.dataloader.dataset.pipeline = new_pipeline

    planned_run([1.0] * 8, tmp_path, hooks=[Caller(1, switch)]).train()
    assert paths[-1] == 'image_7.png' and len(paths) >= 4


def test_overrides_apply_to_types_given_as_classes(tmp_path):
    runner = planned_run([1.0] * 4, tmp_path, train_cfg=dict(type=EpochBasedTrainLoop, max_epochs=1))
    runner.register_hook(dict(type=CheckpointHook, interval=1))
    runner.train()
    assert type(runner.train_loop) is ResumableEpochLoop
    assert not any(type(hook) is CheckpointHook for hook in runner.hooks)


def test_training_set_smaller_than_batch_is_refused(tmp_path):
    runner = planned_run([1.0], tmp_path, train_cfg=dict(by_epoch=False, max_iters=2), loader=dict(drop_last=True))
    with pytest.raises(UsageError, match='smaller than one batch'):
        runner.train()


def test_resume_restores_drawn_seed(tmp_path):
    initial = planned_run([1.0] * 8, tmp_path / 'first', seed=None)
    initial.train()
    register_checkpoint_loader()
    two_epochs = dict(by_epoch=True, max_epochs=2)
    path = str(tmp_path / 'first/epoch_1.pth')
    resumed = planned_run([1.0] * 8, tmp_path / 'again', train_cfg=two_epochs, seed=None, load_from=path)
    resumed.train()
    assert resumed.seed == initial.seed and resumed.iter == 8
    assert resumed.train_loop.dataloader.batch_sampler.sampler.seed == initial.seed


def test_out_of_memory_lists_options_and_savings():
    backbone = ConvNeXt(dict(depths=(1, 1, 2, 1), channels=(8, 16, 24, 32)))
    with pytest.raises(RuntimeError) as exc_info:
        torch.empty(2**60)
    line = diagnose(exc_info.value, nn.ModuleDict(dict(backbone=backbone)), (4, 3, 64, 96))
    assert line.startswith('out of memory with a batch of 4 x 3 x 64 x 96')
    for option in (
        'model.backbone.with_cp=True model.backbone.cp_scope=block',
        'model.backbone.with_cp=True model.backbone.cp_scope=mlp',
        '--amp-dtype bfloat16',
        'train_dataloader.batch_size=2',
    ):
        assert option in line
    assert diagnose(torch.OutOfMemoryError('CUDA out of memory')) == 'out of memory'
    assert diagnose(ValueError('no')) is None


@pytest.mark.parametrize('settings', [{}, dict(with_cp=True, cp_scope='mlp'), dict(with_cp=True)], ids=str)
def test_saved_activation_bytes_equal_measured(settings, monkeypatch):
    monkeypatch.setattr('convnext_dense.ops.dispatch._disabled_depth', 1)  # the reference implementation, as on a GPU
    backbone = ConvNeXt(dict(depths=(1, 1, 2, 1), channels=(8, 16, 24, 32)), **settings).train()
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = backbone(torch.rand(2, 3, 64, 96))
    param_ptrs = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    measured_bytes = sum(t.untyped_storage().nbytes() for key, t in storages.items() if key not in param_ptrs)
    assert outputs and saved_activation_bytes(backbone, (2, 3, 64, 96)) == pytest.approx(measured_bytes, rel=0.02)
    backbone.with_cp = False
    sizes = [saved_activation_bytes(backbone, (2, 3, 64, 96), scope) for scope in (None, 'mlp', 'block')]
    assert sizes[0] > 2 * sizes[1] and sizes[1] > 1.1 * sizes[2]


def test_invalid_retention_and_unreadable_limits_are_refused():
    from mmengine.config import Config

    for value in ('-1', '1.5', '200%', 'few'):
        with pytest.raises(UsageError, match='--max-unreadable'):
            set_max_unreadable(Config(), value)
    for evaluator, best in (
        (dict(type='CocoMetric', metric=['bbox', 'segm']), 'coco/bbox_mAP'),
        (dict(type='CocoMetric', metric='segm'), 'auto'),
        (dict(type='VOCMetric'), 'auto'),
    ):
        config = Config(dict(val_evaluator=evaluator, default_hooks=None))
        set_checkpoint_retention(config, 1)
        assert config.default_hooks.checkpoint.save_best == best
    config = Config(dict(default_scope='mmseg', val_evaluator=dict(type='IoUMetric')))
    for value, limit in (('0', 0), ('3', 3), ('0.5%', 0.005), ('0.002', 0.002)):
        set_max_unreadable(config, value)
        assert config.max_unreadable == limit
    with pytest.raises(UsageError, match='--max-keep-ckpts 0'):
        set_checkpoint_retention(config, 0)
    set_checkpoint_retention(config, 2)
    hook = config.default_hooks.checkpoint
    assert (hook.max_keep_ckpts, hook.save_best, hook.rule) == (2, 'mIoU', 'greater')


def test_max_keep_ckpts_keeps_last_and_best(train, tmp_path):
    process = train(
        'default_hooks.checkpoint.interval=1', 'train_cfg.val_interval=2', extra_args=('--max-keep-ckpts', '2')
    )
    assert process.wait() == 0, process.output
    actual = sorted(path.name for path in (tmp_path / 'run').glob('*.pth'))
    assert actual[1:] == ['iter_6.pth', 'iter_8.pth'] and actual[0].startswith('best_mIoU_iter_'), actual


def test_one_line_of_worker_error():
    error = TrainingError(
        'Caught UnreadableImage in DataLoader worker process 0.\nOriginal Traceback\n'
        'convnext_dense.errors.UnreadableImageError: /data/1.png: the file is empty\n'
    )
    assert errors.one_line(error) == '/data/1.png: the file is empty'
