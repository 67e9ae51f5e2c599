"""`--lr-find`: an exponential sweep, its multipliers, its end, what it suggests, and what it leaves."""

import csv
import math
import re
from argparse import Namespace

import cv2
import pytest
from mmengine.hooks import Hook

from convnext_dense.cli.prepare import TRAIN_STEPS, PreparedRun
from convnext_dense.config.lr_finder import set_lr_find
from convnext_dense.engine.lr_finder import LRFinderHook, find_lr
from convnext_dense.errors import UsageError
from helpers.planned_runs import LossByPlan, planned_run
from helpers.processes import WITHOUT_WORKERS
from helpers.recipes import load
from helpers.tools import DEMO


class GroupLrs(Hook):
    """The learning rates of all iterations, by parameter group; it runs before the finder's `after_train_iter`."""

    def __init__(self):
        self.lrs = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.lrs.append([group['lr'] for group in runner.optim_wrapper.optimizer.param_groups])


def sweep(folder, accumulation=1, hooks=()):
    run = planned_run(
        *([1.0] * 400, folder, hooks),
        train_cfg=dict(by_epoch=False, max_iters=100 * accumulation),
        checkpoint=dict(interval=-1),
        cfg=dict(health_check=False),
        accumulative_counts=accumulation,
        paramwise_cfg=dict(custom_keys={'weight': dict(lr_mult=0.5)}),
    )
    find_lr(run)
    with open(folder / 'lr_find.csv', newline='') as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize('accumulation', [1, 2])
def test_lr_rises_exponentially_with_constant_multipliers(tmp_path, accumulation):
    record = GroupLrs()
    rows = sweep(tmp_path, accumulation, [record])
    lrs = [row['lr'] for row in rows]
    assert lrs == pytest.approx([1e-7 * 10 ** (7 * i / 99) for i in range(len(lrs))], rel=1e-9) and len(lrs) > 60
    assert {round(min(group) / max(group), 9) for group in record.lrs} == {0.5}  # weights have half of the norm's
    assert [max(group) for group in record.lrs][::accumulation][: len(lrs)] == pytest.approx(lrs, rel=1e-9)
    average = 0.0
    for i, row in enumerate(rows, 1):
        average = 0.9 * average + 0.1 * row['loss']
        assert row['smoothed_loss'] == pytest.approx(average / (1 - 0.9**i))
    assert cv2.imread(str(tmp_path / 'lr_find.png')).std() > 5 and not [*tmp_path.rglob('*.pth')]


def test_sweeps_with_equal_seeds_are_equal(tmp_path):
    assert sweep(tmp_path / 'a') == sweep(tmp_path / 'b')


@pytest.mark.parametrize('value', [math.nan, 100.0])
def test_sweep_ends_when_the_loss_diverges(tmp_path, monkeypatch, value):
    steps, original = [], LossByPlan.forward

    def forward(self, *args, **kwargs):
        steps.append(1)
        losses = original(self, *args, **kwargs)
        return {key: loss * 0 + (value if len(steps) > 20 else 1.0) for key, loss in losses.items()}

    monkeypatch.setattr(LossByPlan, 'forward', forward)
    rows = sweep(tmp_path)
    assert len(steps) == 21 and len(rows) == (20 if math.isnan(value) else 21)


def test_suggested_lr():
    hook = LRFinderHook()
    hook.lrs = [10 ** (-7 + 7 * i / 99) for i in range(100)]
    hook.smoothed = [abs(i - 60) for i in range(100)]
    assert hook.best_lr() == hook.lrs[60]
    hook.smoothed = [*range(100)]  # rises from the start
    assert hook.best_lr() is None
    hook.lrs, hook.smoothed = [], []
    assert hook.best_lr() is None


def test_several_optimizers_are_refused():
    config = load('demo/upernet')
    config.optim_wrapper = dict(constructor='Own', generator=dict())
    with pytest.raises(UsageError, match='--lr-find needs a single optimizer'):
        set_lr_find(config, 1)


def test_sweep_of_a_recipe(run_tool, tmp_path, data):
    args = ('--lr-find', '--work-dir', 'run', '--image-size', 64, '--batch-size', 2, '--seed', 0, '--max-keep-ckpts', 1)
    process = run_tool('train.py', DEMO, *args, '--cfg-options', 'total_batch=2', *WITHOUT_WORKERS, SHAPES_ROOT=data)
    assert process.returncode == 0, process.stderr[-3000:]
    (line,) = [line for line in process.stdout.splitlines() if 'lr-find: ' in line]
    lr = re.search(r'use it with --cfg-options optim_wrapper.optimizer.lr=(\S+);', line)[1]
    assert 1e-6 < float(lr) < 1 and 'lr-find: lr ' + lr in line
    assert {path.suffix for path in tmp_path.glob('run/lr_find.*')} == {'.csv', '.png'}
    assert not [*tmp_path.rglob('*.pth')]


@pytest.mark.parametrize('checkpoint, resume', [('epoch_1.pth', None), (None, 'last')])
def test_resumed_runs_are_refused(checkpoint, resume):
    (step,) = [step for step in TRAIN_STEPS if step.name == 'lr_find']
    with pytest.raises(UsageError, match='--lr-find is for the start of a training: leave out --resume'):
        step.apply(PreparedRun(checkpoint=checkpoint), Namespace(lr_find=True, resume=resume, launcher='none'))
