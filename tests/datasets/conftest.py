"""Fixtures of data sets."""

import pytest

from convnext_dense.datasets import toy_shapes
from helpers.datasets import N_TRAIN, N_VAL


@pytest.fixture(scope='module')
def toy_dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp('drawn') / 'shapes'
    toy_shapes.write(folder, train=N_TRAIN, val=N_VAL, size=64)
    return folder


@pytest.fixture(autouse=True)
def fast_config_dumps(monkeypatch):
    """Skip the formatting of dumped configs, which would take most of the time."""
    monkeypatch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True))
