"""Under gradient accumulation, checkpoints are written where an optimizer step ends."""

import os
import signal

import pytest
import torch
from mmengine.hooks import Hook

from convnext_dense.engine.build import register_checkpoint_loader
from convnext_dense.errors import RunInterrupted, UsageError
from helpers.planned_runs import planned_run

PLAN = [1.0] * 12  # six batches an epoch, four accumulated for a step: epochs end in the middle of one
THREE_EPOCHS = dict(by_epoch=True, max_epochs=3)


@pytest.fixture(autouse=True)
def checkpoint_loader():
    register_checkpoint_loader()


def build_runner(folder, train_cfg=THREE_EPOCHS, **kwargs):
    return planned_run(PLAN, folder, train_cfg=train_cfg, accumulative_counts=4, **kwargs)


def load(path):
    return torch.load(path, weights_only=False)


def assert_same_state(runner, expected):
    for name, value in expected.model.state_dict().items():
        assert torch.equal(runner.model.state_dict()[name], value), name


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    runner = build_runner(tmp_path_factory.mktemp('checkpoints') / 'whole', checkpoint=dict(interval=1))
    runner.train()
    return runner


def test_epoch_ending_mid_step_is_saved_at_last_step_end(uninterrupted):
    metas = {n: load(f'{uninterrupted.work_dir}/epoch_{n}.pth')['meta'] for n in (1, 2, 3)}
    assert {n: (meta['epoch'], meta['iter']) for n, meta in metas.items()} == {1: (0, 4), 2: (2, 12), 3: (3, 18)}


@pytest.mark.parametrize('epoch', [1, 2])
def test_resume_from_last_step_end_equals_uninterrupted_run(epoch, uninterrupted, tmp_path):
    resumed = build_runner(tmp_path, load_from=f'{uninterrupted.work_dir}/epoch_{epoch}.pth')
    resumed.train()
    assert resumed.iter == 18
    assert_same_state(resumed, uninterrupted)


class ParametersOfEvaluation(Hook):
    """Keeps the parameters that each evaluation sees."""

    def __init__(self):
        self.parameters = {}

    def before_val_epoch(self, runner):
        self.parameters[runner.epoch] = [p.detach().clone() for p in runner.model.parameters()]


def test_saved_parameters_equal_evaluated_ones(tmp_path):
    runner, hook = build_runner(tmp_path, evaluates=True, checkpoint=dict(interval=1)), ParametersOfEvaluation()
    runner.register_hook(hook)
    runner.train()
    names = [name for name, _ in runner.model.named_parameters()]
    for epoch, parameters in hook.parameters.items():
        saved = load(tmp_path / f'epoch_{epoch}.pth')['state_dict']
        assert all(torch.equal(saved[name], value) for name, value in zip(names, parameters)), epoch


@pytest.mark.parametrize(
    'interval, iters', [(4, [4, 8, 12, 14]), (3, [4, 8, 12, 14]), (6, [4, 12, 14]), (5, [4, 8, 14]), (-1, [14])]
)
def test_iter_checkpoint_due_mid_step(interval, iters, tmp_path):
    """At 3 no step has ended, so nothing is saved; 14 is the end of the run."""
    train_cfg = dict(by_epoch=False, max_iters=14)
    build_runner(tmp_path, train_cfg, checkpoint=dict(interval=interval, by_epoch=False)).train()
    assert sorted(int(path.stem[5:]) for path in tmp_path.glob('iter_*.pth')) == iters
    for n in iters:
        assert load(tmp_path / f'iter_{n}.pth')['meta']['iter'] == n


class SignalAt(Hook):
    """Sends this process a signal in an iteration of training or of evaluation."""

    def __init__(self, mode, iters):
        self.mode, self.iters = mode, iters

    def after_iter(self, runner, batch_idx, mode='train', **kwargs):
        if (mode, runner.iter) == (self.mode, self.iters):
            os.kill(os.getpid(), signal.SIGTERM)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.after_iter(runner, batch_idx)

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.after_iter(runner, batch_idx, 'val')


@pytest.mark.parametrize(
    'mode, iters, interval, name, saved_iter',
    [
        ('train', 1, 9, 'interrupted.pth', 4),
        ('train', 4, 9, 'interrupted.pth', 8),  # beyond the end of an epoch
        ('val', 6, 9, 'interrupted.pth', 8),  # no checkpoint yet: finish the evaluation, then the step
        ('val', 6, 1, 'epoch_1.pth', 4),  # already saved: stop immediately
        ('val', 12, 9, 'interrupted.pth', 12),  # a step ends with the epoch
    ],
)
def test_signal_mid_step_stops_at_step_end(mode, iters, interval, name, saved_iter, uninterrupted, tmp_path):
    runner = build_runner(tmp_path / 'run', evaluates=True, checkpoint=dict(interval=interval))
    runner.register_hook(SignalAt(mode, iters), priority='VERY_HIGH')
    with pytest.raises(RunInterrupted, match=f'stopped by SIGTERM. Saved .*{name}; resume with --resume'):
        runner.train()
    path = tmp_path / 'run' / name
    checkpoint = load(path)
    assert checkpoint['meta']['iter'] == saved_iter and 'gradients' not in checkpoint
    assert (tmp_path / 'run/last_checkpoint').read_text() == str(path)
    resumed = build_runner(tmp_path / 'again', load_from=str(path))
    resumed.train()
    assert_same_state(resumed, uninterrupted)


def test_checkpoint_with_partial_gradients_is_refused(uninterrupted, tmp_path):
    checkpoint = load(f'{uninterrupted.work_dir}/epoch_1.pth')
    checkpoint['gradients'] = [{'weight': torch.ones(2)}]
    torch.save(checkpoint, tmp_path / 'interrupted.pth')
    with pytest.raises(UsageError, match='interrupted.pth was saved by an earlier version.*a regular checkpoint'):
        build_runner(tmp_path / 'run', load_from=str(tmp_path / 'interrupted.pth')).train()


def test_old_batch_partition_is_read(uninterrupted, tmp_path):
    checkpoint = load(f'{uninterrupted.work_dir}/epoch_1.pth')
    partition = checkpoint['meta'].pop('batch_partition')
    old_names = ('processes', 'images', 'accumulation', 'batches', 'samples', 'order')
    checkpoint['meta']['layout'] = dict(zip(old_names, partition.values()))
    torch.save(checkpoint, tmp_path / 'old.pth')
    resumed = build_runner(tmp_path / 'run', load_from=str(tmp_path / 'old.pth'))
    resumed.train()
    assert_same_state(resumed, uninterrupted)
