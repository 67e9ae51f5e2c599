#!/usr/bin/env python
"""Write the page of the tutorial from its notebook, after executing it if that is asked for.

    python docs/run_tutorial.py               docs/tutorial.md and its pictures, from docs/tutorial.ipynb
    python docs/run_tutorial.py --execute     execute the cells first, in a fresh folder, and keep their outputs
                                              in the notebook (`make tutorial`)

A cell that begins with ! is one command of the shell, as in Jupyter; all others are Python. Of commands the standard
output is kept. The metadata of a cell may hold `lines`, a regular expression of those lines of its output that are
kept (the page shows ... for the others), and `picture`, the description of the picture that it displays.
"""

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / 'docs/tutorial.ipynb'
MAX_SIDE, COLORS = 900, 64  # of a picture
NOISE = 'Could not import OneDL. Skipping OneDL datasets.'  # printed wherever onedl-mmdetection is imported
NOTE = '<!-- Written by run_tutorial.py out of tutorial.ipynb: change the notebook. -->'


def execute(notebook: dict, folder: Path) -> None:
    """Execute the cells in order in `folder`, which gets copies of what of the clone they use; outputs are replaced."""
    for name in ('tools', 'configs'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))
    (folder / 'docs').mkdir()
    os.chdir(folder / 'docs')  # where Jupyter starts
    os.environ['PATH'] = os.pathsep.join([os.path.dirname(sys.executable), os.environ['PATH']])
    namespace = {'__name__': '__main__'}
    cells = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']
    for count, cell in enumerate(cells, 1):
        source = ''.join(cell['source'])
        print(source, flush=True)
        text, value = run_command(source[1:], cell) if source.startswith('!') else run_python(source, namespace)
        text = select_lines(text.replace(f'{folder}/', ''), cell['metadata'].get('lines', ''))
        print(text, flush=True)
        outputs = [dict(output_type='stream', name='stdout', text=text.splitlines(True))] if text else []
        if value is not None:
            result = dict(output_type='execute_result', execution_count=count, metadata={}, data=display(value))
            outputs.append(result)
        cell.update(execution_count=count, outputs=outputs)


def run_command(command: str, cell: dict) -> tuple[str, None]:
    """Standard output of a command, which may only fail where the cell says so."""
    result = subprocess.run(command, shell=True, text=True, capture_output=True, check=False)
    if result.returncode and 'raises-exception' not in cell['metadata'].get('tags', []):
        sys.exit(f'error: {command}\n{result.stdout}{result.stderr}')
    return result.stdout, None


def run_python(source: str, namespace: dict) -> tuple[str, object]:
    """What a cell prints, and the value of the expression at its end."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()):
        exec(compile(tree, NOTEBOOK.name, 'exec'), namespace)
        value = eval(compile(ast.Expression(last.value), NOTEBOOK.name, 'eval'), namespace) if last else None
    return printed.getvalue(), value


def select_lines(text: str, pattern: str) -> str:
    """The lines in which `pattern` is found, and ... in the place of others."""
    lines = [line.rstrip() for line in text.splitlines() if line != NOISE]
    shown = []
    for line in lines:
        if re.search(pattern, line):
            shown.append(line)
        elif shown[-1:] != ['...']:
            shown.append('...')
    return ''.join(f'{line}\n' for line in shown)


def display(value: object) -> dict:
    """What Jupyter shows of a value; of a picture a small one."""
    from PIL import Image

    if not isinstance(value, Image.Image):
        return {'text/plain': repr(value).splitlines(True)}
    picture, buffer = value.convert('RGB'), io.BytesIO()
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    picture.quantize(COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(buffer, 'PNG', optimize=True)
    text = f'<PIL.Image size={picture.width}x{picture.height}>'
    return {'image/png': base64.b64encode(buffer.getvalue()).decode(), 'text/plain': [text]}


def render(notebook: dict) -> tuple[str, dict[str, bytes]]:
    """The page, and its pictures by their paths next to it."""
    parts, pictures = [], {}
    for cell in notebook['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            parts.append(source)
            continue
        parts.append(f'```sh\n{source[1:]}\n```' if source.startswith('!') else f'```python\n{source}\n```')
        for output in cell['outputs']:
            data = output.get('data', {})
            if 'image/png' in data:
                path = f'images/tutorial_{cell["id"]}.png'
                pictures[path] = base64.b64decode(data['image/png'])
                parts.append(f'![{cell["metadata"]["picture"]}]({path})')
            else:
                text = ''.join(output.get('text') or data['text/plain'])
                parts.append(f'```text\n{text.rstrip()}\n```')
    title, *rest = parts
    return '\n\n'.join([title, NOTE, *rest]) + '\n', pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--execute', nargs='?', const='', metavar='FOLDER', help='in this folder, which is left; without, in one'
    )
    parser.add_argument('--out', type=Path, default=NOTEBOOK.parent, metavar='FOLDER', help='for what is written')
    args = parser.parse_args()
    out = args.out.resolve()
    notebook = json.loads(NOTEBOOK.read_text())
    if args.execute is not None:
        with tempfile.TemporaryDirectory() as temporary:
            execute(notebook, Path(args.execute or temporary).resolve())
            os.chdir(ROOT)
        (out / NOTEBOOK.name).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n')
    page, pictures = render(notebook)
    (out / 'images').mkdir(exist_ok=True)
    (out / 'tutorial.md').write_text(page)
    for path, content in pictures.items():
        (out / path).write_bytes(content)


if __name__ == '__main__':
    main()
