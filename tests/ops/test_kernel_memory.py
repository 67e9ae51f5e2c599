"""Memory that the kernels read and write: views of any kind against the reference."""

import copy
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from convnext_dense.models.convnext import ConvNeXtBlock
from convnext_dense.ops import avx512, dispatch, onednn
from helpers.paths import ROOT
from helpers.views import VIEWS, build_model, set_param_view

pytestmark = pytest.mark.skipif(torch.float32 not in onednn.dtypes(), reason='this machine has no fast backend')
needs_kernels = pytest.mark.skipif(not avx512.dtypes(), reason='the kernels are not for this machine, or not compiled')
# Widths that the AVX-512 kernels support, and widths that only oneDNN supports.
WIDTHS = [pytest.param((32, 64), marks=needs_kernels), (16, 40)]


def with_param_view(model, name, view):
    """A copy of the model in which one parameter is a view."""
    model = copy.deepcopy(model)
    set_param_view(model, name, view)
    return model


def features_and_grads(model, image, view=None):
    """Features, and gradients of the parameters; `view` is applied to the gradients of the features."""
    model.zero_grad()
    feats = model(image)
    torch.manual_seed(1)
    grads = [torch.randn(m.shape).to(m.dtype) for m in feats]  # the same numbers in each dtype
    torch.autograd.backward(feats, [VIEWS[view](g) if view else g for g in grads])
    return [m.detach() for m in feats] + [p.grad for p in model.parameters()]


def assert_equals_the_reference(model, image, view=None):
    """The error against float64 is that of the reference implementation, up to a factor: where terms cancel, as in
    the gradient of a bias before a LayerNorm, both are nothing but rounding."""
    actual = features_and_grads(model, image, view)
    with torch.no_grad():
        actual += model(image)
    with dispatch.disabled():
        expected = features_and_grads(model, image, view)
        exact = features_and_grads(copy.deepcopy(model).double(), image.double(), view)
    for f, e, t in zip(actual, [*expected, *expected[:2]], [*exact, *exact[:2]], strict=True):
        assert (f - t).norm() <= 10 * (e - t).norm() + 1e-5 * t.norm() + 1e-6 * t.numel() ** 0.5


@pytest.mark.parametrize('use_grn', [False, True])
@pytest.mark.parametrize('view', VIEWS)
@pytest.mark.parametrize('widths', WIDTHS, ids=str)
def test_parameters_may_be_views(widths, view, use_grn):
    model, image = build_model(widths, use_grn=use_grn), torch.randn(2, 4, 19, 27)
    for name, _ in model.named_parameters():
        assert_equals_the_reference(with_param_view(model, name, view), image)


@pytest.mark.parametrize('in_channels', [1, 2, 3, 5, 6, 13])
def test_stem_weights_for_any_number_of_channels_may_be_views(in_channels):
    model, image = build_model((32, 64), in_channels), torch.randn(2, in_channels, 12, 17)
    for view in VIEWS:
        assert_equals_the_reference(with_param_view(model, 'downsample_layers.0.0.weight', view), image)


@pytest.mark.parametrize('view', VIEWS)
@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('widths', WIDTHS, ids=str)
def test_gradients_and_images_may_be_views(widths, with_cp, view):
    model, image = build_model(widths, with_cp=with_cp), torch.randn(2, 4, 19, 27)
    assert_equals_the_reference(model, image, view)
    for shape in ((2, 4, 19, 27), (1, 4, 8, 8), (2, 4, 8, 40), (1, 4, 11, 9)):
        assert_equals_the_reference(model, VIEWS[view](torch.randn(shape)))


@pytest.mark.parametrize('channels', [1, 3, 32])
def test_features_of_one_pixel_or_one_channel_may_be_views(channels):
    torch.manual_seed(0)
    block = ConvNeXtBlock(channels, 7, 0.0, 1.0)
    for shape in ((1, channels, 1, 1), (2, channels, 1, 1), (2, channels, 1, 9), (3, channels, 6, 1)):
        for view in VIEWS.values():
            x = view(torch.randn(shape))
            actual = dispatch.block_forward(block, x)
            with dispatch.disabled():
                expected = block(x)
            assert (actual is None) == x.is_neg()
            torch.testing.assert_close(expected if actual is None else actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('view', ['strided', 'transposed', 'reversed dimensions', 'slice of columns', 'offset'])
@pytest.mark.parametrize('with_cp', [False, 'mlp', True])
@pytest.mark.parametrize(
    'channels', [pytest.param(32, marks=needs_kernels), pytest.param(384, marks=needs_kernels), 400]
)
def test_saved_tensors_may_come_back_as_views(channels, with_cp, view):
    torch.manual_seed(0)
    block, x = ConvNeXtBlock(channels, 7, 0.0, 1.0), torch.randn(2, channels, 5, 7)
    block.with_cp = with_cp

    def gradients(pack):
        block.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: pack(t.detach()), lambda t: t):
            out = dispatch.block_forward(block, x)
        out.pow(2).sum().backward()
        return [p.grad for p in block.parameters()]

    for actual, expected in zip(gradients(VIEWS[view]), gradients(lambda t: t)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize('view', ['strided', 'reversed dimensions', 'slice of columns'])
def test_saved_tensors_of_a_whole_model_may_come_back_as_views(view):
    model, image = build_model((32, 64)), torch.randn(2, 4, 35, 44)
    expected = features_and_grads(model, image)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: VIEWS[view](t.detach()), lambda t: t):
        actual = features_and_grads(model, image)
    for f, e in zip(actual, expected):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('widths', WIDTHS, ids=str)
def test_batched_gradients_equal_single_gradients(widths):
    """As in vectorized Jacobians: such a gradient has no storage."""
    model, image = build_model(widths), torch.randn(2, 4, 19, 27)
    feats, parameters = model(image), list(model.parameters())
    grads = [torch.randn(3, *m.shape) for m in feats]
    batched = torch.autograd.grad(feats, parameters, grads, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(feats, parameters, [g[i] for g in grads], retain_graph=True) for i in range(3)]
    for f, e in zip(batched, map(torch.stack, zip(*single))):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings('ignore:Sparse CSR')
@pytest.mark.parametrize('channels', [32, 40])
def test_sparse_weights_and_other_dtypes_fall_back(channels):
    torch.manual_seed(0)
    block, x = ConvNeXtBlock(channels, 7, 0.0, 1.0).requires_grad_(False), torch.randn(2, channels, 9, 7)
    dense = block.pwconv1.weight
    for layout in ('to_sparse', 'to_sparse_csr'):
        block.pwconv1.weight = nn.Parameter(getattr(dense, layout)(), requires_grad=False)
        actual = block(x)
        block.pwconv1.weight = dense
        torch.testing.assert_close(actual, block(x))
    for dtype in (torch.float64, torch.int32):
        with torch.autocast('cpu', torch.bfloat16), pytest.raises(RuntimeError):
            block(x.to(dtype))


@pytest.mark.parametrize('widths', WIDTHS, ids=str)
def test_a_forward_pass_within_a_hook(widths):
    """The workspace belongs to the thread: neither pass may overwrite the other's."""
    outer, inner, image = build_model(widths), build_model(widths), torch.randn(2, 4, 35, 44)
    expected, inner_results = features_and_grads(outer, image), []

    @torch.enable_grad()
    def run_inner(*_):
        inner_results.append(features_and_grads(inner, image[:1, :, :20]))
        torch.set_num_threads(1 + len(inner_results) % 5)

    expected_inner = features_and_grads(inner, image[:1, :, :20])
    for module in (outer.stages[0], outer.stages[0][0], outer.norm0, outer.downsample_layers[1]):
        module.register_forward_hook(run_inner)
        module.register_full_backward_hook(run_inner)
    num_threads = torch.get_num_threads()
    try:
        actual = features_and_grads(outer, image)
    finally:
        torch.set_num_threads(num_threads)
    assert len(inner_results) == 8
    for f, e in [
        *zip(actual, expected),
        *(pair for inner_result in inner_results for pair in zip(inner_result, expected_inner)),
    ]:
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('widths', WIDTHS, ids=str)
def test_threads_that_train_their_own_models_do_not_interfere(widths):
    models = [build_model(widths, with_cp=with_cp) for with_cp in (False, 'mlp', True)]
    images = [torch.randn(n, 4, 20 + 13 * n, 33) for n in (1, 2, 3)]
    expected = [features_and_grads(*pair) for pair in zip(models, images)]

    def train(i):
        torch.set_num_threads(1 + i)
        return [features_and_grads(models[i], images[i]) for _ in range(5)]

    with ThreadPoolExecutor(3) as pool:
        for i, runs in enumerate(pool.map(train, range(3))):
            for actual in runs:
                for f, e in zip(actual[:2], expected[i]):  # threads share the random generator, so gradients differ
                    torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_fewer_threads_than_requested_give_the_same_result():
    script = (
        'import sys, torch; sys.path[:0] = sys.argv[1].split(); from test_kernel_memory import *; '
        'torch.set_num_threads(5); '
        'torch.save(features_and_grads(build_model((32, 64)), torch.ones(2, 4, 67, 90)), sys.argv[2])'
    )
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, '-c', script, f'{Path(__file__).parent} {ROOT / "tests"}', file.name]
        subprocess.run(command, env={**os.environ, 'OMP_THREAD_LIMIT': '2'}, check=True)
        actual = torch.load(file.name)
    for f, e in zip(actual, features_and_grads(build_model((32, 64)), torch.ones(2, 4, 67, 90)), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-3)
