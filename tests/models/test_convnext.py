import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, Registry

from convnext_dense.errors import UsageError
from convnext_dense.models.convnext import ARCHS, ConvNeXt, ConvNeXtBlock
from helpers.paths import ROOT
from helpers.weights import random_weights

SMALL = dict(depths=(1, 1, 2, 1), channels=(8, 16, 32, 64))


def build_small(**settings) -> ConvNeXt:
    torch.manual_seed(0)
    return ConvNeXt(arch=SMALL, **settings)


def with_random_weights(model: ConvNeXt) -> ConvNeXt:
    model.load_state_dict(random_weights({name: tuple(t.shape) for name, t in model.state_dict().items()}))
    return model


def test_features_equal_the_original_code():
    reference = np.load(ROOT / 'tests/data/features_small.npz')
    image = torch.from_numpy(np.random.RandomState(7).standard_normal((1, 3, 76, 52)).astype(np.float32))
    feats = with_random_weights(build_small()).eval()(image)
    assert len(feats) == 4
    for i, actual in enumerate(feats):
        np.testing.assert_allclose(actual.detach().numpy(), reference[f'stage{i}'], rtol=0, atol=1e-5)


def test_forward_equals_the_papers_equations():
    """Reference forward pass with other operations: einsum for the Linears, explicit means for the norms."""
    model = with_random_weights(build_small()).eval()
    p = dict(model.named_parameters())

    def norm(x, name):
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-6).sqrt() * p[f'{name}.weight'][:, None, None] + p[f'{name}.bias'][:, None, None]

    def linear(x, name):
        return torch.einsum('nchw,dc->ndhw', x, p[f'{name}.weight']) + p[f'{name}.bias'][:, None, None]

    x = image = torch.randn(2, 3, 45, 70)
    for i, depth in enumerate(SMALL['depths']):
        d = f'downsample_layers.{i}'
        x = (
            norm(torch.nn.functional.conv2d(x, p[f'{d}.0.weight'], p[f'{d}.0.bias'], stride=4), f'{d}.1')
            if i == 0
            else torch.nn.functional.conv2d(norm(x, f'{d}.0'), p[f'{d}.1.weight'], p[f'{d}.1.bias'], stride=2)
        )
        for b in range(depth):
            s = f'stages.{i}.{b}'
            y = torch.nn.functional.conv2d(
                x, p[f'{s}.dwconv.weight'], p[f'{s}.dwconv.bias'], padding=3, groups=x.shape[1]
            )
            y = linear(norm(y, f'{s}.norm'), f'{s}.pwconv1')
            y = linear(y * 0.5 * (1 + torch.erf(y / 2**0.5)), f'{s}.pwconv2')
            x = x + y * p[f'{s}.gamma'][:, None, None]
        torch.testing.assert_close(model(image)[i], norm(x, f'norm{i}'), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('height, width', [(32, 32), (33, 47), (63, 32), (95, 129)])
def test_output_sizes_are_rounded_down(height, width):
    for i, y in enumerate(build_small().eval()(torch.randn(1, 3, height, width))):
        assert y.shape == (1, SMALL['channels'][i], height // 4 // 2**i, width // 4 // 2**i)
        assert y.isfinite().all() and y.is_contiguous()


def test_known_archs():
    expected = {
        'atto': dict(depths=(2, 2, 6, 2), channels=(40, 80, 160, 320)),
        'femto': dict(depths=(2, 2, 6, 2), channels=(48, 96, 192, 384)),
        'pico': dict(depths=(2, 2, 6, 2), channels=(64, 128, 256, 512)),
        'nano': dict(depths=(2, 2, 8, 2), channels=(80, 160, 320, 640)),
        'tiny': dict(depths=(3, 3, 9, 3), channels=(96, 192, 384, 768)),
        'small': dict(depths=(3, 3, 27, 3), channels=(96, 192, 384, 768)),
        'base': dict(depths=(3, 3, 27, 3), channels=(128, 256, 512, 1024)),
        'large': dict(depths=(3, 3, 27, 3), channels=(192, 384, 768, 1536)),
        'xlarge': dict(depths=(3, 3, 27, 3), channels=(256, 512, 1024, 2048)),
        'huge': dict(depths=(3, 3, 27, 3), channels=(352, 704, 1408, 2816)),
    }
    assert expected == ARCHS


SIZES = dict(atto=3.7, femto=5.2, pico=9.1, nano=15.6, tiny=28.6, small=50.2, base=88.6, large=197.8, xlarge=350.2)
V2_SIZES = dict(atto=3.7, femto=5.2, pico=9.1, nano=15.6, tiny=28.6, base=89, large=198, huge=660)


@pytest.mark.parametrize(
    'arch, published, grn', [(*item, False) for item in SIZES.items()] + [(*item, True) for item in V2_SIZES.items()]
)
def test_known_archs_have_the_papers_sizes(arch, published, grn):
    """Millions of parameters of the ImageNet models, as published."""
    with torch.device('meta'):
        model = ConvNeXt(arch, use_grn=grn)
    count = sum(p.numel() for p in model.parameters())
    channels = model.channels[-1]
    head_and_norm = channels * 1000 + 1000 + 2 * channels - 2 * sum(model.channels)  # one norm instead of four
    margin = 0.06 if isinstance(published, float) else 0.5
    assert (count + head_and_norm) / 1e6 == pytest.approx(published, abs=margin)


def reference_v2(weights, image):
    """ConvNeXt V2 by the equations of its paper (section 3.2, algorithm 1), with output norms."""

    def norm(x, name):  # over the channels of N x H x W x C
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-6).sqrt() * weights[f'{name}.weight'] + weights[f'{name}.bias']

    def conv(x, name, **settings):
        x = F.conv2d(x.permute(0, 3, 1, 2), weights[f'{name}.weight'], weights[f'{name}.bias'], **settings)
        return x.permute(0, 2, 3, 1)

    def linear(x, name):
        return x @ weights[f'{name}.weight'].T + weights[f'{name}.bias']

    def grn(x, name):
        size = (x**2).sum((1, 2), keepdim=True).sqrt()
        return (
            weights[f'{name}.gamma'] * (x * size / (size.mean(-1, keepdim=True) + 1e-6)) + weights[f'{name}.beta'] + x
        )

    x, feats = image.permute(0, 2, 3, 1), []
    for i, depth in enumerate((1, 1, 2, 1)):
        layer = f'downsample_layers.{i}'
        x = (
            norm(conv(x, f'{layer}.0', stride=4), f'{layer}.1')
            if i == 0
            else conv(norm(x, f'{layer}.0'), f'{layer}.1', stride=2)
        )
        for b in range(depth):
            block = f'stages.{i}.{b}'
            y = conv(x, f'{block}.dwconv', padding=3, groups=x.shape[-1])
            y = F.gelu(linear(norm(y, f'{block}.norm'), f'{block}.pwconv1'))
            x = x + linear(grn(y, f'{block}.grn'), f'{block}.pwconv2')
        feats.append(norm(x, f'norm{i}').permute(0, 3, 1, 2))
    return feats


def test_v2_equals_its_papers_equations():
    model = build_small(use_grn=True).double().eval()
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    assert not any('layer_scale' in n or n.split('.')[-2:] == ['0', 'gamma'] for n in model.state_dict())
    image = torch.randn(2, 3, 70, 52, dtype=torch.float64)
    for actual, expected in zip(model(image), reference_v2(model.state_dict(), image)):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_grn_starts_as_the_identity_and_is_finite_in_half_precision():
    block = ConvNeXtBlock(8, 3, 0.0, 0, use_grn=True)
    assert not block.grn.gamma.any() and not block.grn.beta.any()
    x = torch.full((1, 40, 40, 32), 100.0, dtype=torch.float16)  # the sum of squares overflows fp16
    with torch.no_grad():
        block.grn.gamma.fill_(1)
        assert block.grn.half()(x).isfinite().all()


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (0,), (3,), [2], (1, 3), 2, -1, (-4, -1), (3, 0), [0, 1]])
@pytest.mark.parametrize('settings', [{}, dict(with_cp=True), dict(with_cp=True, cp_scope='mlp')], ids=str)
def test_out_indices_and_gradients_of_every_parameter(out_indices, settings):
    original = copy.deepcopy(out_indices)
    model = build_small(out_indices=out_indices, drop_path_rate=0.0, **settings)
    assert out_indices == original and type(out_indices) is type(original)
    image = torch.randn(2, 3, 64, 48)
    expected = [i % 4 for i in ([out_indices] if isinstance(out_indices, int) else out_indices)]
    feats = model(image)
    assert [m.shape[1] for m in feats] == [SMALL['channels'][i] for i in expected]
    sum((m * torch.randn_like(m)).sum() for m in feats).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    full_model = build_small()
    full_model.load_state_dict(model.state_dict(), strict=False)
    for m, i in zip(feats, expected):
        torch.testing.assert_close(m, full_model(image)[i])


def test_out_indices_list_is_not_modified():
    out_indices = [-1, -3]
    model = build_small(out_indices=out_indices)
    assert out_indices == [-1, -3] and [m.shape[1] for m in model(torch.randn(1, 3, 32, 32))] == [64, 16]


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for with_cp in (False, True):
        model = build_small(with_cp=with_cp, drop_path_rate=0.5).train()
        torch.manual_seed(1)
        sum(m.square().mean() for m in model(torch.randn(4, 3, 64, 64))).backward()
        gradients.append([p.grad for p in model.parameters()])
    for reference, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, reference)


def test_checkpointing_recomputes():
    model, calls = build_small(with_cp=True), []
    model.stages[0][0].dwconv.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(1, 3, 32, 32))[3].sum().backward()
    assert len(calls) == 2


def test_export_with_dynamic_size():
    model = with_random_weights(build_small()).eval()
    # From 64: torch's own Conv2d exports for more than one pixel in its output only.
    height, width = (torch.export.Dim(name, min=64, max=4096) for name in ('height', 'width'))
    program = torch.export.export(model, (torch.randn(1, 3, 64, 96),), dynamic_shapes=[{2: height, 3: width}]).module()
    for size in ((64, 96), (67, 97), (150, 201)):
        image = torch.randn(1, 3, *size)
        for exported, eager in zip(program(image), model(image)):
            torch.testing.assert_close(exported, eager, rtol=1e-5, atol=1e-5)


def test_drop_path_per_sample_and_linear_in_depth():
    model = build_small(drop_path_rate=0.4)
    blocks = [block for stage in model.stages for block in stage]
    np.testing.assert_allclose([b.drop_path.drop_prob for b in blocks], np.linspace(0, 0.4, 5))
    drop_path = blocks[-1].drop_path.train()
    x = torch.ones(20000, 3, 1, 1)
    y = drop_path(x)
    remaining = y[:, 0, 0, 0] > 0
    assert (y == y[:, :1]).all() and torch.allclose(y[remaining], x[remaining] / 0.6)
    assert remaining.float().mean().item() == pytest.approx(0.6, abs=0.02)
    assert drop_path.eval()(x) is x


def test_drop_path_drops_the_branch_and_keeps_the_shortcut():
    torch.manual_seed(0)
    block, x = with_random_weights(ConvNeXtBlock(8, 3, 0.6, 1.0)), torch.randn(64, 8, 6, 6)
    branch = block.eval()(x) - x
    y = block.train()(x)
    dropped = torch.tensor([torch.equal(*feats) for feats in zip(y, x)])
    assert 20 < dropped.sum() < 60
    torch.testing.assert_close(y[~dropped], (x + branch / 0.4)[~dropped], rtol=1e-4, atol=1e-4)


def test_drop_rates_of_blocks_in_training():
    model, dropped, n = with_random_weights(build_small(drop_path_rate=0.4)).train(), [], 2000
    for stage in model.stages:
        for block in stage:
            block.register_forward_hook(lambda _, x, y: dropped.append((y == x[0]).flatten(1).all(1).sum() / n))
    with torch.no_grad():
        model(torch.randn(n, 3, 32, 32))
    np.testing.assert_allclose(dropped, [0, 0.1, 0.2, 0.3, 0.4], rtol=0, atol=0.04)
    dropped.clear()
    model.eval()(torch.randn(n, 3, 32, 32))
    assert dropped == [0] * 5


def test_unbuilt_stages_do_not_change_the_drop_rates():
    for out_indices, expected in [((0, 1), [0, 0.1]), ((2,), [0, 0.1, 0.2, 0.3]), ((3,), [0, 0.1, 0.2, 0.3, 0.4])]:
        model = build_small(drop_path_rate=0.4, out_indices=out_indices)
        np.testing.assert_allclose([block.drop_path.drop_prob for stage in model.stages for block in stage], expected)


def test_any_number_of_stages_input_channels_and_kernel_size():
    for n in (1, 2, 3, 5):
        model = ConvNeXt(
            dict(depths=(1,) * n, channels=tuple(8 * (i + 1) for i in range(n))),
            in_channels=4,
            kernel_size=5,
            out_indices=(-1,),
        )
        assert model(torch.randn(1, 4, 128, 128))[0].shape == (1, 8 * n, 32 >> (n - 1), 32 >> (n - 1))


def test_initial_values():
    model = ConvNeXt('atto', layer_scale_init_value=0.25)
    for name, p in model.named_parameters():
        if name.endswith('gamma'):
            assert (p == 0.25).all()
        elif p.ndim > 1:
            assert p.std().item() == pytest.approx(0.02, rel=0.25) and abs(p.mean()) < 0.005
        else:
            assert (p == (1 if name.endswith('weight') else 0)).all(), name  # a norm's, or a bias
    assert not any('gamma' in name for name in ConvNeXt('atto', layer_scale_init_value=0).state_dict())
    assert all((p == 1).all() for name, p in ConvNeXt('atto').named_parameters() if name.endswith('gamma'))


@pytest.mark.parametrize('frozen, n_downsample, n_stages', [(-1, 0, 0), (0, 1, 0), (1, 1, 1), (3, 3, 3), (4, 4, 4)])
def test_frozen_stages(frozen, n_downsample, n_stages):
    model = build_small(frozen_stages=frozen, drop_path_rate=0.5)
    assert model.train() is model
    for name, p in model.named_parameters():
        kind, index = name.split('.')[:2]
        limit = dict(downsample_layers=n_downsample, stages=n_stages).get(kind, 0)
        assert p.requires_grad == (kind.startswith('norm') or int(index) >= limit), name
    for i, stage in enumerate(model.stages):
        assert stage.training == (i >= n_stages)


@pytest.mark.parametrize('frozen', [-1, 0, 2, 4])
def test_eval_and_train_switch_every_module_that_is_not_frozen(frozen):
    model = build_small(frozen_stages=frozen, drop_path_rate=0.5)
    for set_eval in (model.eval, lambda: model.train(False)):
        assert model.train().training and model.norm3.training and model.stages[3].training == (frozen < 4)
        assert set_eval() is model and not any(module.training for module in model.modules())
    image = torch.randn(2, 3, 32, 32)
    for out1, out2 in zip(model(image), model(image)):
        assert torch.equal(out1, out2)


@pytest.mark.parametrize(
    'settings, word',
    [
        (dict(arch='tinny'), 'tinny'),
        (dict(arch=dict(depths=(1, 1), channels=(8,))), 'channels'),
        (dict(arch=dict(depths=(1,))), 'channels'),
        (dict(arch=dict(depths=(1, 1, 1, 1), channels=(8, 8, 8, 8), width=2)), 'width'),
        (dict(arch=dict(depths=(), channels=())), 'depths'),
        (dict(out_indices=(0, 4)), 'out_indices'),
        (dict(out_indices=(-5,)), 'out_indices'),
        (dict(out_indices=(1, -3)), 'twice'),
        (dict(out_indices=()), 'out_indices'),
        (dict(out_indices=(True,)), 'out_indices'),
        (dict(out_indices=('0',)), 'out_indices'),
        (dict(kernel_size=6), 'kernel_size'),
        (dict(drop_path_rate=1.0), 'drop_path_rate'),
        (dict(drop_path_rate='a'), 'drop_path_rate'),
        (dict(drop_path_rate=-0.1), 'drop_path_rate'),
        (dict(frozen_stages=5), 'frozen_stages'),
        (dict(frozen_stages=2, out_indices=(0,)), 'frozen_stages'),
        (dict(in_channels=0), 'in_channels'),
        (dict(out_indices=None), 'out_indices'),
        (dict(with_cp='all'), 'with_cp'),
        (dict(with_cp=True, cp_scope='all'), 'cp_scope'),
        (dict(use_grn='yes'), 'use_grn'),
        (dict(use_grn=True, grn=False), 'contradict'),
        (dict(use_grn=False, grn=True), 'contradict'),
        (dict(arch=dict(depths=3, channels=(8, 16))), 'depths'),
        (dict(layer_scale_init_value='abc'), 'layer_scale_init_value'),
        (dict(layer_scale_init_value=float('nan')), 'layer_scale_init_value'),
        (dict(init_cfg='some.pth'), 'checkpoint='),
    ],
)
def test_invalid_arguments_raise_a_one_line_error(settings, word):
    with pytest.raises(UsageError, match=word) as error:
        ConvNeXt(**settings)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'deprecated, settings',
    [
        (dict(grn=True), dict(use_grn=True)),
        (dict(grn=False), dict(use_grn=False)),
        (dict(grn=True, use_grn=True), dict(use_grn=True)),
        (dict(with_cp='mlp'), dict(with_cp=True, cp_scope='mlp')),
    ],
)
def test_deprecated_arguments_work_with_a_one_line_warning(deprecated, settings, caplog):
    MMLogger.get_instance('deprecated').addHandler(caplog.handler)
    model, expected = ConvNeXt('atto', **deprecated), ConvNeXt('atto', **settings)
    (record,) = caplog.records
    assert record.levelname == 'WARNING' and 'deprecated' in record.getMessage() and '\n' not in record.getMessage()
    assert list(model.state_dict()) == list(expected.state_dict())
    assert [(m.use_grn, m.with_cp, m.cp_scope) for m in (model, expected)] == [
        (settings.get('use_grn', False), settings.get('with_cp', False), settings.get('cp_scope', 'block'))
    ] * 2
    assert [b.with_cp for b in model._blocks()] == [b.with_cp for b in expected._blocks()]


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (3, 0), -1, [1]])
def test_out_channels_and_strides_equal_the_outputs(out_indices):
    model = build_small(out_indices=out_indices)
    feats = model(torch.randn(1, 3, 96, 64))
    assert model.out_channels == tuple(m.shape[1] for m in feats)
    assert [(96 // stride, 64 // stride) for stride in model.out_strides] == [tuple(m.shape[2:]) for m in feats]


def test_registered_in_other_scopes_and_next_to_another_convnext():
    """Found without a prefix from a library's registry, and with one where the library has a ConvNeXt of its own."""
    library = Registry('model', parent=MODELS, scope='some_library')
    assert library.get('ConvNeXt') is ConvNeXt

    @library.register_module(name='ConvNeXt')
    class Namesake:
        pass

    assert library.get('ConvNeXt') is Namesake and MODELS.get('ConvNeXt') is ConvNeXt
    assert library.get('convnext_dense.ConvNeXt') is ConvNeXt
    with MODELS.switch_scope_and_registry('some_library') as registry:
        assert registry.build(dict(type='convnext_dense.ConvNeXt', arch='atto')).depths == (2, 2, 6, 2)
        assert MODELS.build(dict(type='ConvNeXt', _scope_='convnext_dense', arch='atto')).depths == (2, 2, 6, 2)
