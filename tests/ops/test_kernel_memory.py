"""Memory that the kernels read and write: views of any kind against the reference, and all kernels under
AddressSanitizer and UndefinedBehaviorSanitizer.

As a script this file is the process that the sanitizers watch.
"""

import ast
import copy
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from convnext_dense.models.convnext import ConvNeXt, ConvNeXtBlock, Downsample, OutputNorm, PatchEmbed, Stem
from convnext_dense.ops import avx512, dispatch, onednn
from helpers.paths import ROOT

pytestmark = pytest.mark.skipif(torch.float32 not in onednn.dtypes(), reason='this machine has no fast backend')
needs_kernels = pytest.mark.skipif(not avx512.dtypes(), reason='the kernels are not for this machine, or not compiled')
# Widths that the AVX-512 kernels support, and widths that only oneDNN supports.
WIDTHS = [pytest.param((32, 64), marks=needs_kernels), (16, 40)]


def strided(t):
    padded = t.new_full([2 * n for n in t.shape], float('nan'))
    return padded[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)


def sliced(dim):
    def view(t):
        d = min(dim, t.ndim - 1)
        return torch.cat([t, t + 1], d).narrow(d, 0, t.shape[d])

    return view


def expanded(dim):
    return lambda t: t.narrow(min(dim, t.ndim - 1), 0, 1).clone().expand_as(t)


def reversed_dimensions(t):
    order = [*reversed(range(t.ndim))]
    return t.permute(order).contiguous().permute(order)


# Views with a tensor's shape and, except for the expanded ones, its values.
VIEWS = {
    'strided': strided,
    'slice of channels': sliced(1),
    'slice of columns': sliced(3),
    'every second row': lambda t: torch.stack([t, t + 1], 1).flatten(0, 1)[::2],
    'transposed': lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    'reversed dimensions': reversed_dimensions,
    'expanded rows': expanded(0),
    'expanded channels': expanded(1),
    'expanded columns': expanded(3),
    'one value': lambda t: t.flatten()[:1].clone().view([1] * t.ndim).expand_as(t),
    'offset': lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
    'negated': lambda t: torch._neg_view(-t),
}


def build_model(widths, in_channels=4, **settings) -> ConvNeXt:
    """A small model. With 4 input channels the kernels can read the stem's weights without a copy."""
    torch.manual_seed(0)
    model = ConvNeXt(dict(depths=(1, 1), channels=widths), in_channels, out_indices=(0, 1), **settings)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def with_param_view(model, name, view):
    """A copy of the model in which one parameter is a view."""
    model = copy.deepcopy(model)
    set_param_view(model, name, view)
    return model


def set_param_view(model, name, view) -> None:
    module_name, _, param_name = name.rpartition('.')
    value = VIEWS[view](model.get_parameter(name).detach())
    model.get_submodule(module_name)._parameters[param_name] = nn.Parameter(value)


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


def build_with_sanitizers(folder: Path) -> None:
    """Compile the kernels into a folder, with setup.py's flags and those of the sanitizers; on x86-64 only."""
    statements = ast.parse(ROOT.joinpath('setup.py').read_text()).body
    flags = next(s.value for s in statements if isinstance(s, ast.Assign) and s.targets[0].id == 'KERNEL_FLAGS')
    flags = eval(compile(ast.Expression(flags), 'setup.py', 'eval'))
    sanitizers = ['-fsanitize=address,undefined', '-fno-omit-frame-pointer']
    source = shutil.copy(avx512.SOURCE, folder)
    define_kept_bytes = '-DKEPT_BYTES=200000'  # GRN recomputes a part of the hidden layer of small features, too
    define = f'-DSOURCE="{hashlib.sha256(avx512.SOURCE.read_bytes()).hexdigest()[:16]}"'
    compiled = folder / 'kernels.o'
    for command in (
        [*flags, *sanitizers, '-Werror=vla', '-g1', '-fPIC', define, define_kept_bytes, '-c', source, '-o', compiled],
        [*sanitizers, '-shared', compiled, '-o', folder / f'avx512_kernels{avx512.EXTENSION_SUFFIXES[0]}', '-lm'],
    ):
        subprocess.run(['gcc', *command], check=True, capture_output=True, text=True)


@needs_kernels
@pytest.mark.slow
def test_no_sanitizer_errors(tmp_path):
    """Takes some minutes; compiling takes two."""
    if not shutil.which('gcc'):
        pytest.skip('gcc is not installed')
    libasan = subprocess.run(['gcc', '-print-file-name=libasan.so'], capture_output=True, text=True).stdout.strip()
    if not Path(libasan).is_absolute():
        pytest.skip("gcc's libasan is not installed")
    build_with_sanitizers(tmp_path)
    # Preload libstdc++ before torch: the sanitizer intercepts its exceptions.
    libraries = f'{libasan} libstdc++.so.6'
    settings = dict(
        LD_PRELOAD=libraries,
        PYTHONPATH=str(ROOT / 'tests'),
        ASAN_OPTIONS='detect_leaks=0',
        UBSAN_OPTIONS='print_stacktrace=1',
    )

    def run_script(*args):
        command = [sys.executable, __file__, str(tmp_path), *args]
        return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)

    assert 'AddressSanitizer: heap-' in run_script('overrun').stderr  # the sanitizer is active
    result = run_script('cases', '1500')
    assert result.returncode == 0 and 'runtime error' not in result.stderr, result.stderr[-5000:]
    calls = ast.literal_eval(result.stdout)
    assert min(calls[name] for name in avx512.KERNELS) > 100


def under_sanitizers(folder: str, mode: str, n: str = '0') -> None:
    avx512._library.cache_clear()
    avx512.dtypes.cache_clear()
    avx512.SOURCE = Path(folder, 'avx512_kernels.c')
    assert avx512._library().path.parent == Path(folder)
    avx512._workspace_ptr = exact_workspace
    if mode == 'overrun':
        avx512._contiguous = lambda t: t
        with_param_view(build_model((32, 64)), 'downsample_layers.1.1.weight', 'expanded rows')(
            torch.ones(1, 4, 16, 16)
        )
    calls, run = Counter(), avx512.launch
    avx512.launch = lambda *kernel_calls: (calls.update(call.name for call in kernel_calls), run(*kernel_calls))[1]
    for seed in range(int(n)):
        run_case(random.Random(seed))
    print(dict(calls))


def exact_workspace(size: int) -> int:
    """A workspace of exactly the requested size, so that any overrun is detected."""
    avx512._tls.workspace = torch.empty(size, dtype=torch.uint8)
    return avx512._tls.workspace.data_ptr()


def run_case(r: random.Random) -> None:
    """Forward and backward of one kernel or a small model, at random sizes and on random views."""
    torch.manual_seed(r.random())
    torch.set_num_threads(r.randint(1, 5))
    c, other_c = (32 * r.randint(1, 12) for _ in range(2))
    in_channels = r.choice([*range(1, 14), 100, 257])
    min_side, module = r.choice(
        [
            (1, lambda: ConvNeXtBlock(c, 7, r.choice([0.0, 0.5]), r.choice([0.0, 1.0]), r.random() < 0.5)),
            (1, lambda: OutputNorm(c)),
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
    for name, _ in [*module.named_parameters()]:
        if r.random() < 0.3:
            set_param_view(module, name, r.choice([*VIEWS]))
        module.get_parameter(name).requires_grad_(r.random() < trained)
    # Not equal channels: a LayerNorm would magnify their rounding errors a thousandfold.
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


if __name__ == '__main__':
    under_sanitizers(*sys.argv[1:])
