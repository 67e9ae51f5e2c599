"""Swin weights of the original code load completely into mmdet's and mmseg's SwinTransformer, or are refused."""

import pytest
import torch
from mmdet.models.backbones import SwinTransformer
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from convnext_dense.checkpoints import hub
from convnext_dense.checkpoints.pretrained import check_state_dict_matches, load_model_weights
from convnext_dense.checkpoints.swin_naming import rename_swin
from convnext_dense.config.preflight import check_pretrained
from convnext_dense.errors import UsageError
from convnext_dense.models import swin_detection, swin_segmentation
from convnext_dense.optim.layer_decay import layer_ids
from helpers.recipes import load
from helpers.weights import random_weights

DEPTHS, DIMS, HEADS, WINDOW = (1, 2, 2, 1), 8, (1, 2, 2, 4), 7
SETTINGS = dict(embed_dims=DIMS, depths=DEPTHS, num_heads=HEADS, window_size=WINDOW)
STRICT = [swin_detection.StrictSwinTransformer, swin_segmentation.StrictSwinTransformer]


def original_shapes(depths=DEPTHS, dims=DIMS, heads=HEADS, window=WINDOW) -> dict[str, tuple[int, ...]]:
    """Names and shapes of microsoft/Swin-Transformer's models/swin_transformer.py."""
    shapes = {'patch_embed.proj.weight': (dims, 3, 4, 4), 'patch_embed.proj.bias': (dims,)}
    shapes |= {f'patch_embed.norm.{leaf}': (dims,) for leaf in ('weight', 'bias')}
    for i, depth in enumerate(depths):
        c = dims * 2**i
        for b in range(depth):
            block = f'layers.{i}.blocks.{b}'
            layers = {'attn.qkv': (3 * c, c), 'attn.proj': (c, c), 'mlp.fc1': (4 * c, c), 'mlp.fc2': (c, 4 * c)}
            for name, shape in layers.items():
                shapes |= {f'{block}.{name}.weight': shape, f'{block}.{name}.bias': shape[:1]}
            shapes |= {f'{block}.norm{n}.{leaf}': (c,) for n in (1, 2) for leaf in ('weight', 'bias')}
            shapes[f'{block}.attn.relative_position_bias_table'] = ((2 * window - 1) ** 2, heads[i])
        if i + 1 < len(depths):
            shapes[f'layers.{i}.downsample.reduction.weight'] = (2 * c, 4 * c)
            shapes |= {f'layers.{i}.downsample.norm.{leaf}': (4 * c,) for leaf in ('weight', 'bias')}
    out_channels = dims * 2 ** (len(depths) - 1)
    return shapes | {
        'norm.weight': (out_channels,),
        'norm.bias': (out_channels,),
        'head.weight': (10, out_channels),
        'head.bias': (10,),
    }


def original_weights(**settings) -> dict[str, torch.Tensor]:
    weights = random_weights(original_shapes(**settings))
    window = settings.get('window', WINDOW)
    rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing='ij')
    rows, columns = rows.flatten(), columns.flatten()
    index = (rows[:, None] - rows + window - 1) * (2 * window - 1) + columns[:, None] - columns + window - 1
    for name in list(weights):
        if name.endswith('relative_position_bias_table'):
            weights[name.replace('bias_table', 'index')] = index
            weights[name.replace('attn.relative_position_bias_table', 'attn_mask')] = torch.zeros(4, 49, 49)
    return weights


def save(path, content):
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize('cls', STRICT, ids=['mmdet', 'mmseg'])
def test_loaded_weights_equal_mmdets_conversion(cls, tmp_path):
    file = save(tmp_path / 'w.pth', {'model': original_weights()})
    init_cfg = ConfigDict(type='Pretrained', checkpoint=file)
    stock = SwinTransformer(**SETTINGS, convert_weights=True, init_cfg=init_cfg)
    stock.init_weights()
    backbone = cls(**SETTINGS, init_cfg=init_cfg)
    backbone.init_weights()
    expected, actual = stock.state_dict(), backbone.state_dict()
    assert expected.keys() == actual.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name
    assert not any(torch.equal(p, torch.zeros_like(p)) for n, p in backbone.named_parameters() if 'table' in n)


def test_downsampling_equals_the_original(tmp_path):
    """The original concatenates x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2] and x[1::2, 1::2]."""
    weights = original_weights()
    backbone = STRICT[0](**SETTINGS, init_cfg=dict(checkpoint=save(tmp_path / 'w.pth', weights)))
    backbone.init_weights()
    x = torch.randn(2, 6, 8, DIMS)
    pixels = torch.cat([x[:, i::2, j::2] for j in range(2) for i in range(2)], dim=-1)
    norm = nn.functional.layer_norm(
        pixels, (4 * DIMS,), weights['layers.0.downsample.norm.weight'], weights['layers.0.downsample.norm.bias']
    )
    expected = norm @ weights['layers.0.downsample.reduction.weight'].T
    actual, size = backbone.stages[0].downsample(x.flatten(1, 2), (6, 8))
    assert size == (3, 4)
    torch.testing.assert_close(actual, expected.flatten(1, 2), rtol=1e-5, atol=1e-5)


def test_weights_in_mmdet_names_load(tmp_path):
    renamed = rename_swin(original_weights())
    for prefix, heads in (('', {}), ('backbone.', {'bbox_head.bias': torch.ones(3)})):
        weights = {prefix + name: tensor for name, tensor in renamed.items()} | heads
        backbone = STRICT[1](**SETTINGS, init_cfg=dict(checkpoint=save(tmp_path / 'w.pth', {'state_dict': weights})))
        backbone.init_weights()
        assert torch.equal(
            backbone.stages[2].blocks[1].attn.w_msa.qkv.weight, renamed['stages.2.blocks.1.attn.w_msa.qkv.weight']
        )


def test_original_trained_detector_matches_the_recipe(tmp_path):
    config = load('mask_rcnn/swin_t')
    config.model.backbone.update(SETTINGS)
    config.model.neck.in_channels = [DIMS * 2**i for i in range(4)]
    model = MODELS.build(config.model)
    heads = {n: t for n, t in model.state_dict().items() if not n.startswith('backbone.')}
    norms = {f'backbone.norm{i}.{leaf}': torch.ones(DIMS * 2**i) for i in range(4) for leaf in ('weight', 'bias')}
    unused = ('norm.', 'head.')
    backbone = {
        f'backbone.{name}': tensor
        for name, tensor in original_weights().items()
        if not name.startswith(unused) and 'attn_mask' not in name
    }
    content = {'state_dict': {**backbone, **norms, **heads}}
    check_state_dict_matches(model, load_model_weights(content, 'w.pth', model), 'w.pth')


@pytest.mark.parametrize(
    'weights, words',
    [
        (lambda: original_weights(depths=(1, 2, 3, 1)), '13 unknown.*stages.2.blocks.2'),
        (lambda: original_weights(window=5), '6 of another shape.*bias_table is .81, 1., not .169, 1.'),
        (lambda: {n: t for n, t in original_weights().items() if 'layers.1.blocks.0.attn.qkv' not in n}, '2 missing'),
        (lambda: original_weights() | {'layers.0.blocks.0.gamma': torch.ones(8)}, '1 unknown'),
        (lambda: original_weights() | {'layers.0.blocks.0.norm1.bias': torch.full((8,), torch.nan)}, 'NaN'),
        (lambda: {'features.0.0.weight': torch.ones(8, 3, 4, 4)}, 'no Swin weights'),
    ],
)
def test_mismatched_weights_are_refused_in_one_line(weights, words, tmp_path):
    init_cfg = dict(checkpoint=save(tmp_path / 'w.pth', weights()))
    with pytest.raises(UsageError, match=words):  # before anything is built
        check_pretrained(dict(backbone=dict(type='StrictSwinTransformer', **SETTINGS, init_cfg=init_cfg)))
    backbone = STRICT[0](**SETTINGS, init_cfg=init_cfg)
    initial = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.raises(UsageError, match=words) as error:
        backbone.init_weights()
    assert '\n' not in str(error.value) and 'w.pth' in str(error.value)
    assert all(torch.equal(tensor, initial[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize('init_cfg', [dict(type='Pretrained'), dict(checkpoint='w.pth', prefix='backbone.')])
def test_init_cfg_accepts_only_checkpoint(init_cfg):
    for check in (
        STRICT[0](**SETTINGS, init_cfg=init_cfg).init_weights,
        lambda: check_pretrained(dict(backbone=dict(type='StrictSwinTransformer', **SETTINGS, init_cfg=init_cfg))),
    ):
        with pytest.raises(UsageError, match='init_cfg of StrictSwinTransformer takes checkpoint'):
            check()


def test_pretrained_weight_name_is_resolved(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(hub, '_download', lambda url, target: torch.save({'model': original_weights()}, target))
    settings = dict(SETTINGS, init_cfg=dict(type='Pretrained', checkpoint='swin_tiny_patch4_window7_224'))
    check_pretrained(dict(backbone=dict(type='StrictSwinTransformer', **settings)))
    backbone = STRICT[0](**settings)
    backbone.init_weights()
    assert [path.name for path in (tmp_path / 'checkpoints').glob('*.pth')] == ['swin_tiny_patch4_window7_224.pth']


def test_random_initialization_equals_mmdet():
    torch.manual_seed(0)
    stock = SwinTransformer(**SETTINGS)
    stock.init_weights()
    torch.manual_seed(0)
    backbone = STRICT[0](**SETTINGS)
    backbone.init_weights()
    assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in backbone.state_dict().items())


def simmim_layer_id(name: str, depths: tuple[int, ...]) -> int:
    """Layer id of microsoft/SimMIM's get_swin_layer for the original's names; the head is the last of N + 2."""
    if name.startswith('patch_embed'):
        return 0
    if not name.startswith('layers'):
        return sum(depths) + 1
    stage, part = int(name.split('.')[1]), name.split('.')[3]
    return sum(depths[: stage + 1]) if part in ('reduction', 'norm') else sum(depths[:stage]) + int(part) + 1


@pytest.mark.parametrize('cls', STRICT, ids=['mmdet', 'mmseg'])
def test_layers_are_numbered_as_in_simmim(cls):
    model = nn.ModuleDict(dict(backbone=cls(**SETTINGS), head=nn.Linear(2, 2)))
    ids, head_id = layer_ids(model, 'layer_wise')
    assert head_id == sum(DEPTHS) + 1 == ids['head.weight'] == ids['backbone.norm0.weight']
    parameters = {id(p) for p in model.parameters()}
    assert len(ids) == len(parameters)
    for name in original_shapes():
        if not name.startswith(('norm', 'head')):
            (renamed,) = rename_swin({'layers.0.blocks.0.norm1.weight': torch.ones(4), name: torch.ones(4)}).keys() - (
                {'stages.0.blocks.0.norm1.weight'} if name != 'layers.0.blocks.0.norm1.weight' else set()
            )
            assert ids[f'backbone.{renamed}'] == simmim_layer_id(name, DEPTHS), name


def test_stage_wise_decay_is_not_defined():
    with pytest.raises(UsageError, match="give 'layer_wise'"):
        layer_ids(STRICT[0](**SETTINGS), 'stage_wise')


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')
