"""Models and backbones of other sources, under any key, through `init_cfg`, `load_from` and tools/test.py."""

import functools
import pathlib
import pickle
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from convnext_dense import load_backbone
from convnext_dense.checkpoints import load_checkpoint
from convnext_dense.checkpoints.pretrained import naming_scheme_of
from convnext_dense.config.resume import check_resume
from convnext_dense.datasets import toy_shapes
from convnext_dense.engine.build import make_runner
from convnext_dense.errors import UsageError
from convnext_dense.models.convnext import ConvNeXt
from helpers.foreign_weights import (
    DINOV3,
    MMPRETRAIN,
    RENAMES,
    TIMM,
    TORCHVISION,
    TRANSFORMERS,
    original_weights,
    rename_to_library,
    save_pth,
)
from helpers.paths import ROOT

SMALL = dict(depths=(1, 1, 2, 1), channels=(8, 16, 24, 32))
PREFIXES = {
    MMPRETRAIN: 'backbone.',
    TIMM: 'backbone.timm_model.',
    TORCHVISION: 'backbone.',
    TRANSFORMERS: '',
    DINOV3: '',
}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    toy_shapes.write(folder, train=2, val=2, size=64)
    return folder


@pytest.fixture
def config(tmp_path, monkeypatch, data):
    """Config of a small segmentor with random weights."""
    monkeypatch.setenv('SHAPES_ROOT', str(data))
    config = Config.fromfile(ROOT / 'configs/demo/upernet.py')
    init_default_scope('mmseg')
    config.model.backbone.arch = SMALL
    config.model.decode_head.in_channels, config.model.auxiliary_head.in_channels = [8, 16, 24, 32], 24
    config.work_dir, config.launcher = str(tmp_path / 'run'), 'none'
    return config


def random_model_weights(config) -> dict:
    torch.manual_seed(3)
    weights = MODELS.build(config.model).state_dict()
    return {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in weights.items()}


def rename_backbone(weights: dict, library: str, prefix: str) -> dict:
    """Rename a model's backbone to another library's names; output norms keep ours."""
    trunk = {n.removeprefix('backbone.'): t for n, t in weights.items() if re.match(r'backbone\.(stages|down)', n)}
    other_weights = {n: t for n, t in weights.items() if n.removeprefix('backbone.') not in trunk}
    library_weights = {
        f'{prefix}{n.removeprefix("convnext.")}': t for n, t in rename_to_library(trunk, library).items()
    }
    return {**other_weights, **library_weights}


def load_with_runner(config, file, strict) -> dict:
    config.load_from = str(file)
    runner = make_runner(config, str(file) if strict else None)
    runner.load_or_resume()
    return runner.model.state_dict()


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('library', [MMPRETRAIN, TIMM, TORCHVISION])
def test_model_with_backbone_of_other_library(tmp_path, config, library, strict):
    weights = random_model_weights(config)
    library_weights = rename_backbone(weights, library, PREFIXES[library])
    if library == TIMM:  # the prefix of output norms too
        library_weights = {
            n.replace('backbone.norm', 'backbone.timm_model.norm'): t for n, t in library_weights.items()
        }
    if library in (TIMM, TORCHVISION):  # these libraries have no names for output norms
        library_weights = {
            n: t for n, t in library_weights.items() if not re.match(r'backbone\.(timm_model\.)?norm\d', n)
        }
        with pytest.raises(UsageError, match=r'8 missing \(backbone.norm0.weight'):
            load_with_runner(config, save_pth(tmp_path / 'w.pth', {'state_dict': library_weights}), strict)
        return
    assert same_tensors(
        load_with_runner(config, save_pth(tmp_path / 'w.pth', {'state_dict': library_weights}), strict), weights
    )


WRAPPERS = {
    'model': lambda w: {'model': w},
    'nothing': lambda w: w,
    'a wrapper in a wrapper': lambda w: {'trainer': {'model': w}},
    'two prefixes': lambda w: {'state_dict': {f'module._orig_mod.{n}': t for n, t in w.items()}},
    'Lightning': lambda w: {'state_dict': {f'model.{n}': t for n, t in w.items()}, 'epoch': 1},
    'DeepSpeed': lambda w: {'module': w, 'ds_version': '0.14'},
    'an average beside it': lambda w: {'net': w, 'ema': {n: t * 0 for n, t in w.items()}},
}


@pytest.mark.parametrize('key', WRAPPERS)
def test_model_under_any_key(tmp_path, config, key):
    weights = random_model_weights(config)
    file = save_pth(tmp_path / 'w.pth', WRAPPERS[key](weights))
    for strict in (True, False):
        assert same_tensors(load_with_runner(config, file, strict), weights)


@pytest.mark.parametrize('library', [None, *RENAMES])
def test_load_from_accepts_backbone_weights(tmp_path, config, library):
    """From any library, as with `init_cfg`: output norms and heads keep their initial values."""
    weights = original_weights(SMALL)
    if library:
        weights = rename_to_library(weights, library)
    file = save_pth(tmp_path / 'w.pth', {'model': weights})
    actual = load_with_runner(config, file, False)
    expected = ConvNeXt(SMALL)
    load_backbone(expected, file)
    assert same_tensors(
        {n.removeprefix('backbone.'): t for n, t in actual.items() if n.startswith('backbone.')}, expected.state_dict()
    )
    with pytest.raises(UsageError, match=r'missing \(.*decode_head'):
        load_with_runner(config, file, True)


KEYS = [
    'model_state_dict',
    'module',
    'net',
    'params',
    'params_ema',
    'teacher',
    'student',
    'ema',
    'weights',
    'state.model',
    'a.b.c',
]


@pytest.mark.parametrize('key', KEYS)
def test_backbone_under_any_key(tmp_path, key):
    weights = original_weights(SMALL)
    content = weights
    for part in reversed(key.split('.')):
        content = {part: content, 'epoch': 3, 'optimizer': {'state': {0: {'exp_avg': torch.ones(2)}}}}
    backbone = ConvNeXt(SMALL)
    assert '0 unused' not in load_backbone(backbone, save_pth(tmp_path / 'w.pth', content))
    assert all(torch.equal(t, weights[n]) for n, t in backbone.state_dict().items() if n in weights)


def test_preferred_state_dict_is_loaded(tmp_path):
    """The usual key before an EMA; refused where the keys do not tell which one to load."""
    weights, other_weights = original_weights(SMALL), {n: t + 1 for n, t in original_weights(SMALL).items()}
    for content in (
        {'net_ema': other_weights, 'net': weights},
        {'ema': other_weights, 'state_dict': weights},
        {'x': other_weights, 'model': weights},
    ):
        backbone = ConvNeXt(SMALL)
        load_backbone(backbone, save_pth(tmp_path / 'w.pth', content))
        assert torch.equal(backbone.stages[0][0].gamma, weights['stages.0.0.gamma'])
    with pytest.raises(UsageError, match=r'several ConvNeXts \(teacher, student\): keep one'):
        load_backbone(ConvNeXt(SMALL), save_pth(tmp_path / 'w.pth', {'teacher': weights, 'student': other_weights}))


@pytest.mark.parametrize('key', ['semantic_net', 'schema', 'upscaler', 'hubert', 'github', 'schedule_model', 'swagger'])
def test_non_weight_keys_match_whole_words(tmp_path, key):
    """'ema' within 'semantic' does not mean an average, 'sched' within a word no schedule."""
    weights, other_weights = original_weights(SMALL), {n: t + 1 for n, t in original_weights(SMALL).items()}
    backbone = ConvNeXt(SMALL)
    load_backbone(backbone, save_pth(tmp_path / 'w.pth', {key: weights, 'optimizer': {'state': {}}}))
    assert torch.equal(backbone.stages[0][0].gamma, weights['stages.0.0.gamma'])
    with pytest.raises(UsageError, match='several ConvNeXts'):
        load_backbone(ConvNeXt(SMALL), save_pth(tmp_path / 'w.pth', {key: weights, 'other': other_weights}))


@pytest.mark.parametrize(
    'prefixes',
    [('backbone.', 'module.backbone.'), ('', '_orig_mod.'), ('student.module.', 'student.'), ('', 'module.')],
)
def test_wrapped_and_unwrapped_model_stay_separate(tmp_path, prefixes):
    weights, other_weights = original_weights(SMALL), {n: t + 1 for n, t in original_weights(SMALL).items()}
    for models in ((weights, other_weights), (other_weights, weights)):
        merged = {f'{prefix}{n}': t for prefix, model in zip(prefixes, models) for n, t in model.items()}
        with pytest.raises(UsageError, match='several ConvNeXts'):
            load_backbone(ConvNeXt(SMALL), save_pth(tmp_path / 'w.pth', merged))


def test_file_without_convnext_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r'by the names in it \(layer1.weight, ...\)'):
        load_backbone(ConvNeXt(SMALL), save_pth(tmp_path / 'w.pth', {'net': {'layer1.weight': torch.ones(1)}}))
    with pytest.raises(UsageError, match=r'by the names in it \(epoch, args, ...\)'):
        load_backbone(ConvNeXt(SMALL), save_pth(tmp_path / 'w.pth', {'epoch': 1, 'args': {}}))


def test_resume_from_other_implementation_is_refused(tmp_path, config):
    weights = rename_backbone(random_model_weights(config), MMPRETRAIN, 'backbone.')
    file = save_pth(tmp_path / 'w.pth', {'state_dict': weights, 'meta': {'epoch': 1, 'iter': 1}, 'optimizer': {}})
    assert naming_scheme_of(load_checkpoint(file), file) == 'mmpretrain'
    with pytest.raises(UsageError, match='another ConvNeXt implementation, .* names of mmpretrain.*load_from='):
        check_resume(config, str(file))


def test_file_with_foreign_objects_gives_a_fix(tmp_path, monkeypatch):
    """The statement in the error message works without changes."""
    monkeypatch.chdir(tmp_path)
    model = ConvNeXt(SMALL)
    weights = model.state_dict()
    lightning = {'state_dict': {f'model.backbone.{n}': t for n, t in weights.items()}}
    for name, content in {
        'path.ckpt': {**lightning, 'hyper_parameters': {'root': pathlib.Path('/data')}},
        'before.ckpt': {'root': pathlib.Path('/data'), 'model': lightning['state_dict']},
        'partial.ckpt': {'hyper_parameters': {'opt': functools.partial(torch.optim.AdamW, lr=1e-3)}, **lightning},
        'whole.pth': model,
    }.items():
        torch.save(content, name)
    torch.jit.trace(model.eval(), torch.randn(1, 3, 64, 64)).save('traced.pt')
    with open('detectron2.pkl', 'wb') as file:
        pickle.dump({'model': {f'backbone.{n}': t.numpy() for n, t in weights.items()}}, file)
    words_of_file = {
        'path.ckpt': 'pathlib',
        'before.ckpt': 'pathlib',
        'partial.ckpt': 'functools.partial',
        'whole.pth': 'it is convnext_dense.models.convnext.ConvNeXt',
    }
    words_of_file |= {'traced.pt': 'TorchScript', 'detectron2.pkl': 'detectron2'}
    for name, words in words_of_file.items():
        with pytest.raises(UsageError, match='cannot be read safely') as error:
            load_backbone(ConvNeXt(SMALL), name)
        line = str(error.value)
        assert words in line and '\n' not in line
        statement = re.search(r'(weights = pickle.*|torch\.save\(.*)', line)[1]
        exec(statement, {'torch': torch, 'pickle': pickle})  # as a user would who trusts the file
        backbone = ConvNeXt(SMALL)
        load_backbone(backbone, 'weights.pth')
        assert same_tensors(backbone.state_dict(), weights), name
        pathlib.Path('weights.pth').unlink()
