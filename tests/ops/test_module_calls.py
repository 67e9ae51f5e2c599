"""The backbone calls its modules as the original code does, `x = downsample(x); x = stage(x); norm(x)`: hooks fire, and
modules that a user has replaced run. The twin uses torch's modules only, under the same names."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from convnext_dense.models.convnext import ConvNeXt, ConvNeXtBlock, OutputNorm
from convnext_dense.ops import dispatch

# Widths that the AVX-512 kernels support, and widths that only oneDNN supports.
WIDTHS = [(32, 64), (16, 40)]
IMAGE = (2, 3, 35, 44)
MODULE_NAMES = ['downsample_layers.0', 'downsample_layers.1', 'stages.0', 'stages.1', 'norm0', 'norm1']
MODULE_NAMES += ['downsample_layers.0.0', 'downsample_layers.0.1', 'downsample_layers.1.0', 'downsample_layers.1.1']
MODULE_NAMES += ['stages.0.0', 'stages.0.1', 'stages.1.0']
MODULE_NAMES += [f'stages.0.1.{name}' for name in ('dwconv', 'norm', 'pwconv1', 'grn', 'pwconv2', 'drop_path')]


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
    def __init__(self, channels0, channels1, with_cp):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, channels0, 4, stride=4), TwinNorm(channels0))
        downsample = nn.Sequential(TwinNorm(channels0), nn.Conv2d(channels0, channels1, 2, stride=2))
        self.downsample_layers = nn.ModuleList([stem, downsample])
        blocks = TwinBlock(channels0, with_cp), TwinBlock(channels0, with_cp), TwinBlock(channels1, with_cp)
        self.stages = nn.ModuleList([nn.Sequential(*blocks[:2]), nn.Sequential(blocks[2])])
        self.norm0, self.norm1 = TwinNorm(channels0), TwinNorm(channels1)

    def forward(self, x):
        feats = []
        for i in range(2):
            x = self.downsample_layers[i](x)
            x = self.stages[i](x)
            feats.append(getattr(self, f'norm{i}')(x))
        return tuple(feats)


def model_and_twin(widths, with_cp=False) -> tuple[ConvNeXt, Twin]:
    torch.manual_seed(0)
    model = ConvNeXt(dict(depths=(2, 1), channels=widths), out_indices=(0, 1), with_cp=with_cp)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    twin = Twin(*widths, with_cp)
    twin.load_state_dict(model.state_dict())
    return model, twin


def allclose(actual, expected) -> bool:
    if actual is None or expected is None:
        return actual is expected
    return (actual - expected).norm() <= 1e-4 * expected.norm()


def register_hook(module, kind, calls, name):
    """Register a hook that appends its name and copies of its tensors to `calls`."""

    def record(*hook_args):
        tensors = [
            t for value in hook_args[1:] for t in (value if isinstance(value, tuple) else (value,)) if value != {}
        ]
        calls.append((name, [t if t is None else t.detach().clone() for t in tensors]))

    if kind == 'forward':
        module.register_forward_hook(record)
    elif kind == 'forward, with kwargs':
        module.register_forward_hook(record, with_kwargs=True)
    elif kind == 'forward, always called':
        module.register_forward_hook(record, always_call=True)
    elif kind == 'forward, before':
        module.register_forward_pre_hook(record)
    elif kind == 'forward, before, with kwargs':
        module.register_forward_pre_hook(record, with_kwargs=True)
    elif kind == 'backward':
        module.register_full_backward_hook(record)
    elif kind == 'backward, before':
        module.register_full_backward_pre_hook(record)


HOOKS = ['forward', 'forward, with kwargs', 'forward, always called', 'forward, before', 'forward, before, with kwargs']
HOOKS += ['backward', 'backward, before']


def hook_calls(model, names, kind, train=True):
    """The calls of hooks on these modules in a forward (and, with `train`, a backward) pass of a copy of the model."""
    calls, model = [], copy.deepcopy(model)
    for name in names:
        register_hook(model.get_submodule(name), kind, calls, name)
    with torch.set_grad_enabled(train):
        feats = model(torch.linspace(-1, 1, 2 * 3 * 35 * 44).sin().view(IMAGE))
        if train:
            sum(m.pow(2).mean() for m in feats).backward()
    return calls


@pytest.mark.filterwarnings('ignore:Full backward hook is firing')  # on the stem, whose image has no gradient
@pytest.mark.parametrize('kind', HOOKS)
@pytest.mark.parametrize('with_cp', [False, 'mlp', True])
@pytest.mark.parametrize('widths', WIDTHS, ids=str)
def test_hooks_fire_and_receive_the_same_as_in_the_original(widths, with_cp, kind):
    model, twin = model_and_twin(widths, with_cp)
    for train in [True] if 'backward' in kind else [True, False]:
        for names in [*([module_name] for module_name in MODULE_NAMES), ['', *MODULE_NAMES]]:
            actual, expected = (hook_calls(m, names, kind, train) for m in (model, twin))
            assert [name for name, _ in actual] == [name for name, _ in expected] != []
            for (name, tensors), (_, expected_tensors) in zip(actual, expected):
                assert len(tensors) == len(expected_tensors) and all(map(allclose, tensors, expected_tensors)), (
                    name,
                    names,
                )


class WithReLU(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs).relu()


def with_relu(model, name, kind):
    """The model with a ReLU after one module, which no later norm undoes."""
    module = model.get_submodule(name)
    if kind == 'wrapped':
        parent, _, attr = name.rpartition('.')
        setattr(model.get_submodule(parent), attr, WithReLU(module))
    elif kind == 'another class':
        forward = type(module).forward
        module.__class__ = type('Other', (type(module),), {'forward': lambda self, x: forward(self, x).relu()})
    elif kind == 'another forward':
        forward = module.forward
        module.forward = lambda x: forward(x).relu()
    else:
        module.register_forward_hook(lambda module, args, out: out.relu())
    return model


@pytest.mark.parametrize('kind', ['wrapped', 'another class', 'another forward', 'hook that changes the output'])
@pytest.mark.parametrize('widths', WIDTHS, ids=str)
def test_replaced_modules_run(widths, kind):
    image = torch.randn(IMAGE)
    for name in MODULE_NAMES:
        models = [with_relu(m, name, kind) for m in model_and_twin(widths)]
        for train in (True, False):
            with torch.set_grad_enabled(train):
                actual, expected = (m(image) for m in models)
            for f, e in zip(actual, expected):
                assert f.is_contiguous() and allclose(f, e), (name, train)


# torch compiles what an nn.Sequential calls, here two blocks.
@pytest.mark.parametrize('name, graphs', [('downsample_layers.0', 1), ('stages.0', 2), ('stages.0.1', 1), ('norm1', 1)])
@pytest.mark.parametrize('train', [True, False])
def test_compiled_modules_run_compiled(name, graphs, train):
    torch._dynamo.reset()
    model, twin = model_and_twin(WIDTHS[0])
    image, runs = torch.randn(IMAGE), []

    def backend(graph, inputs):
        return lambda *args: (runs.append(name), graph(*args))[1]

    model.get_submodule(name).compile(backend=backend)
    with torch.set_grad_enabled(train):
        actual = model(image)
    assert runs == [name] * graphs
    assert all(map(allclose, actual, twin(image)))
    torch._dynamo.reset()


@pytest.mark.parametrize('train', [True, False])
def test_only_a_modified_module_falls_back(train, monkeypatch):
    fast_calls = []

    def watch(name, function):
        def recorded(*args):
            out = function(*args)
            fast_calls.extend([name] if out is not None else [])
            return out

        monkeypatch.setattr(dispatch, f'{name}_forward', recorded)

    for name in ('stage', 'patch_embed', 'block', 'norm'):
        watch(name, getattr(dispatch, f'{name}_forward'))

    def runs(name=None, how='hook'):
        model, _ = model_and_twin(WIDTHS[0])
        if name:
            with_relu(model, name, how)
        fast_calls.clear()
        with torch.set_grad_enabled(train):
            model(torch.randn(IMAGE))
        return fast_calls.copy()

    stage0, stage1 = ['patch_embed', 'block', 'block', 'norm'], ['patch_embed', 'block', 'norm']
    if runs() == ['block'] * 3:
        pytest.skip('the kernels are not for this machine, or not compiled')
    if not train:  # an unmodified stage is one call
        stage1 = ['stage']
    assert runs() == (stage0 if train else ['stage']) + stage1
    for how in ('wrapped', 'hook'):
        for module_name in ('downsample_layers.0', 'stages.0', 'stages.0.1', 'norm0'):
            assert runs(module_name, how) == stage0 + stage1, (how, module_name)
        for module_name, op in (('downsample_layers.0.1', 'patch_embed'), ('stages.0.1.grn', 'block')):
            remaining = stage0.copy()
            remaining.remove(op)
            assert runs(module_name, how) == remaining + stage1, (how, module_name)


def test_modules_of_the_package_in_other_positions():
    """Each module has a fast implementation for its own position only."""
    model, _ = model_and_twin(WIDTHS[0])
    torch.manual_seed(0)
    model.stages[0].append(OutputNorm(32))
    model.stages[1] = nn.Sequential(model.stages[1][0], OutputNorm(64), copy.deepcopy(model.stages[1][0]))
    model.downsample_layers[1] = nn.Sequential(ConvNeXtBlock(32, 7, 0.0, 1.0), model.downsample_layers[1])
    model.norm0, image = ConvNeXtBlock(32, 7, 0.0, 1.0), torch.randn(IMAGE)
    assert_equals_the_reference(model, image)
    model, _ = model_and_twin(WIDTHS[0])
    model.downsample_layers[0] = nn.Conv2d(3, 32, 4, 4)
    model.norm1 = copy.deepcopy(model.stages[1][0])
    model.stages[0] = OutputNorm(32)
    assert_equals_the_reference(model, image)
    model.downsample_layers[0], image = ConvNeXtBlock(32, 7, 0.0, 1.0), torch.randn(2, 32, 16, 16)
    assert_equals_the_reference(model, image)


def assert_equals_the_reference(model, image):
    for train in (True, False):
        with torch.set_grad_enabled(train):
            actual = model(image)
            with dispatch.disabled():
                expected = model(image)
        assert all(map(allclose, actual, expected)) and all(f.is_contiguous() for f in actual)


def count_recomputations(model, name='stages.0.1.pwconv1', train=True) -> int:
    """How often the backward pass runs a module again."""
    return len(hook_calls(model, [name], 'forward', train)) - 1


def test_without_gradients_nothing_is_checkpointed(monkeypatch):
    def wrong(*args, **kwargs):
        raise AssertionError('checkpointed')

    monkeypatch.setattr('convnext_dense.models.convnext.checkpoint', wrong)
    for with_cp in (True, 'mlp'):
        model, twin = model_and_twin(WIDTHS[0], with_cp)
        image = torch.randn(IMAGE)
        with torch.no_grad(), dispatch.disabled():
            assert all(map(allclose, model(image), twin(image)))
        with pytest.raises(AssertionError, match='checkpointed'), dispatch.disabled():
            model(image)


def test_setting_with_cp_reaches_every_block():
    model, _ = model_and_twin(WIDTHS[0])
    wrapped = copy.deepcopy(model)
    wrapped.stages[0] = WithReLU(wrapped.stages[0])
    wrapped.stages[1][0] = WithReLU(wrapped.stages[1][0])
    names = ['stages.0.module.1.pwconv1', 'stages.1.0.module.pwconv1']
    for with_cp, scope in ((True, 'block'), (False, 'block'), (True, 'mlp'), (False, 'mlp'), (True, 'block')):
        wrapped.with_cp, wrapped.cp_scope = with_cp, scope
        assert wrapped.with_cp == with_cp and wrapped.cp_scope == scope
        assert [count_recomputations(wrapped, name) for name in names] == [bool(with_cp)] * 2
        assert model.with_cp is False and count_recomputations(model) == 0
        assert copy.deepcopy(wrapped).with_cp == with_cp and count_recomputations(
            copy.deepcopy(wrapped), names[0]
        ) == bool(with_cp)
        assert count_recomputations(wrapped, names[0], train=False) == 0
    assert count_recomputations(wrapped, 'stages.0.module.1.dwconv') == 1
    wrapped.cp_scope = 'mlp'
    assert count_recomputations(wrapped, 'stages.0.module.1.dwconv') == 0
    assert list(wrapped.state_dict())[-4:] == ['norm0.weight', 'norm0.bias', 'norm1.weight', 'norm1.bias']


def test_wrapped_stages_are_frozen_compiled_and_counted():
    model = ConvNeXt(dict(depths=(1, 1, 4), channels=(8, 16, 24)), out_indices=(2,), frozen_stages=1)
    model.stages[0], model.stages[2] = WithReLU(model.stages[0]), WithReLU(model.stages[2])
    model.train()
    assert not model.stages[0].module[0].training and model.stages[2].module[0].training
    model.compile_blocks(backend='eager')
    assert sum(module._compiled_call_impl is not None for module in model.modules()) == 6
    assert model.layer_id('stages.2.module.0.gamma') == 3 and model.layer_id('stages.2.module.3.gamma') == 4
    assert model.layer_id('stages.2.inner.2.gamma') == 3 and model.layer_id('stages.2.inner.3.norm.weight') == 4
    assert model.layer_id('stages.2.adapter.weight') == model.layer_id('stages.2.6.weight') == 4
    torch._dynamo.reset()
