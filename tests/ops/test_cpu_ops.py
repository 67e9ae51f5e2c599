"""Both fast forms of a block against `Block` itself, run where the fast forms are refused."""

import copy
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from convnext_dense.models.convnext import GRN, ConvNeXt, ConvNeXtBlock, DropPath, OutputNorm, Stem
from convnext_dense.ops import avx512, dispatch, onednn

pytestmark = pytest.mark.skipif(torch.float32 not in onednn.dtypes(), reason='this machine has no fast form')
BF16 = pytest.param('bfloat16', marks=pytest.mark.skipif(len(onednn.dtypes()) < 2, reason='no bfloat16 here'))
# Tiled: groups of 16 and of 8. Fused: multiples of 32, in the last the hidden layer's chunks leave a rest. The last is
# wide.
ARCHS = {
    onednn: dict(depths=(2, 1, 2), channels=(16, 40, 400)),
    avx512: dict(depths=(2, 1, 2), channels=(32, 96, 416)),
}
AUTOCAST, PURE = 'autocast', 'pure'


def made(form=onednn, **settings) -> ConvNeXt:
    torch.manual_seed(0)
    model = ConvNeXt(ARCHS[form], out_indices=(0, 1, 2), **settings)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture(params=[onednn, avx512], ids=['onednn', 'avx512'])
def form(request, monkeypatch):
    """The form that runs; the other would be noticed."""
    if request.param is avx512 and not avx512.dtypes():
        pytest.skip('the kernels are not for this machine, or not compiled')

    def wrong(*args, **kwargs):
        raise AssertionError('the other form ran')

    monkeypatch.setattr(onednn if request.param is avx512 else avx512, 'forward', wrong)
    if request.param is onednn:
        monkeypatch.setattr(avx512, 'supports_block', lambda *args: False)
    return request.param


def plainly(monkeypatch):
    monkeypatch.setattr(dispatch, '_disabled_depth', 1)


@pytest.fixture
def runs(monkeypatch):
    """For each block since: whether it ran in its fast form."""
    seen, block = [], dispatch.block_forward

    def watched(*args):
        out = block(*args)
        seen.append(out is not None)
        return out

    monkeypatch.setattr(dispatch, 'block_forward', watched)
    return seen


def reference(module, x):
    """The output of a module's reference implementation."""
    with dispatch.disabled():
        return module(x)


def maps_and_gradients(model, image, precision='float32'):
    """Maps, and gradients of a weighted sum of them by parameters and image."""
    image = image.clone().requires_grad_()
    if precision == PURE:
        model, image = copy.deepcopy(model).bfloat16(), image.detach().bfloat16().requires_grad_()
    torch.manual_seed(1)
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == AUTOCAST):
        maps = model(image)
    torch.manual_seed(2)
    sum((m.double() * torch.randn(m.shape)).sum() for m in maps).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()} | {'image': image.grad}
    for p in model.parameters():
        p.grad = None
    return [m.detach() for m in maps], gradients


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize('tile', [4096, 64])
@pytest.mark.parametrize(
    'settings',
    [
        {},
        dict(layer_scale_init_value=0),
        dict(drop_path_rate=0.6),
        dict(with_cp=True, drop_path_rate=0.6),
        dict(with_cp='mlp'),
        dict(frozen_stages=1),
        dict(kernel_size=5),
        dict(use_grn=True),
        dict(use_grn=True, layer_scale_init_value=1.0, with_cp=True, drop_path_rate=0.6),
        dict(use_grn=True, with_cp='mlp', frozen_stages=1),
    ],
    ids=str,
)
def test_float32_equals_the_plain_form(settings, tile, form, runs, monkeypatch):
    if form is avx512 and (tile < 4096 or 'kernel_size' in settings):
        pytest.skip('of the other form')
    monkeypatch.setattr(onednn, 'TILE', tile)
    if tile < 4096:  # of the hidden layers of some tiles are kept for GRN's second sweep
        monkeypatch.setattr(onednn, 'KEPT_BYTES', 2 * tile * 4 * 40 * 4)
    model, image = made(form, **settings), torch.randn(3, 3, 70, 101)
    found = maps_and_gradients(model, image)
    assert runs == [True] * 5
    plainly(monkeypatch)
    expected = maps_and_gradients(model, image)
    for m, e in zip(found[0], expected[0]):
        assert m.dtype == e.dtype and m.is_contiguous() and distance(m, e) < 1e-5
    for name, e in expected[1].items():
        assert (found[1][name] is None) == (e is None), name
        assert e is None or (found[1][name].dtype == e.dtype and distance(found[1][name], e) < 1e-5), name


@pytest.mark.parametrize('precision', [pytest.param(p, marks=BF16.marks) for p in (AUTOCAST, PURE)])
@pytest.mark.parametrize(
    'settings',
    [{}, dict(layer_scale_init_value=0), dict(with_cp='mlp', drop_path_rate=0.6), dict(use_grn=True)],
    ids=str,
)
def test_bfloat16_is_as_near_to_the_truth_as_the_plain_form(precision, settings, form, runs, monkeypatch):
    if form is avx512 and precision == PURE:
        pytest.skip('parameters are bfloat16: of the other form')
    if form is avx512 and torch.bfloat16 not in avx512.dtypes():
        pytest.skip('this processor has no products of bfloat16, or oneDNN faster ones')
    model, image = made(form, **settings), torch.randn(3, 3, 70, 101)
    found = maps_and_gradients(model, image, precision)
    assert runs == [True] * 5
    plainly(monkeypatch)
    plain = maps_and_gradients(model, image, precision)
    true = maps_and_gradients(model.double(), image.double())
    for m, p, t in zip(found[0], plain[0], true[0]):
        assert m.dtype == p.dtype and distance(m, t) < 1.2 * distance(p, t) + 1e-3
    ours, theirs = ([distance(gradients[name], t) for name, t in true[1].items()] for gradients in (found[1], plain[1]))
    assert sum(ours) < 1.15 * sum(theirs) and max(ours) < 2 * max(theirs)
    assert [g.dtype for g in found[1].values()] == [g.dtype for g in plain[1].values()]


@pytest.mark.parametrize('settings', [{}, dict(with_cp=True), dict(use_grn=True)], ids=str)
def test_without_gradients_the_same_maps_and_an_untouched_image(settings, form, runs):
    model, image = made(form, **settings), torch.randn(2, 3, 64, 96)
    given = image.clone()
    expected = [m.detach() for m in model(image)]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = model(image)
        assert torch.equal(image, given)
        for f, e in zip(found, expected):
            assert distance(f, e) < 1e-6 and f.is_contiguous()
    assert all(runs)


@pytest.mark.parametrize('use_grn', [False, True])
@pytest.mark.parametrize('with_cp', [False, 'mlp', True])
def test_gradients_and_their_gradients_by_finite_differences(with_cp, use_grn, monkeypatch):
    monkeypatch.setattr(onednn, 'TILE', 7)
    monkeypatch.setattr(onednn, 'KEPT_BYTES', 7 * 32 * 8)
    monkeypatch.setattr(onednn, 'SAVE_HIDDEN_FROM', 8)
    monkeypatch.setattr(onednn, 'dtypes', lambda: (torch.float64,))
    # oneDNN has no float64: its Linear as it is defined.
    monkeypatch.setattr(
        onednn,
        '_onednn_linear',
        lambda x, w, b=None, gelu=False: (F.gelu if gelu else nn.Identity())(F.linear(x, w, b)),
    )
    torch.manual_seed(0)
    block = ConvNeXtBlock(8, 3, 0.0, 0.5, use_grn).double()
    block.with_cp = with_cp
    for p in block.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*block.named_parameters())

    def function(x, *values):
        other = copy.copy(block)
        other._modules = {k: copy.copy(m) for k, m in block._modules.items()}
        for module in other._modules.values():
            module._parameters = dict(module._parameters)
        other._parameters = dict(block._parameters)
        for name, value in zip(names, values):
            module, _, last = name.rpartition('.')
            (other._modules[module] if module else other)._parameters[last] = value
        out = dispatch.block_forward(other, x)
        assert out is not None
        return out

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, *parameters), fast_mode=True)


@pytest.fixture
def ends(monkeypatch):
    """The names of the stems, downsamplings and output norms that ran in their fast form since."""
    if not avx512.dtypes():
        pytest.skip('the kernels are not for this machine, or not compiled')
    seen = []

    def watch(name, function):
        monkeypatch.setattr(avx512, name, lambda *args: (seen.append(name), function(*args))[1])

    watch('patch_embed', avx512.patch_embed)
    watch('norm_nchw', avx512.norm_nchw)
    return seen


ENDS = ['patch_embed', 'norm_nchw'] * 3


@pytest.mark.parametrize('in_channels', [1, 3, 4, 5])
@pytest.mark.parametrize('memory', ['contiguous', 'channels_last', 'strided', 'expanded'])
def test_stem_downsampling_and_output_norms(in_channels, memory, ends, monkeypatch):
    """Of images in any layout; odd sizes: pixels that no patch covers have no gradient."""
    torch.manual_seed(0)
    model, image = made(avx512, in_channels=in_channels), torch.randn(2, in_channels, 93, 75)
    if memory == 'channels_last':
        image = image.contiguous(memory_format=torch.channels_last)
    elif memory == 'strided':
        image = torch.randn(2, 2 * in_channels, 93, 150)[:, ::2, :, ::2]
    elif memory == 'expanded':
        image = torch.randn(1, in_channels, 93, 1).expand(2, in_channels, 93, 75)

    def gradients():
        model.zero_grad()
        maps = model(image)
        torch.manual_seed(1)
        sum((m * torch.randn(m.shape)).sum() for m in maps).backward()
        return [*maps, *(p.grad for p in model.parameters())]

    found = gradients()
    assert ends == ENDS
    plainly(monkeypatch)
    for f, e in zip(found, gradients()):
        assert f.shape == e.shape and distance(f, e) < 1e-5


@pytest.mark.parametrize('settings', [{}, dict(layer_scale_init_value=0), dict(grn=True)], ids=str)
@pytest.mark.parametrize('train', [False, True])
def test_maps_have_the_dtype_of_the_plain_form_under_autocast(settings, train, monkeypatch):
    if torch.bfloat16 not in avx512.dtypes():
        pytest.skip('the kernels have no bfloat16 here')
    model, image = made(avx512, **settings), torch.randn(1, 3, 64, 64)
    with torch.autocast('cpu', torch.bfloat16), torch.set_grad_enabled(train):
        found = model(image)
        plainly(monkeypatch)
        expected = model(image)
    for f, e in zip(found, expected):
        assert f.dtype == e.dtype and distance(f, e) < 2e-2


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize(
    'change, lost',
    [
        (lambda m: m.downsample_layers[0].register_forward_hook(lambda *_: None), None),
        (lambda m: m.downsample_layers[1][0].register_forward_hook(lambda *_: None), 'patch_embed'),
        (lambda m: m.downsample_layers.__setitem__(1, nn.Conv2d(32, 96, 2, 2)), 'patch_embed'),
        (lambda m: m.downsample_layers[0].__setitem__(0, nn.Conv2d(3, 32, 3, 4, 1)), 'patch_embed'),
        (lambda m: setattr(m.downsample_layers[0][0], 'bias', None), 'patch_embed'),
        (lambda m: m.downsample_layers.__setitem__(1, Wrapper(m.downsample_layers[1])), None),
        (lambda m: m.norm1.register_forward_hook(lambda *_: None), None),
        (lambda m: setattr(m, 'norm2', nn.Identity()), 'norm_nchw'),
    ],
    ids=['hook', 'hook within', 'other module', 'other kernel', 'no bias', 'wrapped', 'hook on a norm', 'no norm'],
)
def test_a_changed_end_goes_the_plain_way_alone(change, lost, ends, monkeypatch):
    model, image = made(avx512), torch.randn(1, 3, 64, 64)
    change(model)
    found = model(image)
    assert {name: ends.count(name) for name in ('patch_embed', 'norm_nchw')} == {
        name: 3 - (name == lost) for name in ('patch_embed', 'norm_nchw')
    }
    plainly(monkeypatch)
    for f, e in zip(found, model(image)):
        assert distance(f, e) < 1e-5


def test_gradients_of_gradients_of_a_whole_model(ends, monkeypatch):
    model, image = made(avx512), torch.randn(1, 3, 64, 64)

    def penalty():
        parameters = list(model.parameters())
        loss = sum(m.pow(2).mean() for m in model(image))
        found = torch.autograd.grad(loss, parameters, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in found), parameters, allow_unused=True)

    found = penalty()
    assert ends == ENDS
    plainly(monkeypatch)
    for f, e in zip(found, penalty()):
        assert (f is None) == (e is None) and (e is None or distance(f, e) < 1e-4)


def test_models_of_several_threads_do_not_meet():
    """Each thread has working memory of its own."""
    models = [made(avx512), made(avx512, with_cp=True)]
    images = [torch.randn(1, 3, 64, 64), torch.randn(2, 3, 96, 80)]
    expected = [maps_and_gradients(m, i) for m, i in zip(models, images)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            jobs = [pool.submit(lambda m, i: [x.detach() for x in m(i)], m, i) for m, i in zip(models, images)]
            for job, (maps, _) in zip(jobs, expected):
                for f, e in zip(job.result(), maps):
                    assert distance(f, e) < 1e-6


@pytest.mark.parametrize('use_grn', [False, True])
@pytest.mark.parametrize('with_cp', [False, True])
def test_gradients_of_gradients_equal_the_plain_form(with_cp, use_grn, form, monkeypatch):
    torch.manual_seed(0)
    block = ConvNeXtBlock(32, 7, 0.0, 0.5, use_grn)
    block.with_cp = with_cp
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)

    def penalty():
        x = torch.randn(2, 32, 5, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = dispatch.block_forward(block, x) if form else reference(block, x)
        (grad,) = torch.autograd.grad(out.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), [x, *block.parameters()])

    found, form = penalty(), None
    for f, e in zip(found, penalty()):
        assert distance(f, e) < 1e-5


@pytest.mark.parametrize('use_grn', [False, True])
@pytest.mark.parametrize('precision', ['float32', AUTOCAST])
@pytest.mark.parametrize('shape', [(1, 1, 1), (3, 5, 7), (2, 33, 17), (1, 20, 90)], ids=str)
def test_any_number_of_threads_computes_the_same(shape, precision, use_grn, runs):
    if (torch.bfloat16 if precision == AUTOCAST else torch.float32) not in avx512.dtypes():
        pytest.skip('the kernels are not for this machine, or not compiled')
    torch.manual_seed(0)
    block, x = ConvNeXtBlock(64, 7, 0.0, 1.0, use_grn), torch.randn(shape[0], 64, *shape[1:])
    for p in block.parameters():
        nn.init.normal_(p, std=0.2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            image = x.clone().requires_grad_()
            block.zero_grad()
            with torch.autocast('cpu', torch.bfloat16, enabled=precision == AUTOCAST):
                out = dispatch.block_forward(block, image)
            out.pow(2).sum().backward()
            found.append([out, image.grad, *(p.grad.clone() for p in block.parameters())])
    finally:
        torch.set_num_threads(before)
    image = x.clone().requires_grad_()
    block.zero_grad()
    out = reference(block, image)
    out.pow(2).sum().backward()
    for f, e in zip(found[0], [out, image.grad, *(p.grad for p in block.parameters())]):
        assert distance(f, e) < (1e-5 if precision == 'float32' else 5e-2)  # of an odd last pixel too
    for other in found[1:]:
        for f, e in zip(other, found[0]):
            assert distance(f, e) < (1e-5 if precision == 'float32' else 1e-2)


@pytest.mark.parametrize('precision', ['float32', pytest.param(AUTOCAST, marks=BF16.marks)])
def test_the_gelu_of_the_kernels(precision):
    """At inputs of every size, NaN and Inf; the second Linear is the identity, the slope the gradient of the bias."""
    dtype = torch.bfloat16 if precision == AUTOCAST else torch.float32
    if dtype not in avx512.dtypes():
        pytest.skip('the kernels are not for this machine, or not compiled')
    block = ConvNeXtBlock(32, 7, 0.0, 1.0).requires_grad_(False)
    for p in block.parameters():
        nn.init.zeros_(p)
    block.norm.bias.fill_(1.0)
    nn.init.ones_(block.gamma)
    block.pwconv2.weight[:, :32] = torch.eye(32)

    def found(values):
        """GELU and its slope at 32 values."""
        bias = block.pwconv1.bias.detach()
        bias[:32] = values
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            block.pwconv1.bias = nn.Parameter(bias)
            out = dispatch.block_forward(block, torch.zeros(1, 32, 1, 1)).flatten()
            slope = torch.autograd.grad(out.sum(), block.pwconv1.bias)[0][:32]
            block.requires_grad_(False)
        return out, slope

    absolute, relative = (1e-6, 2e-7) if dtype == torch.float32 else (7e-5, 2**-8)  # the latter is the dtype's rounding
    for values in (torch.linspace(-12, 12, 3200), torch.linspace(-200, 200, 320), torch.logspace(-8, 0, 320)):
        for part in values.split(32):
            exact = part.double().requires_grad_()
            slope = torch.autograd.grad(F.gelu(exact).sum(), exact)[0]
            for is_now, wanted in zip(found(part), (F.gelu(part.double()), slope)):
                assert ((is_now - wanted).abs() < absolute + relative * wanted.abs()).all(), part
    for value, expected in ((math.nan, (math.nan,) * 2), (-1e30, (0, 0)), (-3e38, (0, 0)), (3e38, (3e38, 1))):
        first = [part[0].item() for part in found(torch.tensor([value] + 31 * [0.0]))]
        assert first == pytest.approx(expected, rel=2**-8, nan_ok=True), value
    for value in (math.inf, -math.inf):
        assert not found(torch.tensor([value] + 31 * [0.0]))[0][0].isfinite()


def test_kernels_of_another_source_or_that_do_not_load_are_left_unused_and_said(monkeypatch, tmp_path):
    if not avx512.dtypes():
        pytest.skip('the kernels are not for this machine, or not compiled')
    monkeypatch.setattr(avx512, 'kernel_source_hash', lambda: 'of another')
    with pytest.warns(UserWarning, match='another avx512_kernels.c.*Install it again'):
        assert avx512._library.__wrapped__() is None
    monkeypatch.setattr(avx512, 'SOURCE', tmp_path / 'avx512_kernels.c')
    with pytest.warns(UserWarning, match='were not compiled when convnext_dense was installed; .* slower'):
        assert avx512._library.__wrapped__() is None
    tmp_path.joinpath('avx512_kernels' + avx512.EXTENSION_SUFFIXES[0]).write_bytes(b'no library')
    with pytest.warns(UserWarning, match='cannot be used: .* slower'):
        assert avx512._library.__wrapped__() is None


def other_mlp(block, width):
    block.pwconv1, block.pwconv2 = nn.Linear(64, width), nn.Linear(width, 64)


@pytest.mark.parametrize(
    'change',
    [
        lambda b: other_mlp(b, 128),
        lambda b: other_mlp(b, 384),
        lambda b: setattr(b, 'gamma', nn.Parameter(torch.ones(1))),
        lambda b: setattr(b.norm, 'weight', nn.Parameter(torch.randn(128)[::2])),
        lambda b: setattr(b.pwconv2, 'bias', nn.Parameter(torch.randn(1).expand(64))),
        lambda b: setattr(b.pwconv1, 'weight', nn.Parameter(torch.randn(64, 256).t())),
        lambda b: setattr(b.dwconv, 'weight', nn.Parameter(torch.randn(64, 1, 7, 7).mT)),
    ],
    ids=[
        'narrower MLP',
        'wider MLP',
        'one gamma',
        'strided norm',
        'expanded bias',
        'transposed Linear',
        'transposed depthwise',
    ],
)
def test_parameters_that_the_kernels_do_not_fit_go_another_way(change):
    torch.manual_seed(0)
    block, x = ConvNeXtBlock(64, 7, 0.0, 1.0), torch.randn(2, 64, 9, 11)
    change(block)
    assert distance(block(x), reference(block, x)) < 1e-5


@pytest.mark.parametrize('hidden', [768, 2048])
def test_a_wide_block_with_an_mlp_of_another_width_trains(hidden):
    """From 384 channels on the hidden layer is saved for the backward pass."""
    torch.manual_seed(0)
    block, x = ConvNeXtBlock(384, 7, 0.0, 1.0), torch.randn(1, 384, 6, 5)
    block.pwconv1, block.pwconv2 = nn.Linear(384, hidden), nn.Linear(hidden, 384)
    grads = torch.autograd.grad(block(x).square().sum(), [*block.parameters()])
    with dispatch.disabled():
        expected = torch.autograd.grad(block(x).square().sum(), [*block.parameters()])
    assert all(distance(grad, e) < 1e-4 for grad, e in zip(grads, expected, strict=True))


@pytest.mark.parametrize(
    'change',
    [
        lambda m: setattr(m.norm0, 'weight', nn.Parameter(torch.randn(64)[::2])),
        lambda m: setattr(m.norm1, 'bias', nn.Parameter(torch.randn(1).expand(96))),
        lambda m: setattr(m.downsample_layers[0][0], 'bias', nn.Parameter(torch.randn(64)[::2])),
        lambda m: setattr(m.downsample_layers[1][0], 'weight', nn.Parameter(torch.randn(64)[::2])),
        lambda m: setattr(
            m.downsample_layers[2][1], 'weight', nn.Parameter(m.downsample_layers[2][1].weight.mT.contiguous().mT)
        ),
    ],
    ids=['norm', 'expanded norm', 'stem', 'downsampling', 'transposed convolution'],
)
def test_parameters_laid_otherwise_at_the_ends(change, monkeypatch):
    model, image = made(avx512), torch.randn(1, 3, 64, 64)
    change(model)
    found = model(image)
    plainly(monkeypatch)
    for f, e in zip(found, model(image)):
        assert distance(f, e) < 1e-5


@pytest.mark.parametrize('shape', [(32, 8, 8), (96, 8, 8)])
def test_maps_of_other_widths_fail_as_they_did(shape):
    with pytest.raises(RuntimeError):
        ConvNeXtBlock(64, 7, 0.0, 1.0)(torch.randn(1, *shape))


@pytest.mark.parametrize('use_grn', [False, True])
def test_gradients_are_the_same_bit_for_bit(form, use_grn):
    """With several threads: which one sums up what is fixed."""
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        model, image = ConvNeXt(ARCHS[form], out_indices=(0, 1, 2), use_grn=use_grn), torch.randn(2, 3, 160, 160)
        for _ in range(6):
            model.zero_grad()
            sum(m.sum() for m in model(image)).backward()
            found.append([p.grad.clone() for p in model.parameters()])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(f, e) for other in found[1:] for f, e in zip(other, found[0]))


def test_saved_tensors_may_come_back_in_another_layout(form):
    model, image = made(form), torch.randn(1, 3, 70, 66)
    expected = maps_and_gradients(model, image)[1]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.detach().clone(memory_format=torch.contiguous_format), lambda t: t
    ):
        found = maps_and_gradients(model, image)[1]
    for name, e in expected.items():
        assert distance(found[name], e) < 1e-5, name


def test_the_default_device_does_not_matter(form):
    block, x = ConvNeXtBlock(32, 7, 0.0, 1.0), torch.randn(1, 32, 9, 9)
    avx512._tls.workspace = avx512._EMPTY
    with torch.device('meta'):
        out = dispatch.block_forward(block, x)
    assert distance(out, reference(block, x)) < 1e-5


def test_processors_without_the_instructions_take_the_other_form(monkeypatch):
    monkeypatch.setattr(avx512, '_library', lambda: object())
    required = {'avx512f', 'avx512bw', 'avx512dq', 'avx512vl'}
    for flags, expected in (
        (set(), ()),
        (required - {'avx512vl'}, ()),
        (required, (torch.float32,)),
        (required | {'avx512_bf16'}, (torch.float32, torch.bfloat16)),
        (required | {'avx512_bf16', 'amx_bf16'}, (torch.float32,)),
    ):
        monkeypatch.setattr(avx512, '_cpu_flags', lambda flags=flags: flags)
        assert avx512.dtypes.__wrapped__() == expected and bool(avx512.unavailable_reason()) == (not expected)


@pytest.mark.parametrize('use_grn', [False, True])
@pytest.mark.parametrize('precision', ['float32', AUTOCAST])
@pytest.mark.parametrize('depth', [1, 2, 3, 6])
def test_a_stage_without_gradients_is_one_call_over_two_maps(depth, precision, use_grn, monkeypatch):
    if (torch.bfloat16 if precision == AUTOCAST else torch.float32) not in avx512.dtypes():
        pytest.skip('the kernels are not for this machine, or not compiled')
    image, calls, seen = torch.randn(1, 3, 64, 80), [], []
    model = ConvNeXt(dict(depths=(depth, depth), channels=(32, 64)), out_indices=(0, 1), use_grn=use_grn).eval()
    run = avx512.launch
    monkeypatch.setattr(avx512, 'launch', lambda *some: (calls.append([call.name for call in some]), run(*some))[1])

    def changed(change):
        """Maps equal those with gradients; the kernels that ran without, call by call."""
        change(model)
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == AUTOCAST):
            expected = [m.detach() for m in model(image)]
            calls.clear()
            with torch.no_grad():
                found = model(image)
        for f, e in zip(found, expected):
            assert distance(f, e) < (1e-6 if precision == 'float32' else 2e-2)
        return calls

    stage, one_by_one = ['patch_embed', *['block'] * depth, 'norm_nchw'], [['block']] * depth
    assert changed(lambda model: None) == [stage, stage]
    found = changed(lambda model: model.norm0.register_forward_hook(lambda *_: None))
    assert found == [['patch_embed'], *one_by_one, ['norm_nchw'], stage]
    # What a hook was given stays as it was.
    found = changed(
        lambda model: model.downsample_layers[1].register_forward_hook(
            lambda *given: seen.append((given[2], given[2].clone()))
        )
    )
    assert found[-2:] == [['block'], ['norm_nchw']]
    assert all(torch.equal(*pair) for pair in seen) and seen
    model.out_indices = (1,)
    assert changed(lambda model: None)[0] == stage[:-1]


def test_the_norm_of_a_map_takes_the_place_of_one_that_is_free(monkeypatch):
    if not avx512.dtypes():
        pytest.skip('the kernels are not for this machine, or not compiled')
    model = ConvNeXt(dict(depths=(2, 3), channels=(32, 64)), out_indices=(0, 1)).eval()
    maps, call = [], avx512.KernelCall

    def watched(name, arguments, tensors):
        maps.extend(t.data_ptr() for t in tensors if t is not None and t.ndim == 4 and t.shape[0] == 2)
        return call(name, arguments, tensors)

    monkeypatch.setattr(avx512, 'KernelCall', watched)
    with torch.no_grad():
        found = model(torch.randn(2, 3, 64, 80))
    assert len(set(maps)) == 1 + 2 + 2  # the image, and two of each stage
    assert {m.data_ptr() for m in found} < set(maps) and all(m.is_contiguous() for m in found)


def kept(model, image) -> int:
    """Bytes that a forward pass keeps for the backward pass beside parameters, each storage once."""
    sizes = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = (storage.nbytes(), t)  # t: not freed, that no other takes its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(image)
    return sum(size for size, _ in sizes.values())


@pytest.mark.parametrize('use_grn', [False, True])
def test_what_is_kept_for_the_backward_pass(form, use_grn, monkeypatch):
    image = torch.randn(1, 3, 128, 128)
    arch = dict(depths=(3, 3, 9, 3), channels=(32, 64, 96, 512))
    models = {cp: ConvNeXt(arch, with_cp=cp, use_grn=use_grn) for cp in (False, 'mlp', True)}
    quick = {cp: kept(model, image) for cp, model in models.items()}
    plainly(monkeypatch)
    plain = {cp: kept(model, image) for cp, model in models.items()}
    assert quick[False] < 0.4 * plain[False] and quick['mlp'] < 0.3 * plain[False]
    assert quick[True] < quick['mlp'] < quick[False]
    assert plain[True] < plain['mlp'] < 0.5 * plain[False]


def test_changed_weights_count_at_once(form):
    """Nothing is cached: not even a change behind autograd's back, as mmengine's EMA makes it, goes unseen."""
    model, image = made(form).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model(image)
        for p in model.parameters():
            p.data.mul_(0.5)
        found = model(image)
    fresh = made(form)
    fresh.load_state_dict(model.state_dict())
    for f, e in zip(found, fresh.eval()(image)):
        assert distance(f, e) < 1e-6


def changed(model, how):
    block = model.stages[0][0]
    if how == 'forward hook':
        block.pwconv1.register_forward_hook(lambda *_: None)
    elif how == 'pre-hook':
        block.norm.register_forward_pre_hook(lambda *_: None)
    elif how == 'deprecated backward hook':
        block.register_backward_hook(lambda *_: None)
    elif how == 'subclass':
        block.pwconv1.__class__ = type('Other', (nn.Linear,), {})
    elif how == 'block subclass':
        block.__class__ = type('Other', (ConvNeXtBlock,), {})
    elif how == 'forward replaced':
        block.dwconv.forward = block.dwconv.forward
    elif how == 'convolution replaced':
        conv = block.dwconv._conv_forward
        block.dwconv._conv_forward = lambda *args: conv(*args).relu()
    elif how == 'MLP replaced':
        mlp = block.mlp
        block.mlp = lambda y: mlp(y).relu()
    elif how == 'residual replaced':
        residual = block.residual
        block.residual = lambda *args: residual(*args).relu()
    elif how == 'scalar layer scale':
        block.gamma = nn.Parameter(torch.tensor(0.5))
    elif how == 'norm over rows':
        block.norm = nn.LayerNorm((24, 16))
    elif how == 'padding by name':
        block.dwconv = nn.Conv2d(16, 16, 5, padding='same', groups=16)
    elif how == 'parametrized':
        nn.utils.parametrizations.weight_norm(block.pwconv2)
    elif how == 'reflecting':
        block.dwconv.padding_mode = 'reflect'
        block.dwconv._reversed_padding_repeated_twice = [3] * 4
    elif how == 'dilated':
        block.dwconv.dilation, block.dwconv.padding = (2, 2), (6, 6)
    elif how == 'other GRN':
        block.grn = type('Other', (GRN,), {})(64)
    elif how == 'hook on GRN':
        block.grn = GRN(64)
        block.grn.register_forward_hook(lambda *_: None)
    elif how == 'tensor subclass':
        block.pwconv1.weight = nn.Parameter(type('Other', (torch.Tensor,), {})(block.pwconv1.weight.data))
    return model


@pytest.mark.filterwarnings('ignore:Using a non-full backward hook')
@pytest.mark.parametrize(
    'how',
    [
        'forward hook',
        'pre-hook',
        'deprecated backward hook',
        'subclass',
        'block subclass',
        'forward replaced',
        'convolution replaced',
        'MLP replaced',
        'residual replaced',
        'scalar layer scale',
        'norm over rows',
        'padding by name',
        'parametrized',
        'reflecting',
        'dilated',
        'other GRN',
        'hook on GRN',
        'tensor subclass',
    ],
)
def test_a_changed_block_goes_the_plain_way_alone(how, runs, monkeypatch):
    model, image = changed(made(), how), torch.randn(1, 3, 80, 96)
    found = maps_and_gradients(model, image)
    expected = {'tensor subclass': [False] * 5}  # the latter's maps are such tensors too
    assert runs == expected.get(how, [False] + [True] * 4)
    plainly(monkeypatch)
    for f, e in zip(found[0], maps_and_gradients(model, image)[0]):
        assert distance(f, e) < 1e-5


@pytest.mark.parametrize(
    'kind, name',
    [
        (nn.Module, '__call__'),
        (nn.Linear, 'forward'),
        (nn.Conv2d, '_conv_forward'),
        (nn.LayerNorm, 'forward'),
        (nn.Sequential, 'forward'),
        *((ConvNeXtBlock, name) for name in ('forward', 'residual', 'mlp')),
        (Stem, 'forward'),
        (OutputNorm, 'forward'),
    ],
    ids=lambda value: getattr(value, '__name__', value),
)
@pytest.mark.parametrize('grad', [True, False])
def test_methods_patched_on_a_class_are_called_as_in_the_reference(kind, name, grad, monkeypatch):
    """As profilers, memory savers and adapters of other libraries do it."""
    model, image, calls, own = made(avx512), torch.randn(1, 3, 64, 64), [], getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda *args, **kwargs: (calls.append(0), own(*args, **kwargs))[1])
    with torch.set_grad_enabled(grad):
        found, n = model(image), len(calls)
        calls.clear()
        expected = reference(model, image)
    assert n == len(calls) > 0
    for f, e in zip(found, expected):
        assert distance(f, e) < 1e-6


def test_stochastic_depth_may_be_left_on_alone():
    """As for Monte Carlo estimates of uncertainty."""
    model, image = made(avx512, drop_path_rate=0.5).eval(), torch.randn(4, 3, 64, 64)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.train()
    with torch.no_grad():
        torch.manual_seed(1)
        found = model(image)
        torch.manual_seed(1)
        expected = reference(model, image)
        another = model(image)
    for f, e, a in zip(found, expected, another):
        assert distance(f, e) < 1e-5 < distance(f, a)


def test_hooks_see_what_they_saw():
    model, seen = made(), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model(torch.randn(1, 3, 64, 64))
    assert {'stages.0.0', 'stages.0.0.pwconv1', 'stages.2.1.drop_path', 'downsample_layers.1', 'norm2'} <= set(seen)


def test_traced_transformed_and_counted_modules_run_their_reference_implementation(runs):
    model, image = made(grn=False), torch.randn(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert not any(runs) and counter.get_total_flops() > 0
    runs.clear()
    torch.jit.trace(model.eval(), image, check_trace=False)
    assert not any(runs)
    runs.clear()
    parameters = dict(model.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, image)[2].sum())(parameters)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(image, torch.ones_like(image))
        assert torch.autograd.forward_ad.unpack_dual(model(dual)[2]).tangent is not None
    assert not any(runs) and gradients['stages.0.0.gamma'].abs().sum() > 0


@pytest.mark.parametrize(
    'image, dtype',
    [
        (torch.empty(0, 3, 64, 64), None),
        (torch.randn(1, 3, 64, 64).double(), torch.float64),
        (torch.randn(1, 3, 64, 64, device='meta'), None),
    ],
    ids=['no image', 'float64', 'meta'],
)
def test_what_has_no_fast_form_goes_the_plain_way(image, dtype, runs):
    model = made().to(image.device, dtype)
    assert [len(m) for m in model(image)] == [len(image)] * 3
    assert not any(runs)


@pytest.mark.parametrize('mkldnn', [True, False])
@pytest.mark.parametrize('compiled', [(), (torch.float32,), (torch.float32, torch.bfloat16)], ids=str)
def test_what_is_said_to_run_is_what_runs(mkldnn, compiled, monkeypatch):
    if not set(compiled) <= set(avx512.dtypes()) or torch.bfloat16 not in onednn.dtypes():
        pytest.skip('not on this machine')
    monkeypatch.setattr(avx512, 'dtypes', lambda: compiled)
    ran, block, x = [], ConvNeXtBlock(32, 7, 0.0, 1.0), torch.randn(1, 32, 8, 8)
    for module in (avx512, onednn):
        monkeypatch.setattr(module, 'forward', partial(lambda f, *a, **k: (ran.append(f), (a[1], []))[1], module))
    found = {}
    with torch.backends.mkldnn.flags(enabled=mkldnn), torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            ran.clear()
            with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
                dispatch.block_forward(block, x)
            found[str(dtype).removeprefix('torch.')] = ran[0] if ran else None
        said = dispatch.backend_summary()
    for form, name in ((avx512, 'AVX-512 kernels'), (onednn, 'oneDNN'), (None, 'the reference implementation')):
        dtypes = ', '.join(dtype for dtype, ran in found.items() if ran is form)
        wanted = bool(dtypes) if form else not mkldnn and not compiled
        assert ((f'{name} for {dtypes}' if form else name) in said) == wanted, (said, found)
    assert ('no AVX-512 kernels (' in said) == (not compiled)


def test_machines_without_any_form_go_the_plain_way(runs, monkeypatch):
    with torch.backends.mkldnn.flags(enabled=False), monkeypatch.context() as patch:
        patch.setattr(avx512, 'dtypes', lambda: ())
        made()(torch.randn(1, 3, 64, 64))
    with torch.autocast('cpu', torch.float16), torch.no_grad():
        made()(torch.randn(1, 3, 64, 64))
    assert not any(runs) and len(runs) == 10


@pytest.mark.parametrize('precision', ['float32', pytest.param(AUTOCAST, marks=BF16.marks)])
@pytest.mark.parametrize('with_cp', [False, True])
def test_grn_of_maps_whose_hidden_layer_is_not_kept(with_cp, precision, runs):
    """It would take more than KEPT_BYTES, so that GRN's second sweep computes a part of it again."""
    if (torch.bfloat16 if precision == AUTOCAST else torch.float32) not in avx512.dtypes():
        pytest.skip('the kernels are not for this machine, or not compiled')
    torch.manual_seed(0)
    block, x = ConvNeXtBlock(32, 7, 0.0, 0.0, use_grn=True), torch.randn(1, 32, 331, 333)
    block.with_cp = with_cp
    for p in block.parameters():
        nn.init.normal_(p, std=0.2)

    def grads(block, x, precision=precision):
        image = x.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == AUTOCAST):
            out = block(image)
        torch.manual_seed(1)
        weight = torch.randn(out.shape).to(out.dtype)
        return [out, *torch.autograd.grad((out * weight).sum(), [image, *block.parameters()])]

    found = grads(block, x)
    assert runs == [True]
    with dispatch.disabled():
        expected = grads(block, x)
        exact = grads(copy.deepcopy(block).double(), x.double(), 'float64')
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=precision == AUTOCAST):
        found.append(block(x))
    for f, e, t in zip(found, [*expected, expected[0]], [*exact, exact[0]], strict=True):
        assert (f - t).norm() <= 3 * (e - t).norm() + 2e-5 * t.norm()  # a sum over all pixels, one after the other


def test_grn_of_a_map_of_zeros(form):
    """Norms of zero divide nothing."""
    block = ConvNeXtBlock(32, 7, 0.0, 0.0, use_grn=True)
    for p in block.parameters():
        nn.init.zeros_(p)
    for use in (dispatch.block_forward, reference):
        block.zero_grad()
        out = use(block, torch.zeros(2, 32, 9, 8))
        out.sum().backward()
        assert not out.any() and all(p.grad.isfinite().all() for p in block.parameters())


def test_a_stage_of_blocks_of_both_kinds(monkeypatch):
    model = ConvNeXt(dict(depths=(2, 2), channels=(32, 64)), out_indices=(0, 1), use_grn=True).eval()
    for stage, other in zip(model.stages, made(avx512).stages[:1]):
        stage[1] = copy.deepcopy(other[0])
    image = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        for f, e in zip(model(image), reference(model, image)):
            assert distance(f, e) < 1e-5


def test_mismatched_dtypes_fail_as_they_did():
    with pytest.raises(RuntimeError):
        made()(torch.randn(1, 3, 64, 64).bfloat16())


@pytest.mark.parametrize('size', [(4, 4), (5, 7), (16, 16), (17, 40)])
@pytest.mark.parametrize('memory', ['contiguous', 'channels_last', 'strided', 'expanded'])
def test_any_size_and_layout(size, memory, form):
    torch.manual_seed(0)
    block, (h, w) = ConvNeXtBlock(32, 7, 0.0, 1.0), size
    x = torch.randn(2, 32, h, w)
    if memory == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    elif memory == 'strided':
        x = torch.randn(2, 64, 2 * h, w)[:, ::2, ::2]
    elif memory == 'expanded':
        x = torch.randn(1, 32, 1, w).expand(2, 32, h, w)
    for size_one in (x, x[:1], x[:, :, :1], x[:, :, :1, :1]):
        found = dispatch.block_forward(block, size_one)
        assert distance(found, reference(block, size_one)) < 1e-5


def test_every_parameter_has_a_gradient_where_no_sample_keeps_its_branch(form):
    block = ConvNeXtBlock(32, 7, 1 - 1e-9, 1.0).train()
    out = dispatch.block_forward(block, torch.randn(2, 32, 8, 8))
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


def test_a_user_may_checkpoint_copy_and_retain(form, runs):
    model, image = made(form), torch.randn(1, 3, 64, 64, requires_grad=True)
    expected = maps_and_gradients(copy.deepcopy(model), image.detach())[1]
    torch.manual_seed(2)
    for attempt in range(2):
        maps = checkpoint(model, image, use_reentrant=False) if attempt else model(image)
        torch.manual_seed(2)
        loss = sum((m.double() * torch.randn(m.shape)).sum() for m in maps)
        for again in range(1 if attempt else 2):
            image.grad = None
            loss.backward(retain_graph=not attempt and not again)
            assert distance(image.grad, expected['image']) < 1e-5
    assert all(runs)


def test_the_import_loads_no_library_that_only_tools_need():
    script = "import sys, convnext_dense; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True).stdout
    assert not any(f"'{name}'" in loaded for name in ('mmcv', 'mmdet', 'mmseg', 'torchvision', 'scipy', 'triton'))


def test_compiled_blocks_are_compiled_once_for_all_sizes_and_rates(monkeypatch):
    torch._dynamo.reset()
    graphs, asked, form = [], [], dispatch._select_backend
    # Not `fast.block`, which compiled blocks have within their graphs.
    monkeypatch.setattr(dispatch, '_select_backend', lambda *args: (asked.append(1), form(*args))[1])

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = ConvNeXt(dict(depths=(3, 3), channels=(16, 32)), out_indices=(0, 1), drop_path_rate=0.5).train()
    eager = copy.deepcopy(model)
    model.compile_blocks(backend=backend)
    found = []
    for n, h, w in ((2, 64, 96), (3, 96, 160), (2, 128, 64), (4, 160, 96)):
        sum(m.sum() for m in model(torch.randn(n, 3, h, w))).backward()
        found.append(len(graphs))
    assert found[1] <= 8 and found[1:] == [found[1]] * 3
    model.eval()
    image = torch.randn(2, 3, 96, 96)
    compiled = model(image)
    assert not asked
    for c, e in zip(compiled, eager.eval()(image)):
        assert distance(c, e) < 1e-5
    assert len(asked) == 6
    assert not any(m._compiled_call_impl for m in copy.deepcopy(model).modules())  # a copy's blocks are its own
    torch._dynamo.reset()
