"""The pages in docs/ agree with the code."""

import inspect
import re

import pytest

from convnext_dense import ARCHS, ConvNeXt
from convnext_dense._moved import MOVED
from convnext_dense.checkpoints import WEIGHT_URLS
from convnext_dense.cli.arguments import RENAMED_OPTIONS
from convnext_dense.paper.results import BASELINE_RESULTS, DINO_RESULTS, LATER_RESULTS, RESULTS, UNTRAINED_RESULTS
from helpers.pages import PAGES, code_blocks, results_table, tables
from helpers.paths import ROOT

ALL_PAGES = pytest.mark.parametrize('name', PAGES)
# Options of pip, torchrun, Slurm, TensorBoard, mkdocs, mmseg and trtexec.
EXTERNAL_OPTIONS = """
    --no-build-isolation --nproc_per_node --nnodes --rdzv_backend --rdzv_endpoint --rdzv_id --gres --ntasks
    --ntasks-per-node --cpus-per-task --kill-on-bad-exit --launcher --nodes --partition --time --gpus-per-task
    --gpu-bind --signal --logdir --strict --tta --onnx --fp16 --saveEngine --minShapes --optShapes --maxShapes
"""


@ALL_PAGES
def test_links_exist(name):
    for target in re.findall(r'\]\((?!https?:)([^)#\s]+)', PAGES[name]):
        assert ((ROOT / name).parent / target).exists(), target


@ALL_PAGES
def test_mentioned_files_exist(name):
    page = PAGES[name] if name != 'CHANGELOG.md' else ''  # which names what is gone
    for path in set(re.findall(r'(?<![\w/.-])((?:tools|configs|tests|benchmarks)/[\w/.-]*\w\.(?:py|sh))\b', page)):
        assert (ROOT / path).exists(), path
    for path in set(re.findall(r'(?<![\w/.-])((?:tests|benchmarks|configs)/\w+)(?![\w/.-])', page)):
        assert (ROOT / path).exists(), path
    for recipe in set(re.findall(r'`((?:mask_rcnn|cascade|upernet|rtmdet|dino)/\w+\.py)`', page)):
        assert (ROOT / 'configs' / recipe).exists(), recipe


@ALL_PAGES
def test_mentioned_options_exist(name):
    folders = ['tools', 'convnext_dense', 'benchmarks']
    sources = ''.join(path.read_text() for folder in folders for path in (ROOT / folder).rglob('*.py'))
    for option in set(re.findall(r'(?<![\w-])--[a-z][\w-]+', PAGES[name])) - set(EXTERNAL_OPTIONS.split()):
        assert f"'{option}'" in sources, option


@ALL_PAGES
def test_python_blocks_compile(name):
    for language, code in code_blocks(PAGES[name]):
        if language == 'python':
            compile(inspect.cleandoc(code), name, 'exec')


def test_table_of_backbone_arguments():
    section = PAGES['docs/config.md'].split('## Arguments of the backbone')[1].split('| arch |')[0]
    rows = {row[0].strip('`'): row[1].strip('`') for row in tables(section)}
    defaults = {name: repr(p.default) for name, p in inspect.signature(ConvNeXt).parameters.items() if name != 'grn'}
    assert rows == {'argument': 'default', '---': '---', **defaults, 'use_grn': 'False'}  # None there: as grn says


def test_table_of_architectures():
    rows = {row[0].strip('`'): row[1:] for row in tables(PAGES['docs/config.md']) if row[0].strip('`') in ARCHS}
    assert rows == {
        name: [', '.join(map(str, arch[key])) for key in ('depths', 'channels')] for name, arch in ARCHS.items()
    }


def test_example_equals_the_readme():
    blocks_of_pages = [code_blocks(PAGES[name]) for name in ('docs/config.md', 'README.md')]
    assert next(b for b in blocks_of_pages[0] if b[0] == 'python') == next(
        b for b in blocks_of_pages[1] if b[0] == 'python'
    )


@pytest.mark.parametrize('results', [BASELINE_RESULTS, LATER_RESULTS, DINO_RESULTS, UNTRAINED_RESULTS])
def test_tables_of_results(results):
    assert results_table(results, '`{}.py`') in PAGES['docs/recipes.md']


def test_table_of_released_models():
    rows = dict(re.findall(r'^\| `(\w+/\w+)\.py` \| `(\w+)` \|$', PAGES['docs/weights.md'], re.MULTILINE))
    assert rows == {row.recipe: row.released for row in RESULTS if row.released}
    assert set(rows.values()) <= set(WEIGHT_URLS) and len(set(rows.values())) == len(rows)
    for recipe, name in rows.items():
        assert name.startswith(recipe.split('/')[0].replace('cascade', 'cascade_mask_rcnn'))


def test_openmmlab_versions_equal_setup():
    setup = (ROOT / 'setup.py').read_text()
    for extra, names in {
        'onedl': ['onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmsegmentation'],
        'openmmlab': ['mmengine', 'mmcv', 'mmdet', 'mmsegmentation'],
    }.items():
        pins = [re.search(rf"'{name}==([\d.]+)'", setup)[1] for name in names]
        (cells,) = [row for row in tables(PAGES['docs/install.md']) if row[0] == f'`[{extra}]`']
        assert cells[1:5] == pins


def test_every_page_is_in_the_navigation():
    pages_in_nav = set(re.findall(r': ([\w/]+\.md)$', (ROOT / 'mkdocs.yml').read_text(), re.MULTILINE))
    assert pages_in_nav == {str(path.relative_to(ROOT / 'docs')) for path in (ROOT / 'docs').rglob('*.md')}


def test_changelog_lists_every_moved_module_and_renamed_option():
    rows = [
        [re.findall(r'`([^`]+)`', cell) for cell in row]
        for row in tables(PAGES['CHANGELOG.md'].replace('\n  |', '\n|'))
    ]
    modules = {old[0]: ' '.join(new) for old, new in (row for row in rows if len(row) == 2) if old}
    assert {old: new for old, new in modules.items() if old in MOVED} == MOVED
    assert {old[0]: new[0] for _, old, new in (row for row in rows if len(row) == 3) if old} == RENAMED_OPTIONS
