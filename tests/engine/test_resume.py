"""A run that is stopped at any time resumes as the same run and ends with bitwise equal weights."""

import errno
import math
import os
import pickle
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from convnext_dense.datasets import toy_shapes
from convnext_dense.engine.atomic_files import DiskFullError, write_atomic
from convnext_dense.engine.progress import BatchPartition
from convnext_dense.engine.resume import convert_progress
from convnext_dense.engine.samplers import ResumableBatchSampler, SeededSampler
from convnext_dense.engine.seeding import SeededIndex, seed_everything
from convnext_dense.errors import UsageError
from helpers.paths import ROOT

# Six batches of two per epoch, four gradient accumulation steps: epochs end in the middle of an optimizer step.
TASKS = {
    'mask_rcnn': (
        '--epochs=3',
        'default_hooks.checkpoint.interval=1',
        'train_cfg.val_interval=2',
        'model.test_cfg.rcnn.max_per_img=5',
    ),
    'upernet': ('--iters=6', 'default_hooks.checkpoint.interval=2', 'train_cfg.val_interval=3'),
}
LAST_CHECKPOINT = {'mask_rcnn': 'epoch_3.pth', 'upernet': 'iter_24.pth'}
SMALL = ('train_dataloader.batch_size=2', 'total_batch=8', 'default_hooks.logger.interval=1')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    toy_shapes.write(folder, train=12, val=2, size=64)
    return str(folder)


@pytest.fixture(scope='module')
def train(start_tool, data, tmp_path_factory):
    """Start a short training of a task in a work dir; it has two data workers."""

    def start(task: str, work_dir, *extra_args, options=(), **env):
        length, *settings = TASKS[task]
        config = ROOT / f'configs/demo/{task}.py'
        args = [config, '--work-dir', work_dir, length, *extra_args, '--cfg-options', *SMALL, *settings, *options]
        return start_tool(f'{work_dir}.log', 'train.py', *args, SHAPES_ROOT=data, **env)

    return start


@pytest.fixture(scope='module')
def uninterrupted(train, tmp_path_factory):
    """Final weights and duration in seconds of an uninterrupted run, by task."""
    results = {}

    def get_result(task: str):
        if task not in results:
            work_dir = tmp_path_factory.mktemp(task) / 'whole'
            start = time.monotonic()
            process = train(task, work_dir)
            assert process.wait() == 0, process.output
            results[task] = load_weights(work_dir / LAST_CHECKPOINT[task]), time.monotonic() - start
        return results[task]

    return get_result


def load_weights(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=False)['state_dict']


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.fixture
def run_without_last_checkpoint(train, tmp_path):
    """A work dir with the first checkpoint but without the file `last_checkpoint`."""
    process = train('mask_rcnn', tmp_path / 'run')
    wait_for((tmp_path / 'run/epoch_1.pth').exists, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / 'run/last_checkpoint').unlink(missing_ok=True)
    return tmp_path / 'run'


def test_killed_before_last_checkpoint_file_is_written(run_without_last_checkpoint, train, uninterrupted):
    resumed = train('mask_rcnn', run_without_last_checkpoint, '--resume')
    assert resumed.wait() == 0 and 'resumed epoch: 0, iter: 4' in resumed.output, resumed.output
    assert_same(load_weights(run_without_last_checkpoint / LAST_CHECKPOINT['mask_rcnn']), uninterrupted('mask_rcnn')[0])


def wait_for(condition, process, seconds: float = 120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.process.is_alive(), process.output
        time.sleep(0.002)


def wait_for_iteration(process, n: int):
    """Wait for the n-th log line of an iteration."""
    wait_for(lambda: process.output.count('Epoch(train)') + process.output.count('Iter(train)') >= n, process)


@pytest.mark.parametrize(
    'task, number, code', [('mask_rcnn', signal.SIGTERM, 143), ('upernet', signal.SIGINT, 130)], ids=['epochs', 'iters']
)
def test_signal_saves_and_run_resumes(task, number, code, train, uninterrupted, tmp_path):
    work_dir = tmp_path / 'run'
    process = train(task, work_dir)
    wait_for_iteration(process, 9)
    os.killpg(process.pid, number)  # as launchers, terminals and timeout do
    assert process.wait(60) == code
    line = process.output.strip().splitlines()[-1]
    assert number.name in line and 'interrupted.pth' in line and '--resume' in line
    saved = torch.load(work_dir / 'interrupted.pth', weights_only=False)['meta']
    assert (
        9 <= saved['iter'] < 18
        and saved['iter'] % 4 == 0
        and (work_dir / 'last_checkpoint').read_text().endswith('interrupted.pth')
    )
    resumed = train(task, work_dir, '--resume')
    assert resumed.wait() == 0, resumed.output
    assert_same(load_weights(work_dir / LAST_CHECKPOINT[task]), uninterrupted(task)[0])
    assert not (work_dir / 'interrupted.pth').exists()


@pytest.mark.parametrize('task', TASKS)
def test_killed_between_checkpoint_and_evaluation(task, train, uninterrupted, tmp_path):
    work_dir = tmp_path / 'run'
    process = train(task, work_dir)
    last_checkpoint = work_dir / 'last_checkpoint'
    wait_for(lambda: last_checkpoint.exists() and last_checkpoint.read_text().endswith(LAST_CHECKPOINT[task]), process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    last_evaluation = int((work_dir / 'last_evaluation').read_text())
    assert last_evaluation < {'mask_rcnn': 18, 'upernet': 24}[task], 'the kill came too late'
    resumed = train(task, work_dir, '--resume')
    assert resumed.wait() == 0 and 'evaluation after this checkpoint was interrupted' in resumed.output
    assert int((work_dir / 'last_evaluation').read_text()) > last_evaluation
    assert_same(load_weights(work_dir / LAST_CHECKPOINT[task]), uninterrupted(task)[0])
    resumed_twice = train(task, work_dir, '--resume')
    assert (
        resumed_twice.wait() == 0
        and resumed_twice.output.count('evaluation after this checkpoint was interrupted') == 1
    )  # all three runs write one log


def kill_while_writing(work_dir: Path, count: int, process, last_checkpoint: str) -> int:
    """Kill a training as soon as it writes its `count`-th file, or has written its last checkpoint."""
    part_files = set()

    def is_written():
        part_files.update(path.name for path in work_dir.glob('*.part'))
        return len(part_files) >= count or (work_dir / last_checkpoint).exists()

    wait_for(is_written, process)
    os.kill(process.pid, signal.SIGKILL)
    return len(part_files)


@pytest.mark.slow
@pytest.mark.parametrize('task', TASKS)
def test_killed_at_fifty_random_times(task, train, uninterrupted, tmp_path):
    """Half of the kills at random times, half while a checkpoint is written; one line each in kills.txt."""
    expected, seconds = uninterrupted(task)
    rng, report = random.Random(0), []
    n = attempts = 0
    while n < int(os.environ.get('KILLS', 50)):
        attempts += 1
        work_dir = tmp_path / f'run{attempts}'
        process = train(task, work_dir)
        if n % 2:
            instant = (
                f'writing file {kill_while_writing(work_dir, rng.randrange(1, 5), process, LAST_CHECKPOINT[task])}'
            )
        else:
            instant = f'{rng.uniform(0, 0.95 * seconds):.2f} s'
            process.process.join(float(instant[:-2]))
            if not process.process.is_alive():
                seconds *= 0.9  # the run ended before the kill
                continue
            os.kill(process.pid, signal.SIGKILL)
        n += 1
        code = process.wait()
        parts = [path.name for path in work_dir.glob('*.part')] if work_dir.exists() else []
        resumed = train(task, work_dir, '--resume')
        assert resumed.wait() == 0, resumed.output
        assert_same(load_weights(work_dir / LAST_CHECKPOINT[task]), expected)
        assert not list(work_dir.glob('*.pth.part'))
        report.append(f'{task} {n}: killed at {instant} ({code}), left {parts}')
    Path(os.environ.get('KILLS_REPORT', tmp_path / 'kills.txt')).write_text('\n'.join(report) + '\n')


@pytest.mark.parametrize('moment', ['before', 'written', 'moved'])
def test_kill_during_write_leaves_complete_file(moment, tmp_path):
    path = tmp_path / 'epoch_1.pth'
    path.write_bytes(b'old' * 1000)
    child = os.fork()
    if child == 0:  # killed while writing the content, before the rename, after it

        def die(*args):
            os.kill(os.getpid(), signal.SIGKILL)

        if moment == 'before':
            os.fsync = die
        elif moment == 'written':
            os.replace = die
        else:
            os.open = die
        write_atomic(path, b'new' * 1000)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert path.read_bytes() == (b'new' if moment == 'moved' else b'old') * 1000


def test_disk_full_keeps_old_file_and_reports_missing_space(tmp_path, monkeypatch):
    path = tmp_path / 'epoch_1.pth'
    path.write_bytes(b'old')

    def full(fd):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    monkeypatch.setattr('shutil.disk_usage', lambda path: type('Usage', (), {'free': 2**20}))
    with pytest.raises(DiskFullError, match='Disk full: .*epoch_1.pth needs 2.0 MB more'):
        write_atomic(path, bytes(3 * 2**20))
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['epoch_1.pth']


def test_augmentations_depend_on_seed_and_position_only():
    class Data:
        metainfo, size = {}, 5

        def __len__(self):
            return 5

    def keys(epoch, skipped=0, sampler='DefaultSampler'):
        sampler_of_keys = SeededSampler(Data(), dict(type=sampler, shuffle=True), seed=3)
        sampler_of_keys.set_epoch(epoch)
        batches = ResumableBatchSampler(sampler_of_keys, 2)
        passes = batches.skip(skipped)
        order = [[(int(draw), draw.seed_key) for draw in batch] for batch, _ in zip(batches, range(6))]
        return passes, order

    _, epoch0 = keys(0)
    assert [index for batch in epoch0 for index, _ in batch] != list(range(5)) and len(epoch0) == 3
    assert keys(0)[1] == epoch0 and keys(1)[1] != epoch0
    assert keys(0, 1)[1] == epoch0[1:]
    assert keys(0, 4) == (1, keys(1)[1][1:])  # beyond the end of an epoch
    _, infinite = keys(0, 0, 'InfiniteSampler')
    assert keys(0, 2, 'InfiniteSampler')[1][:4] == infinite[2:]
    assert len({key for batch in infinite for _, key in batch}) == 12

    draw = pickle.loads(pickle.dumps(SeededIndex(4, (1, 2))))
    assert draw == 4 and draw.seed_key == (1, 2)


def test_neighboring_seeds_are_independent():
    def draw(*key):
        seed_everything(*key)
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    assert draw(0, 1, 2) == draw(0, 1, 2)
    values = np.array([draw(0, 0, n) for n in range(2000)])
    assert len(np.unique(values)) > 5990  # float32 draws may meet
    assert np.abs(values.mean(0) - 0.5).max() < 0.03 and np.abs(np.corrcoef(values.T) - np.eye(3)).max() < 0.1
    assert np.abs([np.corrcoef(v[1:], v[:-1])[0, 1] for v in values.T]).max() < 0.1


@pytest.mark.parametrize('started', [True, False])
def test_unstarted_batch_sampler_yields_nothing(started):
    draws = SeededSampler(range(10), dict(type='InfiniteSampler', shuffle=False), seed=0)
    batches = ResumableBatchSampler(draws, 2, started=started)
    assert next(iter(batches), None) == ([0, 1] if started else None)
    if not started:
        batches.skip(1)
        assert next(iter(batches)) == [2, 3]


def partition(world_size, batch_size, accumulation_steps, num_images=96):
    iters_per_epoch = math.ceil(math.ceil(num_images / world_size) / batch_size)
    return BatchPartition(world_size, batch_size, accumulation_steps, iters_per_epoch, num_images)


@pytest.mark.parametrize(
    'old, new, epoch, iteration, by_epoch, expected',
    [
        (partition(8, 2, 1), partition(8, 2, 1), 2, 14, True, 14),
        (partition(8, 2, 1), partition(4, 2, 2), 0, 100, False, 200),
        (partition(4, 2, 2), partition(8, 2, 1), 0, 200, False, 100),
        (partition(8, 2, 1), partition(1, 2, 8), 2, 12, True, 96),
        (partition(8, 2, 1), partition(1, 2, 8), 2, 14, True, 112),  # after two of six batches of the third epoch
        (partition(8, 2, 1), partition(4, 2, 1), 2, 12, True, 24),  # with another total batch, epochs are preserved
        (partition(8, 2, 1), partition(4, 2, 1), 0, 100, False, 100),
    ],
)
def test_convert_progress(old, new, epoch, iteration, by_epoch, expected):
    assert convert_progress(epoch, iteration, old, new, by_epoch)[0] == expected


@pytest.mark.parametrize(
    'old, new, epoch, iteration, by_epoch, word',
    [
        (partition(8, 2, 1), partition(8, 2, 1, 95), 2, 12, True, '95 images, but 96 when'),
        (partition(1, 2, 8), partition(8, 2, 1), 0, 201, False, 'not at a batch boundary'),
        (partition(8, 2, 1), replace(partition(8, 2, 1), iters_per_epoch=9), 2, 12, True, '9 iterations, but had 6'),
        (partition(8, 2, 1), partition(4, 2, 4), 0, 100, False, 'total batch was 16, now it is 32'),
        (partition(8, 2, 1), partition(4, 2, 1), 2, 14, True, 'total batch was 16, now it is 8'),
    ],
)
def test_convert_progress_refuses(old, new, epoch, iteration, by_epoch, word):
    with pytest.raises(UsageError, match=word):
        convert_progress(epoch, iteration, old, new, by_epoch)


@pytest.mark.parametrize(
    'num_images, by_epoch, same_images', [(96, True, True), (100, True, False), (100, False, True)]
)
def test_messages_about_changed_partition_are_true(num_images, by_epoch, same_images):
    _, note = convert_progress(1, 10, partition(8, 2, 1, num_images), partition(4, 2, 2, num_images), by_epoch)
    assert ('each optimizer step sees the same images' in note) == same_images


def test_steps_of_changed_partition_see_same_images():
    """The images of optimizer step k are the same with any number of processes."""

    def images(world_size, batch_size, accumulation, step):
        order = list(range(96))  # any permutation
        actual = []
        for rank in range(world_size):
            rank_indices = order[rank::world_size]
            start = step * accumulation * batch_size
            actual += rank_indices[start : start + accumulation * batch_size]
        return sorted(actual)

    for step in range(6):
        assert images(1, 2, 8, step) == images(4, 2, 2, step) == images(8, 2, 1, step) == images(16, 1, 1, step)
