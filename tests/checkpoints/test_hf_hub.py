"""Models of the Hugging Face Hub in timm's notation, with a fake huggingface_hub: downloads and all its errors."""

import re
import sys
import types

import pytest
import torch
from mmengine.logging import MMLogger

from convnext_dense import load_backbone
from convnext_dense.checkpoints import hf_hub, hub
from convnext_dense.errors import UsageError
from convnext_dense.models.convnext import ConvNeXt
from helpers.foreign_weights import RENAMES, TIMM
from helpers.weights import random_weights

ARCH = dict(depths=(1, 1, 2, 1), channels=(8, 16, 24, 32))
NAME = 'hf-hub:timm/convnext_tiny.dinov3_lvd1689m'


class HfHubHTTPError(OSError):
    pass


class RepositoryNotFoundError(HfHubHTTPError):
    pass


class GatedRepoError(RepositoryNotFoundError):
    pass


class RevisionNotFoundError(HfHubHTTPError):
    pass


class EntryNotFoundError(Exception):
    pass


class RemoteEntryNotFoundError(HfHubHTTPError, EntryNotFoundError):
    pass


class LocalEntryNotFoundError(FileNotFoundError, EntryNotFoundError):
    pass


@pytest.fixture
def hugging_face(tmp_path, monkeypatch):
    """A fake huggingface_hub that serves files of a folder; it raises `fail` if that is set."""
    module, requests = types.ModuleType('huggingface_hub'), []
    module.fail = None

    def hf_hub_download(repo_id, filename, revision=None):
        requests.append((repo_id, filename, revision))
        if module.fail:
            raise module.fail
        path = tmp_path / 'hub' / repo_id / filename
        if not path.exists():
            raise RemoteEntryNotFoundError(f'404 {filename}')
        return str(path)

    module.hf_hub_download, module.requests = hf_hub_download, requests
    monkeypatch.setitem(sys.modules, 'huggingface_hub', module)
    hf_hub._announce_license.cache_clear()
    (tmp_path / 'hub/timm/convnext_tiny.dinov3_lvd1689m').mkdir(parents=True)
    return module


def original_weights() -> dict[str, torch.Tensor]:
    """Weights without a classifier, as DINOv3's and EUPE's in timm."""
    model = ConvNeXt(ARCH, out_indices=-1)
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.startswith('norm')}
    return random_weights(shapes | {'norm.weight': (32,), 'norm.bias': (32,)})


def save(folder, weights, file='model.safetensors'):
    from safetensors.torch import save_file

    timm_weights = {RENAMES[TIMM](name): tensor for name, tensor in weights.items()}
    (save_file if file.endswith('safetensors') else torch.save)(timm_weights, folder / file)


@pytest.mark.parametrize('file', ['model.safetensors', 'pytorch_model.bin'])
@pytest.mark.parametrize('final_norm', ['drop', 'reuse'])
def test_loads_exact_values(hugging_face, tmp_path, file, final_norm):
    weights = original_weights()
    save(tmp_path / 'hub/timm/convnext_tiny.dinov3_lvd1689m', weights, file)
    backbone = ConvNeXt(ARCH)
    report = load_backbone(backbone, NAME, final_norm)
    n_initial = 6 if final_norm == 'reuse' else 8
    assert NAME in report and f'{n_initial} kept at initialization' in report
    for name, tensor in backbone.state_dict().items():
        original = name.replace('norm3.', 'norm.') if final_norm == 'reuse' else name
        if original in weights and not re.match(r'norm\d', name.replace('norm3.', '')):
            assert torch.equal(tensor, weights[original]), name


def test_license_is_logged_once(hugging_face, tmp_path, caplog):
    folder = tmp_path / 'hub/timm/convnext_tiny.dinov3_lvd1689m'
    save(folder, original_weights())
    (folder / 'README.md').write_text(
        '---\nlicense: other\nlicense_name: dinov3-license\nlicense_link: https://ai.meta.com/x\n---\n# license: none\n'
    )
    MMLogger.get_instance('hf').addHandler(caplog.handler)
    for _ in range(2):
        hub.download(NAME)
    lines = [record.getMessage() for record in caplog.records if 'license' in record.getMessage()]
    assert lines == [f'{NAME}: license dinov3-license, https://ai.meta.com/x']


def test_revision_is_passed_to_the_hub(hugging_face, tmp_path):
    save(tmp_path / 'hub/timm/convnext_tiny.dinov3_lvd1689m', original_weights())
    hub.download(f'{NAME}@abc123')
    assert hugging_face.requests[0] == ('timm/convnext_tiny.dinov3_lvd1689m', 'model.safetensors', 'abc123')


@pytest.mark.parametrize(
    'error, words',
    [
        (GatedRepoError('401\nCannot access'), 'is gated: accept its terms at https://huggingface.co/timm/conv'),
        (RepositoryNotFoundError('404'), 'no model https://huggingface.co/timm/convnext_tiny.dinov3_lvd1689m'),
        (RevisionNotFoundError('404'), 'no such revision'),
        (LocalEntryNotFoundError('offline'), 'not in the cache of huggingface_hub and the hub cannot be reached'),
        (RemoteEntryNotFoundError('404'), 'has none of model.safetensors, pytorch_model.bin'),
        (HfHubHTTPError('500\nServer'), r'cannot download .*\(500 Server\)'),
        (ConnectionError('refused'), 'cannot download'),
    ],
)
def test_errors_are_one_line_with_a_manual_download_hint(hugging_face, error, words):
    hugging_face.fail = error
    with pytest.raises(UsageError, match=words) as error_info:
        hub.download(NAME)
    message = str(error_info.value)
    assert '\n' not in message
    hint = 'download https://huggingface.co/timm/convnext_tiny.dinov3_lvd1689m/resolve/main/model.safetensors'
    assert f'{hint} and give its path' in message


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(UsageError, match='pip install huggingface_hub, or download https://huggingface.co/timm/conv'):
        load_backbone(ConvNeXt(ARCH), NAME)


@pytest.mark.parametrize('name', ['hf-hub:', 'hf-hub:convnext', 'hf-hub:a/b/c', 'hf-hub:../x y'])
def test_invalid_names(name):
    with pytest.raises(UsageError, match='give hf-hub:owner/name'):
        hub.download(name)


def test_gated_weights_name_their_public_copy():
    for name in (name for name in hub.WEIGHTS if name.startswith('dinov3')):
        with pytest.raises(UsageError, match='is not public.*request it at https://ai.meta.com') as error:
            hub.resolve(name)
        (copy,) = re.findall(r'hf-hub:[\w/.]+\w', str(error.value))
        assert copy in hub.WEIGHTS and hub.resolve(copy) == copy
