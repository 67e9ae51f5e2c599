"""Triton kernels of the ConvNeXt block on a GPU in half precision.

Feature maps are contiguous (N, H, W, C); rows are their pixels. All arithmetic is in float32; what is stored in half
precision is rounded where the reference implementation under autocast rounds it. Reductions over rows are written as
partial sums per program and added up by torch, so that results do not depend on the order in which programs finish.
"""

import triton
import triton.language as tl

# Sizes in pixels differ from image to image: kernels do not depend on them, so that each is compiled once for a block.
_kernel = triton.jit(
    do_not_specialize=[
        *('height', 'width', 'tiles_h', 'tiles_w', 'n_pixels', 'pixels_per_program'),
        *('rows', 'rows_per_sample', 'rows_per_program', 'programs_per_sample'),
    ]
)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_grad(x):
    cdf = 0.5 * (1 + tl.math.erf(x * 0.7071067811865476))
    return cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@_kernel
def cast_weights(
    dw_ptr, weight1_ptr, weight2_ptr, taps_ptr, out1_ptr, out2_ptr,
    channels: tl.constexpr, hidden: tl.constexpr, TAPS: tl.constexpr, CAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights of a block in half precision, those of the depthwise convolution transposed to (taps, C)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_taps = i < TAPS * channels
    taps = tl.load(dw_ptr + i % channels * TAPS + i // channels, mask=in_taps)
    tl.store(taps_ptr + i, taps.to(taps_ptr.dtype.element_ty), mask=in_taps)
    if CAST:
        in_weights = i < channels * hidden
        tl.store(out1_ptr + i, tl.load(weight1_ptr + i, mask=in_weights).to(out1_ptr.dtype.element_ty), mask=in_weights)
        tl.store(out2_ptr + i, tl.load(weight2_ptr + i, mask=in_weights).to(out2_ptr.dtype.element_ty), mask=in_weights)


@_kernel
def dwconv(
    x_ptr, weight_ptr, bias_ptr, shortcut_ptr, out_ptr, height, width, tiles_h, tiles_w,
    channels: tl.constexpr, KERNEL: tl.constexpr, IS_GRADIENT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Depthwise convolution with a weight (KERNEL * KERNEL, C).

    With `IS_GRADIENT`, of the output's gradient: the gradient of the input, plus that of the shortcut and no bias.
    """
    pid = tl.program_id(0)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    block_c = pid % blocks_c
    tile_w = pid // blocks_c % tiles_w
    tile_h = pid // (blocks_c * tiles_w) % tiles_h
    image = (pid // (blocks_c * tiles_w * tiles_h)).to(tl.int64) * height * width * channels

    pixel = tl.arange(0, BLOCK_H * BLOCK_W)
    h = tile_h * BLOCK_H + pixel // BLOCK_W
    w = tile_w * BLOCK_W + pixel % BLOCK_W
    c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = c < channels
    center = (h * width + w)[:, None] * channels + c[None, :]
    inside = ((h < height) & (w < width))[:, None] & in_channels[None, :]

    acc = tl.zeros([BLOCK_H * BLOCK_W, BLOCK_C], tl.float32)
    for tap_h in range(KERNEL):
        for tap_w in tl.static_range(KERNEL):
            y, x = h + tap_h - KERNEL // 2, w + tap_w - KERNEL // 2
            valid = ((y >= 0) & (y < height) & (x >= 0) & (x < width))[:, None] & in_channels[None, :]
            offset = (y * width + x)[:, None] * channels + c[None, :]
            value = tl.load(x_ptr + image + offset, mask=valid, other=0.0).to(tl.float32)
            tap = tap_h * KERNEL + tap_w
            if IS_GRADIENT:
                tap = KERNEL * KERNEL - 1 - tap
            acc += value * tl.load(weight_ptr + tap * channels + c, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    if IS_GRADIENT:
        acc = acc.to(x_ptr.dtype.element_ty).to(tl.float32)
        acc += tl.load(shortcut_ptr + image + center, mask=inside).to(tl.float32)
    else:
        acc += tl.load(bias_ptr + c, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + image + center, acc.to(out_ptr.dtype.element_ty), mask=inside)


@_kernel
def dwconv_weight_grad(
    x_ptr, grad_ptr, partial_ptr, n_pixels, height, width, pixels_per_program,
    channels: tl.constexpr, columns: tl.constexpr, first: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Partial sums (programs, C, 7 * 7) of the gradient of a 7 x 7 depthwise weight, one row of taps per program."""
    pid = tl.program_id(0)
    tap_h = pid % 7
    chunk = pid // 7
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = (c < channels)[None, :]
    acc_0 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    acc_1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    acc_2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    acc_3 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    acc_4 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    acc_5 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    acc_6 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    first_pixel = chunk.to(tl.int64) * pixels_per_program
    for start in range(0, pixels_per_program, BLOCK_P):
        pixel = first_pixel + start + tl.arange(0, BLOCK_P)
        w = (pixel % width).to(tl.int32)
        y = (pixel // width % height).to(tl.int32) + tap_h - 3
        valid = (pixel < n_pixels) & (start + tl.arange(0, BLOCK_P) < pixels_per_program) & (y >= 0) & (y < height)
        row = (pixel + (tap_h - 3) * width)[:, None] * channels + c[None, :]
        grad = tl.load(grad_ptr + pixel[:, None] * channels + c[None, :], mask=valid[:, None] & in_channels, other=0.0)
        grad = grad.to(tl.float32)
        acc_0 += grad * _tap(x_ptr, row, w, -3, width, channels, valid, in_channels)
        acc_1 += grad * _tap(x_ptr, row, w, -2, width, channels, valid, in_channels)
        acc_2 += grad * _tap(x_ptr, row, w, -1, width, channels, valid, in_channels)
        acc_3 += grad * _tap(x_ptr, row, w, 0, width, channels, valid, in_channels)
        acc_4 += grad * _tap(x_ptr, row, w, 1, width, channels, valid, in_channels)
        acc_5 += grad * _tap(x_ptr, row, w, 2, width, channels, valid, in_channels)
        acc_6 += grad * _tap(x_ptr, row, w, 3, width, channels, valid, in_channels)
    out = partial_ptr + chunk * columns + first + c * 49 + tap_h * 7
    tl.store(out, tl.sum(acc_0, 0), mask=c < channels)
    tl.store(out + 1, tl.sum(acc_1, 0), mask=c < channels)
    tl.store(out + 2, tl.sum(acc_2, 0), mask=c < channels)
    tl.store(out + 3, tl.sum(acc_3, 0), mask=c < channels)
    tl.store(out + 4, tl.sum(acc_4, 0), mask=c < channels)
    tl.store(out + 5, tl.sum(acc_5, 0), mask=c < channels)
    tl.store(out + 6, tl.sum(acc_6, 0), mask=c < channels)


@triton.jit
def _tap(x_ptr, row, w, shift, width, channels, valid, in_channels):
    inside = valid & (w + shift >= 0) & (w + shift < width)
    return tl.load(x_ptr + row + shift * channels, mask=inside[:, None] & in_channels, other=0.0).to(tl.float32)


@triton.jit
def _layer_norm(x, in_channels, channels, eps):
    """Normalized rows and the reciprocal of their standard deviation."""
    centered = tl.where(in_channels[None, :], x - tl.sum(x, 1)[:, None] / channels, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centered * centered, 1) / channels + eps)
    return centered * rstd[:, None], rstd


@_kernel
def layer_norm(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, eps,
    channels: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """LayerNorm of rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    in_channels = c < channels
    mask = (row < rows)[:, None] & in_channels[None, :]
    offset = row[:, None] * channels + c[None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    normalized, _ = _layer_norm(x, in_channels, channels, eps)
    weight = tl.load(weight_ptr + c, mask=in_channels, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=in_channels, other=0.0).to(tl.float32)
    out = normalized * weight[None, :] + bias[None, :]
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


@_kernel
def layer_norm_grad(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, grad_x_ptr, out_ptr, partial_ptr, rows, rows_per_program, eps,
    channels: tl.constexpr, columns: tl.constexpr, first: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of the input, the output once more, and partial sums (programs, 3, C).

    The sums are the gradients of weight and bias, and the sum of the input's gradient: that of the convolution's bias.
    """
    c = tl.arange(0, BLOCK_C)
    in_channels = c < channels
    weight = tl.load(weight_ptr + c, mask=in_channels, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=in_channels, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    grad_bias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    sum_grad_x = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    first_row = tl.program_id(0).to(tl.int64) * rows_per_program
    for start in range(0, rows_per_program, BLOCK_R):
        row = first_row + start + tl.arange(0, BLOCK_R)
        mask = ((row < rows) & (start + tl.arange(0, BLOCK_R) < rows_per_program))[:, None] & in_channels[None, :]
        offset = row[:, None] * channels + c[None, :]
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        normalized, rstd = _layer_norm(x, in_channels, channels, eps)
        out = normalized * weight[None, :] + bias[None, :]
        tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)
        grad_weight += grad * normalized
        grad_bias += grad
        scaled = grad * weight[None, :]
        mean = tl.sum(scaled, 1) / channels
        mean_normalized = tl.sum(scaled * normalized, 1) / channels
        grad_x = (scaled - mean[:, None] - normalized * mean_normalized[:, None]) * rstd[:, None]
        grad_x = tl.where(mask, grad_x, 0.0).to(grad_x_ptr.dtype.element_ty)
        tl.store(grad_x_ptr + offset, grad_x, mask=mask)
        sum_grad_x += grad_x.to(tl.float32)
    out = partial_ptr + tl.program_id(0) * columns + first + c
    tl.store(out, tl.sum(grad_weight, 0), mask=in_channels)
    tl.store(out + channels, tl.sum(grad_bias, 0), mask=in_channels)
    tl.store(out + 2 * channels, tl.sum(sum_grad_x, 0), mask=in_channels)


@_kernel
def shortcut(
    branch_ptr, x_ptr, bias_ptr, gamma_ptr, scale_ptr, out_ptr, rows, rows_per_sample,
    channels: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Input plus branch, to which the last bias is added, times layer scale and stochastic depth."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (c < channels)[None, :]
    offset = row[:, None] * channels + c[None, :]
    out = tl.load(branch_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    out += tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    out = out.to(branch_ptr.dtype.element_ty).to(tl.float32)
    if HAS_GAMMA:
        out *= tl.load(gamma_ptr + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    if HAS_SCALE:
        out *= tl.load(scale_ptr + row // rows_per_sample, mask=row < rows, other=0.0)[:, None]
    out += tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


@_kernel
def shortcut_grad(
    grad_ptr, branch_ptr, bias_ptr, gamma_ptr, scale_ptr, grad_branch_ptr, partial_ptr,
    rows, rows_per_sample, rows_per_program,
    channels: tl.constexpr, columns: tl.constexpr, first: tl.constexpr,
    HAS_GAMMA: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of the branch, and partial sums (programs, 2, C): gradients of layer scale and of the last bias."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = c < channels
    grad_gamma = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    grad_bias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if HAS_GAMMA:
        gamma = tl.load(gamma_ptr + c, mask=in_channels, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + c, mask=in_channels, other=0.0).to(tl.float32)
    first_row = tl.program_id(0).to(tl.int64) * rows_per_program
    for start in range(0, rows_per_program, BLOCK_R):
        row = first_row + start + tl.arange(0, BLOCK_R)
        in_rows = (row < rows) & (start + tl.arange(0, BLOCK_R) < rows_per_program)
        mask = in_rows[:, None] & in_channels[None, :]
        offset = row[:, None] * channels + c[None, :]
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if HAS_SCALE:
            grad *= tl.load(scale_ptr + row // rows_per_sample, mask=in_rows, other=0.0)[:, None]
        if HAS_GAMMA:
            branch = tl.load(branch_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            grad_gamma += grad * (branch + bias[None, :])
            grad *= gamma[None, :]
        grad = grad.to(grad_branch_ptr.dtype.element_ty)
        tl.store(grad_branch_ptr + offset, grad, mask=mask)
        grad_bias += grad.to(tl.float32)
    out = partial_ptr + tl.program_id(0) * columns + first + c
    tl.store(out, tl.sum(grad_gamma, 0), mask=in_channels)
    tl.store(out + channels, tl.sum(grad_bias, 0), mask=in_channels)


@_kernel
def gelu(
    hidden_ptr, bias_ptr, out_ptr, partial_ptr, rows_per_sample, programs_per_sample, rows_per_program,
    hidden: tl.constexpr, SQUARES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """GELU of the hidden layer plus its bias; for GRN partial sums (samples, programs, channels) of its squares.

    The bias is not added to the hidden layer in memory.
    """
    sample = (tl.program_id(0) // programs_per_sample).to(tl.int64)
    part = tl.program_id(0) % programs_per_sample
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    bias = tl.load(bias_ptr + c, mask=c < hidden, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, rows_per_program, BLOCK_R):
        step = start + tl.arange(0, BLOCK_R)
        row = part * rows_per_program + step
        mask = ((row < rows_per_sample) & (step < rows_per_program))[:, None] & (c < hidden)[None, :]
        offset = (sample * rows_per_sample + row)[:, None] * hidden + c[None, :]
        x = (tl.load(hidden_ptr + offset, mask=mask, other=0.0).to(tl.float32) + bias[None, :]).to(
            out_ptr.dtype.element_ty
        )
        out = _gelu(x.to(tl.float32)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offset, out, mask=mask)
        if SQUARES:
            out = tl.where(mask, out.to(tl.float32), 0.0)
            acc += out * out
    if SQUARES:
        tl.store(partial_ptr + tl.program_id(0) * hidden + c, tl.sum(acc, 0), mask=c < hidden)


@_kernel
def grn_scale(
    partial_ptr, gamma_ptr, norms_ptr, scale_ptr, programs_per_sample, eps, hidden: tl.constexpr, BLOCK_C: tl.constexpr
):
    """GRN of a sample: norms of its hidden channels, and what their values are multiplied by, the shortcut included."""
    sample = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    in_hidden = c < hidden
    squares = tl.zeros([BLOCK_C], tl.float32)
    for part in range(programs_per_sample):
        row = (sample * programs_per_sample + part).to(tl.int64) * hidden
        squares += tl.load(partial_ptr + row + c, mask=in_hidden, other=0.0)
    norms = tl.sqrt(squares)
    relative = norms / (tl.sum(norms, 0) / hidden + eps)
    gamma = tl.load(gamma_ptr + c, mask=in_hidden, other=0.0).to(tl.float32)
    tl.store(norms_ptr + sample * hidden + c, norms, mask=in_hidden)
    tl.store(scale_ptr + sample * hidden + c, gamma * relative + 1, mask=in_hidden)


@_kernel
def scale_weight(
    weight_ptr, bias_ptr, beta_ptr, scale_ptr, out_ptr, out_bias_ptr,
    channels: tl.constexpr, hidden: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A channel of Linear 2 after GRN: its weights times a sample's scale, its bias plus weights times GRN's shift."""
    channel = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    shift = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, hidden, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_hidden = k < hidden
        weight = tl.load(weight_ptr + channel * hidden + k, mask=in_hidden, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + sample * hidden + k, mask=in_hidden, other=0.0)
        out = (weight * scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (sample * channels + channel) * hidden + k, out, mask=in_hidden)
        shift += weight * tl.load(beta_ptr + k, mask=in_hidden, other=0.0).to(tl.float32)
    tl.store(out_bias_ptr + channel, tl.sum(shift, 0) + tl.load(bias_ptr + channel).to(tl.float32))


@_kernel
def grn_grad_sums(
    hidden_ptr, bias_ptr, grad_ptr, partial_ptr, rows_per_sample, programs_per_sample, rows_per_program,
    hidden: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Partial sums (samples, programs, 2, channels) of grad * gelu(hidden) and of grad over the pixels of a sample."""
    sample = (tl.program_id(0) // programs_per_sample).to(tl.int64)
    part = tl.program_id(0) % programs_per_sample
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    bias = tl.load(bias_ptr + c, mask=c < hidden, other=0.0).to(tl.float32)
    products = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    grads = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, rows_per_program, BLOCK_R):
        step = start + tl.arange(0, BLOCK_R)
        row = part * rows_per_program + step
        mask = ((row < rows_per_sample) & (step < rows_per_program))[:, None] & (c < hidden)[None, :]
        offset = (sample * rows_per_sample + row)[:, None] * hidden + c[None, :]
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(hidden_ptr + offset, mask=mask, other=0.0)
        products += grad * _gelu((x.to(tl.float32) + bias[None, :]).to(x.dtype).to(tl.float32))
        grads += grad
    out = partial_ptr + tl.program_id(0) * 2 * hidden + c
    tl.store(out, tl.sum(products, 0), mask=c < hidden)
    tl.store(out + hidden, tl.sum(grads, 0), mask=c < hidden)


@_kernel
def grn_grad_scale(
    partial_ptr, gamma_ptr, norms_ptr, square_ptr, param_grads_ptr, programs_per_sample, eps,
    hidden: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of GRN for a sample, from the sums of `grn_grad_sums`.

    `square` is what gelu(hidden) is multiplied by for the gradient through its norm; `param_grads`, (samples, 2,
    channels), are the sample's contributions to the gradients of GRN's parameters.
    """
    sample = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    in_hidden = c < hidden
    products = tl.zeros([BLOCK_C], tl.float32)
    grads = tl.zeros([BLOCK_C], tl.float32)
    for part in range(programs_per_sample):
        row = (sample * programs_per_sample + part).to(tl.int64) * 2 * hidden
        products += tl.load(partial_ptr + row + c, mask=in_hidden, other=0.0)
        grads += tl.load(partial_ptr + row + hidden + c, mask=in_hidden, other=0.0)
    norms = tl.load(norms_ptr + sample * hidden + c, mask=in_hidden, other=0.0)
    mean = tl.sum(norms, 0) / hidden + eps
    relative = norms / mean
    grad_relative = products * tl.load(gamma_ptr + c, mask=in_hidden, other=0.0).to(tl.float32)
    grad_norms = (grad_relative - tl.sum(grad_relative * relative, 0) / hidden) / mean
    square = tl.where(norms > 0, grad_norms / tl.where(norms > 0, norms, 1.0), 0.0)
    tl.store(square_ptr + sample * hidden + c, square, mask=in_hidden)
    tl.store(param_grads_ptr + sample * 2 * hidden + c, products * relative, mask=in_hidden)
    tl.store(param_grads_ptr + (sample * 2 + 1) * hidden + c, grads, mask=in_hidden)


@_kernel
def gelu_grad(
    hidden_ptr, bias_ptr, grad_ptr, out_ptr, scale_ptr, shift_ptr, square_ptr, partial_ptr,
    rows_per_sample, programs_per_sample, rows_per_program,
    hidden: tl.constexpr, columns: tl.constexpr, first: tl.constexpr, HAS_GRN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Overwrite `grad` with the hidden layer's gradient; store what Linear 2 multiplied; partial sums of the former.

    With GRN, Linear 2 multiplied `gelu(hidden) * scale + shift`, of a scale (samples, channels) and a shift, and the
    gradient of gelu(hidden) is `grad * scale + square * gelu(hidden)`, with square of (samples, channels).
    """
    sample = (tl.program_id(0) // programs_per_sample).to(tl.int64)
    part = tl.program_id(0) % programs_per_sample
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_hidden = c < hidden
    bias = tl.load(bias_ptr + c, mask=in_hidden, other=0.0).to(tl.float32)
    if HAS_GRN:
        scale = tl.load(scale_ptr + sample * hidden + c, mask=in_hidden, other=0.0)[None, :]
        square = tl.load(square_ptr + sample * hidden + c, mask=in_hidden, other=0.0)[None, :]
        shift = tl.load(shift_ptr + c, mask=in_hidden, other=0.0).to(tl.float32)[None, :]
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, rows_per_program, BLOCK_R):
        step = start + tl.arange(0, BLOCK_R)
        row = part * rows_per_program + step
        mask = ((row < rows_per_sample) & (step < rows_per_program))[:, None] & in_hidden[None, :]
        offset = (sample * rows_per_sample + row)[:, None] * hidden + c[None, :]
        x = tl.load(hidden_ptr + offset, mask=mask, other=0.0)
        x = (x.to(tl.float32) + bias[None, :]).to(x.dtype).to(tl.float32)
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        out = _gelu(x)
        if HAS_GRN:
            grad = grad * scale + square * out
            out = out * scale + shift
        grad = tl.where(mask, grad * _gelu_grad(x), 0.0).to(grad_ptr.dtype.element_ty)
        tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_ptr + offset, grad, mask=mask)
        acc += grad.to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0) * columns + first + c, tl.sum(acc, 0), mask=in_hidden)
