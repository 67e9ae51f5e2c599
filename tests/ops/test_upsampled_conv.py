"""Convolutions of upsampled maps, next to torch's upsampling, concatenation and convolution."""

import ctypes

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
# Sizes by twos, as UperNet's pyramid has them, of odd sides, of pooled maps, and of equal maps.
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
    """Each of the compiled forms that run on this processor."""
    monkeypatch.setattr(head_kernels, 'VARIANTS', {request.param: head_kernels.VARIANTS[request.param]})
    head_kernels._library.cache_clear()
    if not head_kernels.available():
        pytest.skip(f'no {request.param} here')
    yield request.param
    monkeypatch.undo()
    head_kernels._library.cache_clear()


def reference(maps, weight, bias, align_corners=False, relu=False):
    size = maps[0].shape[2:]
    upsampled = [F.interpolate(x, size, mode='bilinear', align_corners=align_corners) for x in maps[1:]]
    out = F.conv2d(torch.cat([maps[0], *upsampled], 1), weight, bias, padding=1)
    return out.relu() if relu else out


def arguments(sizes, channels=48, dtype=torch.float32, in_channels=8, batch=2):
    torch.manual_seed(0)
    maps = [torch.randn(batch, in_channels + i, *size, dtype=dtype) for i, size in enumerate(sizes)]
    total = sum(x.shape[1] for x in maps)
    weight = torch.randn(channels, total, 3, 3, dtype=dtype) / (9 * total) ** 0.5
    return maps, weight, torch.randn(channels, dtype=dtype)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('sizes', SIZES, ids=str)
def test_outputs_and_gradients_are_torchs(variant, sizes, align_corners):
    for channels in (16, 48, 64, 144):  # pieces of a thread that are whole, and that are not
        for relu in (False, True):
            maps, weight, bias = arguments(sizes, channels)
            tensors = [t.requires_grad_() for t in (*maps, weight, bias)]
            expected = reference(maps, weight, bias, align_corners, relu)
            found = upsampled_conv(maps, weight, bias, align_corners, relu)
            with torch.no_grad():
                alone = upsampled_conv(maps, weight, bias, align_corners, relu)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-5)
            grad = torch.randn(expected.shape)
            grads = (torch.autograd.grad(out, tensors, grad) for out in (found, expected))
            for f, e in zip(*grads):
                torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5 * max(1, e.abs().max().item()))


@pytest.mark.skipif(torch.bfloat16 not in onednn.dtypes(), reason='no bfloat16 here')
def test_bfloat16_is_as_accurate_as_torchs(variant):
    maps, weight, bias = arguments(SIZES[0], 64, in_channels=64)
    rounded = [t.bfloat16().float() for t in (*maps, weight, bias)]
    tensors = [t.requires_grad_() for t in rounded]
    true = reference(tensors[:4], *tensors[4:])
    grad = torch.randn(true.shape).bfloat16().float()
    true = [true, *torch.autograd.grad(true, tensors, grad)]
    errors = []
    for function in (reference, upsampled_conv):
        with torch.autocast('cpu', torch.bfloat16):
            out = function(tensors[:4], *tensors[4:])
        assert out.dtype == torch.bfloat16
        results = [out, *torch.autograd.grad(out, tensors, grad.bfloat16())]
        errors.append([((r.float() - t).norm() / t.norm()).item() for r, t in zip(results, true)])
    for theirs, ours in zip(*errors):
        assert ours < 2 * theirs + 1e-3


def test_results_are_the_same_bits_with_any_number_of_threads():
    maps = arguments(SIZES[1])[0]
    base = torch.randn(2, 48, 13, 17)
    products = [torch.randn(2, 9 * 48, *x.shape[2:], requires_grad=True) for x in maps[1:]]
    results, threads = [], torch.get_num_threads()
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        out = tap_sum(base, products, False, False)
        results.append([out, *torch.autograd.grad(out.square().sum(), products)])
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_what_is_no_number_stays_so():
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


def test_what_it_does_not_support():
    maps, weight, _ = arguments(SIZES[0])
    assert supports_upsampled_conv(maps, weight)
    assert not supports_upsampled_conv(maps[:1], weight)
    assert not supports_upsampled_conv(maps[:-1], weight)
    assert not supports_upsampled_conv(maps, weight[:40])
    assert not supports_upsampled_conv(maps, weight[..., :1])
    assert not supports_upsampled_conv([x.double() for x in maps], weight.double())
    assert not supports_upsampled_conv([x.to('meta') for x in maps], weight)
    assert not supports_upsampled_conv([x[:1] if i else x for i, x in enumerate(maps)], weight)


def test_the_operators_refuse_what_they_do_not_understand():
    base, products = torch.zeros(1, 16, 4, 4), torch.zeros(1, 144, 2, 2)
    for wrong in (
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
            tap_sum(*wrong, False, False)
    for wrong in (([0], [2]), ([2, 2], [2]), ([], [])):
        with pytest.raises(RuntimeError):
            tap_sum_backward(base, *wrong, False)


def test_the_kernels_refuse_structs_that_they_do_not_understand():
    library, memory = head_kernels._library(), torch.zeros(1 << 14)
    level = head_kernels.Level(height=2, width=2, scale=1.0, data=memory.data_ptr())
    pointer, address = ctypes.cast(ctypes.pointer(level), ctypes.c_void_p), memory.data_ptr()
    names = [name for name, _ in head_kernels.TapSumArgs._fields_]
    good = dict(zip(names, (1, 1, 1, 16, 4, 4, 1, 0, 0, 0, pointer, address, address), strict=True))
    kernels = (library.convnext_tap_sum, library.convnext_tap_sum_backward)
    for kernel in kernels:
        assert kernel(ctypes.byref(head_kernels.TapSumArgs(**good))) == 0 and kernel(None) != 0
        for name in names:
            if name == 'base' and kernel is kernels[1]:
                continue
            for value in {None} if name in names[-3:] else {-1, 1 << 40}:
                code = kernel(ctypes.byref(head_kernels.TapSumArgs(**(good | {name: value}))))
                assert code and library.convnext_head_error_message(code) not in (b'success', b'unknown error'), name
    for field, value in (('height', 0), ('width', 1 << 40), ('data', None)):
        wrong = head_kernels.Level(height=2, width=2, scale=1.0, data=memory.data_ptr())
        setattr(wrong, field, value)
        args = good | dict(levels=ctypes.cast(ctypes.pointer(wrong), ctypes.c_void_p))
        assert all(kernel(ctypes.byref(head_kernels.TapSumArgs(**args))) for kernel in kernels)
