import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.model import PretrainedInit, Sequential
from mmengine.registry import MODELS
from mmengine.runner import save_checkpoint

from convnext_dense import load_backbone
from convnext_dense.checkpoints import WEIGHT_URLS, hub, io, load_checkpoint
from convnext_dense.checkpoints.pretrained import load_model_weights
from convnext_dense.errors import UsageError
from convnext_dense.models.convnext import ConvNeXt
from convnext_dense.paper.results import PAPER_RESULTS, RESULTS
from helpers.paths import ROOT
from helpers.recipes import load as load_recipe
from helpers.weights import random_weights

ARCH = dict(depths=(1, 1, 4, 1), channels=(8, 16, 24, 32))
# URLs in the result tables of the original code of ConvNeXt, ConvNeXt V2 and Swin, and of the ResNets.
ADDRESSES = (ROOT / 'tests/data/addresses.txt').read_text().split()


def save_original(path: Path, arch=ARCH, edit=None) -> Path:
    """A file as the original code saves it: {'model': ...} with a classifier and no output norms."""
    model = ConvNeXt(arch, out_indices=-1)
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.startswith('norm')}
    channels = model.channels[-1]
    shapes |= {'norm.weight': (channels,), 'norm.bias': (channels,), 'head.weight': (10, channels), 'head.bias': (10,)}
    weights = random_weights(shapes)
    if edit:
        edit(weights)
    torch.save({'model': weights}, path)
    return path


def test_original_weights_load_except_for_output_norms(tmp_path):
    file = save_original(tmp_path / 'w.pth')
    model = MODELS.build(dict(type='ConvNeXt', arch=ARCH, init_cfg=dict(type='Pretrained', checkpoint=str(file))))
    initial = {name: t.clone() for name, t in model.state_dict().items()}
    model.init_weights()
    saved = torch.load(file)['model']
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, initial[name] if name.startswith('norm') else saved[name], rtol=0, atol=0)
    report = load_backbone(model, file)
    n_tensors = len(initial)
    assert '\n' not in report
    assert (
        f'{n_tensors - 8} of {n_tensors} backbone tensors loaded, 8 kept at initialization (output norms), 4 unused'
        in report
    )


@pytest.mark.parametrize(
    'settings',
    [
        lambda checkpoint: [dict(type='Pretrained', checkpoint=checkpoint)],
        lambda checkpoint: dict(type=PretrainedInit, checkpoint=checkpoint),
        lambda checkpoint: [dict(type=PretrainedInit, checkpoint=checkpoint)],
        lambda checkpoint: dict(type='mmengine.Pretrained', checkpoint=checkpoint),
        lambda checkpoint: [
            dict(type='Pretrained', checkpoint=checkpoint),
            dict(type='Constant', val=3.0, layer=['Linear', 'Conv2d', 'LayerNorm']),  # applied first, in any order
        ],
    ],
)
def test_every_spelling_of_init_cfg(tmp_path, settings):
    file = save_original(tmp_path / 'w.pth')
    model = ConvNeXt(ARCH, init_cfg=settings(str(file)))
    model.init_weights()
    saved = torch.load(file)['model']
    for name, tensor in model.state_dict().items():
        assert name.startswith('norm') or torch.equal(tensor, saved[name]), name


def test_init_weights_of_model_reports_loading(tmp_path, caplog):
    file = save_original(tmp_path / 'w.pth')
    MMLogger.get_instance('weights').addHandler(caplog.handler)
    model = Sequential(MODELS.build(dict(type='ConvNeXt', arch=ARCH, init_cfg=dict(checkpoint=str(file)))))
    model.init_weights()
    reports = [r.getMessage() for r in caplog.records if 'tensors loaded' in r.getMessage()]
    assert len(reports) == 1 and str(file) in reports[0]
    torch.testing.assert_close(model[0].stages[2][3].gamma, torch.load(file)['model']['stages.2.3.gamma'])


@pytest.mark.parametrize(
    'wrap',
    [
        lambda w: w,
        lambda w: {'state_dict': w},
        lambda w: {'model': {f'module.{n}': t for n, t in w.items()}},
        lambda w: {'state_dict': {f'_orig_mod.{n}': t for n, t in w.items()}},
        lambda w: {'model': {f'module._orig_mod.{n}': t for n, t in w.items()}},
        lambda w: {f'_orig_mod.module.module.{n}': t for n, t in w.items()},
        lambda w: {'model': {n: t.half() for n, t in w.items()}},
        lambda w: {
            'meta': {'epoch': 3},
            'state_dict': {f'backbone.{n}': t for n, t in w.items()} | {'x.y': w['head.bias']},
        },
    ],
)
def test_wrappers_prefixes_and_trained_detectors(tmp_path, wrap):
    weights = torch.load(save_original(tmp_path / 'w.pth'))['model']
    torch.save(wrap(weights), tmp_path / 'v.pth')
    model = ConvNeXt(ARCH)
    load_backbone(model, tmp_path / 'v.pth')
    torch.testing.assert_close(
        model.stages[3][0].dwconv.weight, weights['stages.3.0.dwconv.weight'], rtol=2e-3, atol=1e-4
    )


def test_backbone_weights_for_a_whole_model_come_from_the_opened_checkpoint(tmp_path):
    """The file is not opened again: here it is gone."""
    content = load_checkpoint(save_original(tmp_path / 'w.pth'), mmap=False)
    (tmp_path / 'w.pth').unlink()
    model = torch.nn.ModuleDict(dict(backbone=ConvNeXt(ARCH)))
    weights = load_model_weights(content, tmp_path / 'w.pth', model)
    assert weights.keys() == model.state_dict().keys()
    name = 'stages.3.0.dwconv.weight'
    assert torch.equal(weights[f'backbone.{name}'], content['model'][name])


def test_checkpoint_is_cached_until_overwritten(tmp_path, monkeypatch):
    reads, load_uncached = [], io._load_uncached
    monkeypatch.setattr(io, '_load_uncached', lambda file: reads.append(file.name) or load_uncached(file))
    file = tmp_path / 'w.pth'
    torch.save(dict(state_dict=dict(w=torch.zeros(5))), file)
    cached, private_copy = load_checkpoint(file), load_checkpoint(str(file), mmap=False)
    private_copy['state_dict']['w'] += 1
    assert (
        not cached['state_dict']['w'].any() and not load_checkpoint(file)['state_dict']['w'].any() and len(reads) == 1
    )
    torch.save(dict(state_dict=dict(w=torch.full((5,), 2.0))), file)
    assert (
        (load_checkpoint(file)['state_dict']['w'] == 2).all()
        and (private_copy['state_dict']['w'] == 1).all()
        and len(reads) == 2
    )
    torch.save(dict(state_dict=dict(w=torch.ones(5))), tmp_path / 'v.pth')
    assert (load_checkpoint(tmp_path / 'v.pth')['state_dict']['w'] == 1).all() and len(reads) == 3
    (tmp_path / 'v.pth').unlink()
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / 'v.pth')
    io.clear_cache()
    assert (load_checkpoint(file)['state_dict']['w'] == 2).all()
    assert reads == ['w.pth', 'w.pth', 'v.pth', 'w.pth']


def test_own_output_norms_are_loaded(tmp_path):
    model = ConvNeXt(ARCH)
    model.load_state_dict(random_weights({n: tuple(t.shape) for n, t in model.state_dict().items()}))
    torch.save(model.state_dict(), tmp_path / 'own.pth')
    other_model = ConvNeXt(ARCH, out_indices=(1, 2))
    assert '0 kept' in load_backbone(other_model, tmp_path / 'own.pth')
    torch.testing.assert_close(other_model.norm2.weight, model.norm2.weight)
    assert len(other_model.stages) == 3


def block_tensor_names() -> list[str]:
    return [n for n in ConvNeXt(ARCH).state_dict() if n.startswith(('stages.2.1.', 'downsample_layers'))]


@pytest.mark.parametrize('name', block_tensor_names())
@pytest.mark.parametrize('damage', ['missing', 'renamed', 'reshaped'])
def test_damaged_tensors_are_refused_by_name(tmp_path, name, damage):
    def edit(weights):
        tensor = weights.pop(name)
        if damage == 'renamed':
            weights[name.replace('.weight', '.wieght').replace('.bias', '.bais').replace('gamma', 'gama')] = tensor
        elif damage == 'reshaped':
            weights[name] = torch.cat([tensor, tensor])

    model = ConvNeXt(ARCH)
    initial = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(UsageError) as error:
        load_backbone(model, save_original(tmp_path / 'w.pth', edit=edit))
    message = str(error.value)
    if damage == 'missing' and name == 'downsample_layers.0.0.weight':
        assert 'no ConvNeXt weights' in message
    else:
        assert name in message or 'no ConvNeXt weights' in message
    assert '\n' not in message
    assert all(torch.equal(t, initial[n]) for n, t in model.state_dict().items())  # nothing was loaded partially


DEEPER = dict(depths=(1, 1, 6, 1), channels=ARCH['channels'])


@pytest.mark.parametrize('file_arch, model_arch', [('atto', 'femto'), (DEEPER, ARCH), (ARCH, DEEPER)])
def test_other_arch_is_refused(tmp_path, file_arch, model_arch):
    """As small and tiny: a deeper model's file fills every tensor of a shallower one; its unused blocks reveal it."""
    file = save_original(tmp_path / 'w.pth', file_arch)
    with pytest.raises(UsageError, match='does not fit'):
        load_backbone(ConvNeXt(model_arch), file)


def test_unbuilt_stages_are_unused(tmp_path):
    model = ConvNeXt(ARCH, out_indices=(0, 1))
    assert '4 kept' in load_backbone(model, save_original(tmp_path / 'w.pth'))


def test_report_counts_unused_tensors(tmp_path):
    """Nine tensors a block, four a stem or downsampling, two a norm."""
    file = save_original(tmp_path / 'w.pth')
    report = load_backbone(ConvNeXt(ARCH, out_indices=(0, 1)), file)
    n_built, n_unbuilt = 2 * 9 + 2 * 4, 5 * 9 + 2 * 4
    expected = '{} of {} backbone tensors loaded, 4 kept at initialization (output norms), {} unused'
    assert expected.format(n_built, n_built + 4, n_unbuilt + 4) in report  # the classifier and its norm

    weights = torch.load(file)['model']
    heads = {f'head.{i}': torch.ones(2) for i in range(5)}
    channels_of_norm = {0: 8, 1: 16, 3: 32}
    norms = {
        f'backbone.norm{i}.{name}': torch.ones(c) for i, c in channels_of_norm.items() for name in ('weight', 'bias')
    }
    detector = {f'backbone.{name}': t for name, t in weights.items() if not name.startswith(('norm', 'head'))}
    torch.save({'state_dict': detector | heads | norms}, tmp_path / 'd.pth')
    report = load_backbone(ConvNeXt(ARCH, out_indices=(0, 1)), tmp_path / 'd.pth')
    assert f'{n_built + 4} of {n_built + 4} backbone tensors loaded, 0 kept at initialization' in report
    assert f'{n_unbuilt + 5 + 2} unused' in report


def test_pretrained_weight_names():
    assert {name: hub.resolve(name) for name in WEIGHT_URLS} == {Path(address).stem: address for address in ADDRESSES}
    assert len(WEIGHT_URLS) == len(ADDRESSES) == 86
    assert {row.weights for row in RESULTS} | {row.released for row in RESULTS} <= {*hub.WEIGHTS, None}
    assert len({row.released for row in PAPER_RESULTS}) == 13


@pytest.mark.parametrize('address', ADDRESSES[::6], ids=lambda address: Path(address).stem)
def test_weights_are_downloaded_once(tmp_path, monkeypatch, address):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    served, urls = save_original(tmp_path / 'served.pth'), []

    def download(url, target):
        urls.append(url)
        Path(target).write_bytes(served.read_bytes())

    monkeypatch.setattr(hub, '_download', download)
    for _ in range(2):
        load_backbone(ConvNeXt(ARCH), Path(address).stem)
    assert urls == [address]


def test_urls_with_same_file_name_are_separate_files(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(hub, '_download', lambda url, target: Path(target).write_text(url))
    for url in ('https://one.org/epoch_12.pth', 'https://two.org/epoch_12.pth?download=1') * 2:
        assert hub.download(url).read_text() == url and hub.download(url).suffix == '.pth'


def test_unreachable_url_gives_a_fix(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(UsageError, match='http://127.0.0.1:9/w.pth.*init_cfg.checkpoint'):
        load_backbone(ConvNeXt(ARCH), 'http://127.0.0.1:9/w.pth')


def test_recipes_name_published_weights():
    for path in {*(ROOT / 'configs').glob('[!_]*/*.py')} - {*(ROOT / 'configs').glob('demo/*.py')}:
        config = load_recipe(f'{path.parent.name}/{path.stem}')
        assert config.model.backbone.init_cfg.checkpoint in {*hub.WEIGHTS, *WEIGHT_URLS.values()}


@pytest.mark.parametrize(
    'content', [b'', b'<!DOCTYPE html><html>Not found</html>', b'PK\x03\x04 cut off', b'\x80\x02]']
)
def test_invalid_checkpoint_files_are_refused(tmp_path, content):
    (tmp_path / 'w.pth').write_bytes(content)
    with pytest.raises(UsageError, match='w.pth') as error:
        load_backbone(ConvNeXt(ARCH), tmp_path / 'w.pth')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('content, kind', [([torch.ones(2)], 'list'), (torch.ones(2), 'Tensor'), (3, 'int')])
def test_a_file_without_a_dict_is_refused(tmp_path, content, kind):
    torch.save(content, tmp_path / 'w.pth')
    for load in (load_checkpoint, lambda file: load_backbone(ConvNeXt(ARCH), file)):
        with pytest.raises(UsageError, match=f'w.pth contains a {kind}'):
            load(tmp_path / 'w.pth')


def test_missing_file_and_invalid_init_cfg(tmp_path):
    with pytest.raises(UsageError, match='nowhere.pth.*convnext_tiny_1k_224'):
        load_backbone(ConvNeXt(ARCH), tmp_path / 'nowhere.pth')
    with pytest.raises(UsageError, match='prefix'):
        ConvNeXt(ARCH, init_cfg=dict(type='Pretrained', checkpoint='x', prefix='backbone.')).init_weights()


class Bomb:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('save', [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
@pytest.mark.parametrize(
    'bomb',
    [
        lambda path: Bomb(open, str(path), 'w'),
        lambda path: Bomb(getattr, Path(path), 'touch'),
        lambda path: Bomb(getattr, HistoryBuffer, '__init__'),
        lambda path: Bomb(getattr, np.ndarray, 'max'),
    ],
)
def test_code_in_file_is_never_run(tmp_path, save, bomb):
    save({'model': {'downsample_layers.0.0.weight': bomb(tmp_path / 'ran')}}, tmp_path / 'w.pth')
    with pytest.raises(UsageError, match='safely'):
        load_backbone(ConvNeXt(ARCH), tmp_path / 'w.pth')
    assert not (tmp_path / 'ran').exists()


class Allowed:
    pass


@pytest.fixture
def user_safe_globals():
    """torch's safe globals as set by a user who allows one class of their own."""
    safe_globals = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([Allowed])
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(safe_globals)


def test_safe_globals_unchanged_after_load(tmp_path, user_safe_globals):
    torch.save({'a': torch.ones(2), 'b': Allowed(), 'c': HistoryBuffer([1.0], [1])}, tmp_path / 'w.pth')
    assert set(load_checkpoint(tmp_path / 'w.pth')) == {'a', 'b', 'c'}
    assert set(torch.serialization.get_safe_globals()) == {Allowed}


def test_safe_globals_unchanged_after_refusal(tmp_path, user_safe_globals):
    torch.save({'a': Bomb(open, str(tmp_path / 'ran'), 'w')}, tmp_path / 'w.pth')
    with pytest.raises(UsageError, match='safely'):
        load_checkpoint(tmp_path / 'w.pth')
    assert set(torch.serialization.get_safe_globals()) == {Allowed}


@pytest.mark.parametrize('numpy', [b'numpy.core.', b'numpy._core.'], ids=['numpy 1', 'numpy 2'])
def test_mmengine_checkpoints_are_read(tmp_path, numpy):
    history = HistoryBuffer([np.float64(1), 2], [1, 1])
    allowed = set(torch.serialization.get_safe_globals())
    save_checkpoint(
        {'state_dict': {'a': torch.ones(2)}, 'message_hub': {'log_scalars': {'loss': history, 'last': np.float64(2)}}},
        str(tmp_path / 'saved.pth'),
    )
    with zipfile.ZipFile(tmp_path / 'saved.pth') as saved, zipfile.ZipFile(tmp_path / 'epoch_1.pth', 'w') as file:
        for record in saved.namelist():  # numpy 2 renamed the module that pickles of arrays name
            file.writestr(record, re.sub(rb'numpy\._?core\.', numpy, saved.read(record)))
    content = load_checkpoint(tmp_path / 'epoch_1.pth')
    assert content['state_dict']['a'].tolist() == [1, 1]
    scalars = content['message_hub']['log_scalars']
    assert scalars['loss'].data[0].tolist() == [1, 2] and scalars['last'] == 2
    assert set(torch.serialization.get_safe_globals()) == allowed
