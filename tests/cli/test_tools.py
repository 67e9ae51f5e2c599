"""The tools as a user runs them: results, and one-line errors for bad input."""

import os
import pickle
import re
import runpy
import shutil
import signal
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader

from convnext_dense.checkpoints import load_checkpoint
from convnext_dense.cli.prepare import format_metrics
from convnext_dense.config import preflight
from convnext_dense.errors import UsageError
from convnext_dense.paper.work_dirs import read_runs
from helpers.paths import ROOT
from helpers.tools import CONFIGS, DEMO, DETECTOR, MEAN, STD, TEST, TRAIN, WITH, one_line_error
from helpers.weights import random_weights

BAD_INPUT = {  # tool and arguments -> words in the one line; the files are those of the fixture `files`
    'no config': ([TRAIN, 'configs/nothing.py'], ['configs/nothing.py']),
    'a part of a config': ([TRAIN, CONFIGS / '_base_/upernet_160k.py'], ['upernet_160k.py', 'train_dataloader']),
    'a broken config': ([TRAIN, 'broken.py'], ['broken.py', 'NameError', 'undefined']),
    'a missing module': ([TRAIN, 'import.py'], ['no_such_module']),
    'no data': ([TRAIN, CONFIGS / 'cascade/convnext_t.py', '--amp-dtype', 'float32'], ['data/coco', 'COCO_ROOT']),
    'no segmentation data': (
        [TRAIN, CONFIGS / 'upernet/convnext_t.py', '--amp-dtype', 'float32'],
        ['ADEChallengeData2016', 'ADE20K_ROOT'],
    ),
    'no annotations': ([TRAIN, DETECTOR, WITH, 'train_dataloader.dataset.ann_file=gone.json'], ['gone.json']),
    'no val annotations': ([TRAIN, DETECTOR, WITH, 'val_dataloader.dataset.ann_file=gone.json'], ['val', 'gone.json']),
    'no ground truth': ([TRAIN, DETECTOR, WITH, 'val_evaluator.ann_file=gone.json'], ['val', 'gone.json']),
    'no test data': (
        [TEST, DETECTOR, 'good.pth', WITH, 'test_dataloader.dataset.data_prefix.img=gone/'],
        ['test', 'gone'],
    ),
    'half an annotation file': ([TRAIN, DETECTOR, WITH, 'val_evaluator.ann_file=half.json'], ['half.json', 'JSON']),
    'no gpu': ([TRAIN, CONFIGS / 'mask_rcnn/convnext_t.py'], ['--amp-dtype float32']),
    'amp without gpu': ([TRAIN, DEMO, '--amp-dtype', 'bfloat16'], ['bfloat16', 'GPU']),
    'unknown arch': ([TRAIN, DETECTOR, WITH, 'model.backbone.arch=tinny'], ['tinny', 'tiny, small']),
    'wrong stages': ([TRAIN, DEMO, WITH, 'model.backbone.out_indices=[0,7]'], ['out_indices']),
    'stages of no kind': ([TRAIN, DEMO, WITH, 'model.backbone.out_indices=1.5'], ['out_indices']),
    'layer scale of no kind': ([TRAIN, DEMO, WITH, 'model.backbone.layer_scale_init_value=abc'], ['layer_scale']),
    'unknown argument': ([TRAIN, DEMO, WITH, 'model.backbone.drop_path=0.1'], ['drop_path']),
    'unknown optimizer': ([TRAIN, DEMO, WITH, 'optim_wrapper.optimizer.type=AdmaW'], ['AdmaW']),
    'no weights': ([TRAIN, 'mine.py'], ['gone.pth', 'convnext_tiny_1k_224']),
    'weights of another size': (
        [TRAIN, 'mine.py', WITH, 'model.backbone.init_cfg.checkpoint=pico.pth'],
        ['pico.pth', 'does not fit', 'another shape'],
    ),
    'weights without a name': ([TRAIN, 'mine.py', WITH, 'model.backbone.init_cfg.checkpoint=None'], ['None']),
    'weights as a text': ([TRAIN, DEMO, WITH, 'model.backbone.init_cfg=some.pth'], ['some.pth', 'checkpoint=']),
    'nothing to resume': ([TRAIN, DEMO, '--resume', 'gone.pth'], ['gone.pth']),
    'weights to resume': ([TRAIN, DEMO, '--resume', 'good.pth'], ['good.pth', 'load_from']),
    'no last checkpoint': ([TRAIN, DEMO, '--work-dir', '.', '--resume'], ['last_checkpoint', '--resume CHECKPOINT']),
    'a run exists': ([TRAIN, DEMO, '--work-dir', '.'], ['already contains a run', '--resume']),
    'another run exists': (
        [TRAIN, DEMO, '--work-dir', 'taken', '--resume', 'state.pth'],
        ['taken', 'another run than', 'state.pth'],
    ),
    'unknown head': ([TRAIN, DEMO, WITH, 'model.decode_head.type=UPerHed'], ['UPerHed']),
    'a head from an unsafe source': (
        [TRAIN, 'head.py', WITH, 'model.decode_head.init_cfg.checkpoint=open-mmlab://resnet50'],
        ['open-mmlab://resnet50'],
    ),
    'work dir of the config': ([TRAIN, 'folder/mine.py', '--work-dir', 'folder'], ['folder', '--work-dir']),
    'work dir a file': ([TRAIN, DEMO, '--work-dir', 'good.pth'], ['good.pth']),
    'no load_from': ([TRAIN, DEMO, WITH, 'load_from=gone.pth'], ['gone.pth']),
    'load_from of another size': ([TRAIN, DEMO, WITH, 'load_from=pico_model.pth'], ['pico_model.pth', 'backbone.']),
    'no launcher': ([TRAIN, DEMO, '--launcher', 'slurm'], ['SLURM_NTASKS', 'srun']),
    'no torchrun': ([TEST, DEMO, 'good.pth', '--launcher', 'pytorch'], ['WORLD_SIZE', 'torchrun']),
    'no checkpoint': ([TEST, DEMO, 'gone.pth'], ['gone.pth']),
    'an unreachable checkpoint': ([TEST, DEMO, 'http://127.0.0.1:9/w.pth'], ['http://127.0.0.1:9/w.pth', 'save it as']),
    'no checkpoint at all': ([TEST, DEMO, 'half.json'], ['half.json', 'JSON']),
    'a missing parameter': ([TEST, DEMO, 'fewer.pth'], ['fewer.pth', '1 missing (decode_head.conv_seg.bias)']),
    'an unknown parameter': ([TEST, DEMO, 'more.pth'], ['more.pth', '1 unknown (backbone.norm9.weight)']),
    'out exists': ([TEST, DEMO, 'good.pth', '--out', 'folder'], ["--out 'folder'"]),
    'show-dir exists': ([TEST, DEMO, 'good.pth', '--show-dir', 'folder'], ["--show-dir '", "folder'"]),
    'detections in no pickle': ([TEST, DETECTOR, 'good.pth', '--out', 'x.txt'], ['x.txt', '.pkl']),
}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """The files of the bad input: configs, checkpoints, an existing work dir."""
    folder = tmp_path_factory.mktemp('files')
    mine_py = f"_base_ = '{DEMO}'\nmodel = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='gone.pth')))"
    for name, text in {
        'mine.py': mine_py,
        'folder/mine.py': mine_py,
        'head.py': mine_py.replace('backbone', 'decode_head'),
        'taken/last_checkpoint': 'taken/iter_9.pth',
        'broken.py': 'model = undefined',
        'import.py': "custom_imports = dict(imports=['no_such_module'])",
        'half.json': '{"images": [',
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    init_default_scope('mmseg')
    config = Config.fromfile(DEMO)
    weights = MODELS.build(config.model).state_dict()
    config.model.backbone.arch = 'pico'
    config.model.decode_head.in_channels, config.model.auxiliary_head.in_channels = [64, 128, 256, 512], 256
    pico = MODELS.build(config.model)
    for name, content in {
        'good.pth': {'state_dict': weights},
        'fewer.pth': old_checkpoint({n: t for n, t in weights.items() if n != 'decode_head.conv_seg.bias'}),
        'more.pth': old_checkpoint({**weights, 'backbone.norm9.weight': torch.ones(1)}),
        'state.pth': {'state_dict': weights, 'meta': {}, 'optimizer': {}},
        'pico.pth': {'model': pico.backbone.state_dict()},
        'pico_model.pth': {'state_dict': pico.state_dict()},
    }.items():
        torch.save(content, folder / name)
    return folder


@pytest.mark.parametrize('case', BAD_INPUT)
def test_bad_input_is_a_one_line_error(data, files, tmp_path, monkeypatch, capsys, case):
    """Runs in this process, since nothing is built or trained; any other exception than a UsageError fails the test."""
    (tool, *arguments), words = BAD_INPUT[case]
    for file in files.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('SHAPES_ROOT', data)
    monkeypatch.setattr(sys, 'argv', [tool, *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')
    assert exit_info.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith('error: '), line
    for word in words:
        assert word in line, line
    assert not list(tmp_path.glob('work_dirs/**/*.pth'))


class Bomb:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return open, ('ran', 'w')


@pytest.mark.parametrize(
    'command',
    [
        [TRAIN, DEMO, '--resume', 'bomb.pth'],
        [TRAIN, DEMO, WITH, 'load_from=bomb.pth'],
        [TRAIN, 'mine.py', WITH, 'model.backbone.init_cfg.checkpoint=bomb.pth'],
        [TEST, DEMO, 'bomb.pth'],
        [TEST, DEMO, 'bomb.pth', '--multiscale'],
        ['weights.py', 'inspect', 'bomb.pth'],
        ['weights.py', 'convert', 'bomb.pth', 'out.pth', '--to', 'timm'],
    ],
    ids=lambda command: ' '.join(map(str, command[:1] + command[2:])),
)
def test_code_in_checkpoints_is_not_run(data, files, tmp_path, monkeypatch, capsys, command):
    content = torch.load(files / 'good.pth')
    content |= {'meta': {'bomb': Bomb()}, 'optimizer': {}}
    torch.save(content, tmp_path / 'bomb.pth')
    (tmp_path / 'mine.py').symlink_to(files / 'mine.py')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('SHAPES_ROOT', data)
    monkeypatch.setattr(sys, 'argv', list(map(str, command)))
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(ROOT / 'tools' / command[0]), run_name='__main__')
    assert exit_info.value.code == 2 and not (tmp_path / 'ran').exists()
    assert 'bomb.pth cannot be read safely' in capsys.readouterr().err.splitlines()[-1]
    if command[0] == TEST:
        with pytest.raises(UsageError):  # the tools have replaced mmengine's loader, too
            CheckpointLoader.load_checkpoint('bomb.pth')
        assert not (tmp_path / 'ran').exists()


def test_resume_does_not_run_the_config_in_a_checkpoint(data, files, tmp_path, monkeypatch, capsys):
    """mmengine's own resume does."""
    code = "open('ran', 'w')"
    for name, meta in {'cfg.pth': {'cfg': code}, 'config.pth': {'config': code}}.items():
        meta |= dict(epoch=0, iter=1)
        torch.save({**torch.load(files / 'good.pth'), 'meta': meta, 'optimizer': {}}, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('SHAPES_ROOT', data)
    for name in ('cfg.pth', 'config.pth'):
        monkeypatch.setattr(sys, 'argv', [TRAIN, str(DEMO), '--resume', name])
        with pytest.raises((SystemExit, KeyError)) as exit_info:  # the optimizer's state is missing in the second
            runpy.run_path(str(ROOT / 'tools' / TRAIN), run_name='__main__')
        if name == 'cfg.pth':
            assert exit_info.value.code == 2 and 'is not plain data' in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('case', ['no data', 'unknown arch', 'weights of another size', 'no checkpoint'])
def test_bad_input_ends_the_process_at_once(run_tool, data, files, tmp_path, case):
    (tool, *arguments), words = BAD_INPUT[case]
    for file in files.iterdir():
        (tmp_path / file.name).symlink_to(file)
    start = time.monotonic()
    process = run_tool(tool, *arguments, SHAPES_ROOT=data)
    one_line_error(process, *words)
    assert len(process.stderr.strip().splitlines()) == 1, process.stderr
    assert time.monotonic() - start < 60  # ten seconds on an idle machine; building the model would take longer


def test_argparse_errors_and_help(run_tool):
    assert run_tool('train.py').returncode == 2
    assert run_tool('train.py', 'x.py', '--no-such').returncode == 2
    process = run_tool('train.py', 'x.py', '--cfg-options', 'foo')
    assert process.returncode == 2 and "'foo': give KEY=VALUE" in process.stderr.splitlines()[-1]
    process = run_tool('test.py', '--help')
    assert process.returncode == 0 and '--show-dir' in process.stdout


@pytest.mark.parametrize('task', ['mask_rcnn', 'upernet'])
def test_train_test_and_resume(run_tool, data, tmp_path, short, task):
    config, env = CONFIGS / f'demo/{task}.py', dict(SHAPES_ROOT=data)
    if task == 'mask_rcnn':
        length = ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1', 'default_hooks.checkpoint.interval=1']
        longer_length, checkpoint_name = ['train_cfg.max_epochs=2', *length[1:]], 'epoch_{}.pth'
    else:
        length = ['train_cfg.max_iters=1', 'train_cfg.val_interval=1', 'default_hooks.checkpoint.interval=1']
        longer_length, checkpoint_name = ['train_cfg.max_iters=2', *length[1:]], 'iter_{}.pth'
    work_dir = tmp_path / 'run'
    train = ['train.py', config, '--work-dir', work_dir, '--cfg-options', *short]
    process = run_tool(*train, *length, **env)
    assert process.returncode == 0, process.stderr[-3000:]
    checkpoint = work_dir / checkpoint_name.format(1)
    saved = checkpoint.read_bytes()

    one_line_error(run_tool(*train, *length, **env), str(work_dir), '--resume')
    assert checkpoint.read_bytes() == saved

    process = run_tool(*train, *longer_length, '--resume', **env)
    assert process.returncode == 0, process.stderr[-3000:]
    assert (work_dir / checkpoint_name.format(2)).exists() and checkpoint.read_bytes() == saved

    test = ['test.py', config, checkpoint, '--work-dir', tmp_path / 'test', '--cfg-options', *short]
    process = run_tool(*test, '--show-dir', tmp_path / 'pictures', **env)
    assert process.returncode == 0, process.stderr[-3000:]
    assert re.search('box AP50 .*mask AP50' if task == 'mask_rcnn' else 'mIoU', process.stdout.splitlines()[-1])
    pictures = list((tmp_path / 'pictures').rglob('*.png'))
    assert len(pictures) == 4
    height, width = cv2.imread(str(pictures[0])).shape[:2]
    assert width >= 2 * height  # ground truth next to the prediction

    (run,) = read_runs(work_dir)
    assert run.done == run.length == 2 and len(run.evaluations) == 2 and run.total_batch == 4
    assert run.issues == [] and run.paper_result is None and run.precision == 'float32'
    ((record,),) = (run.eval_records for run in read_runs(tmp_path / 'test'))
    assert record.checkpoint == checkpoint.stem and record.metrics and record.config.model.type

    process_pico = run_tool(*test, 'model.backbone.arch=pico', **env)
    one_line_error(process_pico, str(checkpoint), 'does not fit', 'backbone')


def test_resume_from_a_checkpoint_of_stock_mmengine(run_tool, data, tmp_path, short):
    """It holds mmengine's and numpy's types, which torch refuses: the classic mmengine cannot resume with torch 2.6."""
    (tmp_path / 'killing.py').write_text(
        'import os, signal\n'
        'from mmengine.hooks import Hook\n'
        'from mmengine.registry import HOOKS\n'
        '@HOOKS.register_module()\n'
        'class Kill(Hook):\n'
        '    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):\n'
        '        if runner.iter == 4: os.kill(os.getpid(), signal.SIGKILL)\n'
    )
    (tmp_path / 'mine.py').write_text(
        f"_base_ = '{DEMO}'\n"
        "custom_imports = dict(imports=['convnext_dense', 'killing'], allow_failed_imports=False)\n"
        'train_cfg = dict(max_iters=6, val_interval=6)\n'
        'default_hooks = dict(checkpoint=dict(interval=3), logger=dict(interval=1))\n'
        "custom_hooks = [dict(type='Kill')]\n"
    )
    train = [TRAIN, 'mine.py', '--work-dir', 'run', WITH, *short]
    env = dict(SHAPES_ROOT=data, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    process = run_tool(*train, **env)
    assert process.returncode == -signal.SIGKILL, process.stderr[-3000:]
    with pytest.raises(pickle.UnpicklingError, match='HistoryBuffer'):
        torch.load(tmp_path / 'run/iter_3.pth', weights_only=True)
    loss_history = load_checkpoint(tmp_path / 'run/iter_3.pth')['message_hub']['log_scalars']['train/loss'].data[0]

    process = run_tool(*train, 'custom_hooks=[]', '--resume', **env)
    assert process.returncode == 0, process.stderr[-3000:]
    assert 'resumed epoch: 0, iter: 3' in process.stdout + process.stderr
    checkpoint = load_checkpoint(tmp_path / 'run/iter_6.pth')
    assert checkpoint['meta']['iter'] == checkpoint['optimizer']['state'][0]['step'] == 6
    history = checkpoint['message_hub']['log_scalars']['train/loss'].data[0]
    assert len(history) == 6 and len(loss_history) == 3 and (history[:3] == loss_history).all()
    torch.save(
        {key: checkpoint[key] for key in ('meta', 'state_dict')}, tmp_path / 'weights.pth'
    )  # as docs/install.md says
    assert torch.load(tmp_path / 'weights.pth', weights_only=True)['meta']['dataset_meta']['classes']


def test_load_from_a_model_with_other_classes(run_tool, data, files, tmp_path, short):
    weights = torch.load(files / 'good.pth')['state_dict']
    weights = {n: t[:3] if 'conv_seg' in n else t for n, t in weights.items()}
    torch.save({'state_dict': weights}, tmp_path / 'other_classes.pth')
    one_iter = ['train_cfg.max_iters=1', 'train_cfg.val_interval=1', 'optim_wrapper.optimizer.lr=1e-12']
    options = [*short, *one_iter, 'load_from=other_classes.pth']
    process = run_tool('train.py', DEMO, '--work-dir', 'run', '--cfg-options', *options, SHAPES_ROOT=data)
    assert process.returncode == 0, process.stderr[-3000:]
    loaded = torch.load(tmp_path / 'run/iter_1.pth', weights_only=False)['state_dict']
    torch.testing.assert_close(loaded['backbone.stages.2.3.gamma'], weights['backbone.stages.2.3.gamma'])
    torch.testing.assert_close(
        loaded['backbone.stages.1.0.dwconv.weight'], weights['backbone.stages.1.0.dwconv.weight']
    )


def test_out_writes_detections(run_tool, data, tmp_path, short):
    config = CONFIGS / 'demo/mask_rcnn.py'
    cfg = Config.fromfile(config)
    init_default_scope('mmdet')
    torch.save({'state_dict': MODELS.build(cfg.model).state_dict()}, tmp_path / 'w.pth')
    arguments = ['test.py', config, tmp_path / 'w.pth', '--work-dir', tmp_path / 'test']
    one_line_error(run_tool(*arguments, '--out', 'x.txt', SHAPES_ROOT=data), 'x.txt', '.pkl')
    process = run_tool(*arguments, '--out', 'x.pkl', '--cfg-options', *short, SHAPES_ROOT=data)
    assert process.returncode == 0, process.stderr[-3000:]
    import pickle

    assert len(pickle.loads((tmp_path / 'x.pkl').read_bytes())) == 4


def old_checkpoint(weights: dict) -> dict:
    """A checkpoint in the format of mmdet 2.11 and mmseg 0.11 with apex."""
    meta = dict(env_info='sys.platform: linux', seed=0, mmseg_version='0.11.0', config='model = dict()', epoch=36)
    meta.update(iter=160_000, CLASSES=('wall', 'building'), PALETTE=[[120, 120, 120], [180, 120, 120]], hook_msgs={})
    optimizer = dict(state={}, param_groups=[dict(lr=1e-4, params=[0], lr_scale=0.1, group_name='layer_0_decay')])
    amp = dict(loss_scaler0=dict(loss_scale=65536.0, unskipped=12))
    return dict(meta=meta, state_dict=weights, optimizer=optimizer, amp=amp)


def slide_inference(model, image: np.ndarray, crop=512, stride=341) -> np.ndarray:
    """Reference for mmseg's slide mode: windows over the resized image, overlapping logits averaged, argmax at the
    original size. `image` is (H, W, 3), BGR."""
    height, width = image.shape[:2]
    scale = min(2048 / max(height, width), 512 / min(height, width))
    size = int(width * scale + 0.5), int(height * scale + 0.5)
    rgb = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)[..., ::-1].astype(np.float32)
    x = torch.from_numpy((rgb - MEAN) / STD).permute(2, 0, 1)[None]
    total = torch.zeros(1, 150, *x.shape[2:])
    count = torch.zeros(1, 1, *x.shape[2:])
    tops, lefts = (range(0, max(n - crop, 0) + stride, stride) for n in x.shape[2:])
    for top in tops:
        for left in lefts:
            bottom, right = min(top + crop, x.shape[2]), min(left + crop, x.shape[3])
            window = (..., slice(max(bottom - crop, 0), bottom), slice(max(right - crop, 0), right))
            logits = model.decode_head(model.backbone(x[window]))
            total[window] += torch.nn.functional.interpolate(logits, x[window].shape[2:], mode='bilinear')
            count[window] += 1
    logits = torch.nn.functional.interpolate(total / count, (height, width), mode='bilinear')
    return logits.argmax(1)[0].numpy()


def test_slide_inference_equals_reference_loop(run_tool, tmp_path):
    rng = np.random.RandomState(0)
    root = tmp_path / 'ade'
    images = {'wide': (150, 230), 'tall': (211, 140)}
    for folder in ('images/validation', 'annotations/validation'):
        (root / folder).mkdir(parents=True)
    for name, (height, width) in images.items():
        picture = cv2.resize(rng.randint(0, 256, (9, 9, 3)).astype(np.uint8), (width, height))
        cv2.imwrite(str(root / f'images/validation/{name}.jpg'), picture)
        label = rng.randint(0, 151, (height, width)).astype(np.uint8)
        cv2.imwrite(str(root / f'annotations/validation/{name}.png'), label)
    config = Config.fromfile(CONFIGS / 'upernet/convnext_t.py')
    init_default_scope('mmseg')
    model = MODELS.build(config.model).eval()
    shapes_of = {n: tuple(p.shape) for n, p in model.named_parameters()}
    model.load_state_dict(random_weights(shapes_of), strict=False)
    for name, p in model.named_parameters():  # norms and biases must not decide the class everywhere
        if '.bn.' in name or name.endswith('conv_seg.bias'):
            torch.nn.init.constant_(p, float(name.endswith('bn.weight')))
    torch.save(old_checkpoint(model.state_dict()), tmp_path / 'w.pth')

    process = run_tool(
        'test.py',
        CONFIGS / 'upernet/convnext_t.py',
        tmp_path / 'w.pth',
        '--out',
        tmp_path / 'out',
        ADE20K_ROOT=str(root),
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    with torch.no_grad():
        for name in images:
            expected = slide_inference(model, cv2.imread(str(root / f'images/validation/{name}.jpg')))
            actual = cv2.imread(str(tmp_path / f'out/{name}.png'), cv2.IMREAD_UNCHANGED)
            np.testing.assert_array_equal(actual, expected + 1)  # 0 is ADE20K's unlabeled
            assert len(np.unique(expected)) > 3


@pytest.mark.parametrize('distribution', preflight.OPENMMLAB_DISTS)
def test_missing_package_names_fix_for_installed_distribution(monkeypatch, distribution):
    extra, mmcv = preflight.OPENMMLAB_DISTS[distribution]
    monkeypatch.setattr(preflight, 'distributions', lambda name: [distribution] * (name == distribution))
    monkeypatch.setitem(sys.modules, 'mmcv._ext', None)
    with pytest.raises(UsageError, match=f'pip install --no-build-isolation.* {mmcv}$') as error:
        preflight.check_installed('mmdet')
    assert '\n' not in str(error.value)
    monkeypatch.setitem(sys.modules, 'mmdet', None)
    with pytest.raises(UsageError, match=rf'mmdet.*convnext_dense\[{extra}\]'):
        preflight.check_installed('mmdet')
    assert f"'{mmcv}'" in (ROOT / 'setup.py').read_text()


def test_both_openmmlab_distributions_are_refused(monkeypatch):
    preflight.check_installed('mmdet')
    monkeypatch.setattr(preflight, 'distributions', lambda name: [name])
    with pytest.raises(UsageError, match='onedl-mmengine and mmengine'):
        preflight.check_installed('mmdet')


def test_format_metrics():
    metrics = {f'coco/{kind}_mAP{at}': 0.25 for kind in ('bbox', 'segm') for at in ('', '_50', '_75')}
    assert format_metrics(metrics).startswith('box AP 25.0  box AP50 25.0') and 'mask AP50 25.0' in format_metrics(
        metrics
    )
    assert format_metrics({'mIoU': 46.0, 'mAcc': 57.0, 'aAcc': 82.0}).startswith('mIoU 46.00')
    assert format_metrics({'other/score': 1.0}) == 'other/score 1.0'


@pytest.mark.parametrize('library', ['mmdet', 'mmseg'])
def test_recipes_train_with_mmdets_and_mmsegs_tools(run_tool, data, tmp_path, short, library):
    """The recipes train by mmdet's and mmseg's own tools, with nothing but their `custom_imports` line."""
    module = __import__(library)
    tool = f'{module.__path__[0]}/.mim/tools/train.py'
    config = CONFIGS / ('demo/mask_rcnn.py' if library == 'mmdet' else 'demo/upernet.py')
    length = ['train_cfg.max_epochs=1'] if library == 'mmdet' else ['train_cfg.max_iters=1']
    process = run_tool(tool, config, '--work-dir', tmp_path / 'run', '--cfg-options', *short, *length, SHAPES_ROOT=data)
    assert process.returncode == 0, process.stderr[-3000:]
    shutil.rmtree(tmp_path / 'run')
