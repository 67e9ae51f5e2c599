"""The READMEs agree with the code, and the Chinese one with the English one."""

import re

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, init_default_scope

from convnext_dense.checkpoints import WEIGHT_URLS
from convnext_dense.paper.results import PAPER_RESULTS
from helpers.pages import README, README_ZH, code_blocks, commands, link_targets, results_table, tables
from helpers.paths import ROOT


def test_readme_is_short_and_in_order():
    assert len(README.splitlines()) <= 160
    assert re.findall(r'^## (.*)', README, re.MULTILINE) == [
        'Install',
        'Use the backbone in your config',
        'Pretrained weights',
        'Train on your data',
        'Predict and export',
        'Results reported in the paper',
        'Demo',
        'Limits',
        'Links',
    ]
    assert README.index('![') < README.index('## Install')


@pytest.mark.parametrize('page', [README, README_ZH], ids=['en', 'zh'])
def test_results_table_equals_the_paper(page):
    assert results_table(PAPER_RESULTS, '[`{0}.py`](configs/{0}.py)') in page


def test_demo_image_has_a_readable_size():
    import cv2

    path = ROOT / 'docs/images/demo.png'
    height, width = cv2.imread(str(path)).shape[:2]
    assert width >= 800 and height >= 400 and path.stat().st_size < 300_000


def test_example_config_trains_a_step(tmp_path):
    (block,) = [code for language, code in code_blocks(README) if language == 'python']
    (tmp_path / 'my_config.py').write_text(block)
    config = Config.fromfile(tmp_path / 'my_config.py')
    assert config.model.backbone.init_cfg.checkpoint in WEIGHT_URLS
    config.model.backbone.init_cfg = None  # no download in a test

    init_default_scope('mmdet')
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs

    model = MODELS.build(config.model)
    optim_wrapper_cfg = config.optim_wrapper.to_dict()
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        dict(
            type=optim_wrapper_cfg.pop('constructor'),
            paramwise_cfg=optim_wrapper_cfg.pop('paramwise_cfg'),
            optim_wrapper_cfg=optim_wrapper_cfg,
        )
    )
    inputs = demo_mm_inputs(2, [[3, 96, 128], [3, 128, 96]])
    initial = model.backbone.downsample_layers[0][0].weight.clone()
    losses = model.train_step(inputs, constructor(model))
    assert all(torch.isfinite(value).all() for value in losses.values())
    assert not torch.equal(initial, model.backbone.downsample_layers[0][0].weight)


def test_versions_equal_setup_and_makefile():
    setup, makefile = (ROOT / 'setup.py').read_text(), (ROOT / 'Makefile').read_text()
    lowest = re.search(r"python_requires='>=([\d.]+)'", setup)[1], re.search(r"'torch>=([\d.]+)'", setup)[1]
    highest_torch = re.search(r'^TORCH \?= ([\d.]+)', makefile, re.MULTILINE)[1]
    rows = dict(re.findall(r'^\| (Python|torch) +\| +([\d.]+) +\| [\d.]+ +\|$', README, re.MULTILINE))
    assert (rows['Python'], rows['torch']) == lowest
    assert re.search(rf'^\| torch .*\| {re.escape(highest_torch)} +\|$', README, re.MULTILINE)


def test_pretrained_weight_names_are_known():
    names = re.findall(r'`(convnext_\w+_224)`', README)
    assert len(set(names)) == 6 and set(names) <= set(WEIGHT_URLS)
    assert set(names) == {row.weights for row in PAPER_RESULTS}


def test_chinese_readme_has_the_same_commands_tables_and_links():
    assert commands(README_ZH) == commands(README)
    assert sorted(link_targets(README_ZH)) == sorted({*link_targets(README)} - {'README_zh-CN.md'} | {'README.md'})
    assert [[numbers(cell) for cell in row] for row in tables(README_ZH)] == [
        [numbers(cell) for cell in row] for row in tables(README)
    ]
    assert re.findall(r'`([^`\n]+)`', README_ZH) == re.findall(r'`([^`\n]+)`', README)


def numbers(cell: str) -> str:
    """The numbers and names of a cell, which no translation changes."""
    return ' '.join(re.findall(r'[\w./-]*\d[\w./-]*', re.sub(r'[^\x00-\x7f]', '', cell)))
