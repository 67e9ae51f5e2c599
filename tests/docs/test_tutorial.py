"""The tutorial: its commands are valid, its page equals its notebook, and it runs."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from convnext_dense.cli.export import make_export_parser
from convnext_dense.cli.predict import make_predict_parser
from convnext_dense.datasets import toy_shapes
from helpers.pages import PAGES, code_blocks
from helpers.paths import ROOT

SCRIPT = runpy.run_path(str(ROOT / 'docs/run_tutorial.py'))
NOTEBOOK = json.loads((ROOT / 'docs/tutorial.ipynb').read_text())
PAGE = PAGES['docs/tutorial.md']
CODE = [cell for cell in NOTEBOOK['cells'] if cell['cell_type'] == 'code']
SOURCES = [''.join(cell['source']) for cell in CODE]
COMMANDS = [source[1:] for source in SOURCES if source.startswith('!')]
PARSERS = {'predict.py': make_predict_parser, 'export.py': make_export_parser}  # other tools have `parse_args`


def test_page_equals_the_notebook():
    page, pictures = SCRIPT['render'](NOTEBOOK)
    assert page == PAGE, 'run docs/run_tutorial.py'
    files = {path.relative_to(ROOT / 'docs').as_posix() for path in (ROOT / 'docs/images').glob('tutorial_*')}
    assert files == set(pictures) and len(files) >= 5
    assert all((ROOT / 'docs' / path).read_bytes() == content for path, content in pictures.items())
    assert sum(map(len, pictures.values())) < 200_000


def test_outputs_are_from_one_execution():
    assert [cell['execution_count'] for cell in CODE] == [*range(1, len(CODE) + 1)]
    assert len({cell['id'] for cell in NOTEBOOK['cells']}) == len(NOTEBOOK['cells'])
    texts = [''.join(output.get('text', '')) for cell in CODE for output in cell['outputs']]
    assert max(text.count('\n') for text in texts) <= 30
    assert not re.search(r'(?<![\w.])/\w+/|Traceback', '\n'.join(texts)), 'a path of a machine, or a failure'


def test_every_cell_is_explained_and_short():
    for previous, cell in zip(NOTEBOOK['cells'], NOTEBOOK['cells'][1:]):
        assert cell['cell_type'] == 'markdown' or len(cell['source']) <= 8
        assert not (previous['cell_type'] == cell['cell_type'] == 'markdown')
    assert NOTEBOOK['cells'][0]['cell_type'] == 'markdown'


def test_page_has_all_commands():
    assert [code.rstrip('\n') for language, code in code_blocks(PAGE) if language == 'sh'] == COMMANDS
    tools = {name for command in COMMANDS for name in re.findall(r'tools/(\w+)', command)}
    assert tools == {'check_data', 'train', 'plot_run', 'test', 'predict', 'export'}


@pytest.mark.parametrize('command', COMMANDS)
def test_arguments_of_commands_are_known(command, parse, monkeypatch):
    """Parsed by the tool's own parser; the toy data set is not written."""
    python, *args = shlex.split(command.replace('\\\n', ' '))
    assert python == 'python'
    if args[0] == '-m':
        calls = []
        monkeypatch.setattr(toy_shapes, 'write', lambda *args, **kwargs: calls.append(args))
        monkeypatch.setattr(toy_shapes, 'write_unlabeled', lambda *args: calls.append(args))
        monkeypatch.setattr(sys, 'argv', args[1:])
        assert args[1] == 'convnext_dense.datasets.toy_shapes' and toy_shapes.main() == 0 and len(calls) == 1
        return
    tool = Path(args[0])
    assert tool.parent == Path('tools') and (ROOT / tool).is_file()
    if tool.name in PARSERS:
        PARSERS[tool.name]('').parse_args(args[1:])
    else:
        parse(tool.name, *args[1:])


def test_failing_command_ends_the_execution():
    cell = dict(metadata={})
    with pytest.raises(SystemExit, match='exit 3'):
        SCRIPT['run_command']('echo why; exit 3', cell)
    cell['metadata']['tags'] = ['raises-exception']
    assert SCRIPT['run_command']('echo why; exit 3', cell) == ('why\n', None)


def test_python_cells_share_a_namespace():
    namespace = {}
    assert SCRIPT['run_python']('x = 20\nprint(x)', namespace) == ('20\n', None)
    assert SCRIPT['run_python']('y = x + 1\ny * 2', namespace) == ('', 42)


def test_omitted_lines_are_marked():
    assert SCRIPT['select_lines']('a\nb\nc \nd1\nd2\n', '[ad]') == 'a\n...\nd1\nd2\n'
    assert SCRIPT['select_lines']('a\nb', '') == 'a\nb\n' and SCRIPT['select_lines']('', '') == ''


@pytest.mark.slow
def test_notebook_runs(tmp_path):
    """Takes a few minutes on two cores; the trained and the exported model detect something."""
    folder, out = tmp_path / 'run', tmp_path / 'out'
    folder.mkdir()
    out.mkdir()
    command = [sys.executable, ROOT / 'docs/run_tutorial.py', '--execute', folder, '--out', out]
    result = subprocess.run(command, text=True, capture_output=True, check=False, env=dict(os.environ))
    assert result.returncode == 0, result.stdout + result.stderr
    for file in ('work_dirs/tutorial/epoch_4.pth', 'report/classes_bbox.csv', 'model.onnx', 'model.onnx.check.json'):
        assert (folder / file).is_file(), file
    for name in ('predictions', 'predictions_onnx'):
        objects = json.loads((folder / name / 'predictions.json').read_text())['annotations']
        assert len(objects) >= 5 and {annotation['image_id'] for annotation in objects} <= {1, 2, 3, 4, 5, 6}
    page = (out / 'tutorial.md').read_text()
    blocks = [[block for block in code_blocks(text) if block[0] != 'text'] for text in (page, PAGE)]
    assert blocks[0] == blocks[1]
    assert re.search(r'(\d+) and \1 objects, scores differ by at most [\d.]+e-0[4-9]', page.replace('0e+00', '1e-09'))
