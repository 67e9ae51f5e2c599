import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from torch import nn

from convnext_dense import ConvNeXt, UsageError, layer_ids

# From the original code's table: (stem, stage 0, stage 1, stage 2 first block, stage 2 last block, stage 3).
SCALES = {
    ('tiny', 'layer_wise', 0.95): (0.698337, 0.735092, 0.773781, 0.814506, 0.9025, 0.95),
    ('tiny', 'layer_wise', 0.7): (0.0823543, 0.117649, 0.16807, 0.2401, 0.49, 0.7),
    ('small', 'layer_wise', 0.7): (0.00968890, 0.0138413, 0.0197733, 0.0282475, 0.49, 0.7),
    ('base', 'layer_wise', 0.8): (0.0549756, 0.0687195, 0.0858993, 0.107374, 0.64, 0.8),
    ('tiny', 'stage_wise', 0.9): (0.478297, 0.531441, 0.59049, 0.6561, 0.6561, 0.729),
    ('base', 'stage_wise', 0.9): (0.254187, 0.282430, 0.313811, 0.348678, 0.348678, 0.387420),
}


def original_id(name: str, decay_type: str, last: int, n: int) -> int:
    """The original's ids, written from its description: an oracle that shares nothing with the package."""
    parts = name.split('.')
    if parts[0] == 'downsample_layers':
        return 0 if decay_type == 'stage_wise' else (0, 2, 3, n)[int(parts[1])]
    if parts[0] == 'stages':
        stage, block = int(parts[1]), int(parts[2])
        assert block <= last or stage != 2
        return stage + 1 if decay_type == 'stage_wise' else (1, 2, 3 + block // 3, n)[stage]
    return n + 1


class Segmentor(nn.Module):
    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(8, 3, 3)
        self.norm = nn.BatchNorm2d(3)


def built(model: nn.Module, decay_type='layer_wise', decay_rate=0.7, **optimizer):
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            constructor='LayerDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=2e-4, weight_decay=0.05, **optimizer),
            paramwise_cfg=dict(decay_type=decay_type, decay_rate=decay_rate),
        ),
    )
    return {id(p): group for group in wrapper.optimizer.param_groups for p in group['params']}


@pytest.mark.parametrize('arch, decay_type, rate', SCALES)
def test_ids_scales_and_weight_decay_of_every_parameter(arch, decay_type, rate):
    with torch.device('meta'):
        model = Segmentor(ConvNeXt(arch))
    n, last = (6, 8) if arch == 'tiny' else (12, 26)
    assert model.backbone.num_layers == n
    groups = built(model, decay_type, rate)
    for name, p in model.named_parameters():
        group = groups[id(p)]
        inner = name.removeprefix('backbone.') if name.startswith('backbone.') else 'head'
        expected = original_id(inner, decay_type, last, n)
        assert group['layer_id'] == expected, name
        assert group['lr'] == pytest.approx(2e-4 * rate ** (n + 1 - expected), rel=1e-12), name
        assert group['weight_decay'] == (0 if p.ndim == 1 or name.endswith('bias') else 0.05), name
    first = dict(
        zip(
            ('downsample_layers.0.0', 'stages.0.0', 'stages.1.0', 'stages.2.0', f'stages.2.{last}', 'stages.3.0'),
            SCALES[arch, decay_type, rate],
        )
    )
    for start, scale in first.items():
        lrs = {groups[id(p)]['lr'] for name, p in model.named_parameters() if name.startswith(f'backbone.{start}.')}
        assert len(lrs) == 1 and lrs.pop() / 2e-4 == pytest.approx(scale, rel=1e-5), start


def test_depthwise_weights_decay_and_output_norms_train_at_full_rate():
    model = Segmentor(ConvNeXt('atto'))
    groups = built(model)
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


@pytest.mark.parametrize(
    'wrap',
    [
        lambda m: Wrapper(Wrapper(m)),
        torch.compile,
        lambda m: Wrapper(torch.compile(m)),
        wrapped_stages,
        lambda m: Segmentor(torch.compile(m.backbone)),
        lambda m: nn.DataParallel(m),
        lambda m: m.backbone,
    ],
)
def test_found_wherever_it_sits(wrap):
    model = Segmentor(ConvNeXt('atto'))
    plain = {id(p): group['lr'] for p in model.backbone.parameters() for group in [built(model)[id(p)]]}
    again = built(wrap(model))
    assert {key: again[key]['lr'] for key in plain} == plain
    assert len(set(plain.values())) == 7  # ids 0 to 6: N is 5 for two blocks a stage and six in the third


def test_found_behind_distributed_data_parallel(tmp_path):
    model = Segmentor(ConvNeXt('atto'))
    plain = built(model)
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        behind = built(nn.parallel.DistributedDataParallel(model))
    finally:
        torch.distributed.destroy_process_group()
    assert {key: group['lr'] for key, group in behind.items()} == {key: group['lr'] for key, group in plain.items()}


def test_frozen_parameters_are_left_out():
    model = Segmentor(ConvNeXt('atto', frozen_stages=2))
    groups = built(model)
    assert set(groups) == {id(p) for p in model.parameters() if p.requires_grad}


def test_any_number_of_stages():
    """Ids rise without gaps with depth, N is the last stage's."""
    for n in (1, 2, 3, 5):
        model = ConvNeXt(dict(depths=(4,) * n, channels=(8,) * n), out_indices=-1)
        ids, top = layer_ids(model, 'layer_wise')
        in_order = [i for name, i in ids.items() if name.startswith('stages')]
        assert in_order == sorted(in_order) and set(ids.values()) == set(range(top + 1))
        assert max(in_order) == model.num_layers == top - 1


def test_the_stages_left_unbuilt_still_count():
    ids, top = layer_ids(ConvNeXt('tiny', out_indices=(0, 1)), 'layer_wise')
    assert top == 7 and ids['stages.1.0.gamma'] == 2


def test_raises_where_no_backbone_is():
    with pytest.raises(UsageError, match='no module.*ConvNeXt'):
        built(nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(UsageError, match='different depth'):
        built(nn.ModuleList([ConvNeXt('atto'), ConvNeXt('tiny')]))


@pytest.mark.parametrize(
    'paramwise, word',
    [
        (None, 'decay_rate'),
        (dict(decay_rate=0.9), 'decay_type'),
        (dict(decay_rate=0, decay_type='layer_wise'), '0'),
        (dict(decay_rate=0.9, decay_type='blockwise'), 'blockwise'),
        (dict(decay_rate=0.9, decay_type='layer_wise', num_layers=12), 'num_layers'),
    ],
)
def test_bad_settings(paramwise, word):
    cfg = dict(
        constructor='LayerDecayOptimWrapperConstructor', optimizer=dict(type='AdamW', lr=1e-4), paramwise_cfg=paramwise
    )
    with pytest.raises(UsageError, match=word):
        build_optim_wrapper(ConvNeXt('atto'), cfg)


def test_other_optimizers_and_their_options():
    groups = built(ConvNeXt('atto'), betas=(0.8, 0.9))
    assert all(group['betas'] == (0.8, 0.9) for group in groups.values())


def test_logs_one_short_table(caplog):
    logger = MMLogger.get_instance('layer_decay')
    logger.addHandler(caplog.handler)
    built(Segmentor(ConvNeXt('atto')))
    (table,) = (r.getMessage() for r in caplog.records if 'lr decay' in r.getMessage())
    lines = table.splitlines()
    assert len(lines) == 2 + 7
    counted = sum(int(line.split()[-1].replace(',', '')) for line in lines[2:])
    assert counted == sum(p.numel() for p in Segmentor(ConvNeXt('atto')).parameters())
