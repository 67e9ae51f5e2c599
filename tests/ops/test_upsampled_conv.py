"""Convolutions of upsampled features against torch's upsampling, concatenation and convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from convnext_dense.ops import head_kernels, onednn
from convnext_dense.ops.upsampled_conv import (
    supports_upsampled_conv,
    tap_sum,
    tap_sum_backward,
    upsampled_conv,
)

pytestmark = pytest.mark.skipif(
    not head_kernels.available() or torch.float32 not in onednn.dtypes(), reason='the kernels are not for this machine'
)
# Halved sizes as in UperNet's pyramid, odd sizes, pooled features, and equal sizes.
SIZES = [
    [(16, 24), (8, 12), (4, 6), (2, 3)],
    [(13, 17), (6, 8), (3, 4), (1, 2)],
    [(9, 7), (1, 1), (2, 2), (3, 3), (6, 6)],
    [(5, 9), (5, 9), (2, 9)],
    [(3, 4), (6, 6), (7, 2)],
    [(1, 1), (1, 1)],
]


@pytest.fixture(params=[*head_kernels.VARIANTS])
def variant(request, monkeypatch):
    """Each compiled variant that runs on this processor."""
    monkeypatch.setattr(head_kernels, 'VARIANTS', {request.param: head_kernels.VARIANTS[request.param]})
    head_kernels._library.cache_clear()
    if not head_kernels.available():
        pytest.skip(f'no {request.param} here')
    yield request.param
    monkeypatch.undo()
    head_kernels._library.cache_clear()


def reference(feats, weight, bias, align_corners=False, relu=False):
    size = feats[0].shape[2:]
    upsampled = [F.interpolate(x, size, mode='bilinear', align_corners=align_corners) for x in feats[1:]]
    out = F.conv2d(torch.cat([feats[0], *upsampled], 1), weight, bias, padding=1)
    return out.relu() if relu else out


def make_inputs(sizes, channels=48, dtype=torch.float32, in_channels=8, batch=2):
    torch.manual_seed(0)
    feats = [torch.randn(batch, in_channels + i, *size, dtype=dtype) for i, size in enumerate(sizes)]
    total = sum(x.shape[1] for x in feats)
    weight = torch.randn(channels, total, 3, 3, dtype=dtype) / (9 * total) ** 0.5
    return feats, weight, torch.randn(channels, dtype=dtype)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('sizes', SIZES, ids=str)
def test_outputs_and_gradients_equal_torch(variant, sizes, align_corners):
    for channels in (16, 48, 64, 144):  # whole and partial chunks per thread
        for relu in (False, True):
            feats, weight, bias = make_inputs(sizes, channels)
            tensors = [t.requires_grad_() for t in (*feats, weight, bias)]
            expected = reference(feats, weight, bias, align_corners, relu)
            actual = upsampled_conv(feats, weight, bias, align_corners, relu)
            with torch.no_grad():
                no_grad_output = upsampled_conv(feats, weight, bias, align_corners, relu)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(no_grad_output, expected, rtol=1e-5, atol=1e-5)
            grad = torch.randn(expected.shape)
            grads = (torch.autograd.grad(out, tensors, grad) for out in (actual, expected))
            for f, e in zip(*grads):
                torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5 * max(1, e.abs().max().item()))


@pytest.mark.skipif(torch.bfloat16 not in onednn.dtypes(), reason='no bfloat16 here')
def test_bfloat16_is_as_accurate_as_torch(variant):
    feats, weight, bias = make_inputs(SIZES[0], 64, in_channels=64)
    rounded = [t.bfloat16().float() for t in (*feats, weight, bias)]
    tensors = [t.requires_grad_() for t in rounded]
    exact = reference(tensors[:4], *tensors[4:])
    grad = torch.randn(exact.shape).bfloat16().float()
    exact = [exact, *torch.autograd.grad(exact, tensors, grad)]
    errors = []
    for function in (reference, upsampled_conv):
        with torch.autocast('cpu', torch.bfloat16):
            out = function(tensors[:4], *tensors[4:])
        assert out.dtype == torch.bfloat16
        results = [out, *torch.autograd.grad(out, tensors, grad.bfloat16())]
        errors.append([((r.float() - t).norm() / t.norm()).item() for r, t in zip(results, exact)])
    for torch_error, error in zip(*errors):
        assert error < 2 * torch_error + 1e-3


def test_results_are_bitwise_equal_for_any_number_of_threads():
    feats = make_inputs(SIZES[1])[0]
    base = torch.randn(2, 48, 13, 17)
    products = [torch.randn(2, 9 * 48, *x.shape[2:], requires_grad=True) for x in feats[1:]]
    results, threads = [], torch.get_num_threads()
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        out = tap_sum(base, products, False, False)
        results.append([out, *torch.autograd.grad(out.square().sum(), products)])
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_nan_and_inf_are_preserved():
    for dtype in (torch.float32, torch.bfloat16):
        base, products = torch.zeros(1, 16, 4, 4, dtype=dtype), torch.zeros(1, 144, 2, 2, dtype=dtype)
        base[0, 3, 1, 2], base[0, 4, 0, 0] = float('nan'), float('inf')
        out = tap_sum(base, [products], False, True)
        assert out.dtype == dtype and out[0, 3, 1, 2].isnan() and out[0, 4, 0, 0].isinf() and out.isnan().sum() == 1


@pytest.mark.parametrize('requires_grad', [False, True])
def test_opcheck(requires_grad):
    for dtype in (torch.float32, torch.bfloat16):
        base, *products = (
            torch.randn(2, n * 16, *size, dtype=dtype).requires_grad_(requires_grad)
            for n, size in ((1, (6, 5)), (9, (3, 2)), (9, (1, 1)))
        )
        opcheck(tap_sum, (base, products, False, False))
        opcheck(tap_sum_backward, (base.detach(), [3, 1], [2, 1], True))
    if not requires_grad:
        opcheck(tap_sum, (base, products, False, True))


def test_unsupported_inputs():
    feats, weight, _ = make_inputs(SIZES[0])
    assert supports_upsampled_conv(feats, weight)
    assert not supports_upsampled_conv(feats[:1], weight)
    assert not supports_upsampled_conv(feats[:-1], weight)
    assert not supports_upsampled_conv(feats, weight[:40])
    assert not supports_upsampled_conv(feats, weight[..., :1])
    assert not supports_upsampled_conv([x.double() for x in feats], weight.double())
    assert not supports_upsampled_conv([x.to('meta') for x in feats], weight)
    assert not supports_upsampled_conv([x[:1] if i else x for i, x in enumerate(feats)], weight)


def test_operators_refuse_invalid_arguments():
    base, products = torch.zeros(1, 16, 4, 4), torch.zeros(1, 144, 2, 2)
    for invalid_args in (
        (base, []),
        (base, [products[:, :128]]),
        (base, [products.double()]),
        (base, [products.bfloat16()]),
        (base.double(), [products.double()]),
        (base[:, :8], [products[:, :72]]),
        (base, [torch.zeros(2, 144, 2, 2)]),
        (base, [products[:, :, :0]]),
        (base, [products.to('meta')]),
        (base[0], [products]),
    ):
        with pytest.raises(RuntimeError):
            tap_sum(*invalid_args, False, False)
    for invalid_args in (([0], [2]), ([2, 2], [2]), ([], [])):
        with pytest.raises(RuntimeError):
            tap_sum_backward(base, *invalid_args, False)
