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
    def start(*options, length='--iters=4', log='run.log', more=(), config='upernet', work_dir=None, **env):
        config = ROOT / f'configs/demo/{config}.py'
        args = [config, '--work-dir', work_dir or tmp_path / 'run', length, *more, '--cfg-options', *SMALL, *options]
        return start_tool(tmp_path / log, 'train.py', *args, SHAPES_ROOT=str(data), **env)

    return start


def last_line(process) -> str:
    return process.output.strip().splitlines()[-1]


def wait_until_it_trains(process) -> None:
    while 'Iter(train)' not in process.output:
        time.sleep(0.05)
        assert process.process.is_alive(), process.output


def left_of(*sessions: int, within: float = 15) -> list[str]:
    """Processes of these sessions (one per tool) that still run after `within` seconds."""
    end = time.monotonic() + within
    while True:
        left = []
        for folder in Path('/proc').glob('[0-9]*'):
            with suppress(OSError):  # it has just ended
                state, *numbers = folder.joinpath('stat').read_text().rpartition(') ')[2].split()[:4]
                if int(numbers[2]) in sessions and state != 'Z':
                    left.append(folder.joinpath('cmdline').read_text().replace('\0', ' '))
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.1)


def break_images(data: Path, names, split='train') -> None:
    for n, name in enumerate(names):
        path = data / split / f'{name:06d}.png'
        path.write_bytes([b'', b'no image', path.read_bytes()[:200]][n % 3])


@pytest.mark.parametrize('more, n_bad, ends', [((), 1, 0), (('--max-unreadable', '3'), 3, 0), ((), 2, 1)])
def test_unreadable_images_are_reported_and_replaced(more, n_bad, ends, train, data, tmp_path):
    break_images(data, range(2, 2 + n_bad))
    process = train(more=more, length='--iters=8')
    assert process.wait() == ends, process.output
    for n in range(2, 2 + n_bad):
        assert process.output.count(f'{n:06d}.png: ') >= 1
    if ends:
        line = last_line(process)
        assert line.startswith('error: 2 images cannot be read') and '--max-unreadable' in line, line
        assert 'interrupted.pth; resume with --resume' in line
    else:
        assert f'({n_bad}/' in process.output and process.output.count('; replaced by another sample (') == n_bad


@pytest.mark.parametrize('ending', IMAGE_SUFFIXES)
def test_read_error_for_every_image_suffix(ending, tmp_path):
    for name in (f'a{ending}', f'b{ending.upper()}'):
        (tmp_path / name).write_bytes(b'no image')
        assert read_error(str(tmp_path / name)) == 'not a valid image'
    (tmp_path / 'c.npy').write_bytes(b'no image')
    assert read_error(str(tmp_path / 'c.npy')) is None  # read by a pipeline of its own


def test_unreadable_evaluation_image_is_an_error(train, data):
    break_images(data, [1], 'val')
    process = train()
    assert process.wait() == 1
    assert last_line(process).startswith('error: ') and last_line(process).endswith('000001.png: the file is empty')


def test_killed_dataloader_worker_is_diagnosed(train, tmp_path):
    process = train(length='--iters=4000')
    wait_until_it_trains(process)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    begin = time.monotonic()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait(60) == 1 and time.monotonic() - begin < 60
    line = last_line(process)
    assert line.startswith('error: ') and 'DataLoader worker was killed' in line, process.output
    assert 'num_workers' in line
    assert not left_of(process.pid)


def test_worker_signal_during_diagnosis_is_diagnosed(tmp_path, monkeypatch):
    errors_of_worker = [RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. ')]

    def interrupted(error, *args):
        if errors_of_worker:
            raise errors_of_worker.pop()
        return diagnose(error, *args)

    def disconnect(runner):
        raise ConnectionResetError(104, 'Connection reset by peer')

    monkeypatch.setattr('convnext_dense.engine.runner.diagnose', interrupted)
    with pytest.raises(TrainingError, match='a DataLoader worker was killed'):
        planned_run([1.0] * 4, tmp_path, hooks=[Caller(1, disconnect)]).train()


def test_killed_run_leaves_no_processes(train, data):
    """Also with workers that block on a full pipe that nobody reads."""
    shutil.rmtree(data)
    toy_shapes.write(data, train=24, val=2, size=256)
    workers = 'train_dataloader.num_workers=2', 'train_dataloader.batch_size=4', 'total_batch=4'
    process = train(*workers, length='--epochs=100', config='mask_rcnn')
    while 'Epoch(train)' not in process.output:
        time.sleep(0.05)
        assert process.process.is_alive(), process.output
    time.sleep(2)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not left_of(process.pid)


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
        assert not left_of(process.pid), method


@pytest.mark.parametrize(
    'lost', [ConnectionResetError(104, 'Connection reset by peer'), EOFError(), FileNotFoundError(2, 'No such file')]
)
def test_worker_disconnect_is_diagnosed(lost):
    batches = iter(DataLoader(list(range(8)), num_workers=1))
    batches._data_queue = Mock(get=Mock(side_effect=lost))
    with pytest.raises(type(lost)) as caught:
        next(batches)
    assert diagnose(caught.value).startswith('a DataLoader worker was killed')


def test_death_of_a_worker_may_be_signalled_while_another_error_is_written(tmp_path, monkeypatch):
    """Reading from the worker fails first; torch's handler of SIGCHLD raises while the rank writes that down."""
    died, write = 'DataLoader worker (pid 1) is killed by signal: Killed.', failures.write_atomic
    signals = iter([RuntimeError(died)])

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


@pytest.mark.parametrize('world', [1, 2])
def test_lost_connection_means_peer_only_if_distributed(world, monkeypatch):
    monkeypatch.setattr('convnext_dense.engine.failures.get_world_size', lambda: world)
    gone = 'lost connection to another rank'
    of_gloo = RuntimeError('[gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:31445')
    assert diagnose(of_gloo) == gone if world > 1 else diagnose(of_gloo).startswith('a connection was lost (Runtime')
    assert (diagnose(torch.distributed.DistStoreError('timed out')) == gone) == (world > 1)

    try:  # as storage and trackers word it: of their own class, around the one that says what happened
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


def two_ranks(train, options=()):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    return [
        train(
            *DDP,
            *options,
            length='--iters=4000',
            log=f'rank{rank}.log',
            more=('--launcher', 'pytorch'),
            **dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port),
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize('killed', [0, 1])
def test_killed_rank_ends_other_ranks(killed, train):
    ranks = two_ranks(train)
    wait_until_it_trains(ranks[0])
    os.kill(ranks[killed].pid, signal.SIGKILL)
    begin = time.monotonic()
    other = ranks[1 - killed]
    assert other.wait(60) == 1 and time.monotonic() - begin < 60
    assert f'rank {killed} exited without an error message' in last_line(other), other.output
    assert not left_of(*(rank.pid for rank in ranks))


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
        assert not left_of(*map(int, ranks), agent.pid, within=30), log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)
    words = 'stopped by SIGHUP. ' if killed == 'torchrun' else 'error: lost connection to another rank: rank '
    assert words in log.read_text(), log.read_text()[-3000:]


def test_error_of_other_rank_is_reported(train, tmp_path):
    ranks = two_ranks(train)
    wait_until_it_trains(ranks[0])
    children = Path(f'/proc/{ranks[1].pid}/task/{ranks[1].pid}/children').read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert [rank.wait(60) for rank in ranks] == [1, 1]
    for rank in ranks:
        assert 'rank 1: a DataLoader worker was killed' in last_line(rank), rank.output
    assert not left_of(*(rank.pid for rank in ranks))


def test_signal_to_one_rank_stops_all_with_one_checkpoint(train, tmp_path):
    ranks = two_ranks(train)
    wait_until_it_trains(ranks[0])
    os.killpg(ranks[1].pid, signal.SIGTERM)
    assert [rank.wait(60) for rank in ranks] == [143, 143], ranks[0].output
    saved = torch.load(tmp_path / 'run/interrupted.pth', weights_only=False)
    assert saved['meta']['batch_partition']['world_size'] == 2
    assert not left_of(*(rank.pid for rank in ranks))
    alone = train(length='--iters=4000', more=('--resume',), log='alone.log')
    wait_until_it_trains(alone)
    os.kill(alone.pid, signal.SIGKILL)
    alone.wait()
    assert 'Resumed with 1 x 2 (was 2 x 2) images per iteration; total batch unchanged' in alone.output
    assert f'iter: {2 * saved["meta"]["iter"]}' in alone.output  # two batches for an update, and not one


@pytest.mark.skipif(os.geteuid() != 0, reason='mounts a small disk')
def test_full_disk_skips_checkpoint_and_continues(train, tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=100m', 'none', disk], capture_output=True).returncode:
        pytest.skip('no disk can be mounted here')
    try:
        process = train('default_hooks.checkpoint.interval=2', length='--iters=8', work_dir=disk / 'run')
        first = disk / 'run/iter_4.pth'
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
        assert (disk / 'run/last_checkpoint').read_text() == str(first)
        torch.load(first, weights_only=False)
        assert not list((disk / 'run').glob('*.part'))
        filler.unlink()
        shutil.copytree(disk / 'run', tmp_path / 'run')  # a larger disk
    finally:
        subprocess.run(['umount', disk], check=True)
    again = train('default_hooks.checkpoint.interval=2', length='--iters=8', more=('--resume',))
    assert again.wait() == 0, again.output
    assert (tmp_path / 'run/last_checkpoint').read_text().endswith('iter_16.pth')


NAN, INF = float('nan'), float('inf')


@pytest.mark.parametrize('wrong', [NAN, INF, 0.0])
def test_nonfinite_steps_are_skipped_and_finally_stop_the_run(wrong, tmp_path):
    fine = planned_run([1.0] * 4, tmp_path / 'fine')
    fine.train()
    runner = planned_run([1.0] * 4 + [1.0, wrong] * 5 + [1.0] * 2, tmp_path / 'run')
    images = 'image_9.png' if wrong else ''
    with pytest.raises(
        TrainingError,
        match=f'3 optimizer steps in a row.*{images}.*learning rate.*interrupted.pth; resume with',
    ):
        runner.train()
    saved = torch.load(tmp_path / 'run/interrupted.pth', weights_only=False)
    assert saved['meta']['iter'] == 5
    for name, value in fine.model.state_dict().items():
        if value.is_floating_point():  # the last good state: of two updates
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
    'losses, accumulated, warnings',
    [
        ([0.0] * 49 + [1.0] + [0.0] * 49, 1, 0),
        ([0.0] * 50, 1, 1),
        ([1.0] + [0.0] * 50 + [1.0] + [0.0] * 60, 1, 1),
        ([1.0, 0.0, 0.0, 0.0] * 60, 4, 0),
        ([0.0] * 100, 2, 1),
        ([0.0] * 98, 2, 0),
    ],
)
def test_long_zero_loss_warns_once(losses, accumulated, warnings, tmp_path, monkeypatch):
    plan = [factor for factor in losses for _ in range(2)]  # two images a batch
    runner, lines = planned_run(plan, tmp_path, model='Scaled', accumulative_counts=accumulated), []
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
    used = []

    def other(info):
        used.append(info['img_path'])
        return Planned.sample(info)

    def switch(runner):
        runner.train_loop.dataloader.dataset.pipeline = other

    planned_run([1.0] * 8, tmp_path, hooks=[Caller(1, switch)]).train()
    assert used[-1] == 'image_7.png' and len(used) >= 4


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
    first = planned_run([1.0] * 8, tmp_path / 'first', seed=None)
    first.train()
    register_checkpoint_loader()
    twice = dict(by_epoch=True, max_epochs=2)
    path = str(tmp_path / 'first/epoch_1.pth')
    again = planned_run([1.0] * 8, tmp_path / 'again', train_cfg=twice, seed=None, load_from=path)
    again.train()
    assert again.seed == first.seed and again.iter == 8
    assert again.train_loop.dataloader.batch_sampler.sampler.seed == first.seed


def test_out_of_memory_lists_options_and_savings():
    backbone = ConvNeXt(dict(depths=(1, 1, 2, 1), channels=(8, 16, 24, 32)))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    line = diagnose(caught.value, nn.ModuleDict(dict(backbone=backbone)), (4, 3, 64, 96))
    assert line.startswith('out of memory with a batch of 4 x 3 x 64 x 96')
    for knob in (
        'model.backbone.with_cp=True model.backbone.cp_scope=block',
        'model.backbone.with_cp=True model.backbone.cp_scope=mlp',
        '--amp-dtype bfloat16',
        'train_dataloader.batch_size=2',
    ):
        assert knob in line
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
    own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    remaining = sum(t.untyped_storage().nbytes() for key, t in storages.items() if key not in own)
    assert outputs and saved_activation_bytes(backbone, (2, 3, 64, 96)) == pytest.approx(remaining, rel=0.02)
    backbone.with_cp = False
    sizes = [saved_activation_bytes(backbone, (2, 3, 64, 96), scope) for scope in (None, 'mlp', 'block')]
    assert sizes[0] > 2 * sizes[1] and sizes[1] > 1.1 * sizes[2]


def test_invalid_retention_and_unreadable_limits_are_refused():
    from mmengine.config import Config

    for given in ('-1', '1.5', '200%', 'few'):
        with pytest.raises(UsageError, match='--max-unreadable'):
            set_max_unreadable(Config(), given)
    for evaluator, best in (
        (dict(type='CocoMetric', metric=['bbox', 'segm']), 'coco/bbox_mAP'),
        (dict(type='CocoMetric', metric='segm'), 'auto'),
        (dict(type='VOCMetric'), 'auto'),
    ):
        config = Config(dict(val_evaluator=evaluator, default_hooks=None))
        set_checkpoint_retention(config, 1)
        assert config.default_hooks.checkpoint.save_best == best
    config = Config(dict(default_scope='mmseg', val_evaluator=dict(type='IoUMetric')))
    for given, limit in (('0', 0), ('3', 3), ('0.5%', 0.005), ('0.002', 0.002)):
        set_max_unreadable(config, given)
        assert config.max_unreadable == limit
    with pytest.raises(UsageError, match='--max-keep-ckpts 0'):
        set_checkpoint_retention(config, 0)
    set_checkpoint_retention(config, 2)
    hook = config.default_hooks.checkpoint
    assert (hook.max_keep_ckpts, hook.save_best, hook.rule) == (2, 'mIoU', 'greater')


def test_max_keep_ckpts_keeps_last_and_best(train, tmp_path):
    process = train('default_hooks.checkpoint.interval=1', 'train_cfg.val_interval=2', more=('--max-keep-ckpts', '2'))
    assert process.wait() == 0, process.output
    actual = sorted(path.name for path in (tmp_path / 'run').glob('*.pth'))
    assert actual[1:] == ['iter_6.pth', 'iter_8.pth'] and actual[0].startswith('best_mIoU_iter_'), actual


def test_one_line_of_worker_error():
    error = TrainingError(
        'Caught UnreadableImage in DataLoader worker process 0.\nOriginal Traceback\n'
        'convnext_dense.errors.UnreadableImageError: /data/1.png: the file is empty\n'
    )
    assert errors.one_line(error) == '/data/1.png: the file is empty'
