import copy

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper, build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from convnext_dense.errors import UsageError
from convnext_dense.models.convnext import ARCHS, ConvNeXt
from convnext_dense.optim.layer_decay import LayerDecayOptimWrapperConstructor, layer_ids

# From the original code's table: (stem, stage 0, stage 1, stage 2 first block, stage 2 last block, stage 3).
SCALES = {
    ('tiny', 'layer_wise', 0.95): (0.698337, 0.735092, 0.773781, 0.814506, 0.9025, 0.95),
    ('tiny', 'layer_wise', 0.7): (0.0823543, 0.117649, 0.16807, 0.2401, 0.49, 0.7),
    ('small', 'layer_wise', 0.7): (0.00968890, 0.0138413, 0.0197733, 0.0282475, 0.49, 0.7),
    ('base', 'layer_wise', 0.8): (0.0549756, 0.0687195, 0.0858993, 0.107374, 0.64, 0.8),
    ('tiny', 'stage_wise', 0.9): (0.478297, 0.531441, 0.59049, 0.6561, 0.6561, 0.729),
    ('base', 'stage_wise', 0.9): (0.254187, 0.282430, 0.313811, 0.348678, 0.348678, 0.387420),
}


def original_id(name: str, decay_type: str, last_block: int, num_layers: int) -> int:
    """The original's ids, written from its description, independent of the package."""
    parts = name.split('.')
    if parts[0] == 'downsample_layers':
        return 0 if decay_type == 'stage_wise' else (0, 2, 3, num_layers)[int(parts[1])]
    if parts[0] == 'stages':
        stage, block = int(parts[1]), int(parts[2])
        assert block <= last_block or stage != 2
        return stage + 1 if decay_type == 'stage_wise' else (1, 2, 3 + block // 3, num_layers)[stage]
    return num_layers + 1


class Segmentor(nn.Module):
    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(8, 3, 3)
        self.norm = nn.BatchNorm2d(3)


def build_param_groups(model: nn.Module, decay_type='layer_wise', decay_rate=0.7, paramwise=None, **optimizer):
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            constructor='LayerDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=2e-4, weight_decay=0.05, **optimizer),
            paramwise_cfg=dict(decay_type=decay_type, decay_rate=decay_rate, **(paramwise or {})),
        ),
    )
    return {id(p): group for group in wrapper.optimizer.param_groups for p in group['params']}


def config(**wrapper) -> dict:
    return dict(
        constructor='LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='SGD', lr=1.0),
        paramwise_cfg=dict(decay_type='layer_wise', decay_rate=1.0),
        **wrapper,
    )


@pytest.mark.parametrize('arch, decay_type, rate', SCALES)
def test_ids_scales_and_weight_decay_of_every_parameter(arch, decay_type, rate):
    with torch.device('meta'):
        model = Segmentor(ConvNeXt(arch))
    num_layers, last_block = (6, 8) if arch == 'tiny' else (12, 26)
    assert model.backbone.num_layers == num_layers
    groups = build_param_groups(model, decay_type, rate)
    for name, p in model.named_parameters():
        group = groups[id(p)]
        name_in_backbone = name.removeprefix('backbone.') if name.startswith('backbone.') else 'head'
        expected = original_id(name_in_backbone, decay_type, last_block, num_layers)
        assert group['layer_id'] == expected, name
        assert group['lr'] == pytest.approx(2e-4 * rate ** (num_layers + 1 - expected), rel=1e-12), name
        assert group['weight_decay'] == (0 if p.ndim == 1 or name.endswith('bias') else 0.05), name
    scale_of_prefix = dict(
        zip(
            ('downsample_layers.0.0', 'stages.0.0', 'stages.1.0', 'stages.2.0', f'stages.2.{last_block}', 'stages.3.0'),
            SCALES[arch, decay_type, rate],
        )
    )
    for prefix, scale in scale_of_prefix.items():
        lrs = {groups[id(p)]['lr'] for name, p in model.named_parameters() if name.startswith(f'backbone.{prefix}.')}
        assert len(lrs) == 1 and lrs.pop() / 2e-4 == pytest.approx(scale, rel=1e-5), prefix


def test_a_bias_of_any_shape_does_not_decay():
    model = Segmentor(ConvNeXt('atto'))
    model.head.bias = nn.Parameter(torch.zeros(3, 4))
    model.head.table = nn.Parameter(torch.zeros(3, 4))
    groups = build_param_groups(model)
    assert groups[id(model.head.bias)]['weight_decay'] == 0
    assert groups[id(model.head.table)]['weight_decay'] == 0.05


def test_no_weight_decay_if_the_optimizer_sets_none():
    wrapper = build_optim_wrapper(ConvNeXt('atto'), config())
    assert {group['weight_decay'] for group in wrapper.optimizer.param_groups} == {0}


def test_depthwise_weights_decay_and_output_norms_train_at_full_rate():
    model = Segmentor(ConvNeXt('atto'))
    groups = build_param_groups(model)
    assert groups[id(model.backbone.stages[0][0].dwconv.weight)]['weight_decay'] == 0.05
    assert groups[id(model.backbone.stages[0][0].gamma)]['weight_decay'] == 0
    assert groups[id(model.backbone.norm0.weight)]['lr'] == 2e-4


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def wrapped_stages(model):
    model.backbone.stages[2] = torch.compile(model.backbone.stages[2])
    return model


def wrapped_parts(model):
    backbone = model.backbone
    backbone.stages[1], backbone.stages[2] = Wrapper(backbone.stages[1]), Wrapper(backbone.stages[2])
    backbone.stages, backbone.downsample_layers = Wrapper(backbone.stages), Wrapper(backbone.downsample_layers)
    return model


class Aliased(nn.Module):
    """Registers a part of the backbone under another name before the backbone itself."""

    def __init__(self, model):
        super().__init__()
        self.first = model.backbone.stages[0]
        self.model = model


@pytest.mark.parametrize(
    'wrap',
    [
        lambda m: Wrapper(Wrapper(m)),
        torch.compile,
        lambda m: Wrapper(torch.compile(m)),
        wrapped_stages,
        wrapped_parts,
        lambda m: Segmentor(torch.compile(m.backbone)),
        lambda m: nn.DataParallel(m),
        lambda m: m.backbone,
        Aliased,
    ],
)
def test_backbone_in_any_wrapper_gets_the_same_lrs(wrap):
    model = Segmentor(ConvNeXt('atto'))
    groups = build_param_groups(model)
    reference = {id(p): groups[id(p)]['lr'] for p in model.backbone.parameters()}
    groups_of_wrapper = build_param_groups(wrap(model))
    assert {key: groups_of_wrapper[key]['lr'] for key in reference} == reference
    assert len(set(reference.values())) == 7  # ids 0 to 6: N is 5 for two blocks a stage and six in the third


def test_wrapper_prefixes_in_names_are_ignored():
    backbone = ConvNeXt('tiny')
    for name, expected in [
        ('downsample_layers.0.1.weight', 0),
        ('module.downsample_layers.module.2._orig_mod.1.bias', 3),
        ('stages.1.module.2.gamma', 2),
        ('_orig_mod.module.stages.module.2._checkpoint_wrapped_module.module.8.norm.weight', 5),
        ('stages.module.3.0.module.gamma', 6),
        ('module.norm3.weight', 7),
    ]:
        assert backbone.layer_id(name) == expected, name


def test_backbone_in_ddp_gets_the_same_lrs(tmp_path):
    model = Segmentor(ConvNeXt('atto'))
    reference = build_param_groups(model)
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        groups = build_param_groups(nn.parallel.DistributedDataParallel(model))
    finally:
        torch.distributed.destroy_process_group()
    assert {key: group['lr'] for key, group in groups.items()} == {key: group['lr'] for key, group in reference.items()}


def test_frozen_parameters_are_left_out():
    model = Segmentor(ConvNeXt('atto', frozen_stages=2))
    groups = build_param_groups(model)
    assert set(groups) == {id(p) for p in model.parameters() if p.requires_grad}


def test_any_number_of_stages():
    """Ids rise without gaps with depth, N is the last stage's."""
    for n in (1, 2, 3, 5):
        model = ConvNeXt(dict(depths=(4,) * n, channels=(8,) * n), out_indices=-1)
        ids, top = layer_ids(model, 'layer_wise')
        in_order = [i for name, i in ids.items() if name.startswith('stages')]
        assert in_order == sorted(in_order) and set(ids.values()) == set(range(top + 1))
        assert max(in_order) == model.num_layers == top - 1


def test_unbuilt_stages_count_as_layers():
    ids, top = layer_ids(ConvNeXt('tiny', out_indices=(0, 1)), 'layer_wise')
    assert top == 7 and ids['stages.1.0.gamma'] == 2


def test_model_without_backbone_is_refused():
    with pytest.raises(UsageError, match='no backbone.*ConvNeXt'):
        build_param_groups(nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(UsageError, match='different depth'):
        build_param_groups(nn.ModuleList([ConvNeXt('atto'), ConvNeXt('tiny')]))


@pytest.mark.parametrize(
    'paramwise, word',
    [
        (None, 'decay_rate'),
        (dict(decay_rate=0.9), 'decay_type'),
        (dict(decay_rate=0, decay_type='layer_wise'), '0'),
        (dict(decay_rate=-0.5, decay_type='layer_wise'), '-0.5'),
        (dict(decay_rate=1.1, decay_type='layer_wise'), '1.1'),
        (dict(decay_rate='0.9', decay_type='layer_wise'), 'decay_rate'),
        (dict(decay_rate=0.9, decay_type='blockwise'), 'blockwise'),
        (dict(decay_rate=True, decay_type='layer_wise'), 'decay_rate'),
        (dict(decay_rate=0.9, decay_type='layer_wise', num_layers=12), 'num_layers=12.*5 layers'),
        (dict(decay_rate=0.9, decay_type='layer_wise', custom_key={}), 'custom_key is unknown.*custom_keys'),
        (dict(decay_rate=0.9, decay_type='layer_wise', custom_keys=['head']), 'custom_keys'),
        (dict(decay_rate=0.9, decay_type='layer_wise', custom_keys=dict(head=10)), 'custom_keys'),
        (
            dict(decay_rate=0.9, decay_type='layer_wise', custom_keys=dict(head=dict(lr_mult='10'))),
            r"custom_keys\.head\.lr_mult='10'",
        ),
        (dict(decay_rate=0.9, decay_type='layer_wise', norm_decay_mult=0.0), 'norm_decay_mult.*give.*weight_decay'),
        (dict(decay_rate=0.9, decay_type='layer_wise', bias_lr_mult='2'), 'bias_lr_mult'),
    ],
)
def test_invalid_paramwise_cfg(paramwise, word):
    cfg = dict(
        constructor='LayerDecayOptimWrapperConstructor', optimizer=dict(type='AdamW', lr=1e-4), paramwise_cfg=paramwise
    )
    with pytest.raises(UsageError, match=word) as error:
        build_optim_wrapper(ConvNeXt('atto'), cfg)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('value', ['abc', -1.0, float('nan'), float('inf'), True], ids=repr)
@pytest.mark.parametrize('key', ['lr', 'weight_decay', 'bias_lr_mult', 'norm_decay_mult', 'lr_mult', 'decay_mult'])
def test_invalid_optimizer_numbers_are_refused(key, value):
    cfg = config()
    cfg['optimizer'] = dict(type='AdamW', lr=1e-4, weight_decay=0.05)
    if key in cfg['optimizer']:
        cfg['optimizer'][key] = value
    else:
        setting = {key: value} if key.startswith(('bias', 'norm')) else dict(custom_keys={'norm': {key: value}})
        cfg['paramwise_cfg'] |= setting
    with pytest.raises(UsageError, match=f'{key}=.* is invalid: give a number that is not negative'):
        build_optim_wrapper(ConvNeXt('atto'), cfg)


def test_custom_keys_must_be_strings():
    cfg = config()
    cfg['paramwise_cfg'] |= dict(custom_keys={1: dict(lr_mult=2)})
    with pytest.raises(UsageError, match='custom_keys has the key 1'):
        build_optim_wrapper(ConvNeXt('atto'), cfg)


def test_missing_lr_is_refused():
    cfg = config()
    del cfg['optimizer']['lr']
    with pytest.raises(UsageError, match='no lr'):
        build_optim_wrapper(ConvNeXt('atto'), cfg)


@OPTIM_WRAPPERS.register_module()
class OtherOptimWrapper(OptimWrapper):
    pass


def test_wrapper_type_is_preserved():
    for settings, expected in [
        (dict(type='OtherOptimWrapper'), OtherOptimWrapper),
        (dict(type=OtherOptimWrapper), OtherOptimWrapper),
        (dict(type='OptimWrapper'), OptimWrapper),
        (dict(), OptimWrapper),
    ]:
        assert type(build_optim_wrapper(ConvNeXt('atto'), config(**settings))) is expected


def test_clipping_and_accumulation_reach_the_wrapper():
    """Of three iterations only the third moves the weights, at lr 1 exactly as far as the clipped gradient is long."""
    torch.manual_seed(0)
    model = ConvNeXt(dict(depths=(1,), channels=(8,)), out_indices=0).double()
    wrapper = build_optim_wrapper(model, config(accumulative_counts=3, clip_grad=dict(max_norm=0.25)))
    initial, distances = [p.detach().clone() for p in model.parameters()], []
    for _ in range(3):
        wrapper.update_params(100 * (model(torch.randn(2, 3, 16, 16).double())[0] - 1).square().mean())
        changes = [p.detach() - old for p, old in zip(model.parameters(), initial)]
        distances.append(sum(change.square().sum().item() for change in changes) ** 0.5)
    assert distances == [0, 0, pytest.approx(0.25, rel=1e-5)]


@pytest.mark.parametrize('kind', [dict, ConfigDict])
def test_config_is_not_modified(kind):
    optim_wrapper = kind(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05, betas=(0.8, 0.9)),
        clip_grad=dict(max_norm=1),
    )
    paramwise = kind(decay_rate=0.9, decay_type='stage_wise')
    original = copy.deepcopy((optim_wrapper, paramwise))
    constructor = LayerDecayOptimWrapperConstructor(optim_wrapper, paramwise)
    for _ in range(2):
        constructor(ConvNeXt('atto'))
    assert (optim_wrapper, paramwise) == original


def test_other_optimizers_and_their_options():
    groups = build_param_groups(ConvNeXt('atto'), betas=(0.8, 0.9))
    assert all(group['betas'] == (0.8, 0.9) for group in groups.values())


def test_logs_one_short_table(caplog):
    logger = MMLogger.get_instance('layer_decay')
    logger.addHandler(caplog.handler)
    build_param_groups(Segmentor(ConvNeXt('atto')))
    (table,) = (r.getMessage() for r in caplog.records if 'lr decay' in r.getMessage())
    lines = table.splitlines()
    assert len(lines) == 2 + 7
    total = sum(int(line.split()[-1].replace(',', '')) for line in lines[2:])
    assert total == sum(p.numel() for p in Segmentor(ConvNeXt('atto')).parameters())


def test_lrs_and_counts_by_hand(caplog):
    """A block of c channels has 8 c^2 + 58 c parameters, the stem 51 c, a downsampling from a to b 2 a + 4 a b + b."""
    logger = MMLogger.get_instance('layer_decay_by_hand')
    logger.addHandler(caplog.handler)
    model = Segmentor(ConvNeXt(dict(depths=(1, 1, 4, 2), channels=(8, 10, 20, 30))))
    groups = build_param_groups(model, decay_rate=0.5)
    (table,) = (r.getMessage() for r in caplog.records if 'lr decay' in r.getMessage())
    expected = [
        (0, 3.125e-6, 51 * 8),
        (1, 6.25e-6, 8 * 8**2 + 58 * 8),
        (2, 1.25e-5, 2 * 8 + 4 * 8 * 10 + 10 + 8 * 10**2 + 58 * 10),
        (3, 2.5e-5, 2 * 10 + 4 * 10 * 20 + 20 + 3 * (8 * 20**2 + 58 * 20)),
        (4, 5e-5, 8 * 20**2 + 58 * 20),
        (5, 1e-4, 2 * 20 + 4 * 20 * 30 + 30 + 2 * (8 * 30**2 + 58 * 30)),
        (6, 2e-4, 2 * (8 + 10 + 20 + 30) + (9 * 8 * 3 + 3) + 2 * 3),  # output norms, the head and its norm
    ]
    rows = [line.split() for line in table.splitlines()[2:]]
    assert [(int(i), float(lr), int(count.replace(',', ''))) for i, lr, count in rows] == expected
    scales = {group['layer_id']: group['lr_scale'] for group in groups.values()}
    assert scales == {0: 1 / 64, 1: 1 / 32, 2: 1 / 16, 3: 1 / 8, 4: 1 / 4, 5: 1 / 2, 6: 1}
    assert all(group['lr'] == pytest.approx(2e-4 * group['lr_scale'], rel=1e-12) for group in groups.values())


def test_grn_of_v2_does_not_decay():
    model = Segmentor(ConvNeXt('atto', use_grn=True))
    groups = build_param_groups(model)
    grn = [p for name, p in model.named_parameters() if '.grn.' in name]
    assert len(grn) == 2 * 12 and all(groups[id(p)]['weight_decay'] == 0 for p in grn)


def mmpretrain_depth(name: str, depths: tuple[int, ...]) -> int:
    """Layer id by mmpretrain's rule for ConvNeXt, which knows two numbers of layers: 12 and 6."""
    deepest = 12 if depths[2] > 9 else 6
    root, *indices = name.split('.')
    if root == 'downsample_layers':
        return {0: 0, 1: 2, 2: 3, 3: deepest}[int(indices[0])]
    if root == 'stages':
        return {0: 1, 1: 2, 2: 3 + int(indices[1]) // 3, 3: deepest}[int(indices[0])]
    return deepest + 1


@pytest.mark.parametrize('arch', ARCHS)
def test_layer_depths_equal_mmpretrain(arch):
    with torch.device('meta'):
        backbone = ConvNeXt(arch)
    n = backbone.num_layers
    for name, _ in backbone.named_parameters():
        expected = mmpretrain_depth(name, backbone.depths)
        if arch in ('atto', 'femto', 'pico'):  # six blocks in the third stage: mmpretrain has no parameter of id 5
            expected -= expected > 5
        for prefix in ('', 'backbone.', 'model.backbone.'):
            assert backbone.get_layer_depth(prefix + name, prefix) == (expected, n + 2), name
    assert backbone.get_layer_depth('head.fc.weight', 'backbone.') == (n + 1, n + 2)
    assert backbone.get_layer_depth('neck.stages.0.0.gamma', 'backbone.') == (n + 1, n + 2)


@pytest.mark.parametrize('arch', ['tiny', 'small', 'nano'])
def test_lrs_by_get_layer_depth_equal_the_constructor(arch):
    """mmpretrain: lr * rate ** (number of layers - depth - 1), the names asked for with the prefix 'backbone.'."""
    with torch.device('meta'):
        model = Segmentor(ConvNeXt(arch))
    groups = build_param_groups(model)
    for name, p in model.named_parameters():
        depth, num_layers = model.backbone.get_layer_depth(name, 'backbone.')
        assert groups[id(p)]['layer_id'] == depth
        assert groups[id(p)]['lr'] == pytest.approx(2e-4 * 0.7 ** (num_layers - depth - 1), rel=1e-12), name


MMENGINE_KEYS = {
    'none': {},
    'custom_keys': dict(custom_keys={'head': dict(lr_mult=10.0, decay_mult=0.5), 'head.bias': dict(lr_mult=2.0)}),
    'a part of the backbone': dict(custom_keys={'backbone.stages.0': dict(lr_mult=0.1), 'norm': dict(decay_mult=0.0)}),
    'other settings': dict(custom_keys={'dwconv': dict(lr_mult=0.1, betas=(0.8, 0.9))}),
    'norm_decay_mult': dict(norm_decay_mult=1.0),
    'bias': dict(bias_lr_mult=2.0, bias_decay_mult=0.5),
    'flat_decay_mult': dict(flat_decay_mult=1.0),
    'dwconv_decay_mult': dict(dwconv_decay_mult=0.1),
    'all': dict(
        custom_keys={'head': dict(lr_mult=3.0)},
        **dict(bias_lr_mult=2.0, bias_decay_mult=0.1, norm_decay_mult=0.2, flat_decay_mult=0.3, dwconv_decay_mult=0.4),
        **dict(dcn_offset_lr_mult=0.5, bypass_duplicate=True),
    ),
}


@pytest.mark.parametrize('keys', MMENGINE_KEYS)
def test_mmengine_keys_act_as_in_mmengine(keys):
    """The values of mmengine's own constructor times the layer decay; the paper's rule where that sets no decay."""
    paramwise = MMENGINE_KEYS[keys]
    model = Segmentor(ConvNeXt('atto'))
    optimizer = dict(type='AdamW', lr=2e-4, weight_decay=0.05)
    mmengine_groups = []
    DefaultOptimWrapperConstructor(dict(optimizer=optimizer), paramwise).add_params(mmengine_groups, model)
    mmengine_groups = {id(p): group for group in mmengine_groups for p in group['params']}
    groups = build_param_groups(model, paramwise=paramwise)
    for name, p in model.named_parameters():
        expected, group = mmengine_groups[id(p)], groups[id(p)]
        name_in_backbone = name.removeprefix('backbone.') if name.startswith('backbone.') else 'head'
        depth = original_id(name_in_backbone, 'layer_wise', 5, 5)
        decay = 0 if p.ndim < 2 or name.endswith('.bias') else 0.05
        assert group['lr'] == pytest.approx(expected.get('lr', 2e-4) * 0.7 ** (6 - depth), rel=1e-12), name
        assert group['weight_decay'] == pytest.approx(expected.get('weight_decay', decay), rel=1e-12), name
        assert group['layer_id'] == depth and group['lr_scale'] == pytest.approx(0.7 ** (6 - depth), rel=1e-12)
        assert group['betas'] == expected.get('betas', (0.9, 0.999)), name


def test_custom_keys_by_hand():
    """The longest key that matches decides, and decides the weight decay too."""
    model = Segmentor(ConvNeXt('atto'))
    groups = build_param_groups(model, paramwise=MMENGINE_KEYS['custom_keys'])
    weight, bias = groups[id(model.head.weight)], groups[id(model.head.bias)]
    assert (weight['lr'], weight['weight_decay']) == (2e-3, 0.025)
    assert (bias['lr'], bias['weight_decay']) == (4e-4, 0.05)
    norm = groups[id(model.norm.weight)]
    assert (norm['lr'], norm['weight_decay'], norm['lr_scale']) == (2e-4, 0, 1)


@pytest.mark.parametrize('paramwise', [{}, dict(bypass_duplicate=True), dict(bypass_duplicate=False)])
def test_a_parameter_under_two_names_is_optimized_once(paramwise):
    model = Aliased(Segmentor(ConvNeXt('atto')))
    groups = {id(group): group for group in build_param_groups(model, paramwise=paramwise).values()}.values()
    assert sorted(id(p) for g in groups for p in g['params']) == sorted(id(p) for p in model.parameters())


def test_unmatched_custom_key_warns(caplog):
    MMLogger.get_instance('custom_keys').addHandler(caplog.handler)
    build_param_groups(
        Segmentor(ConvNeXt('atto')), paramwise=dict(custom_keys={'haed': dict(lr_mult=10.0), 'head': dict(lr_mult=2)})
    )
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == 'WARNING')
    assert "'haed'" in warning and '\n' not in warning


def test_num_layers_may_equal_the_backbones():
    model = Segmentor(ConvNeXt('atto'))
    expected = {key: group['lr'] for key, group in build_param_groups(model).items()}
    groups = build_param_groups(model, paramwise=dict(num_layers=5))
    assert {key: group['lr'] for key, group in groups.items()} == expected


def test_parameters_with_equal_settings_share_a_group_in_order_of_depth():
    """Checkpoints of optimizers hold their groups by position."""
    model = Segmentor(ConvNeXt('tiny'))
    groups = list({id(group): group for group in build_param_groups(model).values()}.values())
    wrapper = build_optim_wrapper(model, config() | dict(optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05)))
    assert [(g['layer_id'], g['weight_decay']) for g in wrapper.optimizer.param_groups] == [
        (i, decay) for i in range(8) for decay in (0.0, 0.05)
    ]
    assert len(groups) == 16
    position = {id(p): n for n, p in enumerate(model.parameters())}
    for group in groups:
        order = [position[id(p)] for p in group['params']]
        assert order == sorted(order)


def test_a_scale_without_dimensions_does_not_decay():
    """As detection heads have one for every level of a feature pyramid."""
    model = Segmentor(ConvNeXt('atto'))
    model.scale = nn.Parameter(torch.tensor(1.0))
    assert build_param_groups(model)[id(model.scale)]['weight_decay'] == 0
