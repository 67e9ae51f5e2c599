"""The steps by which the command line changes a config: their order, and what each needs of those before it."""

import logging

import pytest

from convnext_dense.cli.prepare import TEST_STEPS, TRAIN_STEPS, Step, prepare
from convnext_dense.config.recipe import accumulative_counts
from convnext_dense.errors import Notice, UsageError
from helpers.tools import DEMO

TOOLS = {'train.py': TRAIN_STEPS, 'test.py': TEST_STEPS}


def replaced(steps, **functions):
    """Steps of which those with these names do something else."""
    assert functions.keys() <= {step.name for step in steps}
    return [step._replace(apply=functions.get(step.name, step.apply)) for step in steps]


def swapped(steps, first: str, second: str):
    names = [step.name for step in steps]
    i, j = names.index(first), names.index(second)
    order = [*steps]
    order[i], order[j] = order[j], order[i]
    return order


@pytest.mark.parametrize('tool', TOOLS)
def test_each_step_comes_after_those_that_it_depends_on(tool):
    done = []
    for step in TOOLS[tool]:
        assert step.name not in done and set(step.after) <= set(done), step.name
        done.append(step.name)
    assert done[0] == 'config' and all(step.after for step in TOOLS[tool] if step.name in ('data', 'overridden'))


def test_order_of_training():
    names = [step.name for step in TRAIN_STEPS]
    for first, second in (
        ('inputs', 'data'),  # color_type
        ('resume', 'lock'),
        ('lock', 'data'),  # written into the work dir
        ('resume', 'data'),  # classes of the checkpoint
        ('data', 'classes'),
        ('data', 'schedule'),
        ('schedule', 'batch'),
        ('batch', 'compare'),
        ('data', 'compare'),
        ('precision', 'compare'),
        ('compare', 'overridden'),
    ):
        assert names.index(first) < names.index(second), (first, second)
        assert set(names[names.index(second) :]).isdisjoint({first})


def test_what_holds_before_each_step_of_a_training(parse, data, tmp_path):
    """Own data, another length, accumulation and a setting of the user's, in one training."""
    work_dir, seen = tmp_path / 'run', []
    args = parse(
        *('train.py', DEMO, '--work-dir', work_dir, '--data', data, '--iters', 40),
        *('--cfg-options', 'total_batch=8', 'train_dataloader.batch_size=4', '+default_hooks.checkpoint.interval=40'),
    )

    def before_data(run):
        assert (work_dir / '.lock').exists() and str(run.request.root) == data and run.checkpoint is None
        assert run.config.train_dataloader.dataset.type != 'PairedSegDataset'

    def before_schedule(run):
        assert run.config.train_dataloader.dataset.type == 'PairedSegDataset'
        assert run.config.train_cfg.max_iters == 400 and accumulative_counts(run.config) == 1

    def before_batch(run):
        assert run.config.train_cfg.max_iters == 40 and accumulative_counts(run.config) == 1

    def before_compare(run):
        assert run.config.train_cfg.max_iters == 80 and accumulative_counts(run.config) == 2

    def before_overridden(run):
        assert run.options['default_hooks.checkpoint.interval'] == 40
        assert run.config.default_hooks.checkpoint.interval == 80

    checks = dict(data=before_data, schedule=before_schedule, batch=before_batch, compare=before_compare)
    checks['overridden'] = before_overridden

    def checked(step: Step) -> Step:
        def apply(run, args):
            seen.append(step.name)
            checks.get(step.name, lambda run: None)(run)
            return step.apply(run, args)

        return step._replace(apply=apply)

    run = prepare(args, map(checked, TRAIN_STEPS))
    assert seen == [step.name for step in TRAIN_STEPS] and checks.keys() <= set(seen)
    lines = [notice.message for notice in run.notices]
    assert any(line.startswith('data: ') for line in lines)
    assert lines.index(next(line for line in lines if '40 iters instead of 400' in line)) < lines.index(
        next(line for line in lines if line.startswith('total batch 8'))
    )
    overridden = [notice for notice in run.notices if 'default_hooks.checkpoint.interval=40' in notice.message]
    assert [notice.level for notice in overridden] == [logging.WARNING] and run.notices[-1] == overridden[0]


def test_swapped_steps_change_the_result(parse, tmp_path):
    """Accumulation after the length: otherwise the length would be that of half the training."""
    config = ('train.py', DEMO, '--iters', 40, '--cfg-options', 'total_batch=8', 'train_dataloader.batch_size=4')
    here = replaced(TRAIN_STEPS, data_files=lambda run, args: None, lock=lambda run, args: None)
    run = prepare(parse(*config, f'work_dir={tmp_path}/a'), here)
    assert run.config.train_cfg.max_iters == 80
    run = prepare(parse(*config, f'work_dir={tmp_path}/b'), swapped(here, 'schedule', 'batch'))
    assert run.config.train_cfg.max_iters == 40


def test_a_step_that_refuses_ends_the_preparation(parse):
    def refuse(run, args):
        raise UsageError('no')

    reached = []
    steps = replaced(TRAIN_STEPS, inputs=refuse, precision=lambda run, args: reached.append(1))
    with pytest.raises(UsageError, match='^no$'):
        prepare(parse('train.py', DEMO), steps)
    assert not reached


def test_lines_of_steps_become_notices():
    warning = Notice('c', logging.WARNING)
    results = (None, 'a', [], ['b', warning], warning)
    steps = [Step(str(i), lambda run, args, result=result: result) for i, result in enumerate(results)]
    assert prepare(None, steps).notices == [Notice('a'), Notice('b'), warning, warning]
    assert Notice('a').level == logging.INFO


def test_a_multi_scale_test_of_own_data(parse, data, tmp_path):
    checkpoint = tmp_path / 'model.pth'
    checkpoint.write_bytes(b'')
    args = parse('test.py', DEMO, checkpoint, '--multiscale', '--work-dir', tmp_path, '--out', tmp_path / 'out')
    options = dict(data_files=lambda run, args: None)
    run = prepare(args, replaced(TEST_STEPS, **options))
    assert run.checkpoint == run.config.load_from == str(checkpoint) and run.config.work_dir == f'{tmp_path}/test'
    assert run.config.model.type == 'MultiScaleSegmentor' and run.notices == []
    assert run.config.test_evaluator.output_dir == str(tmp_path / 'out')
