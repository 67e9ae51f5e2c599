"""Both fast backends of a block (AVX-512 kernels, oneDNN) against its reference implementation."""

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

pytestmark = pytest.mark.skipif(torch.float32 not in onednn.dtypes(), reason='this machine has no fast backend')
BF16 = pytest.param('bfloat16', marks=pytest.mark.skipif(len(onednn.dtypes()) < 2, reason='no bfloat16 here'))
# oneDNN: groups of 16 and of 8. AVX-512: multiples of 32; in the last, the hidden layer is not a multiple of a chunk.
ARCHS = {
    onednn: dict(depths=(2, 1, 2), channels=(16, 40, 400)),
    avx512: dict(depths=(2, 1, 2), channels=(32, 96, 416)),
}
AUTOCAST, PURE = 'autocast', 'pure'


def build_model(backend=onednn, **settings) -> ConvNeXt:
    torch.manual_seed(0)
    model = ConvNeXt(ARCHS[backend], out_indices=(0, 1, 2), **settings)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture(params=[onednn, avx512], ids=['onednn', 'avx512'])
def backend(request, monkeypatch):
    """The backend that runs; the other one raises."""
    if request.param is avx512 and not avx512.dtypes():
        pytest.skip('the kernels are not for this machine, or not compiled')

    def fail(*args, **kwargs):
        raise AssertionError('the other backend ran')

    monkeypatch.setattr(onednn if request.param is avx512 else avx512, 'forward', fail)
    if request.param is onednn:
        monkeypatch.setattr(avx512, 'supports_block', lambda *args: False)
    return request.param


def disable_fast_ops(monkeypatch):
    monkeypatch.setattr(dispatch, '_disabled_depth', 1)


@pytest.fixture
def fast_blocks(monkeypatch):
    """For each block that ran: whether a fast backend ran it."""
    ran, block = [], dispatch.block_forward

    def recorded_forward(*args):
        out = block(*args)
        ran.append(out is not None)
        return out

    monkeypatch.setattr(dispatch, 'block_forward', recorded_forward)
    return ran


def reference(module, x):
    """The output of a module's reference implementation."""
    with dispatch.disabled():
        return module(x)


def features_and_grads(model, image, precision='float32'):
    """Features, and gradients of a weighted sum of them with respect to parameters and image."""
    image = image.clone().requires_grad_()
    if precision == PURE:
        model, image = copy.deepcopy(model).bfloat16(), image.detach().bfloat16().requires_grad_()
    torch.manual_seed(1)
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == AUTOCAST):
        feats = model(image)
    torch.manual_seed(2)
    sum((m.double() * torch.randn(m.shape)).sum() for m in feats).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()} | {'image': image.grad}
    for p in model.parameters():
        p.grad = None
    return [m.detach() for m in feats], gradients


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


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
def test_float32_equals_the_reference(settings, tile, backend, fast_blocks, monkeypatch):
    if backend is avx512 and (tile < 4096 or 'kernel_size' in settings):
        pytest.skip('for the other backend only')
    monkeypatch.setattr(onednn, 'TILE', tile)
    if tile < 4096:  # only some tiles' hidden layers are kept for GRN's second pass
        monkeypatch.setattr(onednn, 'KEPT_BYTES', 2 * tile * 4 * 40 * 4)
    model, image = build_model(backend, **settings), torch.randn(3, 3, 70, 101)
    actual = features_and_grads(model, image)
    assert fast_blocks == [True] * 5
    disable_fast_ops(monkeypatch)
    expected = features_and_grads(model, image)
    for m, e in zip(actual[0], expected[0]):
        assert m.dtype == e.dtype and m.is_contiguous() and distance(m, e) < 1e-5
    for name, e in expected[1].items():
        assert (actual[1][name] is None) == (e is None), name
        assert e is None or (actual[1][name].dtype == e.dtype and distance(actual[1][name], e) < 1e-5), name


@pytest.mark.parametrize('precision', [pytest.param(p, marks=BF16.marks) for p in (AUTOCAST, PURE)])
@pytest.mark.parametrize(
    'settings',
    [{}, dict(layer_scale_init_value=0), dict(with_cp='mlp', drop_path_rate=0.6), dict(use_grn=True)],
    ids=str,
)
def test_bfloat16_is_as_accurate_as_the_reference(precision, settings, backend, fast_blocks, monkeypatch):
    if backend is avx512 and precision == PURE:
        pytest.skip('bfloat16 parameters: for the other backend only')
    if backend is avx512 and torch.bfloat16 not in avx512.dtypes():
        pytest.skip('this processor has no bfloat16 matmul, or oneDNN has a faster one')
    model, image = build_model(backend, **settings), torch.randn(3, 3, 70, 101)
    actual = features_and_grads(model, image, precision)
    assert fast_blocks == [True] * 5
    disable_fast_ops(monkeypatch)
    reference_result = features_and_grads(model, image, precision)
    exact = features_and_grads(model.double(), image.double())
    for m, p, t in zip(actual[0], reference_result[0], exact[0]):
        assert m.dtype == p.dtype and distance(m, t) < 1.2 * distance(p, t) + 1e-3
    errors, reference_errors = (
        [distance(gradients[name], t) for name, t in exact[1].items()] for gradients in (actual[1], reference_result[1])
    )
    assert sum(errors) < 1.15 * sum(reference_errors) and max(errors) < 2 * max(reference_errors)
    assert [g.dtype for g in actual[1].values()] == [g.dtype for g in reference_result[1].values()]


@pytest.mark.parametrize('settings', [{}, dict(with_cp=True), dict(use_grn=True)], ids=str)
def test_no_grad_gives_the_same_features_and_leaves_the_image_unmodified(settings, backend, fast_blocks):
    model, image = build_model(backend, **settings), torch.randn(2, 3, 64, 96)
    original = image.clone()
    expected = [m.detach() for m in model(image)]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            actual = model(image)
        assert torch.equal(image, original)
        for f, e in zip(actual, expected):
            assert distance(f, e) < 1e-6 and f.is_contiguous()
    assert all(fast_blocks)


@pytest.mark.parametrize('use_grn', [False, True])
@pytest.mark.parametrize('with_cp', [False, 'mlp', True])
def test_gradcheck_and_gradgradcheck(with_cp, use_grn, monkeypatch):
    monkeypatch.setattr(onednn, 'TILE', 7)
    monkeypatch.setattr(onednn, 'KEPT_BYTES', 7 * 32 * 8)
    monkeypatch.setattr(onednn, 'SAVE_HIDDEN_FROM', 8)
    monkeypatch.setattr(onednn, 'dtypes', lambda: (torch.float64,))
    # oneDNN has no float64: use torch's Linear and GELU.
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
        shadow = copy.copy(block)
        shadow._modules = {k: copy.copy(m) for k, m in block._modules.items()}
        for module in shadow._modules.values():
            module._parameters = dict(module._parameters)
        shadow._parameters = dict(block._parameters)
        for name, value in zip(names, values):
            module, _, param_name = name.rpartition('.')
            (shadow._modules[module] if module else shadow)._parameters[param_name] = value
        out = dispatch.block_forward(shadow, x)
        assert out is not None
        return out

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, *parameters), fast_mode=True)


@pytest.fixture
def fast_ends(monkeypatch):
    """The names of the stem, downsampling and output norm calls that the kernels ran."""
    if not avx512.dtypes():
        pytest.skip('the kernels are not for this machine, or not compiled')
    names = []

    def watch(name, function):
        monkeypatch.setattr(avx512, name, lambda *args: (names.append(name), function(*args))[1])

    watch('patch_embed', avx512.patch_embed)
    watch('norm_nchw', avx512.norm_nchw)
    return names


ENDS = ['patch_embed', 'norm_nchw'] * 3


@pytest.mark.parametrize('in_channels', [1, 3, 4, 5])
@pytest.mark.parametrize('memory', ['contiguous', 'channels_last', 'strided', 'expanded'])
def test_stem_downsampling_and_output_norms(in_channels, memory, fast_ends, monkeypatch):
    """Images in any memory format, with odd sizes: pixels that no patch covers have no gradient."""
    torch.manual_seed(0)
    model, image = build_model(avx512, in_channels=in_channels), torch.randn(2, in_channels, 93, 75)
    if memory == 'channels_last':
        image = image.contiguous(memory_format=torch.channels_last)
    elif memory == 'strided':
        image = torch.randn(2, 2 * in_channels, 93, 150)[:, ::2, :, ::2]
    elif memory == 'expanded':
        image = torch.randn(1, in_channels, 93, 1).expand(2, in_channels, 93, 75)

    def gradients():
        model.zero_grad()
        feats = model(image)
        torch.manual_seed(1)
        sum((m * torch.randn(m.shape)).sum() for m in feats).backward()
        return [*feats, *(p.grad for p in model.parameters())]

    actual = gradients()
    assert fast_ends == ENDS
    disable_fast_ops(monkeypatch)
    for f, e in zip(actual, gradients()):
        assert f.shape == e.shape and distance(f, e) < 1e-5


@pytest.mark.parametrize('settings', [{}, dict(layer_scale_init_value=0), dict(grn=True)], ids=str)
@pytest.mark.parametrize('train', [False, True])
def test_output_dtype_under_autocast_equals_the_reference(settings, train, monkeypatch):
    if torch.bfloat16 not in avx512.dtypes():
        pytest.skip('the kernels have no bfloat16 here')
    model, image = build_model(avx512, **settings), torch.randn(1, 3, 64, 64)
    with torch.autocast('cpu', torch.bfloat16), torch.set_grad_enabled(train):
        actual = model(image)
        disable_fast_ops(monkeypatch)
        expected = model(image)
    for f, e in zip(actual, expected):
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
def test_only_a_modified_stem_downsampling_or_norm_falls_back(change, lost, fast_ends, monkeypatch):
    model, image = build_model(avx512), torch.randn(1, 3, 64, 64)
    change(model)
    actual = model(image)
    assert {name: fast_ends.count(name) for name in ('patch_embed', 'norm_nchw')} == {
        name: 3 - (name == lost) for name in ('patch_embed', 'norm_nchw')
    }
    disable_fast_ops(monkeypatch)
    for f, e in zip(actual, model(image)):
        assert distance(f, e) < 1e-5


def test_double_backward_of_a_model(fast_ends, monkeypatch):
    model, image = build_model(avx512), torch.randn(1, 3, 64, 64)

    def penalty():
        parameters = list(model.parameters())
        loss = sum(m.pow(2).mean() for m in model(image))
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), parameters, allow_unused=True)

    actual = penalty()
    assert fast_ends == ENDS
    disable_fast_ops(monkeypatch)
    for f, e in zip(actual, penalty()):
        assert (f is None) == (e is None) and (e is None or distance(f, e) < 1e-4)


def test_models_in_several_threads_do_not_interfere():
    """Each thread has its own workspace."""
    models = [build_model(avx512), build_model(avx512, with_cp=True)]
    images = [torch.randn(1, 3, 64, 64), torch.randn(2, 3, 96, 80)]
    expected = [features_and_grads(m, i) for m, i in zip(models, images)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            jobs = [pool.submit(lambda m, i: [x.detach() for x in m(i)], m, i) for m, i in zip(models, images)]
            for job, (feats, _) in zip(jobs, expected):
                for f, e in zip(job.result(), feats):
                    assert distance(f, e) < 1e-6


@pytest.mark.parametrize('use_grn', [False, True])
@pytest.mark.parametrize('with_cp', [False, True])
def test_double_backward_equals_the_reference(with_cp, use_grn, backend, monkeypatch):
    torch.manual_seed(0)
    block = ConvNeXtBlock(32, 7, 0.0, 0.5, use_grn)
    block.with_cp = with_cp
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)

    def penalty():
        x = torch.randn(2, 32, 5, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = dispatch.block_forward(block, x) if backend else reference(block, x)
        (grad,) = torch.autograd.grad(out.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), [x, *block.parameters()])

    actual, backend = penalty(), None
    for f, e in zip(actual, penalty()):
        assert distance(f, e) < 1e-5


@pytest.mark.parametrize('use_grn', [False, True])
@pytest.mark.parametrize('precision', ['float32', AUTOCAST])
@pytest.mark.parametrize('shape', [(1, 1, 1), (3, 5, 7), (2, 33, 17), (1, 20, 90)], ids=str)
def test_any_number_of_threads_gives_the_same_result(shape, precision, use_grn, fast_blocks):
    if (torch.bfloat16 if precision == AUTOCAST else torch.float32) not in avx512.dtypes():
        pytest.skip('the kernels are not for this machine, or not compiled')
    torch.manual_seed(0)
    block, x = ConvNeXtBlock(64, 7, 0.0, 1.0, use_grn), torch.randn(shape[0], 64, *shape[1:])
    for p in block.parameters():
        nn.init.normal_(p, std=0.2)
    num_threads, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            image = x.clone().requires_grad_()
            block.zero_grad()
            with torch.autocast('cpu', torch.bfloat16, enabled=precision == AUTOCAST):
                out = dispatch.block_forward(block, image)
            out.pow(2).sum().backward()
            results.append([out, image.grad, *(p.grad.clone() for p in block.parameters())])
    finally:
        torch.set_num_threads(num_threads)
    image = x.clone().requires_grad_()
    block.zero_grad()
    out = reference(block, image)
    out.pow(2).sum().backward()
    for f, e in zip(results[0], [out, image.grad, *(p.grad for p in block.parameters())]):
        assert distance(f, e) < (1e-5 if precision == 'float32' else 5e-2)  # also for an odd last pixel
    for result in results[1:]:
        for f, e in zip(result, results[0]):
            assert distance(f, e) < (1e-5 if precision == 'float32' else 1e-2)


@pytest.mark.parametrize('precision', ['float32', pytest.param(AUTOCAST, marks=BF16.marks)])
def test_gelu_of_the_kernels(precision):
    """Inputs of every magnitude, NaN and Inf; the second Linear is the identity, the slope the gradient of the bias."""
    dtype = torch.bfloat16 if precision == AUTOCAST else torch.float32
    if dtype not in avx512.dtypes():
        pytest.skip('the kernels are not for this machine, or not compiled')
    block = ConvNeXtBlock(32, 7, 0.0, 1.0).requires_grad_(False)
    for p in block.parameters():
        nn.init.zeros_(p)
    block.norm.bias.fill_(1.0)
    nn.init.ones_(block.gamma)
    block.pwconv2.weight[:, :32] = torch.eye(32)

    def gelu_and_slope(values):
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
            for actual, expected_value in zip(gelu_and_slope(part), (F.gelu(part.double()), slope)):
                assert ((actual - expected_value).abs() < absolute + relative * expected_value.abs()).all(), part
    for value, expected in ((math.nan, (math.nan,) * 2), (-1e30, (0, 0)), (-3e38, (0, 0)), (3e38, (3e38, 1))):
        first_value = [part[0].item() for part in gelu_and_slope(torch.tensor([value] + 31 * [0.0]))]
        assert first_value == pytest.approx(expected, rel=2**-8, nan_ok=True), value
    for value in (math.inf, -math.inf):
        assert not gelu_and_slope(torch.tensor([value] + 31 * [0.0]))[0][0].isfinite()


def test_unusable_kernels_warn_and_are_not_used(monkeypatch, tmp_path):
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
def test_unsupported_parameter_shapes_fall_back(change):
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
def test_strided_parameters_of_stem_downsampling_and_norm(change, monkeypatch):
    model, image = build_model(avx512), torch.randn(1, 3, 64, 64)
    change(model)
    actual = model(image)
    disable_fast_ops(monkeypatch)
    for f, e in zip(actual, model(image)):
        assert distance(f, e) < 1e-5


@pytest.mark.parametrize('shape', [(32, 8, 8), (96, 8, 8)])
def test_wrong_number_of_channels_raises(shape):
    with pytest.raises(RuntimeError):
        ConvNeXtBlock(64, 7, 0.0, 1.0)(torch.randn(1, *shape))


@pytest.mark.parametrize('use_grn', [False, True])
def test_gradients_are_deterministic(backend, use_grn):
    """With several threads: the order of summation is fixed."""
    num_threads, results = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        model, image = ConvNeXt(ARCHS[backend], out_indices=(0, 1, 2), use_grn=use_grn), torch.randn(2, 3, 160, 160)
        for _ in range(6):
            model.zero_grad()
            sum(m.sum() for m in model(image)).backward()
            results.append([p.grad.clone() for p in model.parameters()])
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(f, e) for result in results[1:] for f, e in zip(result, results[0]))


def test_saved_tensors_may_be_unpacked_in_another_memory_format(backend):
    model, image = build_model(backend), torch.randn(1, 3, 70, 66)
    expected = features_and_grads(model, image)[1]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.detach().clone(memory_format=torch.contiguous_format), lambda t: t
    ):
        actual = features_and_grads(model, image)[1]
    for name, e in expected.items():
        assert distance(actual[name], e) < 1e-5, name


def test_default_device_is_ignored(backend):
    block, x = ConvNeXtBlock(32, 7, 0.0, 1.0), torch.randn(1, 32, 9, 9)
    avx512._tls.workspace = avx512._EMPTY
    with torch.device('meta'):
        out = dispatch.block_forward(block, x)
    assert distance(out, reference(block, x)) < 1e-5


def test_dtypes_by_cpu_flags(monkeypatch):
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
def test_a_stage_without_gradients_is_one_kernel_call(depth, precision, use_grn, monkeypatch):
    if (torch.bfloat16 if precision == AUTOCAST else torch.float32) not in avx512.dtypes():
        pytest.skip('the kernels are not for this machine, or not compiled')
    image, calls, outputs = torch.randn(1, 3, 64, 80), [], []
    model = ConvNeXt(dict(depths=(depth, depth), channels=(32, 64)), out_indices=(0, 1), use_grn=use_grn).eval()
    run = avx512.launch
    monkeypatch.setattr(
        avx512,
        'launch',
        lambda *kernel_calls: (calls.append([call.name for call in kernel_calls]), run(*kernel_calls))[1],
    )

    def calls_after(change):
        """Apply a change; compare features with and without gradients; return the kernels of each call without."""
        change(model)
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == AUTOCAST):
            expected = [m.detach() for m in model(image)]
            calls.clear()
            with torch.no_grad():
                actual = model(image)
        for f, e in zip(actual, expected):
            assert distance(f, e) < (1e-6 if precision == 'float32' else 2e-2)
        return calls

    stage, one_by_one = ['patch_embed', *['block'] * depth, 'norm_nchw'], [['block']] * depth
    assert calls_after(lambda model: None) == [stage, stage]
    actual = calls_after(lambda model: model.norm0.register_forward_hook(lambda *_: None))
    assert actual == [['patch_embed'], *one_by_one, ['norm_nchw'], stage]
    # The output that a hook received is not overwritten.
    actual = calls_after(
        lambda model: model.downsample_layers[1].register_forward_hook(
            lambda *hook_args: outputs.append((hook_args[2], hook_args[2].clone()))
        )
    )
    assert actual[-2:] == [['block'], ['norm_nchw']]
    assert all(torch.equal(*pair) for pair in outputs) and outputs
    model.out_indices = (1,)
    assert calls_after(lambda model: None)[0] == stage[:-1]


def test_output_norm_reuses_an_unused_buffer(monkeypatch):
    if not avx512.dtypes():
        pytest.skip('the kernels are not for this machine, or not compiled')
    model = ConvNeXt(dict(depths=(2, 3), channels=(32, 64)), out_indices=(0, 1)).eval()
    buffers, call = [], avx512.KernelCall

    def recorded_forward(name, arguments, tensors):
        buffers.extend(t.data_ptr() for t in tensors if t is not None and t.ndim == 4 and t.shape[0] == 2)
        return call(name, arguments, tensors)

    monkeypatch.setattr(avx512, 'KernelCall', recorded_forward)
    with torch.no_grad():
        actual = model(torch.randn(2, 3, 64, 80))
    assert len(set(buffers)) == 1 + 2 + 2  # the image, and two of each stage
    assert {m.data_ptr() for m in actual} < set(buffers) and all(m.is_contiguous() for m in actual)


def saved_activation_bytes(model, image) -> int:
    """Bytes that a forward pass saves for the backward pass, without parameters, each storage once."""
    sizes = {}
    param_ptrs = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in param_ptrs:
            sizes[storage.data_ptr()] = (storage.nbytes(), t)  # t: keeps the address from being reused
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(image)
    return sum(size for size, _ in sizes.values())


@pytest.mark.parametrize('use_grn', [False, True])
def test_memory_saved_for_the_backward_pass(backend, use_grn, monkeypatch):
    image = torch.randn(1, 3, 128, 128)
    arch = dict(depths=(3, 3, 9, 3), channels=(32, 64, 96, 512))
    models = {cp: ConvNeXt(arch, with_cp=cp, use_grn=use_grn) for cp in (False, 'mlp', True)}
    fast = {cp: saved_activation_bytes(model, image) for cp, model in models.items()}
    disable_fast_ops(monkeypatch)
    reference_bytes = {cp: saved_activation_bytes(model, image) for cp, model in models.items()}
    assert fast[False] < 0.4 * reference_bytes[False] and fast['mlp'] < 0.3 * reference_bytes[False]
    assert fast[True] < fast['mlp'] < fast[False]
    assert reference_bytes[True] < reference_bytes['mlp'] < 0.5 * reference_bytes[False]


def test_modified_weights_take_effect_immediately(backend):
    """Nothing is cached: changes that autograd does not see, as by mmengine's EMA, count too."""
    model, image = build_model(backend).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model(image)
        for p in model.parameters():
            p.data.mul_(0.5)
        actual = model(image)
    fresh = build_model(backend)
    fresh.load_state_dict(model.state_dict())
    for f, e in zip(actual, fresh.eval()(image)):
        assert distance(f, e) < 1e-6


def change_block(model, change):
    block = model.stages[0][0]
    if change == 'forward hook':
        block.pwconv1.register_forward_hook(lambda *_: None)
    elif change == 'pre-hook':
        block.norm.register_forward_pre_hook(lambda *_: None)
    elif change == 'deprecated backward hook':
        block.register_backward_hook(lambda *_: None)
    elif change == 'subclass':
        block.pwconv1.__class__ = type('Other', (nn.Linear,), {})
    elif change == 'block subclass':
        block.__class__ = type('Other', (ConvNeXtBlock,), {})
    elif change == 'forward replaced':
        block.dwconv.forward = block.dwconv.forward
    elif change == 'convolution replaced':
        conv = block.dwconv._conv_forward
        block.dwconv._conv_forward = lambda *args: conv(*args).relu()
    elif change == 'MLP replaced':
        mlp = block.mlp
        block.mlp = lambda y: mlp(y).relu()
    elif change == 'residual replaced':
        residual = block.residual
        block.residual = lambda *args: residual(*args).relu()
    elif change == 'scalar layer scale':
        block.gamma = nn.Parameter(torch.tensor(0.5))
    elif change == 'norm over rows':
        block.norm = nn.LayerNorm((24, 16))
    elif change == 'padding by name':
        block.dwconv = nn.Conv2d(16, 16, 5, padding='same', groups=16)
    elif change == 'parametrized':
        nn.utils.parametrizations.weight_norm(block.pwconv2)
    elif change == 'reflecting':
        block.dwconv.padding_mode = 'reflect'
        block.dwconv._reversed_padding_repeated_twice = [3] * 4
    elif change == 'dilated':
        block.dwconv.dilation, block.dwconv.padding = (2, 2), (6, 6)
    elif change == 'other GRN':
        block.grn = type('Other', (GRN,), {})(64)
    elif change == 'hook on GRN':
        block.grn = GRN(64)
        block.grn.register_forward_hook(lambda *_: None)
    elif change == 'tensor subclass':
        block.pwconv1.weight = nn.Parameter(type('Other', (torch.Tensor,), {})(block.pwconv1.weight.data))
    return model


@pytest.mark.filterwarnings('ignore:Using a non-full backward hook')
@pytest.mark.parametrize(
    'kind',
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
def test_only_a_modified_block_falls_back(kind, fast_blocks, monkeypatch):
    model, image = change_block(build_model(), kind), torch.randn(1, 3, 80, 96)
    actual = features_and_grads(model, image)
    expected = {'tensor subclass': [False] * 5}  # its outputs are such tensors, too
    assert fast_blocks == expected.get(kind, [False] + [True] * 4)
    disable_fast_ops(monkeypatch)
    for f, e in zip(actual[0], features_and_grads(model, image)[0]):
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
    """As profilers, memory savers and adapter libraries do."""
    model, image, calls, original = build_model(avx512), torch.randn(1, 3, 64, 64), [], getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda *args, **kwargs: (calls.append(0), original(*args, **kwargs))[1])
    with torch.set_grad_enabled(grad):
        actual, n = model(image), len(calls)
        calls.clear()
        expected = reference(model, image)
    assert n == len(calls) > 0
    for f, e in zip(actual, expected):
        assert distance(f, e) < 1e-6


def test_stochastic_depth_in_eval_mode():
    """As for Monte Carlo dropout."""
    model, image = build_model(avx512, drop_path_rate=0.5).eval(), torch.randn(4, 3, 64, 64)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.train()
    with torch.no_grad():
        torch.manual_seed(1)
        actual = model(image)
        torch.manual_seed(1)
        expected = reference(model, image)
        another = model(image)
    for f, e, a in zip(actual, expected, another):
        assert distance(f, e) < 1e-5 < distance(f, a)


def test_forward_hooks_of_all_modules_fire():
    model, names = build_model(), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: names.append(name))
    model(torch.randn(1, 3, 64, 64))
    assert {'stages.0.0', 'stages.0.0.pwconv1', 'stages.2.1.drop_path', 'downsample_layers.1', 'norm2'} <= set(names)


def test_traced_transformed_and_counted_modules_run_their_reference_implementation(fast_blocks):
    model, image = build_model(grn=False), torch.randn(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert not any(fast_blocks) and counter.get_total_flops() > 0
    fast_blocks.clear()
    torch.jit.trace(model.eval(), image, check_trace=False)
    assert not any(fast_blocks)
    fast_blocks.clear()
    parameters = dict(model.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, image)[2].sum())(parameters)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(image, torch.ones_like(image))
        assert torch.autograd.forward_ad.unpack_dual(model(dual)[2]).tangent is not None
    assert not any(fast_blocks) and gradients['stages.0.0.gamma'].abs().sum() > 0


@pytest.mark.parametrize(
    'image, dtype',
    [
        (torch.empty(0, 3, 64, 64), None),
        (torch.randn(1, 3, 64, 64).double(), torch.float64),
        (torch.randn(1, 3, 64, 64, device='meta'), None),
    ],
    ids=['no image', 'float64', 'meta'],
)
def test_unsupported_inputs_fall_back(image, dtype, fast_blocks):
    model = build_model().to(image.device, dtype)
    assert [len(m) for m in model(image)] == [len(image)] * 3
    assert not any(fast_blocks)


@pytest.mark.parametrize('mkldnn', [True, False])
@pytest.mark.parametrize('compiled', [(), (torch.float32,), (torch.float32, torch.bfloat16)], ids=str)
def test_backend_summary_names_the_backend_that_runs(mkldnn, compiled, monkeypatch):
    if not set(compiled) <= set(avx512.dtypes()) or torch.bfloat16 not in onednn.dtypes():
        pytest.skip('not on this machine')
    monkeypatch.setattr(avx512, 'dtypes', lambda: compiled)
    ran, block, x = [], ConvNeXtBlock(32, 7, 0.0, 1.0), torch.randn(1, 32, 8, 8)
    for module in (avx512, onednn):
        monkeypatch.setattr(module, 'forward', partial(lambda f, *a, **k: (ran.append(f), (a[1], []))[1], module))
    backend_of_dtype = {}
    with torch.backends.mkldnn.flags(enabled=mkldnn), torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            ran.clear()
            with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
                dispatch.block_forward(block, x)
            backend_of_dtype[str(dtype).removeprefix('torch.')] = ran[0] if ran else None
        summary = dispatch.backend_summary()
    for backend, name in ((avx512, 'AVX-512 kernels'), (onednn, 'oneDNN'), (None, 'the reference implementation')):
        dtypes = ', '.join(dtype for dtype, ran in backend_of_dtype.items() if ran is backend)
        is_expected = bool(dtypes) if backend else not mkldnn and not compiled
        assert ((f'{name} for {dtypes}' if backend else name) in summary) == is_expected, (summary, backend_of_dtype)
    assert ('no AVX-512 kernels (' in summary) == (not compiled)


def test_machines_without_a_fast_backend_fall_back(fast_blocks, monkeypatch):
    with torch.backends.mkldnn.flags(enabled=False), monkeypatch.context() as patch:
        patch.setattr(avx512, 'dtypes', lambda: ())
        build_model()(torch.randn(1, 3, 64, 64))
    with torch.autocast('cpu', torch.float16), torch.no_grad():
        build_model()(torch.randn(1, 3, 64, 64))
    assert not any(fast_blocks) and len(fast_blocks) == 10


@pytest.mark.parametrize('precision', ['float32', pytest.param(AUTOCAST, marks=BF16.marks)])
@pytest.mark.parametrize('with_cp', [False, True])
def test_grn_with_a_recomputed_hidden_layer(with_cp, precision, fast_blocks):
    """The hidden layer takes more than KEPT_BYTES, so GRN's second pass recomputes a part of it."""
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

    actual = grads(block, x)
    assert fast_blocks == [True]
    with dispatch.disabled():
        expected = grads(block, x)
        exact = grads(copy.deepcopy(block).double(), x.double(), 'float64')
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=precision == AUTOCAST):
        actual.append(block(x))
    for f, e, t in zip(actual, [*expected, expected[0]], [*exact, exact[0]], strict=True):
        assert (f - t).norm() <= 3 * (e - t).norm() + 2e-5 * t.norm()  # sequential sum over all pixels


def test_grn_of_zeros(backend):
    """No division by zero."""
    block = ConvNeXtBlock(32, 7, 0.0, 0.0, use_grn=True)
    for p in block.parameters():
        nn.init.zeros_(p)
    for use in (dispatch.block_forward, reference):
        block.zero_grad()
        out = use(block, torch.zeros(2, 32, 9, 8))
        out.sum().backward()
        assert not out.any() and all(p.grad.isfinite().all() for p in block.parameters())


def test_a_stage_with_v1_and_v2_blocks(monkeypatch):
    model = ConvNeXt(dict(depths=(2, 2), channels=(32, 64)), out_indices=(0, 1), use_grn=True).eval()
    for stage, other_stage in zip(model.stages, build_model(avx512).stages[:1]):
        stage[1] = copy.deepcopy(other_stage[0])
    image = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        for f, e in zip(model(image), reference(model, image)):
            assert distance(f, e) < 1e-5


def test_mismatched_dtypes_raise():
    with pytest.raises(RuntimeError):
        build_model()(torch.randn(1, 3, 64, 64).bfloat16())


@pytest.mark.parametrize('size', [(4, 4), (5, 7), (16, 16), (17, 40)])
@pytest.mark.parametrize('memory', ['contiguous', 'channels_last', 'strided', 'expanded'])
def test_any_size_and_memory_format(size, memory, backend):
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
        actual = dispatch.block_forward(block, size_one)
        assert distance(actual, reference(block, size_one)) < 1e-5


def test_every_parameter_has_a_gradient_when_all_branches_are_dropped(backend):
    block = ConvNeXtBlock(32, 7, 1 - 1e-9, 1.0).train()
    out = dispatch.block_forward(block, torch.randn(2, 32, 8, 8))
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


def test_checkpoint_deepcopy_and_retain_graph(backend, fast_blocks):
    model, image = build_model(backend), torch.randn(1, 3, 64, 64, requires_grad=True)
    expected = features_and_grads(copy.deepcopy(model), image.detach())[1]
    torch.manual_seed(2)
    for attempt in range(2):
        feats = checkpoint(model, image, use_reentrant=False) if attempt else model(image)
        torch.manual_seed(2)
        loss = sum((m.double() * torch.randn(m.shape)).sum() for m in feats)
        for repeat in range(1 if attempt else 2):
            image.grad = None
            loss.backward(retain_graph=not attempt and not repeat)
            assert distance(image.grad, expected['image']) < 1e-5
    assert all(fast_blocks)


def test_import_does_not_load_mmdet_mmseg_or_torchvision():
    script = "import sys, convnext_dense; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True).stdout
    assert not any(f"'{name}'" in loaded for name in ('mmcv', 'mmdet', 'mmseg', 'torchvision', 'scipy', 'triton'))


def test_compiled_blocks_compile_once_for_all_sizes_and_drop_rates(monkeypatch):
    torch._dynamo.reset()
    graphs, select_calls, select_backend = [], [], dispatch._select_backend
    # Not `block_forward`, which compiled blocks contain in their graphs.
    monkeypatch.setattr(dispatch, '_select_backend', lambda *args: (select_calls.append(1), select_backend(*args))[1])

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = ConvNeXt(dict(depths=(3, 3), channels=(16, 32)), out_indices=(0, 1), drop_path_rate=0.5).train()
    eager = copy.deepcopy(model)
    model.compile_blocks(backend=backend)
    graph_counts = []
    for n, h, w in ((2, 64, 96), (3, 96, 160), (2, 128, 64), (4, 160, 96)):
        sum(m.sum() for m in model(torch.randn(n, 3, h, w))).backward()
        graph_counts.append(len(graphs))
    assert graph_counts[1] <= 8 and graph_counts[1:] == [graph_counts[1]] * 3
    model.eval()
    image = torch.randn(2, 3, 96, 96)
    compiled = model(image)
    assert not select_calls
    for c, e in zip(compiled, eager.eval()(image)):
        assert distance(c, e) < 1e-5
    assert len(select_calls) == 6
    assert not any(m._compiled_call_impl for m in copy.deepcopy(model).modules())  # a copy's blocks are its own
    torch._dynamo.reset()
