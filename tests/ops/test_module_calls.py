"""The backbone calls its modules as the original code does, `x = downsample(x); x = stage(x); norm(x)`: hooks fire, and
what a user has put in a module's place runs. The twin is written of torch's modules alone, under the same names."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from convnext_dense.models.convnext import ConvNeXt, ConvNeXtBlock, OutputNorm
from convnext_dense.ops import dispatch

# Widths of which the compiled kernels, and of which torch's own operations make the fast form.
WIDTHS = [(32, 64), (16, 40)]
IMAGE = (2, 3, 35, 44)
PLACES = ['downsample_layers.0', 'downsample_layers.1', 'stages.0', 'stages.1', 'norm0', 'norm1']
PLACES += ['downsample_layers.0.0', 'downsample_layers.0.1', 'downsample_layers.1.0', 'downsample_layers.1.1']
PLACES += ['stages.0.0', 'stages.0.1', 'stages.1.0']
PLACES += [f'stages.0.1.{name}' for name in ('dwconv', 'norm', 'pwconv1', 'grn', 'pwconv2', 'drop_path')]


class TwinNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class TwinBlock(nn.Module):
    def __init__(self, c, with_cp):
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(c, c, 7, padding=3, groups=c), nn.LayerNorm(c, eps=1e-6)
        self.pwconv1, self.grn, self.pwconv2 = nn.Linear(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c)
        self.gamma, self.drop_path, self.with_cp = nn.Parameter(torch.ones(c)), nn.Identity(), with_cp

    def forward(self, x):
        def mlp(y):
            return self.gamma * self.pwconv2(self.grn(F.gelu(self.pwconv1(self.norm(y)))))

        def residual(x):
            y = self.dwconv(x).permute(0, 2, 3, 1)
            y = checkpoint(mlp, y, use_reentrant=False) if self.with_cp == 'mlp' else mlp(y)
            return x + self.drop_path(y.permute(0, 3, 1, 2))

        return checkpoint(residual, x, use_reentrant=False) if self.with_cp is True else residual(x)


class Twin(nn.Module):
    def __init__(self, first, second, with_cp):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, first, 4, stride=4), TwinNorm(first))
        downsample = nn.Sequential(TwinNorm(first), nn.Conv2d(first, second, 2, stride=2))
        self.downsample_layers = nn.ModuleList([stem, downsample])
        blocks = TwinBlock(first, with_cp), TwinBlock(first, with_cp), TwinBlock(second, with_cp)
        self.stages = nn.ModuleList([nn.Sequential(*blocks[:2]), nn.Sequential(blocks[2])])
        self.norm0, self.norm1 = TwinNorm(first), TwinNorm(second)

    def forward(self, x):
        maps = []
        for i in range(2):
            x = self.downsample_layers[i](x)
            x = self.stages[i](x)
            maps.append(getattr(self, f'norm{i}')(x))
        return tuple(maps)


def pair(widths, with_cp=False) -> tuple[ConvNeXt, Twin]:
    torch.manual_seed(0)
    model = ConvNeXt(dict(depths=(2, 1), channels=widths), out_indices=(0, 1), with_cp=with_cp)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    twin = Twin(*widths, with_cp)
    twin.load_state_dict(model.state_dict())
    return model, twin


def close(found, expected) -> bool:
    if found is None or expected is None:
        return found is expected
    return (found - expected).norm() <= 1e-4 * expected.norm()


def hook(module, kind, seen, name):
    """Have `seen` told of each call of a hook, with the tensors that it is given."""

    def called(*given):
        tensors = [t for some in given[1:] for t in (some if isinstance(some, tuple) else (some,)) if some != {}]
        seen.append((name, [t if t is None else t.detach().clone() for t in tensors]))

    if kind == 'forward':
        module.register_forward_hook(called)
    elif kind == 'forward, with kwargs':
        module.register_forward_hook(called, with_kwargs=True)
    elif kind == 'forward, always called':
        module.register_forward_hook(called, always_call=True)
    elif kind == 'forward, before':
        module.register_forward_pre_hook(called)
    elif kind == 'forward, before, with kwargs':
        module.register_forward_pre_hook(called, with_kwargs=True)
    elif kind == 'backward':
        module.register_full_backward_hook(called)
    elif kind == 'backward, before':
        module.register_full_backward_pre_hook(called)


HOOKS = ['forward', 'forward, with kwargs', 'forward, always called', 'forward, before', 'forward, before, with kwargs']
HOOKS += ['backward', 'backward, before']


def seen_by_hooks(model, places, kind, train=True):
    """What hooks on copies of these modules see of a forward and a backward pass, or of a forward pass alone."""
    seen, model = [], copy.deepcopy(model)
    for place in places:
        hook(model.get_submodule(place), kind, seen, place)
    with torch.set_grad_enabled(train):
        maps = model(torch.linspace(-1, 1, 2 * 3 * 35 * 44).sin().view(IMAGE))
        if train:
            sum(m.pow(2).mean() for m in maps).backward()
    return seen


@pytest.mark.filterwarnings('ignore:Full backward hook is firing')  # on the stem, whose image has no gradient
@pytest.mark.parametrize('kind', HOOKS)
@pytest.mark.parametrize('with_cp', [False, 'mlp', True])
@pytest.mark.parametrize('widths', WIDTHS, ids=str)
def test_hooks_fire_as_often_as_in_the_original_and_see_the_same(widths, with_cp, kind):
    model, twin = pair(widths, with_cp)
    for train in [True] if 'backward' in kind else [True, False]:
        for places in [*([place] for place in PLACES), ['', *PLACES]]:
            found, expected = (seen_by_hooks(m, places, kind, train) for m in (model, twin))
            assert [name for name, _ in found] == [name for name, _ in expected] != []
            for (name, given), (_, wanted) in zip(found, expected):
                assert len(given) == len(wanted) and all(map(close, given, wanted)), (name, places)


class Rectified(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs).relu()


def rectified(model, place, how):
    """The model with the output of a module rectified, which no norm behind it undoes."""
    module = model.get_submodule(place)
    if how == 'wrapped':
        parent, _, name = place.rpartition('.')
        setattr(model.get_submodule(parent), name, Rectified(module))
    elif how == 'another class':
        forward = type(module).forward
        module.__class__ = type('Other', (type(module),), {'forward': lambda self, x: forward(self, x).relu()})
    elif how == 'another forward':
        forward = module.forward
        module.forward = lambda x: forward(x).relu()
    else:
        module.register_forward_hook(lambda module, given, out: out.relu())
    return model


@pytest.mark.parametrize('how', ['wrapped', 'another class', 'another forward', 'hook that changes the output'])
@pytest.mark.parametrize('widths', WIDTHS, ids=str)
def test_what_takes_a_modules_place_runs(widths, how):
    image = torch.randn(IMAGE)
    for place in PLACES:
        models = [rectified(m, place, how) for m in pair(widths)]
        for train in (True, False):
            with torch.set_grad_enabled(train):
                found, expected = (m(image) for m in models)
            for f, e in zip(found, expected):
                assert f.is_contiguous() and close(f, e), (place, train)


# Of an nn.Sequential torch compiles what it calls, here two blocks.
@pytest.mark.parametrize(
    'place, graphs', [('downsample_layers.0', 1), ('stages.0', 2), ('stages.0.1', 1), ('norm1', 1)]
)
@pytest.mark.parametrize('train', [True, False])
def test_what_was_compiled_runs_compiled(place, graphs, train):
    torch._dynamo.reset()
    model, twin = pair(WIDTHS[0])
    image, runs = torch.randn(IMAGE), []

    def backend(graph, inputs):
        return lambda *args: (runs.append(place), graph(*args))[1]

    model.get_submodule(place).compile(backend=backend)
    with torch.set_grad_enabled(train):
        found = model(image)
    assert runs == [place] * graphs
    assert all(map(close, found, twin(image)))
    torch._dynamo.reset()


@pytest.mark.parametrize('train', [True, False])
def test_the_fast_form_steps_aside_at_the_changed_module_alone(train, monkeypatch):
    fast_ones = []

    def watch(name, function):
        def watched(*args):
            out = function(*args)
            fast_ones.extend([name] if out is not None else [])
            return out

        monkeypatch.setattr(dispatch, f'{name}_forward', watched)

    for name in ('stage', 'patch_embed', 'block', 'norm'):
        watch(name, getattr(dispatch, f'{name}_forward'))

    def runs(place=None, how='hook'):
        model, _ = pair(WIDTHS[0])
        if place:
            rectified(model, place, how)
        fast_ones.clear()
        with torch.set_grad_enabled(train):
            model(torch.randn(IMAGE))
        return fast_ones.copy()

    first, second = ['patch_embed', 'block', 'block', 'norm'], ['patch_embed', 'block', 'norm']
    if runs() == ['block'] * 3:
        pytest.skip('the kernels are not for this machine, or not compiled')
    if not train:  # a stage that is as built is one call
        second = ['stage']
    assert runs() == (first if train else ['stage']) + second
    for how in ('wrapped', 'hook'):
        for place in ('downsample_layers.0', 'stages.0', 'stages.0.1', 'norm0'):
            assert runs(place, how) == first + second, (how, place)
        for place, lost in (('downsample_layers.0.1', 'patch_embed'), ('stages.0.1.grn', 'block')):
            left = first.copy()
            left.remove(lost)
            assert runs(place, how) == left + second, (how, place)


def test_modules_of_ours_in_other_places_run_as_what_they_are():
    """Each has a fast form for its own place: as another it would be taken for what it is not."""
    model, _ = pair(WIDTHS[0])
    torch.manual_seed(0)
    model.stages[0].append(OutputNorm(32))
    model.stages[1] = nn.Sequential(model.stages[1][0], OutputNorm(64), copy.deepcopy(model.stages[1][0]))
    model.downsample_layers[1] = nn.Sequential(ConvNeXtBlock(32, 7, 0.0, 1.0), model.downsample_layers[1])
    model.norm0, image = ConvNeXtBlock(32, 7, 0.0, 1.0), torch.randn(IMAGE)
    assert_equals_the_reference(model, image)
    model, _ = pair(WIDTHS[0])
    model.downsample_layers[0] = nn.Conv2d(3, 32, 4, 4)
    model.norm1 = copy.deepcopy(model.stages[1][0])
    model.stages[0] = OutputNorm(32)
    assert_equals_the_reference(model, image)
    model.downsample_layers[0], image = ConvNeXtBlock(32, 7, 0.0, 1.0), torch.randn(2, 32, 16, 16)
    assert_equals_the_reference(model, image)


def assert_equals_the_reference(model, image):
    for train in (True, False):
        with torch.set_grad_enabled(train):
            found = model(image)
            with dispatch.disabled():
                expected = model(image)
        assert all(map(close, found, expected)) and all(f.is_contiguous() for f in found)


def recomputed(model, place='stages.0.1.pwconv1', train=True) -> int:
    """How often the backward pass runs a module again."""
    return len(seen_by_hooks(model, [place], 'forward', train)) - 1


def test_without_gradients_nothing_is_checkpointed(monkeypatch):
    def wrong(*args, **kwargs):
        raise AssertionError('checkpointed')

    monkeypatch.setattr('convnext_dense.models.convnext.checkpoint', wrong)
    for with_cp in (True, 'mlp'):
        model, twin = pair(WIDTHS[0], with_cp)
        image = torch.randn(IMAGE)
        with torch.no_grad(), dispatch.disabled():
            assert all(map(close, model(image), twin(image)))
        with pytest.raises(AssertionError, match='checkpointed'), dispatch.disabled():
            model(image)


def test_with_cp_reaches_every_block_whenever_it_is_set():
    model, _ = pair(WIDTHS[0])
    other = copy.deepcopy(model)
    other.stages[0] = Rectified(other.stages[0])
    other.stages[1][0] = Rectified(other.stages[1][0])
    places = ['stages.0.module.1.pwconv1', 'stages.1.0.module.pwconv1']
    for with_cp, scope in ((True, 'block'), (False, 'block'), (True, 'mlp'), (False, 'mlp'), (True, 'block')):
        other.with_cp, other.cp_scope = with_cp, scope
        assert other.with_cp == with_cp and other.cp_scope == scope
        assert [recomputed(other, place) for place in places] == [bool(with_cp)] * 2
        assert model.with_cp is False and recomputed(model) == 0
        assert copy.deepcopy(other).with_cp == with_cp and recomputed(copy.deepcopy(other), places[0]) == bool(with_cp)
        assert recomputed(other, places[0], train=False) == 0
    assert recomputed(other, 'stages.0.module.1.dwconv') == 1
    other.cp_scope = 'mlp'
    assert recomputed(other, 'stages.0.module.1.dwconv') == 0
    assert list(other.state_dict())[-4:] == ['norm0.weight', 'norm0.bias', 'norm1.weight', 'norm1.bias']


def test_wrapped_stages_are_frozen_compiled_and_counted_as_any_other():
    model = ConvNeXt(dict(depths=(1, 1, 4), channels=(8, 16, 24)), out_indices=(2,), frozen_stages=1)
    model.stages[0], model.stages[2] = Rectified(model.stages[0]), Rectified(model.stages[2])
    model.train()
    assert not model.stages[0].module[0].training and model.stages[2].module[0].training
    model.compile_blocks(backend='eager')
    assert sum(module._compiled_call_impl is not None for module in model.modules()) == 6
    assert model.layer_id('stages.2.module.0.gamma') == 3 and model.layer_id('stages.2.module.3.gamma') == 4
    assert model.layer_id('stages.2.inner.2.gamma') == 3 and model.layer_id('stages.2.inner.3.norm.weight') == 4
    assert model.layer_id('stages.2.adapter.weight') == model.layer_id('stages.2.6.weight') == 4
    torch._dynamo.reset()
