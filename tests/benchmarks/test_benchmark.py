"""`tools/benchmark.py` at tiny sizes, with the baselines that are installed."""

import json

import pytest
import torch

from benchmarks import backbone
from benchmarks.backbone import Case, available, build, feature_distance, gemm_lower_bound, measure_time
from convnext_dense.errors import UsageError

TINY = ('--sizes', 'atto', '--resolutions', '32x48', '--rounds', '2', '--dtypes', 'fp32', '--device', 'cpu')


def test_one_run(run_tool, tmp_path):
    run = run_tool('benchmark.py', *TINY, '--baselines', 'reference', 'timm', '--json', '--plot', tmp_path / 'bars.png')
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert {(r['backbone'], r['memory_format'], r['mode']) for r in report['results']} >= {
        ('ours', 'contiguous', 'inference'),
        ('reference', 'channels_last', 'inference'),
        ('reference', 'contiguous', 'training'),
    }
    assert all(0 < r['low'] <= r['median'] <= r['high'] and r['unit'] == 'ms' for r in report['results'])
    result = next(r for r in report['results'] if r['backbone'] == 'ours')
    assert result['ratio'] == 1 and report['gemm_lower_bounds'][0]['ms'] > 0
    assert report['feature_distances']['atto, reference'] < 1e-5
    assert (tmp_path / 'bars.png').stat().st_size > 1000


def test_default_resolutions(run_tool):
    options = ('--sizes', 'atto', '--rounds', '1', '--dtypes', 'fp32', '--device', 'cpu')
    run = run_tool('benchmark.py', *options, '--measure', 'inference', '--json', '--baselines')
    assert run.returncode == 0, run.stderr
    assert {(r['height'], r['width']) for r in json.loads(run.stdout)['results']} == {(512, 512), (800, 1280)}


def test_missing_baselines_are_reported_and_skipped(run_tool):
    run = run_tool('benchmark.py', *TINY, '--measure', 'inference', '--baselines', 'mmpretrain', 'reference')
    assert run.returncode == 0, run.stderr
    if "No module named 'mmpretrain'" in run.stdout:
        assert 'left out: atto: mmpretrain' in run.stdout
    assert 'reference' in run.stdout and 'features equal' in run.stdout


def test_missing_libraries_and_sizes_are_reported(monkeypatch):
    monkeypatch.setitem(backbone.BACKBONES, 'gone', lambda arch: __import__('no_such_library'))
    buildable, missing = available(['reference', 'gone', 'swin-mmdet'], 'atto')
    assert buildable == ['reference'] and [line.split(':')[0] for line in missing] == ['gone', 'swin-mmdet']
    with pytest.raises(UsageError, match='gone'):
        build('gone', 'atto')


def test_feature_distance(monkeypatch):
    class Wrong(backbone._Reference):
        def forward(self, x):
            return [m + 0.1 * m.roll(1, 1) for m in super().forward(x)]

    monkeypatch.setitem(backbone.BACKBONES, 'wrong', Wrong)
    assert feature_distance('wrong', 'atto') > 1e-2 and feature_distance('reference', 'atto') < 1e-5
    assert feature_distance('ours', 'atto') is None


def test_rounds_over_backbones_and_memory_formats():
    calls = []

    class Counted(backbone._Reference):
        def forward(self, x):
            calls.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
            return super().forward(x)

    original = dict(backbone.BACKBONES)
    try:
        backbone.BACKBONES['counted'] = Counted
        case = Case('atto', 'training', 32, 32, 1, 'fp32', 'cpu', False)
        results = list(measure_time(case, ['ours', 'counted'], rounds=3))
    finally:
        backbone.BACKBONES.clear()
        backbone.BACKBONES.update(original)
    assert calls == [False, True] * 5
    assert [(r.backbone, r.memory_format) for r in results] == [
        ('ours', 'contiguous'),
        ('counted', 'contiguous'),
        ('counted', 'channels_last'),
    ]


def test_gemm_lower_bound_grows_with_pixels():
    lower, higher = (gemm_lower_bound(Case('atto', 'inference', n, n, 1, 'fp32', 'cpu', False)) for n in (64, 1024))
    assert higher > 4 * lower


@pytest.mark.parametrize(
    'args, word',
    [
        (('--sizes', 'Q'), 'Q'),
        (('--resolutions', '10x10'), '10x10'),
        (('--baselines', 'nobody'), 'nobody'),
        (('--batches', '0'), 'at least 1'),
        (('--device', 'cuda'), 'cuda'),
    ],
)
def test_bad_input_is_a_one_line_error(args, word, run_tool):
    run = run_tool('benchmark.py', *args)
    assert run.returncode == 2 and word in run.stderr.splitlines()[-1] and 'Traceback' not in run.stderr


def test_break_even_runs():
    compiled, eager = dict(median=8.0, first=1001.0), dict(median=10.0)
    runs = backbone.break_even_runs(compiled, eager)
    durations = [(compiled['first'] + (n - 2) * compiled['median'], n * eager['median']) for n in (runs - 1, runs)]
    assert durations[0][0] > durations[0][1] and durations[1][0] <= durations[1][1]
    assert backbone.break_even_runs(dict(median=8.0, first=16.0), eager) == 1
    assert backbone.break_even_runs(dict(median=10.0, first=1000.0), eager) is None


@pytest.mark.slow
def test_compiled_and_eager(run_tool):
    run = run_tool('benchmark.py', *TINY, '--measure', 'inference', '--baselines', 'reference', '--compiled', 'both')
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if ': compiling, ' in line]
    assert len(lines) == 3 and all(' s with two runs, ' in line and ' pay' in line for line in lines), run.stdout
