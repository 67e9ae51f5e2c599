"""3 x 3 convolutions of necks and heads against torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from convnext_dense.ops import avx512, flop_formulas
from convnext_dense.ops.conv import MIN_PIXELS, conv, conv3x3, prefers_conv3x3
from helpers.views import VIEWS

pytestmark = pytest.mark.skipif(not avx512.dtypes(), reason='the kernels are not for this machine')
# Images, channels, height and width, and channels of the output: even, odd, thin, a batch of RoIs, wide rows.
SHAPES = [
    ((1, 64, 16, 24), 32),
    ((2, 32, 33, 47), 96),
    ((1, 96, 1, 300), 32),
    ((3, 32, 301, 1), 64),
    ((9, 64, 14, 14), 64),
    ((1, 32, 3, 345), 32),
]


def make_inputs(shape, out_channels, has_bias=True):
    torch.manual_seed(0)
    weight = torch.randn(out_channels, shape[1], 3, 3) / (9 * shape[1]) ** 0.5
    return [torch.randn(shape), weight, torch.randn(out_channels) if has_bias else None]


def reference(x, weight, bias, relu=False):
    out = F.conv2d(x, weight, bias, padding=1)
    return out.relu() if relu else out


def output_and_gradients(function, tensors, grad, relu):
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    out = function(*leaves, relu)
    return [out, *torch.autograd.grad(out, [t for t in leaves if t is not None], grad.to(out.dtype))]


@pytest.mark.parametrize('has_bias', [False, True])
@pytest.mark.parametrize('shape, out_channels', SHAPES, ids=str)
def test_outputs_and_gradients_are_as_accurate_as_those_of_torch(shape, out_channels, has_bias):
    tensors = make_inputs(shape, out_channels, has_bias)
    grad = torch.randn(shape[0], out_channels, *shape[2:])
    exact = output_and_gradients(reference, [None if t is None else t.double() for t in tensors], grad, False)
    actual, expected = (output_and_gradients(f, tensors, grad, False) for f in (conv3x3, reference))
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    for a, e, t in zip(actual, expected, exact):
        assert (a - t).norm() < 4 * (e - t).norm() + 1e-7 * t.norm()
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5 * t.abs().max().item())
    with torch.no_grad():
        torch.testing.assert_close(conv3x3(*tensors, True), expected[0].relu(), rtol=1e-5, atol=1e-5)


def test_gradients_with_a_relu_equal_torch():
    tensors = make_inputs((2, 32, 15, 10), 32)
    grad = torch.randn(2, 32, 15, 10)

    def with_relu_in_place(*args):
        return conv3x3(*args[:3], False).relu_()

    expected = output_and_gradients(reference, tensors, grad, True)
    for function in (conv3x3, with_relu_in_place):
        for a, e in zip(output_and_gradients(function, tensors, grad, True), expected):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5 * e.abs().max().item())


def test_bfloat16_equals_torch():
    tensors = make_inputs((2, 64, 20, 20), 64)
    grad = torch.randn(2, 64, 20, 20).bfloat16().float()
    with torch.autocast('cpu', torch.bfloat16):
        expected = output_and_gradients(reference, tensors, grad, True)
        actual = output_and_gradients(
            lambda x, weight, bias, relu: conv(x, weight, bias, padding=(1, 1), relu=relu), tensors, grad, True
        )
        with torch.no_grad():
            torch.testing.assert_close(conv(*tensors, padding=(1, 1), relu=True), expected[0])
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, rtol=1e-2, atol=1e-2 * e.abs().max().item())


@pytest.mark.parametrize('view', VIEWS)
def test_inputs_may_be_views(view):
    x, weight, bias = make_inputs((2, 32, 18, 17), 64)
    x, weight, bias = (VIEWS[view](t) for t in (x, weight, bias[:, None, None, None]))
    bias = bias[:, 0, 0, 0]
    torch.testing.assert_close(
        conv(x, weight, bias, padding=(1, 1)), reference(x, weight, bias), rtol=1e-5, atol=1e-5 * x.abs().max().item()
    )


def test_only_supported_convolutions_use_the_kernel(monkeypatch):
    calls = []
    launch = avx512.launch
    monkeypatch.setattr(avx512, 'launch', lambda *args: (calls.append(args), launch(*args)))
    x, weight, bias = make_inputs((1, 64, 16, 16), 64)
    for changes in (
        dict(stride=(2, 2)),
        dict(padding=(0, 1)),
        dict(padding=(2, 2), dilation=(2, 2)),
        dict(weight=weight[:, :32], groups=2),
        dict(weight=weight[:48], bias=bias[:48]),
        dict(x=x[..., :15]),  # fewer pixels than MIN_PIXELS
        dict(weight=weight[..., :1], padding=(1, 0)),
    ):
        args = dict(x=x, weight=weight, bias=bias, padding=(1, 1)) | changes
        tensors = [args.pop(name) for name in ('x', 'weight', 'bias')]
        torch.testing.assert_close(conv(*tensors, **args), F.conv2d(*tensors, **args), rtol=1e-5, atol=1e-5)
    assert not calls and x[0, 0].numel() == MIN_PIXELS
    conv(x, weight, bias, padding=(1, 1))
    assert len(calls) == 1
    assert not prefers_conv3x3(x.double(), weight.double()) and not prefers_conv3x3(x, weight[:, :32])


def test_results_are_bitwise_equal_for_any_number_of_threads():
    tensors, results, threads = make_inputs((1, 32, 40, 41), 32), [], torch.get_num_threads()
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        results.append(conv3x3(*tensors, True))
    torch.set_num_threads(threads)
    assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0])


def test_nan_and_inf_stay_where_they_are():
    x, weight, bias = make_inputs((1, 32, 20, 20), 32)
    for value in (float('nan'), float('inf')):
        broken = x.clone()
        broken[0, 3, 9, 9] = value
        finite = conv3x3(broken, weight, bias, True).isfinite()[0]
        assert not finite[:, 8:11, 8:11].all(0).any() and finite[:, :7].all() and finite[:, 12:].all()
        assert finite[..., :7].all() and finite[..., 12:].all()


def test_gradients_are_differentiable():
    tensors = make_inputs((1, 32, 5, 6), 32)
    results = []
    for function in (conv3x3, reference):
        x, weight, bias = (t.clone().requires_grad_() for t in tensors)
        out = function(x, weight, bias, False)
        grads = torch.autograd.grad(out.square().sum(), (x, weight), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), (x, weight, bias)))
    for a, e in zip(*results):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * e.abs().max().item())


@pytest.mark.parametrize('requires_grad', [False, True])
def test_opcheck(requires_grad):
    for has_bias in (False, True):
        tensors = make_inputs((2, 32, 6, 5), 64, has_bias)
        tensors = [None if t is None else t.requires_grad_(requires_grad) for t in tensors]
        opcheck(conv3x3, (*tensors, False))
    if not requires_grad:
        opcheck(conv3x3, (*tensors, True))


def test_operator_refuses_invalid_arguments():
    x, weight, bias = make_inputs((1, 32, 4, 4), 32)
    for invalid_args in (
        (x[0], weight, bias),
        (x[:0], weight, bias),
        (x.double(), weight.double(), bias.double()),
        (x.half(), weight, bias),
        (x, weight.bfloat16(), bias),
        (x, weight, bias.bfloat16()),
        (x, weight, bias[:16]),
        (x, weight[:16], bias[:16]),
        (x[:, :16], weight[:, :16], bias),
        (x, weight[..., :1], bias),
        (x.to('meta'), weight, bias),
    ):
        with pytest.raises(RuntimeError):
            conv3x3(*invalid_args, False)


def test_flop_count_equals_that_of_torch():
    flop_formulas.register()
    tensors, counts = make_inputs((2, 32, 5, 7), 64), []
    for function in (conv3x3, reference):
        with FlopCounterMode(display=False) as counter:
            function(*tensors, False)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
