"""The steps by which the command line changes a config: their order and their dependencies."""

import logging
from argparse import Namespace

import pytest

from convnext_dense.cli.prepare import TEST_STEPS, TRAIN_STEPS, PreparedRun, Step, _apply, prepare
from convnext_dense.config.recipe import accumulative_counts
from convnext_dense.errors import Notice, UsageError
from helpers.tools import DEMO

TOOLS = {'train.py': TRAIN_STEPS, 'test.py': TEST_STEPS}


def replace_steps(steps, **functions):
    """The steps, with other functions for some names."""
    assert functions.keys() <= {step.name for step in steps}
    return [step._replace(apply=functions.get(step.name, step.apply)) for step in steps]


def swap_steps(steps, name_a: str, name_b: str):
    names = [step.name for step in steps]
    i, j = names.index(name_a), names.index(name_b)
    order = [*steps]
    order[i], order[j] = order[j], order[i]
    return order


@pytest.mark.parametrize('tool', TOOLS)
def test_steps_are_ordered_by_their_dependencies(tool):
    earlier_steps = []
    for step in TOOLS[tool]:
        assert step.name not in earlier_steps and set(step.after) <= set(earlier_steps), step.name
        earlier_steps.append(step.name)
    assert earlier_steps[0] == 'config' and all(
        step.after for step in TOOLS[tool] if step.name in ('data', 'overridden')
    )


def test_order_of_training_steps():
    names = [step.name for step in TRAIN_STEPS]
    for earlier, later in (
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
        assert names.index(earlier) < names.index(later), (earlier, later)
        assert set(names[names.index(later) :]).isdisjoint({earlier})


def test_config_before_each_training_step(parse, data, tmp_path):
    """Custom data, another length, accumulation and a user override in one training."""
    work_dir, step_names = tmp_path / 'run', []
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

    def with_check(step: Step) -> Step:
        def apply(run, args):
            step_names.append(step.name)
            checks.get(step.name, lambda run: None)(run)
            return step.apply(run, args)

        return step._replace(apply=apply)

    run = prepare(args, map(with_check, TRAIN_STEPS))
    assert step_names == [step.name for step in TRAIN_STEPS] and checks.keys() <= set(step_names)
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
    steps = replace_steps(TRAIN_STEPS, data_files=lambda run, args: None, lock=lambda run, args: None)
    run = prepare(parse(*config, f'work_dir={tmp_path}/a'), steps)
    assert run.config.train_cfg.max_iters == 80
    run = prepare(parse(*config, f'work_dir={tmp_path}/b'), swap_steps(steps, 'schedule', 'batch'))
    assert run.config.train_cfg.max_iters == 40


def test_error_in_a_step_ends_the_preparation(parse):
    def refuse(run, args):
        raise UsageError('no')

    calls = []
    steps = replace_steps(TRAIN_STEPS, inputs=refuse, precision=lambda run, args: calls.append(1))
    with pytest.raises(UsageError, match='^no$'):
        prepare(parse('train.py', DEMO), steps)
    assert not calls


@pytest.mark.parametrize('value, arguments', [(None, None), (False, None), (True, ()), (0, (0,)), ('', ('',))])
def test_functions_of_unset_arguments_are_not_called(value, arguments):
    calls, run = [], PreparedRun()
    _apply('flag', lambda *args: calls.append(args))(run, Namespace(flag=value))
    assert calls == ([] if arguments is None else [(run.config, *arguments)])


def test_messages_of_steps_become_notices():
    warning = Notice('c', logging.WARNING)
    results = (None, 'a', [], ['b', warning], warning)
    steps = [Step(str(i), lambda run, args, result=result: result) for i, result in enumerate(results)]
    assert prepare(None, steps).notices == [Notice('a'), Notice('b'), warning, warning]
    assert Notice('a').level == logging.INFO


def test_multiscale_test(parse, data, tmp_path):
    checkpoint = tmp_path / 'model.pth'
    checkpoint.write_bytes(b'')
    args = parse('test.py', DEMO, checkpoint, '--multiscale', '--work-dir', tmp_path, '--out', tmp_path / 'out')
    options = dict(data_files=lambda run, args: None)
    run = prepare(args, replace_steps(TEST_STEPS, **options))
    assert run.checkpoint == run.config.load_from == str(checkpoint) and run.config.work_dir == f'{tmp_path}/test'
    assert run.config.model.type == 'MultiScaleSegmentor' and run.notices == []
    assert run.config.test_evaluator.output_dir == str(tmp_path / 'out')
