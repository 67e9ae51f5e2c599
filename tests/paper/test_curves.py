"""Training curves: lr of every layer, resumed runs, units, plots."""

import io
import logging
import math

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import Dataset

from convnext_dense.config.batch_size import scale_batch
from convnext_dense.engine.hooks import UpdateParamSchedulerHook
from convnext_dense.errors import UsageError
from convnext_dense.models.convnext import ConvNeXt
from convnext_dense.paper.curves import ema, format_progress, layer_lrs, plot, read_curves
from convnext_dense.paper.session import parse_lr_scales
from helpers.recipes import load
from helpers.tools import one_line_error
from helpers.work_dirs import coco, write_run_info, write_session

ARCH = dict(depths=(1, 1, 2, 1), channels=(4, 8, 12, 16))


class Net(BaseModel):
    def __init__(self, frozen: int):
        super().__init__()
        self.backbone = ConvNeXt(ARCH, frozen_stages=frozen)
        self.head = torch.nn.Linear(16, 1)

    def forward(self, inputs, mode='loss'):
        return {'loss': self.head(self.backbone(inputs)[-1].mean((2, 3))).square().mean()}


class Images(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return {'inputs': torch.full((3, 32, 32), float(i))}


class LrRecorder(Hook):
    """What the optimizer's own parameter groups have at each iteration."""

    priority = 'VERY_HIGH'

    def __init__(self):
        self.lrs = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.lrs[runner.iter + 1] = {g['layer_id']: g['lr'] for g in runner.optim_wrapper.optimizer.param_groups}


STEPS = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=5),
    dict(type='MultiStepLR', by_epoch=True, milestones=[2, 3], gamma=0.1, begin=0, end=4),
]
POLY = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=4),
    dict(type='PolyLR', power=0.9, eta_min=3e-4, by_epoch=False, begin=0, end=30),
]
COSINE = [dict(type='CosineAnnealingLR', T_max=12, eta_min=1e-4, by_epoch=False, begin=0, end=12)]


@pytest.mark.parametrize('decay_type', ['layer_wise', 'stage_wise'])
@pytest.mark.parametrize(
    'schedule, accumulation, frozen', [(STEPS, 1, -1), (POLY, 3, -1), (COSINE, 2, 2), (STEPS, 1, 1)]
)
def test_layer_lrs_equal_optimizer_lrs(tmp_path, schedule, accumulation, frozen, decay_type):
    """In a real run, at every iteration, computed from its logs."""
    recorder = LrRecorder()
    Runner(
        Net(frozen),
        str(tmp_path / 'run'),
        dict(
            dataset=Images(), batch_size=1, sampler=dict(type='DefaultSampler'), collate_fn=dict(type='default_collate')
        ),
        train_cfg=dict(by_epoch=True, max_epochs=4),
        optim_wrapper=dict(
            constructor='LayerDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=2e-3),
            paramwise_cfg=dict(decay_type=decay_type, decay_rate=0.7),
            accumulative_counts=accumulation,
        ),
        param_scheduler=schedule,
        default_hooks=dict(
            param_scheduler=UpdateParamSchedulerHook(), logger=dict(type='LoggerHook', interval=1), checkpoint=None
        ),
        custom_hooks=[recorder],
        cfg=dict(
            train_cfg=dict(by_epoch=True, max_epochs=4), optim_wrapper=dict(optimizer=dict(lr=2e-3)), model=dict()
        ),
        experiment_name=f'{decay_type}{accumulation}{frozen}{id(tmp_path)}',
    ).train()
    (curves,) = read_curves([tmp_path])
    assert [x for x, _ in curves.lrs] == [(i + 1) / 6 for i in range(24)] and curves.unit == 'epochs'
    for i, (_, lrs) in enumerate(curves.lrs, 1):
        assert lrs.keys() == recorder.lrs[i].keys() and len(lrs) > 2
        for layer, lr in lrs.items():
            assert lr == pytest.approx(recorder.lrs[i][layer], rel=1e-9)
    assert any(len(set(lrs.values())) > 2 for _, lrs in curves.lrs)


def test_lr_scales_of_mmdet_constructor_log():
    from mmdet.engine.optimizers import LearningRateDecayOptimizerConstructor

    text = io.StringIO()
    handler = logging.StreamHandler(text)
    MMLogger.get_current_instance().addHandler(handler)
    try:
        groups = []
        optimizer = dict(optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05))
        paramwise = dict(decay_rate=0.8, decay_type='layer_wise', num_layers=6)
        LearningRateDecayOptimizerConstructor(optimizer, paramwise).add_params(groups, Net(-1))
    finally:
        MMLogger.get_current_instance().removeHandler(handler)
    scales = parse_lr_scales(text.getvalue(), None)
    assert scales == {int(group['group_name'].split('_')[1]): group['lr_scale'] for group in groups} and len(scales) > 3
    assert next(iter(scales.values())) == groups[0]['lr_scale']


def test_lr_scales_of_other_logs():
    """A rate of 1, no log at all; a base lr that mmengine has scaled by the batch."""
    record = dict(lr=5e-5, base_lr=1e-4)
    assert layer_lrs(record, {}, Config()) == record
    assert layer_lrs(dict(lr=5e-5, base_lr=5e-5), {}, Config()) == {'lr': 5e-5} and layer_lrs({}, {}, Config()) == {}
    scaled = Config(dict(auto_scale_lr=dict(enable=True, base_batch_size=16)))
    assert layer_lrs(record, {0: 0.25, 2: 1.0}, scaled) == pytest.approx({0: 5e-5, 2: 2e-4})
    table = 'layer_wise lr decay, rate 1.0:\n  id  lr            parameters\n   0  0.0001             2,040\n'
    assert parse_lr_scales(table, None) == {0: 1.0}


def train_record(step, **more):
    return dict(loss=step / 1000, lr=1e-4, iter=step, step=step, **more)


def test_resumed_sessions_are_merged(tmp_path):
    """The first start ends at 900, the second goes on from 500, is killed at 700 and leaves a half-written line, the
    third logs nothing, the fourth goes on from 500 again."""
    config = load('upernet/convnext_t')
    write_session(
        tmp_path,
        config,
        [*map(train_record, range(50, 501, 50)), dict(mIoU=1.0, step=500), train_record(550), train_record(900)],
    )
    resumed_records = [train_record(550), train_record(600), dict(mIoU=2.0, step=600), train_record(700)]
    write_session(tmp_path, config, resumed_records, timestamp='20260102_120000', tail='\n{"loss": 0.1, "st')
    write_session(tmp_path, config, timestamp='20260103_120000')
    write_session(
        tmp_path, config, [train_record(550), train_record(600), dict(mIoU=3.0, step=600)], timestamp='20260104_120000'
    )
    (curves,) = read_curves([tmp_path])
    assert [x for x, _ in curves.losses] == list(range(50, 601, 50)) and curves.unit == 'optimizer steps'
    assert curves.metrics == [(500, {'mIoU': 1.0}), (600, {'mIoU': 3.0})]
    assert curves.resume_points == [550]
    assert curves.run.issues == ['the log is truncated at line 5', '20260103_120000: no iteration was logged']


def test_session_that_starts_with_evaluation(tmp_path):
    config = load('cascade/convnext_t')
    write_session(tmp_path / 'epochs', config, [train_record(10, epoch=1), train_record(20, epoch=2)])
    write_session(
        tmp_path / 'epochs', config, [coco(0.1, 0.1, 2), train_record(30, epoch=3)], timestamp='20260102_120000'
    )
    config = load('upernet/convnext_t')
    config.default_hooks.logger.pop('log_metric_by_epoch')  # then it gives no step
    write_session(tmp_path / 'iters', config, [train_record(10), train_record(20)])
    write_session(tmp_path / 'iters', config, [dict(mIoU=1.0, step=0), train_record(30)], timestamp='20260102_120000')
    for name, xs in {'epochs': [1, 2, 3], 'iters': [10, 20, 30]}.items():
        (curves,) = read_curves([tmp_path / name])
        assert [x for x, _ in curves.losses] == xs and [x for x, _ in curves.metrics] == xs[1:2]


def test_units(tmp_path):
    """Epochs by the log's iterations of one, also where it has none; optimizer steps under accumulation."""
    config = load('cascade/convnext_t')
    records = [
        train_record(20, epoch=1),
        train_record(40, epoch=1),
        coco(0.1, 0.2, 1),
        train_record(70, epoch=2),
        train_record(90, epoch=2),
    ]
    write_session(tmp_path / 'logged', config, records)
    log = tmp_path / 'logged/20260101_120000/20260101_120000.log'
    log.write_text(log.read_text() + '- mmengine - INFO - Epoch(train)  [ 1][ 20/50]  base_lr: 1e-4\n')
    write_session(tmp_path / 'not_logged', config, records)
    logged, not_logged = read_curves([tmp_path])
    assert [x for x, _ in logged.losses] == [0.4, 0.8, 1.4, 1.8] and [x for x, _ in logged.metrics] == [1]
    assert logged.metrics[0][1]['box AP'] == pytest.approx(10) and logged.unit == 'epochs'
    assert [x for x, _ in not_logged.losses] == [20 / 45, 40 / 45, 70 / 45, 2]

    config = load('upernet/convnext_t')
    scale_batch(config, 1)
    write_session(tmp_path / 'optimizer steps', config, [train_record(800), dict(mIoU=5.0, step=800)], 1)
    # Loops that count iterations under a logger that does not know it: the step of an evaluation is none.
    config.default_hooks.logger.pop('log_metric_by_epoch')
    write_session(tmp_path / 'unknowing', config, [train_record(800), dict(mIoU=5.0, step=0)], 1)
    for name in ('optimizer steps', 'unknowing'):
        (curves,) = read_curves([tmp_path / name])
        assert [x for x, _ in curves.losses] == [x for x, _ in curves.metrics] == [100]


def test_units_and_layers_by_run_json(tmp_path):
    """Epochs, progress and the lr of each layer by the file, where text log and config say nothing or otherwise."""
    write_session(
        tmp_path / 'epochs', load('cascade/convnext_t'), [train_record(5, epoch=1), train_record(25, epoch=3)]
    )
    groups = [dict(name=f'layer_{i}_decay', layer_id=i, lr=1e-4 * scale, lr_scale=scale, weight_decay=0.0, num_params=1)
              for i, scale in enumerate((0.25, 1.0))]  # fmt: skip
    write_run_info(tmp_path / 'epochs/20260101_120000', param_groups=groups)
    (curves,) = read_curves([tmp_path / 'epochs'])
    assert [x for x, _ in curves.losses] == [0.5, 2.5]
    assert curves.lrs[0][1] == pytest.approx({0: 1e-4, 1: 4e-4})
    assert format_progress(curves.run) == '2.5 of 36 epochs' and curves.run.issues == []
    write_session(tmp_path / 'steps', load('upernet/convnext_t'), [train_record(800)])
    write_run_info(tmp_path / 'steps/20260101_120000', accumulation_steps=8, by_epoch=False, max_epochs=None)
    (curves,) = read_curves([tmp_path / 'steps'])
    assert [x for x, _ in curves.losses] == [100] and format_progress(curves.run).startswith('100 of ')


def test_isolated_points_have_markers(tmp_path):
    """A curve of one point, or a value between two that are not drawn, would have no visible line."""
    import matplotlib.figure

    config = load('upernet/convnext_t')
    write_session(tmp_path / 'one', config, [train_record(50), dict(mIoU=20.0, step=50)])
    write_session(
        tmp_path / 'more',
        config,
        [*map(train_record, (50, 100)), train_record(150) | dict(loss=math.nan), train_record(200)],
    )
    markers = {}

    def record(figure, file):
        lines = [
            line for axis in figure.axes for line in axis.lines if len(line.get_xdata()) and line.get_marker() == 'o'
        ]
        markers[file.stem] = {str(line.get_label()): line.get_markevery() for line in lines}

    save, matplotlib.figure.Figure.savefig = matplotlib.figure.Figure.savefig, record
    try:
        for name in ('one', 'more'):
            plot(read_curves([tmp_path / name]), tmp_path / f'{name}.png')
    finally:
        matplotlib.figure.Figure.savefig = save
    assert markers['one']['total'] == [0] and markers['more']['total'] == [3]
    for name in ('one', 'more'):
        assert plot(read_curves([tmp_path / name]), tmp_path / f'{name}.png').read_bytes().startswith(b'\x89PNG')


def test_parts_of_the_loss_and_other_evaluators(tmp_path):
    parts = {'loss_rpn_cls': 0.1, 's0.loss_cls': 0.2, 's1.loss_cls': 0.3, 's0.acc': 90.0, 'decode.loss_ce': 0.4}
    records = [{f'train/{k}': v for k, v in dict(loss=1.0, lr=1e-4, **parts).items()} | dict(epoch=1, iter=1, step=1)]
    records += [{'val/pascal_voc/mAP': 0.5, 'val/pascal_voc/AP50': 0.6, 'val/time': 1.0, 'step': 1}]
    write_session(tmp_path, Config(dict(train_cfg=dict(max_epochs=2))), records)
    (curves,) = read_curves([tmp_path])
    assert curves.losses == [(1, {'loss': 1.0, 'loss_rpn_cls': 0.1, 'loss_cls': 0.5, 'decode.loss_ce': 0.4})]
    assert curves.metrics == [(1, {'pascal_voc/mAP': 0.5, 'pascal_voc/AP50': 0.6})]
    assert plot([curves], tmp_path / 'run') == tmp_path / 'run.png' and (tmp_path / 'run.png').exists()
    assert panel_texts(curves)[:4] == ['loss', 'lr', 'pascal_voc/mAP', 'pascal_voc/AP50']


def panel_texts(*curves, smooth=0.0) -> list[str]:
    """Titles of the panels, then all other text in the plot."""
    import matplotlib.figure

    labels = []

    def look(figure, file):
        labels.append([axis.get_title() for axis in figure.axes if axis.get_title()])
        labels.append([t.get_text() for axis in figure.axes for t in axis.texts])
        labels.append([t.get_text() for holder in [*figure.axes, figure] for t in legend_of(holder)])

    save, matplotlib.figure.Figure.savefig = matplotlib.figure.Figure.savefig, look
    try:
        plot(curves, 'x.png', smooth)
    finally:
        matplotlib.figure.Figure.savefig = save
    return [text for some in labels for text in some]


def legend_of(holder):
    legends = getattr(holder, 'legends', None) or [getattr(holder, 'legend_', None)]
    return [text for legend in legends if legend for text in legend.get_texts()]


def test_ema():
    assert ema([1.0, 5.0, 2.0], 0.0) == [1.0, 5.0, 2.0]
    averages = ema([1.0, 5.0, math.nan, 2.0], 0.5)
    assert averages[:2] == pytest.approx([1.0, (0.25 * 1 + 0.5 * 5) / 0.75]) and math.isnan(averages[2])
    assert averages[3] == pytest.approx((0.125 * 1 + 0.25 * 5 + 0.5 * 2) / 0.875)


def test_command_line_tool(run_tool, tmp_path):
    det = load('cascade/convnext_t')
    records = [r for e in range(1, 5) for r in (train_record(e * 10, epoch=e), coco(e / 10, e / 20, e))]
    write_session(tmp_path / 'work_dirs/cascade/a', det, records)
    write_session(tmp_path / 'work_dirs/cascade/b', det, [*records[:4], train_record(30, epoch=3) | {'loss': math.nan}])
    write_session(
        tmp_path / 'work_dirs/upernet/c', load('upernet/convnext_t'), [train_record(50), dict(mIoU=20.0, step=50)]
    )
    write_session(tmp_path / 'quiet', load('upernet/convnext_t'), [train_record(50), train_record(100)])

    process = run_tool('plot_run.py', 'work_dirs/cascade/a')
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == [
        'work_dirs/cascade/a: 4 of 36 epochs, box AP 40.0 (best 40.0), mask AP 20.0 (best 20.0)',
        'work_dirs/cascade/a/run.png',
    ]
    assert (tmp_path / 'work_dirs/cascade/a/run.png').read_bytes().startswith(b'\x89PNG')
    # Again, with the picture there: it is drawn anew. The same run twice is one.
    process = run_tool(
        'plot_run.py', 'work_dirs', 'work_dirs/cascade/a', 'quiet', '--out', 'all.svg', '--smooth', '0.9'
    )
    assert process.returncode == 0, process.stderr
    assert len(process.stdout.splitlines()) == 5 and 'loss nan' in process.stdout
    svg = (tmp_path / 'all.svg').read_text()
    assert svg.startswith('<?xml') and not (tmp_path / 'runs.png').exists()

    curves = read_curves([tmp_path / 'work_dirs'])
    labels = panel_texts(*curves)
    assert labels[:4] == ['detection: loss', labels[1], 'detection: box AP', 'detection: mask AP']
    assert [t for t in labels if t.startswith('segmentation: ')][::2] == ['segmentation: loss', 'segmentation: mIoU']
    assert {'paper 50.4', 'paper 43.7', 'paper 46.0', '40.0', 'cascade/a', 'cascade/b', 'upernet/c'} <= set(labels)
    assert 'paper 46.0' not in panel_texts(*read_curves([tmp_path / 'quiet']))
    assert panel_texts(curves[0])[:4] == ['loss', 'lr', 'box AP', 'mask AP']


def test_bad_input(run_tool, tmp_path):
    (tmp_path / 'empty').mkdir()
    write_session(tmp_path / 'begun', load('upernet/convnext_t'))
    write_session(tmp_path / 'run', load('upernet/convnext_t'), [train_record(50)])
    one_line_error(run_tool('plot_run.py', 'run', '--out', 'run.xyz'), 'run.xyz', 'png')
    one_line_error(run_tool('plot_run.py', 'run', '--out', 'gone/run.png'), 'gone/run.png')
    one_line_error(run_tool('plot_run.py', 'run', '--smooth', '1'), '--smooth 1')
    for folder, words in {
        'gone': "'gone'",
        'empty': 'empty holds no run',
        'begun': 'begun has logged no iteration',
        'run/20260101_120000': 'is one session of a run: give',
    }.items():
        with pytest.raises(UsageError, match=words):
            read_curves([tmp_path / 'run', tmp_path / folder if folder != 'gone' else folder])


MALFORMED = {  # scalars, a text log, the issue that is reported
    'an lr that is NaN': ('{"loss":1,"lr":NaN,"step":1,"epoch":1}', '', 'lr nan at 1 epochs is not drawn'),
    'an infinite lr': ('{"loss":1,"lr":Infinity,"base_lr":1,"step":1,"epoch":1}', '', 'lr inf at 1 epochs is not'),
    'numbers beyond scales': (
        '{"loss":1e308,"loss_a":1e308,"loss_b":1,"s0.loss_c":1e308,"s1.loss_c":1e308,"lr":1e308,"step":1,"epoch":1}',
        '',
        'loss 1e+308 at 1 epochs is not drawn, nor are 3 more values',
    ),
    'an infinite metric': (
        '{"loss":1,"lr":1,"step":1,"epoch":1}\n{"coco/bbox_mAP":Infinity,"step":1}',
        '',
        'box AP inf at step 1',
    ),
    'another metric': ('{"loss":1,"lr":1,"step":1,"epoch":1}\n{"a/mAP":-1e308,"step":1}', '', 'a/mAP -1e+308 at 1'),
    'scales of 0': ('{"loss":1,"lr":1,"step":1,"epoch":1}', '"layer_0_decay": {"lr_scale": 0.0', ''),
    'scales that are no numbers': ('{"loss":1,"lr":1,"step":1,"epoch":1}', '"layer_0_decay": {"lr_scale": 1.2.3', ''),
    'an lr of 0 in the table': (
        '{"loss":1,"lr":1,"step":1,"epoch":1}',
        'layer_wise lr decay, rate 0.7:\n  id  lr            parameters\n   0  0             2,040\n',
        '',
    ),
    'a rate of 0 in the table': (
        '{"loss":1,"lr":1,"step":1,"epoch":1}',
        'layer_wise lr decay, rate 0:\n  id  lr            parameters\n   0  1             2,040\n',
        '',
    ),
}


@pytest.mark.parametrize('case', MALFORMED)
@pytest.mark.parametrize('single_run', [True, False])
def test_values_that_cannot_be_drawn_are_reported(tmp_path, case, single_run):
    """The rest is drawn, alone and with another run, and what is not drawn is reported."""
    scalars, log, words = MALFORMED[case]
    config = Config(dict(train_cfg=dict(max_epochs=3), optim_wrapper=dict(optimizer=dict(lr=1.0))))
    write_session(tmp_path / 'a', config, [train_record(1, epoch=1)])
    place = tmp_path / 'a/20260101_120000'
    (place / 'vis_data/scalars.json').write_text(f'{scalars}\n{{"loss":2.0,"lr":0.5,"epoch":2,"step":2}}\n')
    (place / '20260101_120000.log').write_text(log)
    if not single_run:
        write_session(tmp_path / 'b', config, [train_record(1, epoch=1)])
    curves = read_curves([tmp_path])
    assert plot(curves, tmp_path / 'x.png', 0.5).read_bytes().startswith(b'\x89PNG')
    assert words in '; '.join(curves[0].run.issues) and bool(words) == bool(curves[0].run.issues)
