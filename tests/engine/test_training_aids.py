"""Early stopping and averaged weights: killed and resumed runs end as uninterrupted ones."""

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.registry import METRICS

from convnext_dense.engine.build import register_checkpoint_loader
from convnext_dense.engine.early_stopping_hook import SCORES_FILE
from helpers.planned_runs import planned_run

SCORES = [1.0, 2.0, 3.0, 2.5, 3.05, 3.0, 9.0, 9.0]  # the third is the best until the seventh
STOP = dict(type='EarlyStoppingHook', monitor='score', rule='greater', min_delta=0.1, patience=3)


@METRICS.register_module()
class ScoresByEpoch(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(score=SCORES[MessageHub.get_current_instance().get_info('epoch')])


@pytest.fixture(autouse=True)
def loader():
    register_checkpoint_loader()  # as `make_runner` does; that of mmengine 0.10.7 cannot load what it saved


class Kill(Hook):
    """Raises an error at an iteration or after an evaluation."""

    priority = 'LOWEST'

    def __init__(self, iteration=None, evaluation=None):
        self.iteration, self.evaluation = iteration, evaluation

    def before_train_iter(self, runner, **_):
        if runner.iter == self.iteration:
            raise RuntimeError('killed')

    def after_val_epoch(self, runner, metrics=None):
        if runner.epoch == self.evaluation:
            raise RuntimeError('killed')


def run_scores(folder, hooks=(), load_from=None, interval=1):
    run = planned_run(
        *([1.0] * 4, folder, [STOP, *hooks]),
        train_cfg=dict(by_epoch=True, max_epochs=8),
        checkpoint=dict(interval=interval),
        evaluates=True,
        metric='ScoresByEpoch',
        load_from=load_from,
    )
    run.train()
    return run


def test_early_stopping_saves_a_checkpoint(tmp_path):
    run = run_scores(tmp_path, interval=5)
    assert run.epoch == 6 and (tmp_path / 'epoch_6.pth').is_file()
    assert (tmp_path / 'last_checkpoint').read_text().endswith('epoch_6.pth')
    assert torch.load(tmp_path / 'epoch_6.pth', weights_only=False)['meta']['epoch'] == 6


@pytest.mark.parametrize('kill', [dict(iteration=3), dict(iteration=8), dict(evaluation=4), dict(evaluation=6)])
def test_resumed_run_stops_at_the_same_epoch(tmp_path, kill):
    with pytest.raises(RuntimeError, match='killed'):
        run_scores(tmp_path, [Kill(**kill)])
    last_checkpoint = (tmp_path / 'last_checkpoint').read_text()
    assert run_scores(tmp_path, load_from=last_checkpoint).epoch == 6
    assert run_scores(tmp_path, load_from=str(tmp_path / 'epoch_6.pth')).epoch == 6  # a stopped run stays stopped
    assert run_scores(tmp_path, load_from=str(tmp_path / 'epoch_2.pth')).epoch == 6  # later scores do not count twice
    (tmp_path / SCORES_FILE).write_text('[[1')
    assert run_scores(tmp_path, load_from=str(tmp_path / 'epoch_5.pth')).epoch == 8


class Weights(Hook):
    """The weights that evaluations see."""

    def __init__(self):
        self.evaluated = []

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx == 0:
            self.evaluated.append(runner.model.weight.detach().clone())


def run_averaged(folder, hooks=(), load_from=None, accumulation=1):
    ema = dict(type='EMAHook', ema_type='MomentumAnnealingEMA', momentum=0.001, gamma=10, update_buffers=True)
    run = planned_run(
        *([1.0, 2.0, 3.0, 4.0, 5.0, 6.0] * 2, folder, [ema, *hooks]),
        train_cfg=dict(by_epoch=False, max_iters=12, val_interval=4),
        checkpoint=dict(interval=1, by_epoch=False),
        evaluates=True,
        load_from=load_from,
        accumulative_counts=accumulation,
    )
    run.train()
    return torch.load(folder / 'iter_12.pth', weights_only=False)


@pytest.mark.parametrize('accumulation', [1, 2])
def test_averaged_weights_of_a_resumed_run_are_bitwise_equal(tmp_path, accumulation):
    uninterrupted = run_averaged(tmp_path / 'a', accumulation=accumulation)
    with pytest.raises(RuntimeError, match='killed'):
        run_averaged(tmp_path / 'b', [Kill(iteration=6)], accumulation=accumulation)
    last_checkpoint, weights = (tmp_path / 'b/last_checkpoint').read_text(), Weights()
    resumed = run_averaged(tmp_path / 'b', [weights], last_checkpoint, accumulation)
    for part in ('state_dict', 'ema_state_dict'):
        assert uninterrupted[part].keys() == resumed[part].keys()
        assert all(torch.equal(uninterrupted[part][key], resumed[part][key]) for key in uninterrupted[part])
    average, current = uninterrupted['state_dict']['weight'], uninterrupted['ema_state_dict']['module.weight']
    assert torch.equal(weights.evaluated[-1], average) and not torch.equal(average, current)


def test_averaged_weights_equal_the_formula(tmp_path):
    final = run_averaged(tmp_path)['state_dict']['weight']
    history = [torch.load(tmp_path / f'iter_{i}.pth', weights_only=False) for i in range(1, 13)]
    current = [state['ema_state_dict']['module.weight'] for state in history]  # mmengine swaps the two in a file
    expected = current[0]
    for step, weight in enumerate(current[1:], 1):
        momentum = max(0.001, 10 / (10 + step))
        expected = (1 - momentum) * expected + momentum * weight
    assert torch.allclose(final, expected, atol=1e-6)
