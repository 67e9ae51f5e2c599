"""What the README says of recipes and tools is what there is."""

import re

from convnext_dense.checkpoints import WEIGHT_URLS
from convnext_dense.paper.results import PAPER_RESULTS
from convnext_dense.paper.tables import format_table
from helpers.paths import ROOT

README = (ROOT / 'README.md').read_text()
HEADER = ('recipe', 'weights', 'precision', 'box AP', 'mask AP', 'mIoU', 'mIoU multi-scale', 'parameters', 'FLOPs')


def recipes() -> str:
    rows = [
        [
            f'[`{row.recipe}.py`](configs/{row.recipe}.py)',
            'ImageNet-22K' if '22k' in row.weights else 'ImageNet-1K',
            row.precision,
            *(str(row.figures.get(name, '')) for name in HEADER[3:7]),
            f'{row.params}M',
            f'{row.gflops}G',
        ]
        for row in PAPER_RESULTS
    ]
    return format_table(HEADER, rows, markdown=True)


def test_the_table_of_recipes_is_the_papers_data():
    assert recipes() in README


def test_links_and_named_files_exist():
    for target in re.findall(r'\]\((?!https?:)([^)#]+)\)', README):
        assert (ROOT / target).exists(), target
    for tool in set(re.findall(r'tools/(\w+\.py)', README)):
        assert (ROOT / 'tools' / tool).exists(), tool
    for config in set(re.findall(r'configs/(\w+/\w+\.py)', README)):
        assert (ROOT / 'configs' / config).exists(), config


def test_options_it_names_are_options_of_a_tool():
    sources = ''.join(
        path.read_text()
        for path in [
            *(ROOT / 'tools').glob('*.py'),
            *(ROOT / 'convnext_dense/cli').glob('*.py'),
            ROOT / 'convnext_dense/datasets/custom.py',
        ]
    )
    others = {'--no-build-isolation', '--nproc_per_node', '--gres', '--ntasks', '--ntasks-per-node', '--cpus-per-task'}
    others |= {'--kill-on-bad-exit', '--launcher', '--nodes', '--logdir'}
    for option in set(re.findall(r'(?<![\w-])--[a-z][\w-]+', README)) - others:
        assert f"'{option}'" in sources, option


def test_names_of_weights_it_gives_are_known():
    names = re.findall(r'`((?:mask_rcnn_|cascade_mask_rcnn_|upernet_)?convnext_\w+_(?:224|3x|\d+x\d+))`', README)
    assert len(names) > 6 and set(names) <= set(WEIGHT_URLS)


def test_the_lines_of_openmmlab_are_those_that_setup_pins():
    for extra, names in {
        'onedl': ['onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmsegmentation'],
        'openmmlab': ['mmengine', 'mmcv', 'mmdet', 'mmsegmentation'],
    }.items():
        pins = [re.search(rf"'{name}==([\d.]+)'", (ROOT / 'setup.py').read_text())[1] for name in names]
        cells = [cell.strip() for cell in re.search(rf'\| `\[{extra}\]` .*', README)[0].split('|')]
        assert cells[2:6] == pins
