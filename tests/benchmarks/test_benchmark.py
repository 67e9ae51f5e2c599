"""`tools/benchmark.py` at tiny sizes, with whatever other ConvNeXts are installed here."""

import json

import pytest
import torch

from benchmarks import backbone
from benchmarks.backbone import Case, agreement, available, bound, build, times
from convnext_dense.errors import UsageError

TINY = ('--sizes', 'atto', '--resolutions', '32x48', '--rounds', '2', '--dtypes', 'fp32', '--device', 'cpu')


def test_one_run(run_tool, tmp_path):
    run = run_tool('benchmark.py', *TINY, '--peers', 'plain form', 'timm', '--json', '--picture', tmp_path / 'bars.png')
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert {(r['candidate'], r['layout'], r['mode']) for r in report['results']} >= {
        ('ours', 'contiguous', 'inference'),
        ('plain form', 'channels_last', 'inference'),
        ('plain form', 'contiguous', 'training'),
    }
    assert all(0 < r['low'] <= r['median'] <= r['high'] and r['unit'] == 'ms' for r in report['results'])
    ours = next(r for r in report['results'] if r['candidate'] == 'ours')
    assert ours['ratio'] == 1 and report['bounds'][0]['ms'] > 0
    assert report['agreement']['atto, plain form'] < 1e-5
    assert (tmp_path / 'bars.png').stat().st_size > 1000


def test_sizes_of_the_image_that_need_not_be_said(run_tool):
    chosen = ('--sizes', 'atto', '--rounds', '1', '--dtypes', 'fp32', '--device', 'cpu')
    run = run_tool('benchmark.py', *chosen, '--measure', 'inference', '--json', '--peers')
    assert run.returncode == 0, run.stderr
    assert {(r['height'], r['width']) for r in json.loads(run.stdout)['results']} == {(512, 512), (800, 1280)}


def test_a_peer_that_is_not_there_is_named_and_the_others_run(run_tool):
    run = run_tool('benchmark.py', *TINY, '--measure', 'inference', '--peers', 'mmpretrain', 'plain form')
    assert run.returncode == 0, run.stderr
    if "No module named 'mmpretrain'" in run.stdout:
        assert 'left out: atto: mmpretrain' in run.stdout
    assert 'plain form' in run.stdout and 'features equal' in run.stdout


def test_missing_and_unknown_sizes_are_named(monkeypatch):
    monkeypatch.setitem(backbone.CANDIDATES, 'gone', lambda arch: __import__('no_such_library'))
    found, missing = available(['plain form', 'gone', 'Swin, mmdet'], 'atto')
    assert found == ['plain form'] and [line.split(':')[0] for line in missing] == ['gone', 'Swin, mmdet']
    with pytest.raises(UsageError, match='gone'):
        build('gone', 'atto')


def test_other_features_are_noticed(monkeypatch):
    class Wrong(backbone._Plain):
        def forward(self, x):
            return [m + 0.1 * m.roll(1, 1) for m in super().forward(x)]

    monkeypatch.setitem(backbone.CANDIDATES, 'wrong', Wrong)
    assert agreement('wrong', 'atto') > 1e-2 and agreement('plain form', 'atto') < 1e-5
    assert agreement('ours', 'atto') is None


def test_every_candidate_runs_in_every_memory_format_once_a_round():
    calls = []

    class Counted(backbone._Plain):
        def forward(self, x):
            calls.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
            return super().forward(x)

    before = dict(backbone.CANDIDATES)
    try:
        backbone.CANDIDATES['counted'] = Counted
        case = Case('atto', 'training', 32, 32, 1, 'fp32', 'cpu', False)
        results = list(times(case, ['ours', 'counted'], rounds=3))
    finally:
        backbone.CANDIDATES.clear()
        backbone.CANDIDATES.update(before)
    assert calls == [False, True] * 5
    assert [(r.candidate, r.layout) for r in results] == [
        ('ours', 'contiguous'),
        ('counted', 'contiguous'),
        ('counted', 'channels_last'),
    ]


def test_the_bound_grows_with_pixels():
    small, large = (bound(Case('atto', 'inference', n, n, 1, 'fp32', 'cpu', False)) for n in (64, 1024))
    assert large > 4 * small


@pytest.mark.parametrize(
    'args, word',
    [
        (('--sizes', 'Q'), 'Q'),
        (('--resolutions', '10x10'), '10x10'),
        (('--peers', 'nobody'), 'nobody'),
        (('--batches', '0'), 'at least 1'),
        (('--device', 'cuda'), 'cuda'),
    ],
)
def test_bad_input_is_one_line(args, word, run_tool):
    run = run_tool('benchmark.py', *args)
    assert run.returncode == 2 and word in run.stderr.splitlines()[-1] and 'Traceback' not in run.stderr


def test_from_how_many_runs_on_compilation_pays():
    compiled, plain = dict(median=8.0, first=1001.0), dict(median=10.0)
    runs = backbone.pays_from(compiled, plain)
    took = [(compiled['first'] + (n - 2) * compiled['median'], n * plain['median']) for n in (runs - 1, runs)]
    assert took[0][0] > took[0][1] and took[1][0] <= took[1][1]
    assert backbone.pays_from(dict(median=8.0, first=16.0), plain) == 1
    assert backbone.pays_from(dict(median=10.0, first=1000.0), plain) is None


@pytest.mark.slow
def test_compiled_beside_eager(run_tool):
    run = run_tool('benchmark.py', *TINY, '--measure', 'inference', '--peers', 'plain form', '--compiled', 'both')
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if ': compiling, ' in line]
    assert len(lines) == 3 and all(' s with two runs, ' in line and ' pay' in line for line in lines), run.stdout
