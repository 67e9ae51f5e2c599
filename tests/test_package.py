"""Content of the wheel, and dependencies of the backbone."""

import subprocess
import sys
import zipfile

import pytest

from helpers.paths import ROOT


def test_wheel_contains_every_config_and_tool(tmp_path):
    command = [
        sys.executable,
        '-m',
        'pip',
        'wheel',
        '--quiet',
        '--no-deps',
        '--no-build-isolation',
        '-w',
        tmp_path,
        ROOT,
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob('convnext_dense-*.whl')
    names = {name.removeprefix('convnext_dense/') for name in zipfile.ZipFile(wheel).namelist()}
    expected = {
        f'.mim/{p.relative_to(ROOT)}'
        for folder in ('configs', 'tools')
        for pattern in ('*.py', '*.sh')
        for p in (ROOT / folder).rglob(pattern)
    }
    assert len(expected) > 10 and expected < names
    assert '.mim/model-index.yml' in names and 'checkpoints/naming.py' in names

    # Installed elsewhere, `convnext_dense::...` is found from any folder.
    zipfile.ZipFile(wheel).extractall(tmp_path / 'site')
    (tmp_path / 'mine.py').write_text("_base_ = 'convnext_dense::upernet/convnext_t.py'")
    code = (
        'import convnext_dense\n'
        'from mmengine import Config\n'
        "print(convnext_dense.__file__, Config.fromfile('mine.py').model.type)"
    )
    actual = subprocess.run(
        [sys.executable, '-c', code],
        cwd=tmp_path,
        env={'PYTHONPATH': str(tmp_path / 'site')},
        capture_output=True,
        text=True,
    )
    assert actual.stdout.split() == [str(tmp_path / 'site/convnext_dense/__init__.py'), 'EncoderDecoder'], actual.stderr


def test_import_with_mmengine_only():
    """Neither mmdet nor mmseg nor mmcv is needed for the backbone."""
    code = (
        'import sys\n'
        "for name in ('mmcv', 'mmdet', 'mmseg'): sys.modules[name] = None\n"
        'import torch, convnext_dense\n'
        "print(len(convnext_dense.ConvNeXt('atto')(torch.zeros(1, 3, 32, 32))))"
    )
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == '4\n'


def test_import_without_mmengine_gives_an_install_hint():
    code = "import sys; sys.modules['mmengine'] = None; import convnext_dense"
    error = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stderr
    assert "pip install --no-build-isolation 'convnext_dense[onedl]', or [openmmlab]" in error.splitlines()[-1]


@pytest.mark.parametrize(
    'library, inferencer, recipe', [('mmdet', 'DetInferencer', 'mask_rcnn'), ('mmseg', 'MMSegInferencer', 'upernet')]
)
@pytest.mark.parametrize('imported', [True, False])
def test_inferencers_accept_a_config_with_a_base_of_this_package(library, inferencer, recipe, imported, tmp_path):
    """After the package is imported, in Python or by the config."""
    base = f"'convnext_dense::demo/{recipe}.py'"
    base = base if imported else f"__import__('convnext_dense') and {base}"
    (tmp_path / 'mine.py').write_text(f'_base_ = {base}\n')
    code = (
        f'{"import convnext_dense" if imported else ""}\n'
        'import numpy as np\n'
        f'from {library}.apis import {inferencer}\n'
        f"inferencer = {inferencer}('mine.py', weights=None, device='cpu')\n"
        "print(len(inferencer(np.zeros((64, 64, 3), np.uint8))['predictions']))\n"
    )
    process = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, text=True, capture_output=True)
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.splitlines()[-1] in ('1', '64')
