"""FLOPs of the operators for `torch.utils.flop_counter`, equal to those of the reference implementation.

That mode hooks all modules, which then run their reference implementation; these formulas are for those who count
operators in another way. Recomputation for `with_cp` is not counted.
"""

from functools import cache

import torch

from .block_params import BlockParams


@cache
def register() -> None:
    """Register the formulas; importing torch's counter imports triton where that is installed, so not at import."""
    from torch.utils.flop_counter import conv_backward_flop, conv_flop_count, mm_flop, register_flop_formula

    ops, n_params = torch.ops.convnext_dense, len(BlockParams._fields)

    def conv(x_shape, weight_shape, out_shape):
        return conv_flop_count(x_shape, weight_shape, out_shape)

    def conv_backward(x_shape, weight_shape, out_shape, needs_x, needs_weight):
        mask, grads = [needs_x, needs_weight, False], [x_shape, weight_shape, None]
        return conv_backward_flop(out_shape, x_shape, weight_shape, None, 1, 0, 1, False, 0, 1, mask, out_val=grads)

    def nchw(nhwc):
        n, height, width, channels = nhwc
        return [n, channels, height, width]

    def linear(n_rows, weight_shape):
        return mm_flop([n_rows, weight_shape[1]], [weight_shape[1], weight_shape[0]])

    @register_flop_formula(ops.block)
    def block(x, z, *args, out_shape=None, **kwargs):
        params, n_rows = BlockParams(*args[:n_params]), x[0] * x[1] * x[2]
        linears = linear(n_rows, params.pwconv1_weight) + linear(n_rows, params.pwconv2_weight)
        return conv(nchw(x), params.dwconv_weight, nchw(x)) + linears

    @register_flop_formula(ops.block_backward)
    def block_backward(grad, z, saved, *args, out_shape=None, **kwargs):
        params, needs_grad = BlockParams(*args[:n_params]), args[-1]
        n_rows, needs = z[0] * z[1] * z[2], BlockParams(*needs_grad[1:])
        flops = conv_backward(nchw(z), params.dwconv_weight, nchw(z), needs_grad[0], needs.dwconv_weight)
        for weight, needs_weight in (
            (params.pwconv1_weight, needs.pwconv1_weight),
            (params.pwconv2_weight, needs.pwconv2_weight),
        ):
            flops += linear(n_rows, weight) * (1 + needs_weight)
        return flops

    @register_flop_formula(ops.patch_embed)
    def patch_embed(x, weight, bias, norm_weight, norm_bias, patch_size, *args, out_shape=None, **kwargs):
        return conv(x, weight, [x[0], weight[0], x[2] // patch_size, x[3] // patch_size])

    @register_flop_formula(ops.patch_embed_backward)
    def patch_embed_backward(grad, x, weight, *args, out_shape=None, **kwargs):
        needs_grad = args[-1]
        return conv_backward(x, weight, nchw(grad), needs_grad[0], needs_grad[1])

    @register_flop_formula(ops.stage)
    def stage(x, patch_params, block_params, norm_params, patch_size, dtype, eps, *args, out_shape=None, **kwargs):
        weight = patch_params[0]
        out = [x[0], x[2] // patch_size, x[3] // patch_size, weight[0]]
        n_blocks = len(eps) - 1 - bool(norm_params)
        size = len(block_params) // n_blocks
        per_block = [block_params[size * i : size * (i + 1)] for i in range(n_blocks)]
        n_rows, flops = out[0] * out[1] * out[2], conv(x, weight, nchw(out))
        for params in map(BlockParams.of_present, per_block):
            flops += conv(nchw(out), params.dwconv_weight, nchw(out))
            flops += linear(n_rows, params.pwconv1_weight) + linear(n_rows, params.pwconv2_weight)
        return flops

    @register_flop_formula(ops.conv3x3)
    def conv3x3(x, weight, bias, *args, out_shape=None, **kwargs):
        return conv(x, weight, [x[0], weight[0], *x[2:]])

    @register_flop_formula([ops.output_norm, ops.output_norm_backward])
    def norm(*args, out_shape=None, **kwargs):
        return 0  # torch counts matmuls and convolutions only
