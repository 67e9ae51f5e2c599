"""Parameters and FLOPs are the paper's; bad input gets one line."""

import json
import runpy
import subprocess
import sys

import pytest
from mmengine.config import Config

from convnext_dense.errors import UsageError
from convnext_dense.paper import results
from convnext_dense.paper.flops import count_flops
from convnext_dense.paper.results import PAPER_RESULTS, RESULTS
from convnext_dense.paper.tables import format_table
from helpers.paths import ROOT
from helpers.recipes import SIZES, load
from helpers.tools import one_line_error

# In G, counted once by the original stack's own tool.
GFLOPS = (262.11, 740.99, 827.31, 964.46, 964.46, 1354.36, 1898.40, 938.92, 1027.31, 1169.84, 1827.86, 2458.22, 3335.21)


@pytest.mark.parametrize(
    'result, expected', list(zip(PAPER_RESULTS, GFLOPS)), ids=[result.recipe for result in PAPER_RESULTS]
)
def test_counts_equal_the_papers(result, expected):
    complexity = count_flops(load(result.recipe), result.size)
    assert complexity.flops / 1e9 == pytest.approx(expected, abs=0.01)
    assert round(complexity.flops / 1e9) == result.gflops
    assert complexity.parameters == SIZES[result.recipe][0]


def test_backbone_flops_by_hand():
    """A one-stage model whose every MAC can be written down: LayerNorm and GELU count nothing."""
    config = Config(
        dict(
            default_scope='mmseg',
            model=dict(
                type='EncoderDecoder',
                backbone=dict(type='ConvNeXt', arch=dict(depths=[2], channels=[8]), out_indices=[0]),
                decode_head=dict(
                    type='FCNHead', in_channels=8, in_index=0, channels=4, num_convs=1, concat_input=False,
                    num_classes=3, norm_cfg=dict(type='SyncBN'), kernel_size=1,
                ),
            ),
        )
    )  # fmt: skip
    pixels = 16 * 24
    weights = 4 * 4 * 3 * 8 + 2 * (7 * 7 * 8 + 2 * 8 * 32) + 8 * 4 + 4 * 3
    biases = 8 + 2 * (8 + 32 + 8) + 3
    norm, relu = 2 * 4, 4
    linear_biases = 2 * (32 + 8)  # counted once a layer by mmcv, not once a pixel
    expected = pixels * (weights + biases - linear_biases + norm + relu) + linear_biases
    assert count_flops(config, (96, 64)).flops == pytest.approx(expected, rel=1e-3)


def test_nothing_is_allocated():
    """The weights of the largest recipe alone are 1.6 GB."""
    code = (
        'import resource; from mmengine.config import Config; from convnext_dense.paper.flops import count_flops;'
        f'config = Config.fromfile("{ROOT}/configs/cascade/convnext_xl_in22k.py"); used = resource.getrusage;'
        'before = used(resource.RUSAGE_SELF).ru_maxrss; count_flops(config, (1280, 800));'
        'print(used(resource.RUSAGE_SELF).ru_maxrss - before)'
    )
    process = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert int(process.stdout.split()[-1]) < 300_000  # kilobytes


def test_command_line_tool(run_tool, monkeypatch, capsys):
    # Each recipe is counted by the test of its results: here one of each kind is.
    names = ('mask_rcnn/convnext_t', 'upernet/swin_t', 'dino/convnext_t', 'mask2former/convnext_b_in22k_coco')
    chosen = [result for result in RESULTS if result.recipe in names]
    monkeypatch.setattr(results, 'RESULTS', chosen)
    monkeypatch.syspath_prepend(ROOT / 'tools')
    monkeypatch.setattr(sys, 'argv', ['complexity.py', '--all', '--json'])
    runpy.run_path(str(ROOT / 'tools/complexity.py'), run_name='__main__')
    rows = json.loads(capsys.readouterr().out)
    assert [row['config'] for row in rows] == [result.recipe for result in chosen]
    for row, result in zip(rows, chosen):
        counted = round(row['flops'] / 1e9), round(row['parameters'] / 1e6)
        assert (row['paper_gflops'], row['paper_parameters_m']) == (result.gflops, result.params_m)
        assert counted == (result.gflops or counted[0], result.params_m or counted[1])
    process = run_tool('complexity.py', ROOT / 'configs/demo/mask_rcnn.py', '--size', 128, 96)
    cells = process.stdout.splitlines()[1].split()
    assert cells[1] == '128x96' and cells[3] == cells[5] == '-'
    process = run_tool('complexity.py', ROOT / 'configs/upernet/convnext_t.py', '--size', 512, 512)
    assert process.stdout.splitlines()[1].split()[3:] == ['60M', process.stdout.split()[-2], '-']


def test_bad_input(run_tool, tmp_path):
    (tmp_path / 'none.py').write_text('x = 1')
    one_line_error(run_tool('complexity.py', 'none.py'), 'none.py', 'no model')
    one_line_error(run_tool('complexity.py', 'gone.py'), 'gone.py')
    assert run_tool('complexity.py').returncode == run_tool('complexity.py', 'a.py', '--all').returncode == 2
    assert run_tool('complexity.py', '--all', '--size', '0', '5').returncode == 2
    with pytest.raises(UsageError, match='at 8x8.*larger'):
        count_flops(load('demo/upernet'), (8, 8))
    config = Config(dict(model=dict(type='ConvNeXt')))
    with pytest.raises(UsageError, match='ConvNeXt cannot be counted'):
        count_flops(config, (64, 64))


def test_tables_align():
    rows = [['x', '10'], ['long', '2']]
    assert format_table(['recipe', 'b'], rows) == 'recipe   b\nx       10\nlong     2'
    assert format_table(['recipe', 'b'], rows[:1], markdown=True) == '| recipe |  b |\n| ------ | -: |\n| x      | 10 |'
