"""The GPU kernels of a block in Triton's interpreter (`conftest.py`), on the CPU, against the block in float64."""

import copy

import pytest
import torch

from convnext_dense.models.convnext import ConvNeXtBlock
from convnext_dense.ops import dispatch, triton_blocks
from convnext_dense.ops.triton_blocks import Block

pytest.importorskip('triton')
CHANNELS = 16


def make_block(use_grn: bool) -> ConvNeXtBlock:
    torch.manual_seed(0)
    block = ConvNeXtBlock(CHANNELS, 7, 0.0, 0.0 if use_grn else 0.5, use_grn)
    for param in block.parameters():
        torch.nn.init.normal_(param, std=0.2)
    torch.nn.init.normal_(block.norm.weight, 1, 0.2)
    return block


def make_args(block: ConvNeXtBlock, dtype: torch.dtype, scale=None) -> Block:
    return Block(dispatch._block_params(block), scale, block.norm.eps, dtype)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize('dtype', triton_blocks.DTYPES, ids=str)
@pytest.mark.parametrize('use_grn', [False, True], ids=['v1', 'v2'])
def test_outputs_and_gradients_equal_the_module(use_grn, dtype):
    """Odd sizes, a float32 shortcut, a sample whose branch is dropped, and all checkpoint scopes."""
    block = make_block(use_grn)
    x = torch.randn(2, 5, 6, CHANNELS)
    scale = torch.tensor([0.0, 1.25])
    exact_block, exact_x = copy.deepcopy(block).double(), x.double().requires_grad_()
    branch = exact_block.mlp(exact_block.dwconv(exact_x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    expected = exact_x + branch * scale.double().view(-1, 1, 1, 1)
    grad = torch.randn(x.shape)
    expected.backward(grad.double())

    results = []
    for with_cp in (False, True, 'mlp') if dtype == torch.float16 else (False,):
        inputs = x.clone().requires_grad_()
        block.zero_grad()
        out = triton_blocks.run(inputs, make_args(block, dtype, scale), with_cp)
        out.backward(grad.to(out.dtype))
        results.append([out.detach(), inputs.grad, *(p.grad for p in block.parameters())])
    assert all(torch.equal(a, b) for result_with_cp in results[1:] for a, b in zip(results[0], result_with_cp))
    out, grad_x, *grads = results[0]
    with torch.no_grad():
        assert torch.equal(out, triton_blocks.run(x, make_args(block, dtype, scale), False))

    tolerance = 1e-3 if dtype == torch.float16 else 1e-2
    assert torch.equal(out[0], x[0])
    assert relative_error(out.double() - x, expected.detach() - x) < 2 * tolerance
    assert relative_error(grad_x.double() - grad, exact_x.grad - grad) < 3 * tolerance
    for (name, param), param_grad in zip(exact_block.named_parameters(), grads):
        assert param_grad.dtype == torch.float32 and relative_error(param_grad, param.grad) < 2 * tolerance, name


def test_half_precision_modules():
    """Parameters, maps and gradients in half precision, without autocast."""
    block = make_block(use_grn=False).half()
    x = torch.randn(1, 4, 5, CHANNELS).half().requires_grad_()
    out = triton_blocks.run(x, make_args(block, torch.float16), False)
    out.sum().backward()
    expected = copy.deepcopy(block).double().residual(x.detach().double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert out.dtype == torch.float16 and relative_error(out, expected) < 2e-3
    assert {p.grad.dtype for p in (x, *block.parameters())} == {torch.float16}


def test_batched_gradients_equal_single_gradients():
    """As in vectorized Jacobians: such a gradient has no storage that a kernel could read."""
    block = make_block(use_grn=False)
    x = torch.randn(1, 3, 4, CHANNELS, requires_grad=True)
    out = triton_blocks.run(x, make_args(block, torch.bfloat16), False)
    grads = torch.randn(2, *out.shape)
    batched = torch.autograd.grad(out, x, grads, is_grads_batched=True, retain_graph=True)[0]
    single = torch.stack([torch.autograd.grad(out, x, grad, retain_graph=True)[0] for grad in grads])
    assert relative_error(batched, single.double()) < 1e-2
    with pytest.raises(RuntimeError, match='reference implementation'):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ('change', 'x_change'),
    [
        (lambda b: b.half(), None),  # parameters narrower than the map
        (lambda b: setattr(b.norm, 'weight', torch.nn.Parameter(b.norm.weight.half())), None),
        (lambda b: setattr(b.pwconv1, 'weight', torch.nn.Parameter(b.pwconv1.weight.t().contiguous().t())), None),
        (lambda b: setattr(b.norm, 'bias', torch.nn.Parameter(torch.zeros(CHANNELS + 1)[1:])), None),
        (None, lambda x: x.double()),
        (None, lambda x: x[..., :12].contiguous()),
        (None, lambda x: torch.zeros(x.numel() + 1)[1:].view(x.shape)),
    ],
    ids=['narrow', 'mixed', 'strides', 'unaligned', 'float64', 'channels', 'unaligned map'],
)
def test_unsupported_inputs_are_refused(change, x_change):
    block, x = make_block(use_grn=False), torch.randn(1, 3, 4, CHANNELS)
    assert triton_blocks.supports(x, make_args(block, torch.float16))
    if change:
        change(block)
    x = x_change(x) if x_change else x
    assert not triton_blocks.supports(x, make_args(block, torch.float16))
    assert not triton_blocks.supports(x, make_args(make_block(False), torch.float32))


def test_blocks_are_not_supported_without_triton(monkeypatch):
    monkeypatch.setattr(triton_blocks, 'kernels', lambda: None)
    block = make_block(use_grn=False)
    assert not triton_blocks.supports(torch.randn(1, 3, 4, CHANNELS), make_args(block, torch.float16))
