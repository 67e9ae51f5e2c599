"""The registered operators: schema, fake implementation, autograd (by `torch.library.opcheck`), dispatch modes and
profilers, and the arguments that they refuse."""

import ctypes

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from convnext_dense.models.convnext import ConvNeXt, ConvNeXtBlock, Downsample, OutputNorm, Stem
from convnext_dense.ops import avx512, dispatch, flop_formulas, onednn, operators
from convnext_dense.ops.block_params import SAVE_DWCONV, SAVE_HIDDEN, SAVE_INPUT

pytestmark = pytest.mark.skipif(torch.float32 not in onednn.dtypes(), reason='oneDNN is not available on this machine')
needs_kernels = pytest.mark.skipif(not avx512.dtypes(), reason='the kernels are not for this machine, or not compiled')
BACKENDS = [pytest.param('avx512', marks=needs_kernels), 'onednn']
LEVELS = [SAVE_INPUT, SAVE_DWCONV, SAVE_HIDDEN]
C = 32


# Layer scale, and whether there is GRN.
KINDS = [(1.0, False), (0.0, False), (0.0, True), (1.0, True)]


def block_params(requires_grad=False, layer_scale=1.0, use_grn=False):
    torch.manual_seed(0)
    block = ConvNeXtBlock(C, 7, 0.0, layer_scale, use_grn).requires_grad_(requires_grad)
    for p in block.parameters():
        nn.init.normal_(p, std=0.2)
    return dispatch._block_params(block)


def block_args(backend, level=SAVE_DWCONV, dtype=torch.float32):
    return backend, dtype, 1e-6, (3, 3), 1.25, level


def block_backward_args(backend, level, needs_x=True, needs_params=True, layer_scale=1.0, use_grn=False):
    x, args = torch.randn(2, 5, 7, C), block_args(backend, level)
    params = block_params(layer_scale=layer_scale, use_grn=use_grn)
    needs_grad = [needs_x, *(needs_params and p is not None for p in params)]
    with torch.inference_mode(False), torch._C._AutoDispatchBelowAutograd():
        _, saved = operators.block(x, None, *params, *args)
    return torch.randn(2, 5, 7, C), x, saved, *params, *args, True, needs_grad


def stem_params(module, requires_grad=False):
    conv, norm = sorted(module.requires_grad_(requires_grad), key=lambda part: isinstance(part, nn.LayerNorm))
    return conv.weight, conv.bias, norm.weight, norm.bias


@pytest.mark.parametrize('requires_grad', [False, True])
@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('backend', BACKENDS)
def test_opcheck_of_blocks(backend, level, requires_grad):
    for kind in KINDS:
        x = torch.randn(2, 5, 7, C, requires_grad=requires_grad)
        args = block_args(backend, level)
        opcheck(operators.block, (x, None, *block_params(requires_grad, *kind), *args))
    if backend == 'onednn' and torch.bfloat16 in onednn.dtypes():
        args = block_args(backend, level, torch.bfloat16)
        z = x.detach().bfloat16().requires_grad_(requires_grad)
        opcheck(operators.block, (x, z, *block_params(requires_grad), *args))


@pytest.mark.parametrize('needs_x, needs_params', [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('backend', BACKENDS)
def test_opcheck_of_gradients_of_blocks(backend, level, needs_x, needs_params):
    for kind in KINDS:
        opcheck(operators.block_backward, block_backward_args(backend, level, needs_x, needs_params, *kind))


@needs_kernels
@pytest.mark.parametrize('requires_grad', [False, True])
def test_opcheck_of_stem_downsampling_and_norm(requires_grad):
    image = torch.randn(2, 3, 13, 18)
    opcheck(operators.patch_embed, (image, *stem_params(Stem(3, C), requires_grad), 4, 1e-6, torch.float32))
    x = torch.randn(2, C, 5, 8).contiguous(memory_format=torch.channels_last).requires_grad_(requires_grad)
    opcheck(operators.patch_embed, (x, *stem_params(Downsample(C, 64), requires_grad), 2, 1e-6, torch.float32))
    norm, rows = OutputNorm(C).requires_grad_(requires_grad), torch.randn(2, 5, 7, C, requires_grad=requires_grad)
    opcheck(operators.output_norm, (rows, norm.weight, norm.bias, 1e-6))


@needs_kernels
def test_opcheck_of_gradients_of_stem_downsampling_and_norm():
    image, x = torch.randn(2, 3, 13, 18), torch.randn(2, C, 5, 8).contiguous(memory_format=torch.channels_last)
    settings = (1e-6, torch.float32)
    stem, downsample, norm = stem_params(Stem(3, C)), stem_params(Downsample(C, 64)), OutputNorm(C)
    opcheck(
        operators.patch_embed_backward,
        (torch.randn(2, 3, 4, C), image, *stem, 4, *settings, [False] + [True] * 4),
    )
    for needs_grad in ([True] * 5, [True] + [False] * 4, [False] + [True] * 4):
        grad = torch.randn(2, 2, 4, 64)
        opcheck(operators.patch_embed_backward, (grad, x, *downsample, 2, *settings, needs_grad))
    params = (norm.weight.detach(), norm.bias.detach())
    for needs_grad in ([True] * 3, [True, False, False]):
        args = (torch.randn(2, C, 5, 7), torch.randn(2, 5, 7, C), *params, 1e-6, needs_grad)
        opcheck(operators.output_norm_backward, args)


def stage_args(n_blocks=2, with_norm=True, kind=KINDS[0]):
    blocks = [t for _ in range(n_blocks) for t in block_params(False, *kind).present()]
    norm = [torch.ones(C), torch.zeros(C)] if with_norm else []
    eps = [1e-6] * (1 + n_blocks + with_norm)
    return torch.randn(2, 3, 13, 18), [*stem_params(Stem(3, C))], blocks, norm, 4, torch.float32, eps


@needs_kernels
@pytest.mark.parametrize('with_norm', [True, False])
def test_opcheck_of_stages(with_norm):
    for n_blocks, kind in zip((1, 2, 1, 2), KINDS):
        opcheck(operators.stage, stage_args(n_blocks, with_norm, kind))


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def small_model():
    torch.manual_seed(0)
    model = ConvNeXt(dict(depths=(1, 1), channels=(C, 64)), out_indices=(0, 1))
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


TRAINING_OPERATORS = {
    f'convnext_dense.{name}{suffix}.default'
    for name in ('block', 'patch_embed', 'output_norm')
    for suffix in ('', '_backward')
}


@needs_kernels
def test_dispatch_modes_and_profilers_see_the_operators():
    model, image = small_model(), torch.randn(1, 3, 32, 32)
    with Recorder() as recorder:
        sum(m.sum() for m in model(image)).backward()
    package_ops = {name for name in recorder.names if name.startswith('convnext_dense.')}
    assert package_ops == TRAINING_OPERATORS and 'aten.convolution.default' not in recorder.names
    with Recorder() as recorder, torch.no_grad():
        model(image)
    assert {name for name in recorder.names if name.startswith('convnext_dense.')} == {'convnext_dense.stage.default'}
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        sum(m.sum() for m in model(image)).backward()
    assert {f'{event.key.replace("::", ".")}.default' for event in prof.key_averages()} >= TRAINING_OPERATORS


@needs_kernels
def test_function_modes_see_the_operators():
    names = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    model, image = small_model(), torch.randn(1, 3, 32, 32)
    expected = model(image)
    with Mode():
        actual = model(image)
    with BaseTorchFunctionMode():
        base_mode_output = model(image)
    assert names.count('convnext_dense.block.default') == 2
    for f, a, e in zip(actual, base_mode_output, expected):
        assert torch.equal(f, e) and torch.equal(a, e)


def test_fake_tensors_tracing_and_export_use_the_reference_implementation():
    model, image = small_model(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(image)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = model(mode.from_tensor(image))
    assert [f.shape for f in fake] == [e.shape for e in expected]
    for strict in (False, True):
        program = torch.export.export(model, (image,), strict=strict)
        assert not any('convnext_dense' in str(node.target) for node in program.graph.nodes)
        for f, e in zip(program.module()(image), expected):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)
    for mode in ('fake', 'symbolic'):
        graph = make_fx(lambda x: model(x), tracing_mode=mode, _allow_non_fake_inputs=True)(image)
        for f, e in zip(graph(image), expected):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)


def test_function_transforms_equal_the_reference():
    model, images = small_model(), torch.randn(3, 1, 3, 32, 32)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, image):
        return torch.func.functional_call(model, params, image)[1].pow(2).mean()

    def transformed():
        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, images)
        _, tangent = torch.func.jvp(lambda x: loss(params, x), (images[0],), (torch.ones_like(images[0]),))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(images[0], torch.ones_like(images[0]))
            forward_ad = torch.autograd.forward_ad.unpack_dual(loss(params, dual)).tangent
        return [*per_sample.values(), tangent, forward_ad]

    actual = transformed()
    with dispatch.disabled():
        expected = transformed()
    for f, e in zip(actual, expected):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('backend', BACKENDS)
def test_flop_counts_of_operators_equal_those_of_the_reference(backend, monkeypatch):
    if backend == 'onednn':
        monkeypatch.setattr(avx512, 'dtypes', lambda: ())
    torch.manual_seed(0)
    flop_formulas.register()
    modules = [(ConvNeXtBlock(C, 7, 0.0, 1.0), torch.randn(2, C, 9, 8, requires_grad=True))]
    if backend == 'avx512':
        x = torch.randn(2, C, 9, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
        downsample = Downsample(C, 64)
        downsample.before_layer_scale = True
        modules += [(downsample, x), (Stem(3, C), torch.randn(2, 3, 17, 16)), (OutputNorm(C), x)]

    def count(module, x):
        """FLOPs of a forward and backward pass, without FlopCounterMode's module tracker, which registers hooks."""
        counter = FlopCounterMode(display=False)
        counter.mod_tracker.__class__ = _NoTracker
        with counter:
            module(x).sum().backward()
        return counter.get_total_flops()

    for module, x in modules:
        monkeypatch.setattr(dispatch, 'GLOBAL_HOOKS', [])
        with Recorder() as recorder:
            module(x).sum().backward()
        assert any(name.startswith('convnext_dense.') for name in recorder.names)
        flops = count(module, x)
        with dispatch.disabled():
            assert flops == count(module, x), type(module)


@needs_kernels
def test_flop_count_of_a_stage():
    flop_formulas.register()
    model, image = small_model(), torch.randn(2, 3, 33, 32)
    with torch.no_grad():
        args = dispatch._patch_embed_args(model.downsample_layers[0], image)
        params = dispatch._block_params(model.stages[0][0])
        call = (
            image,
            [*args[0]],
            params.present(),
            [model.norm0.weight, model.norm0.bias],
            4,
            torch.float32,
            [1e-6] * 3,
        )
        with FlopCounterMode(display=False) as counter:
            operators.stage(*call)
        with FlopCounterMode(display=False) as reference, dispatch.disabled():
            model.norm0(model.stages[0](model.downsample_layers[0](image)))
    assert counter.get_total_flops() == reference.get_total_flops() > 0


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(
    'change',
    [
        dict(x=torch.randn(2, 5, 7)),
        dict(x=torch.randn(2, C, 5, 7)),
        dict(x=torch.randn(2, C, 5, 7).permute(0, 2, 3, 1)),
        dict(x=torch.randn(2, 5, 7, C).double()),
        dict(x=torch.empty(2, 0, 7, C)),
        dict(level=7),
        dict(level=-1),
        dict(backend='other'),
        dict(dtype=torch.float64),
        dict(z=torch.randn(2, 5, 7, 2 * C)),
    ],
    ids=lambda change: ' '.join(change),
)
def test_blocks_refuse_invalid_arguments(change, backend):
    call = dict(x=torch.randn(2, 5, 7, C), z=None, backend=backend, level=SAVE_DWCONV, dtype=torch.float32) | change
    args = block_args(call['backend'], call['level'], call['dtype'])
    with pytest.raises(RuntimeError):
        operators.block(call['x'], call['z'], *block_params(), *args)


@pytest.mark.parametrize('backend', BACKENDS)
def test_gradients_of_blocks_refuse_invalid_arguments(backend):
    grad, x, saved, *rest = block_backward_args(backend, SAVE_DWCONV, use_grn=True)
    for invalid_args in (
        (grad[:1], x, saved, *rest),
        (grad.permute(0, 2, 1, 3), x, saved, *rest),
        (grad, x, [], *rest),
        (grad, x, [saved[0].double()], *rest),
        (grad, x, saved, *rest[:-1], [True]),
        (grad.bfloat16(), x, saved, *rest),
        (grad.double(), x, saved, *rest),
        (grad, x, saved, *rest[:10], None, *rest[11:]),
        (grad, x, saved, *rest[:6], None, None, *rest[8:]),
        (grad.to('meta'), x, saved, *rest),
    ):
        with pytest.raises(RuntimeError):
            operators.block_backward(*invalid_args)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('i', range(11))
def test_blocks_refuse_parameters_of_wrong_shapes_and_devices(i, backend):
    x, params, args = torch.randn(2, 5, 7, C), block_params(use_grn=True), block_args(backend)
    for invalid_param in (torch.tensor(1.5), params[i][:-1], params[i].to('meta')):
        with pytest.raises(RuntimeError):
            operators.block(x, None, *[*params[:i], invalid_param, *params[i + 1 :]], *args)


def test_forward_mode_ad_is_refused():
    x, params, args = torch.randn(2, 5, 7, C), block_params(), block_args('onednn')
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match='forward-mode AD'):
        operators.block(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), None, *params, *args)


@needs_kernels
def test_other_operators_refuse_invalid_arguments():
    params, norm = block_params()._replace(pwconv1_weight=torch.randn(4 * C, C + 1)), (torch.ones(C), torch.ones(C))
    image, stem, downsample = torch.randn(2, 3, 16, 16), stem_params(Stem(3, C)), stem_params(Downsample(C, 64))
    rows = torch.randn(2, 4, 4, C)
    settings = (1e-6, torch.float32)
    x, patch_params, blocks, norm_params, *rest = stage_args()
    for operator, args in (
        (operators.block, (rows, None, *params, *block_args('avx512'))),
        (operators.patch_embed, (image, *stem, 3, *settings)),
        (operators.patch_embed, (image[:, :2], *stem, 4, *settings)),
        (operators.patch_embed, (image[:, :, :3], *stem, 4, *settings)),
        (operators.patch_embed, (torch.randn(2, C, 4, 4), *downsample, 2, *settings)),
        (operators.output_norm, (rows.permute(0, 2, 1, 3), *norm, 1e-6)),
        (operators.output_norm, (torch.randn(2, 4, 4, C + 1), *norm, 1e-6)),
        (operators.output_norm_backward, (torch.randn(2, 4, 4, C), rows, *norm, 1e-6, [True] * 3)),
        (operators.output_norm_backward, (torch.randn(2, C, 4, 4).bfloat16(), rows, *norm, 1e-6, [True] * 3)),
        (
            operators.patch_embed_backward,
            (torch.randn(2, 4, 4, C).half(), image, *stem, 4, *settings, [False] + [True] * 4),
        ),
        (operators.stage, (x, patch_params, blocks[:-1], norm_params, *rest)),
        (operators.stage, (x, patch_params, blocks, norm_params, *rest[:-1], [1e-6])),
    ):
        with pytest.raises(RuntimeError):
            operator(*args)
    with pytest.raises(RuntimeError, match='no gradients'):
        operators.stage(x, [p.requires_grad_() for p in patch_params], blocks, norm_params, *rest)


def kernel_args(kernel):
    """A call that a kernel accepts; it keeps its tensors alive."""
    rows = torch.randn(1, 4, 4, C)
    if kernel == 'block':
        args = dispatch.BlockArgs(*block_args('avx512', SAVE_INPUT))
        return avx512._block_call('block', args, rows, block_params(), out=torch.empty_like(rows))
    if kernel == 'block_backward':
        args = dispatch.BlockArgs(*block_args('avx512', SAVE_INPUT))
        grads = dict(grad=rows, grad_y=torch.empty_like(rows), grad_x=torch.empty_like(rows))
        return avx512._block_call('block_backward', args, rows, block_params(), **grads)
    if kernel.startswith('patch_embed'):
        x = torch.randn(1, C, 4, 4).contiguous(memory_format=torch.channels_last)
        args, params = avx512.PatchEmbedArgs(2, 1e-6, torch.float32), stem_params(Downsample(C, 64))
        out = dict(grad=torch.randn(1, 2, 2, 64), grad_x=torch.empty_like(x))
        out = out if kernel.endswith('backward') else dict(out=torch.empty(1, 2, 2, 64))
        return avx512._patch_embed_call(kernel, args, x, avx512.PatchEmbedParams(*params), **out)
    if kernel == 'conv3x3':
        settings = dict(images=1, height=4, width=4, channels=C, out_channels=C)
        return avx512._pack(kernel, x=rows, weight=torch.randn(C, 3, 3, C), out=torch.empty(1, C, 4, 4), **settings)
    out = dict(grad=torch.randn(1, C, 4, 4), grad_x=torch.empty_like(rows), sums=torch.empty(2 * C))
    out = out if kernel.endswith('backward') else dict(out=torch.empty(1, C, 4, 4))
    return avx512._norm_call(kernel, 1e-6, rows, torch.ones(C), torch.zeros(C), **out)


@needs_kernels
@pytest.mark.parametrize('kernel', avx512.KERNELS)
def test_kernels_return_an_error_for_invalid_arguments(kernel):
    avx512.launch(kernel_args(kernel))
    pointer = 'grad' if kernel.endswith('backward') else 'out'
    changes = dict(version=99, threads=0, images=0, channels=33, x=None) | {pointer: None}
    messages = dict(version='version', threads='threads', images='size', channels='channels')
    for field, value in changes.items():
        call = kernel_args(kernel)
        setattr(call.args, field, value)
        with pytest.raises(RuntimeError, match=f'convnext_{kernel}: .*{messages.get(field, "null")}'):
            avx512.launch(call)
    for field in ('images', 'threads', 'channels'):
        call = kernel_args(kernel)
        setattr(call.args, field, -1)
        with pytest.raises(RuntimeError):
            avx512.launch(call)
    call = kernel_args(kernel)
    call.args.x += 2
    with pytest.raises(RuntimeError, match='misaligned'):
        avx512.launch(call)
    if kernel in avx512.NEEDS_WORKSPACE:
        library, call = avx512._library(), kernel_args(kernel)
        run = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(library.addresses[kernel])
        assert b'null' in library.error_message(run(ctypes.addressof(call.args)))  # no workspace
        workspace = torch.empty(128, dtype=torch.uint8)
        call.args.workspace, call.args.workspace_bytes = workspace.data_ptr(), 64
        assert b'too small' in library.error_message(run(ctypes.addressof(call.args)))
        assert b'null' in library.error_message(run(None))


@needs_kernels
def test_kernels_with_another_struct_layout_are_not_used(monkeypatch):
    monkeypatch.setattr(avx512, 'STRUCTS', ('NormArgs', 'PatchEmbedArgs', 'BlockArgs', 'KernelCall'))
    with pytest.warns(UserWarning, match='not laid out as Python expects; .* slower'):
        assert avx512._library.__wrapped__() is None
    with pytest.raises(RuntimeError, match='has no field other'):
        avx512._pack('norm_nchw', other=1)


class _NoTracker:
    """Replaces FlopCounterMode's module tracker."""

    parents = frozenset({'Global'})

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass
