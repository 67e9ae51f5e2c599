"""All kernels under AddressSanitizer and UndefinedBehaviorSanitizer: entry points at the edges and with arguments that
they refuse, and the package's operators at random sizes on random views.

As a script this file is the process that the sanitizers watch.
"""

import copy
import random
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from convnext_dense.models.convnext import ConvNeXtBlock, Downsample, OutputNorm, PatchEmbed, Stem
from convnext_dense.models.fused_conv2d import FusedConv2d
from convnext_dense.ops import avx512, box_ops, conv, dispatch, head_kernels
from convnext_dense.ops.upsampled_conv import tap_sum
from helpers import kernel_calls, sanitizers
from helpers.views import VIEWS, build_model, set_param_view

# Small features of GRN, too, have a part of the hidden layer that is recomputed.
FLAGS = {'avx512_kernels': ['-DKEPT_BYTES=200000']}


@pytest.mark.slow
@pytest.mark.parametrize('name', kernel_calls.MODULES)
def test_no_sanitizer_errors(name, tmp_path):
    """Takes some minutes; compiling the AVX-512 kernels takes two."""
    if not kernel_calls.is_available(name):
        pytest.skip(f'{name} is not for this machine')
    sanitizers.sanitizer_library()
    sanitizers.build(name, tmp_path, *FLAGS.get(name, []))
    run_script = partial(sanitizers.run_script, __file__, name, tmp_path)
    assert 'AddressSanitizer: heap-' in run_script('overrun').stderr  # the sanitizer is active
    result = run_script('cases', 1500)
    assert result.returncode == 0 and 'runtime error' not in result.stderr, result.stderr[-5000:]
    calls = Counter(result.stdout.split())
    assert calls and min(calls[entry] for entry in entries_of_kernels(name)) > 100, calls


def entries_of_kernels(name: str) -> set[str]:
    module = kernel_calls.MODULES[name]
    return {f'convnext_{kernel}' for kernel in module.KERNELS} | ({'convnext_nms'} if module is head_kernels else set())


def under_sanitizers(name: str, folder: str, mode: str, n: str = '0') -> None:
    use_library_in(Path(folder), name)
    conv.MIN_PIXELS = 1
    library = kernel_calls.load(name)
    if mode == 'overrun':
        overrun(library, name)
    run_entries(library, kernel_calls.MODULES[name])
    for seed in range(int(n)):
        r = random.Random(seed)
        torch.manual_seed(seed)
        torch.set_num_threads(r.randint(1, 5))
        run_random_call(library, kernel_calls.MODULES[name], r)
        if name == 'avx512_kernels':
            run_module(r)
        else:
            run_head_operators(r)


def use_library_in(folder: Path, name: str) -> None:
    """Let the package load a module from a folder, and print each kernel that it runs."""
    module = kernel_calls.MODULES[name]
    module.SOURCE = folder / module.SOURCE.name
    module._library.cache_clear()
    if module is head_kernels:
        head_kernels.VARIANTS = {name: head_kernels.VARIANTS[name]}
        launch, nms = head_kernels.launch, head_kernels.nms
        head_kernels.launch = lambda kernel, *args, **fields: (print_entry(kernel), launch(kernel, *args, **fields))[1]
        head_kernels.nms = lambda *args: (print_entry('nms'), nms(*args))[1]
        assert head_kernels.variant() == name and str(folder) in head_kernels._library()._name
    else:
        avx512.dtypes.cache_clear()
        avx512._workspace_ptr = exact_workspace
        launch = avx512.launch
        avx512.launch = lambda *calls: ([print_entry(call.name) for call in calls], launch(*calls))[1]
        assert avx512._library().path.parent == folder


def print_entry(kernel: str) -> None:
    print(f'convnext_{kernel}')


def overrun(library, name: str) -> None:
    """A call whose struct promises more memory than there is."""
    make = kernel_calls.norm_nchw if name == 'avx512_kernels' else kernel_calls.tap_sum
    call = make(library, images=1)
    call.args.images = 2
    kernel_calls.run(library, call)


def run_entries(library, module) -> None:
    for call in kernel_calls.edge_calls(library, module):
        assert kernel_calls.run(library, call) == 0
        for field, value, _ in kernel_calls.invalid_changes(call):
            valid = getattr(call.args, field)
            setattr(call.args, field, value)
            assert kernel_calls.run(library, call) != 0, (call.entry, field, value)
            setattr(call.args, field, valid)


def run_random_call(library, module, r: random.Random) -> None:
    """A call at random sizes, which half of the time one field makes invalid."""
    call = kernel_calls.random_call(library, module, r)
    if r.random() < 0.5:
        field, value, _ = r.choice([*kernel_calls.invalid_changes(call)])
        setattr(call.args, field, value)
        assert kernel_calls.run(library, call) != 0, (call.entry, field, value)
        return
    assert kernel_calls.run(library, call) == 0
    assert all(t.isfinite().all() for t in call.outputs), call


def exact_workspace(size: int) -> int:
    """A workspace of exactly the requested size, so that any overrun is detected."""
    avx512._tls.workspace = torch.empty(size, dtype=torch.uint8)
    return avx512._tls.workspace.data_ptr()


def run_module(r: random.Random) -> None:
    """Forward and backward of one kernel or a small model, at random sizes and on random views."""
    torch.set_num_threads(r.randint(1, 5))
    c, other_c = (32 * r.randint(1, 12) for _ in range(2))
    in_channels = r.choice([*range(1, 14), 100, 257])
    min_side, module = r.choice(
        [
            (1, lambda: ConvNeXtBlock(c, 7, r.choice([0.0, 0.5]), r.choice([0.0, 1.0]), r.random() < 0.5)),
            (1, lambda: OutputNorm(c)),
            (1, lambda: FusedConv2d(c, other_c, 3, padding=1)),
            (2, lambda: Downsample(c, other_c)),
            (4, lambda: Stem(in_channels, c)),
            (
                8,
                lambda: build_model(
                    (c, other_c), in_channels, drop_path_rate=r.choice([0.0, 0.5]), use_grn=r.random() < 0.5
                ),
            ),
        ]
    )
    module = module()
    if isinstance(module, PatchEmbed):
        module.before_layer_scale = True
    channels = in_channels if min_side >= 4 else c
    n, *sides = r.randint(1, 3), *(r.choice([r.randint(1, 9), r.randint(1, 70)]) for _ in range(2))
    sides = [max(min_side, side * (4 if min_side == 4 else 1)) for side in sides]
    if n * sides[0] * sides[1] * c * c > 3e8:  # seconds
        sides[1] = max(min_side, sides[1] // 10)
    for part in module.modules():
        if isinstance(part, ConvNeXtBlock):
            part.with_cp = r.choice([False, 'mlp', True])
    trained = r.choice([0.0, 0.5, 1.0])
    # No view makes all channels equal: a LayerNorm would magnify their rounding errors a thousandfold.
    for name, param in [*module.named_parameters()]:
        is_conv_weight = param.ndim == 4 and param.shape[1] > 1
        views = [view for view in VIEWS if not (is_conv_weight and view in ('expanded rows', 'one value'))]
        if r.random() < 0.3:
            set_param_view(module, name, r.choice(views))
        module.get_parameter(name).requires_grad_(r.random() < trained)
    view = r.choice([view for name, view in VIEWS.items() if name not in ('expanded channels', 'one value')])
    x = view(torch.randn(n, channels, *sides))
    if isinstance(module, (OutputNorm, Downsample)):  # as blocks return them
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_(min_side < 4 and r.random() < 0.5)
    seed, bfloat16 = r.randint(0, 1000), r.random() < 0.5

    def output(module=module, x=x):
        torch.manual_seed(seed)
        with torch.autocast('cpu', torch.bfloat16, enabled=bfloat16 and x.dtype == torch.float32):
            out = module(x)
        return [out] if isinstance(out, torch.Tensor) else [*out]

    with torch.no_grad():
        no_grad_outputs = output()
        with dispatch.disabled():
            expected, exact = output(), output(copy.deepcopy(module).double(), x.double())
    feats = output()
    for out in (no_grad_outputs, feats):
        for f, e, t in zip(out, expected, exact, strict=True):
            assert (f - t).norm() <= 10 * (e - t).norm() + 3e-3 * t.norm(), (module, x.shape)
    if feats[-1].requires_grad:
        view = r.choice([*VIEWS.values()])
        torch.autograd.backward(feats, [view(torch.randn_like(m)) for m in feats])


def run_head_operators(r: random.Random) -> None:
    """Forward and backward of RoIAlign and of sums of upsampled products, and NMS, at random sizes."""
    images, channels, n_rois = r.randint(1, 3), 16 * r.randint(1, 20), r.choice([0, 1, 5, 30])
    dtype = r.choice(box_ops.DTYPES)
    feats = [torch.randn(images, channels, r.randint(1, 20), r.randint(1, 20)).to(dtype).requires_grad_() for _ in 'ab']
    corners = torch.randn(n_rois, 2) * r.choice([10, 100, 1000])
    sizes = torch.rand(n_rois, 2).pow(2) * r.choice([0, 50, 3000])
    rois = torch.cat([torch.randint(images, (n_rois, 1)), corners, corners + sizes], 1).float()
    settings = ((r.randint(1, 9), r.randint(1, 9)), r.choice([0, 2]), r.random() < 0.5, r.random() < 0.5)
    out = box_ops.roi_align(feats, rois, torch.randint(2, (n_rois,)), [1 / 4, 1 / 8], *settings)
    out.sum().backward()
    box_ops.nms(rois[:, 1:], torch.rand(n_rois), 0.5, 0)
    sides = [r.randint(1, 20), r.randint(1, 20)]
    sizes = [(1, sides), *((9, [r.randint(1, side) for side in sides]) for _ in range(r.randint(1, 3)))]
    base, *products = (torch.randn(images, k * channels, *s).to(dtype).requires_grad_() for k, s in sizes)
    tap_sum(base, products, r.random() < 0.5, r.random() < 0.5).sum().backward()


if __name__ == '__main__':
    under_sanitizers(*sys.argv[1:])
