"""The paper's results next to work dirs: finished, unfinished and crashed runs, released weights."""

import json

import pytest

from convnext_dense.config.batch_size import scale_batch
from convnext_dense.config.evaluation import set_multiscale
from convnext_dense.paper.recipe_diff import diff_from_recipe
from convnext_dense.paper.results import RESULTS, find_paper_result
from convnext_dense.paper.work_dirs import find_runs, read_runs
from helpers.recipes import load
from helpers.tools import one_line_error
from helpers.work_dirs import coco, dump, write_run_info, write_session


def write_test_result(folder, config, metrics, load_from, multiscale=False, timestamp='20260102_120000') -> None:
    """Write the files of tools/test.py into a work dir."""
    log_dir = folder / 'test' / timestamp
    log_dir.mkdir(parents=True)
    (log_dir / f'{timestamp}.json').write_text(json.dumps(metrics))
    if multiscale:
        set_multiscale(config)
    config.load_from = load_from
    dump(config, log_dir / 'config.py')


def train_record(loss=1.0, **kwargs):
    return dict(loss=loss, lr=1e-4, **kwargs)


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / 'work_dirs'
    records = [
        r for e in range(1, 37) for r in (train_record(epoch=e, step=e * 10), coco(0.3 + e / 200, 0.2 + e / 200, e))
    ]
    records[-3] = coco(0.515, 0.437, 35)
    records[-1] = coco(0.5062, 0.432, 36)
    write_session(folder / 'finished', load('cascade/convnext_t'), records)
    (folder / 'finished/last_checkpoint').write_text('/elsewhere/epoch_36.pth')

    half = load('upernet/convnext_s')
    scale_batch(half, 4)
    half.optim_wrapper.optimizer.lr = 2e-4
    write_session(folder / 'half', half, [train_record(step=50), dict(mIoU=30.0, step=32_000)], 4)
    write_session(
        folder / 'half', half, [dict(mIoU=44.0, step=128_000), train_record(step=160_000)], 4, '20260102_120000'
    )

    crashed = [train_record(epoch=1, step=50), coco(0.1, 0.1, 1), train_record(float('nan'), epoch=2, step=60)]
    write_session(folder / 'crashed', load('mask_rcnn/convnext_t'), crashed, 3, tail='\n{"loss": 1.0, "ep')
    (folder / 'crashed/last_checkpoint').write_text(str(folder / 'crashed/epoch_1.pth'))
    (folder / 'crashed/epoch_1.pth').write_bytes(b'PK\x03\x04 half of a checkpoint')

    released = folder / 'released'
    file, recipe = '/hub/upernet_convnext_tiny_1k_512x512.pth', 'upernet/convnext_t'
    write_test_result(released, load(recipe), dict(mIoU=46.02), file)
    write_test_result(released, load(recipe), dict(mIoU=46.9), file, True, '20260103_120000')

    write_session(folder / 'other', load('demo/upernet'), [dict(mIoU=90.15, step=400)], 1)
    write_session(folder / 'at_once', load('cascade/convnext_b'))
    return folder


def test_read_runs(runs):
    names = ('finished', 'half', 'crashed', 'released', 'other', 'at_once')
    (finished,), (half,), (crashed,), (released,), (other_run,), (at_once,) = (read_runs(runs / name) for name in names)
    assert {run.work_dir for run in find_runs([runs])} == {runs / n for n in names if n != 'released'} | {
        runs / 'released/test'
    }

    assert (
        finished.paper_result.recipe == 'cascade/convnext_t'
        and finished.is_finished
        and (finished.done, finished.length) == (36, 36)
    )
    assert finished.last('box AP') == pytest.approx(50.62) and finished.best('box AP') == pytest.approx(51.5)
    assert finished.compare_to_paper('box AP') == (0.2, 'within tolerance') and finished.compare_to_paper(
        'mask AP'
    ) == (-0.5, 'below')
    assert (finished.precision, finished.total_batch, finished.deviations()) == ('float16', 16, [])
    assert finished.issues == ['epoch_36.pth is missing']

    assert half.paper_result.recipe == 'upernet/convnext_s' and not half.is_finished
    assert (half.done, half.length, half.total_batch) == (80_000, 160_000, 16)
    assert half.last('mIoU') == 44.0 and half.compare_to_paper('mIoU') == (None, '')
    assert half.deviations() == ['optimizer.lr'] and half.issues == []

    assert crashed.paper_result.recipe == 'mask_rcnn/convnext_t' and crashed.done == 1 and crashed.total_batch == 6
    assert crashed.issues[:2] == ['the log is truncated at line 4', 'loss nan at step 60']
    assert crashed.issues[2:] == ['epoch_1.pth cannot be read: it is truncated or damaged']
    assert crashed.deviations() == ['batch']

    assert released.paper_result.recipe == 'upernet/convnext_t' and not released.has_training
    assert released.compare_to_paper('mIoU') == (0.0, 'within tolerance') and released.compare_to_paper(
        'mIoU multi-scale'
    ) == (0.2, 'above')
    assert released.last('mIoU') is None

    assert other_run.paper_result is None and other_run.is_finished and other_run.compare_to_paper('mIoU') == (None, '')
    assert at_once.done == 0 and at_once.issues == ['20260101_120000: no iteration was logged']


def test_run_with_deviations_gets_no_verdict(runs):
    config = load('cascade/convnext_t')
    config.optim_wrapper.type = 'OptimWrapper'
    write_session(runs / 'changed', config, [coco(0.504, 0.437, 36)], 1)
    (run,) = read_runs(runs / 'changed')
    assert run.compare_to_paper('box AP') == (0.0, '') and run.deviations() == ['precision', 'batch']


@pytest.mark.parametrize(
    'change, name',
    [
        (lambda c: c.update(custom_hooks=[dict(type='EMAHook')]), 'custom_hooks.type'),
        (lambda c: c.model.test_cfg.update(mode='whole'), 'test_cfg.mode'),
        (lambda c: c.param_scheduler.pop(0), 'param_scheduler.type'),
        (lambda c: c.optim_wrapper.update(clip_grad=dict(max_norm=1)), 'clip_grad.max_norm'),
        (lambda c: c.model.decode_head.norm_cfg.update(type='BN'), 'norm_cfg.type'),
        (lambda c: c.train_dataloader.dataset.pipeline.pop(5), 'pipeline.type'),
        (lambda c: c.optim_wrapper.optimizer.update(betas=(0.9, 0.99)), 'optimizer.betas'),
        (lambda c: c.update(load_from='coarse.pth'), 'load_from'),
        (lambda c: c.val_dataloader.dataset.pipeline[1].update(keep_ratio=False), 'pipeline.keep_ratio'),
        (lambda c: c.model.decode_head.update(dropout_ratio=0.0), 'decode_head.dropout_ratio'),
    ],
)
def test_every_deviation_from_the_recipe_is_reported(tmp_path, change, name):
    config = load('upernet/convnext_t')
    scale_batch(config, 1)
    config.train_dataloader.num_workers = 9
    assert diff_from_recipe(config, find_paper_result(config)) == []
    change(config)
    assert name in diff_from_recipe(config, find_paper_result(config))
    write_session(tmp_path / 'run', config, [dict(mIoU=46.0, step=1_280_000)], 1)
    (run,) = read_runs(tmp_path / 'run')
    assert run.is_finished and run.compare_to_paper('mIoU') == (0.0, '')


def test_tests_are_assigned_to_their_runs(tmp_path):
    """Tests of other recipes, of the released model and of early checkpoints are not the final metric of the run."""
    folder, config = tmp_path / 'run', load('upernet/convnext_t')
    write_session(folder, config, [dict(mIoU=46.1, step=160_000)])
    write_test_result(
        folder, load('upernet/convnext_b'), dict(mIoU=49.0), 'x/iter_160000.pth', timestamp='20260102_000001'
    )
    write_test_result(
        folder, config, dict(mIoU=46.0), 'hub/upernet_convnext_tiny_1k_512x512.pth', timestamp='20260102_000002'
    )
    write_test_result(
        folder, load('upernet/convnext_t'), dict(mIoU=31.0), 'run/iter_16000.pth', timestamp='20260102_000003'
    )
    run, base, released = read_runs(folder)
    assert (
        run.has_training
        and run.compare_to_paper('mIoU') == (0.1, 'within tolerance')
        and run.last_test('mIoU').checkpoint == 'iter_16000'
    )
    assert base.paper_result.recipe == 'upernet/convnext_b' and base.compare_to_paper('mIoU') == (-0.1, '')
    assert released.compare_to_paper('mIoU') == (0.0, 'within tolerance') and not released.has_training


def test_resumed_run_and_run_without_evaluation(tmp_path):
    config = load('mask_rcnn/convnext_t')
    write_session(tmp_path / 'a', config, [coco(0.3, 0.2, 1), coco(0.9, 0.9, 2)])
    write_session(tmp_path / 'a', config, [coco(0.31, 0.2, 2)], timestamp='20260103_120000')  # again from epoch 1 on
    (run,) = read_runs(tmp_path / 'a')
    assert run.best('box AP') == run.last('box AP') == 31.0 and run.done == 2
    write_session(
        tmp_path / 'test', config, [train_record(epoch=36, step=9)]
    )  # a work dir of that name is a run all the same
    (tmp_path / 'test/last_checkpoint').write_text('epoch_36.pth')
    (run,) = [run for run in find_runs([tmp_path]) if run.work_dir.name == 'test']
    assert run.is_finished and run.issues == ['epoch_36.pth is missing']


def test_run_json_takes_precedence_over_log(tmp_path):
    """The log says 8 GPUs, the config no accumulation; a damaged file is reported and the log counts."""
    write_session(tmp_path / 'a', load('cascade/convnext_t'), [train_record(epoch=3, step=25)])
    log_dir = tmp_path / 'a/20260101_120000'
    write_run_info(log_dir, world_size=2, batch_size=3, accumulation_steps=4)
    (run,) = read_runs(tmp_path / 'a')
    assert (run.world_size, run.total_batch, run.done, run.progress) == (2, 24, 2, 2.5) and run.issues == []
    assert run.deviations() == ['batch']
    for damage in ('{"world_size": 2', '{}'):
        (log_dir / 'run.json').write_text(damage)
        (run,) = read_runs(tmp_path / 'a')
        assert (run.world_size, run.total_batch, run.done, run.progress) == (8, 16, 2, 2)
        assert len(run.issues) == 1 and 'run.json is damaged' in run.issues[0]
    for fact in ('world_size', 'batch_size', 'accumulation_steps', 'iters_per_epoch'):
        write_run_info(log_dir, **{fact: 0})
        (run,) = read_runs(tmp_path / 'a')
        assert run.total_batch == 16 and f'run.json is damaged (ValueError: {fact} is 0)' in run.issues[0]


def test_truncated_files_are_reported(tmp_path):
    write_session(
        tmp_path / 'a',
        load('upernet/convnext_t'),
        [dict(mIoU=None, step=1), *[train_record(float('inf'), step=i) for i in (2, 3)]],
    )
    (tmp_path / 'a/20260101_120000/vis_data/config.py').write_text('model = dict(')
    write_test_result(tmp_path / 'a', load('upernet/convnext_t'), {}, 'x.pth')
    (tmp_path / 'a/test/20260102_120000/20260102_120000.json').write_text('{"mIoU": 4')
    (run,) = read_runs(tmp_path / 'a')
    assert run.paper_result is None and run.eval_records == [] and run.evaluations == {}
    assert run.issues[0] == '20260102_120000.json is truncated' and 'config.py cannot be read' in run.issues[1]
    assert run.issues[2] == 'loss inf at step 2 and in 1 more records'


def test_paper_table(run_tool, runs, tmp_path):
    process = run_tool('paper_table.py', 'work_dirs', '--plot', 'bars.png')
    assert process.returncode == 0, process.stderr
    header, *lines = process.stdout.splitlines()
    assert header.split()[:4] == ['recipe', 'metric', 'paper', 'last']
    by_name = {}
    for line in lines:
        by_name.setdefault(line.split()[0], []).append(line)
    assert set(by_name) == {result.recipe for result in RESULTS} | {'work_dirs/other'}
    finished = by_name['cascade/convnext_t'][0]
    assert '50.4  50.6  51.5' in finished and '+0.2  within tolerance' in finished
    assert (
        '80,000/160,000' in by_name['upernet/convnext_s'][0]
        and 'differs from the recipe: optimizer.lr' in by_name['upernet/convnext_s'][0]
    )
    assert 'not finished, last logged 20' in by_name['mask_rcnn/convnext_t'][0]
    assert 'epoch_1.pth cannot be read' in by_name['mask_rcnn/convnext_t'][0]
    assert by_name['work_dirs/other'][0].split()[1:5] == ['mIoU', '90.2', '90.2', '400/400']
    for result in RESULTS:  # those without a run hold the paper's metrics and none of ours
        if result.recipe.endswith('in22k'):
            names = result.main_metrics
            assert [line.split() for line in by_name[result.recipe]] == [
                [result.recipe, *name.split(), str(result.metrics[name])] for name in names
            ]
    assert (tmp_path / 'bars.png').read_bytes().startswith(b'\x89PNG')

    process = run_tool('paper_table.py', 'work_dirs', '--markdown')
    assert [line.count('|') for line in process.stdout.splitlines()] == [13] * (len(lines) + 2)


def test_without_any_run_and_bad_input(run_tool):
    process = run_tool('paper_table.py')
    rows = sum(len(result.main_metrics) for result in RESULTS)
    assert process.returncode == 0 and len(process.stdout.splitlines()) == 1 + rows
    untrained = [line.split() for line in process.stdout.splitlines() if 'untrained' in line]
    assert [row[0] for row in untrained] == [result.recipe for result in RESULTS if not result.metrics]
    assert {tuple(row[1:]) for row in untrained} == {('box', 'AP', 'untrained'), ('mIoU', 'untrained')}
    one_line_error(run_tool('paper_table.py', 'nowhere'), "'nowhere'")
    one_line_error(run_tool('paper_table.py', '--plot', 'bars.xyz'), 'bars.xyz')


MALFORMED = {  # config.py and scalars.json of a work dir, what is reported of them
    'a reserved key': ('filename = "x"', '', 'config.py cannot be read'),
    'a number in the place of a dict': ('train_cfg = 5', '', 'config.py has no valid train_cfg'),
    'text in the place of a number': ("train_cfg = dict(max_epochs='3')", '', 'has no valid train_cfg.max_epochs'),
    'batches of no number': (
        'train_cfg = dict(max_iters=3)\noptim_wrapper = dict(accumulative_counts=0)',
        '',
        'has no valid optim_wrapper.accumulative_counts',
    ),
    'fewer batches than none': (
        'optim_wrapper = dict(accumulative_counts=-2)',
        '',
        'has no valid optim_wrapper.accumulative_counts',
    ),
    'a length below 0': ('train_cfg = dict(max_iters=-3)', '', 'has no valid train_cfg.max_iters'),
    'a metric that is no number': ('train_cfg = dict(max_epochs=3)', '{"mIoU":NaN,"step":1}', 'mIoU nan at step 1'),
    'a sign without end': (f'x = {"-" * 200_000}1', '', 'config.py cannot be read'),
    'lists without end': (f'x = {"[" * 100_000}', '', 'config.py cannot be read'),
    'text as a loss': ('train_cfg = dict(max_epochs=3)', '{"loss":"x","step":1}', "'loss' is not a number at line 1"),
    'a list as a step': (
        'train_cfg = dict(max_epochs=3)',
        '{"loss":1.0,"step":[1]}',
        "'step' is not a number at line 1",
    ),
    'a step below 0': ('train_cfg = dict(max_epochs=3)', '{"mIoU":1.0,"step":-1}', "'step' is not a number at line 1"),
    'half a step': ('train_cfg = dict(max_epochs=3)', '{"loss":1.0,"step":0.5}', "'step' is not a number at line 1"),
    'a number of 400 digits': ('train_cfg = dict(max_epochs=3)', f'{{"loss":{"9" * 400}}}', "'loss' is not a number"),
    'nested without end': ('train_cfg = dict(max_epochs=3)', '[' * 100_000, 'the log is truncated at line 1'),
}


@pytest.mark.parametrize('case', MALFORMED)
def test_malformed_work_dir_is_reported(tmp_path, run_tool, case):
    config, scalars, words = MALFORMED[case]
    start = tmp_path / 'r/20260101_000000/vis_data'
    start.mkdir(parents=True)
    (start / 'config.py').write_text(config)
    (start / 'scalars.json').write_text(f'{scalars}\n{{"loss":1.0,"lr":0.1,"epoch":1,"step":1,"iter":1}}\n')
    (run,) = read_runs(tmp_path / 'r')
    assert any(words in problem for problem in run.issues), run.issues
    assert run.done in (0, 1)
    for tool in ('paper_table.py', 'plot_run.py'):
        process = run_tool(tool, 'r')
        assert process.returncode == 0 and words in process.stdout and 'Traceback' not in process.stderr


def test_plot_into_folder(tmp_path, run_tool):
    start = tmp_path / 'r/20260101_000000/vis_data'
    start.mkdir(parents=True)
    (start / 'scalars.json').write_text('{"loss":1.0,"lr":0.1,"epoch":1,"step":1,"iter":1}\n' * 2)
    (tmp_path / 'pictures').mkdir()
    for out in ('pictures', 'pictures/'):
        assert run_tool('plot_run.py', 'r', '--out', out).stdout.splitlines()[-1] == 'pictures/run.png'
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith('pictures')] == ['pictures']
