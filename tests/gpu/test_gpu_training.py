"""Tests that need a GPU: the recipes' mixed precision, compiled blocks, and an NCCL process group."""

import math
import socket

import pytest
import torch
from mmengine.hooks import Hook

from convnext_dense.models.convnext import ConvNeXt
from helpers.gpu import gpu_environment
from helpers.processes import WITHOUT_WORKERS
from helpers.recipes import load
from helpers.tools import CONFIGS

pytestmark = pytest.mark.gpu

# Demo recipe -> the recipe whose precision it uses here, and settings for 16 optimizer steps.
DEMOS = {
    'demo/mask_rcnn': ('mask_rcnn/convnext_t', {'train_cfg.max_epochs': 4, 'train_dataloader.batch_size': 2}),
    'demo/upernet': ('upernet/convnext_t', {'train_cfg.max_iters': 16, 'train_dataloader.batch_size': 4}),
}
# Modules whose outputs, or for RoIAlign whose inputs, are fp32 under autocast.
FP32_HEADS = ('FP32RPNHead', 'FP32Shared2FCBBoxHead', 'FP32FCNMaskHead', 'FP32RoIExtractor')
AMP_LAYERS = (torch.nn.Conv2d, torch.nn.Linear)


def tensors_in(value) -> list[torch.Tensor]:
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return [value] if isinstance(value, torch.Tensor) else []


class DtypeHook(Hook):
    """Records the dtypes of outputs during training, the losses, and the initial weights."""

    def __init__(self):
        self.dtypes, self.losses, self.initial = {}, [], {}

    def before_train(self, runner):
        self.initial = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
        for module in runner.model.modules():
            kind = type(module).__name__
            if isinstance(module, AMP_LAYERS):
                module.register_forward_hook(lambda _, __, out: self.record('layers', out))
            elif kind == 'RoIAlign':
                module.register_forward_pre_hook(lambda _, args: self.record('RoIAlign', args[:2]))
            elif kind in FP32_HEADS or isinstance(module, ConvNeXt):
                module.register_forward_hook(lambda _, __, out, kind=kind: self.record(kind, out))

    def record(self, kind, value):
        if torch.is_autocast_enabled():  # not in evaluations
            self.dtypes.setdefault(kind, set()).update(str(x.dtype) for x in tensors_in(value))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(float(outputs['loss']))


def train(demo: str, data: str, work_dir: str, compile_blocks: bool) -> dict:
    """Train a demo recipe in its paper recipe's precision; return the facts that the test checks."""
    from torch._dynamo.utils import counters

    from convnext_dense.engine.build import compile_backbones, make_runner

    recipe, length = DEMOS[demo]
    wrapper_cfg = {key: load(recipe).optim_wrapper.get(key) for key in ('type', 'dtype', 'loss_scale')}
    config = load(demo)
    config.optim_wrapper.update({key: value for key, value in wrapper_cfg.items() if value is not None})
    config.merge_from_dict(length)
    for split in ('train', 'val', 'test'):
        loader = config[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = data
    for key in ('val_dataloader', 'val_cfg', 'val_evaluator'):
        config.pop(key)
    config.work_dir = work_dir
    runner = make_runner(config)
    if compile_blocks:
        compile_backbones(runner.model)
    hook = DtypeHook()
    runner.register_hook(hook)
    runner.train()
    params = dict(runner.model.named_parameters())
    return dict(
        wrapper=type(runner.optim_wrapper).__name__,
        device=next(iter(params.values())).device.type,
        parameter_dtypes={str(p.dtype) for p in params.values()},
        unchanged=[name for name, p in params.items() if torch.equal(p, hook.initial[name])],
        dtypes=hook.dtypes,
        losses=hook.losses,
        graphs=counters['stats']['unique_graphs'],
    )


def compare_compiled_features() -> list[float]:
    """The largest relative difference of each feature map, compiled against not."""
    torch.manual_seed(0)
    model = ConvNeXt('atto').cuda().eval()
    image = torch.randn(1, 3, 96, 128, device='cuda')
    with torch.no_grad():
        expected = model(image)
        model.compile_blocks()
        result = model(image)
    return [((r - e).norm() / e.norm()).item() for r, e in zip(result, expected)]


@pytest.mark.parametrize('compile_blocks', [False, True], ids=['eager', 'compiled'])
@pytest.mark.parametrize('demo', DEMOS)
def test_training_with_the_recipes_mixed_precision(demo, compile_blocks, run_on_gpu, data, tmp_path):
    """Losses are finite, all weights are fp32 and trained, and heads are fp32 under autocast."""
    result = run_on_gpu(train, demo, data, str(tmp_path / 'run'), compile_blocks)
    assert (result['wrapper'], result['device']) == ('AmpOptimWrapper', 'cuda')
    assert len(result['losses']) == 16 and all(map(math.isfinite, result['losses']))
    assert result['parameter_dtypes'] == {'torch.float32'} and not result['unchanged']
    dtypes = result['dtypes']
    assert dtypes.pop('layers') == {'torch.float16'}
    expected = {'ConvNeXt'} | ({*FP32_HEADS, 'RoIAlign'} if demo == 'demo/mask_rcnn' else set())
    assert dtypes == {kind: {'torch.float32'} for kind in expected}
    assert bool(result['graphs']) == compile_blocks


def test_compiled_blocks_give_the_same_features(run_on_gpu):
    distances = run_on_gpu(compare_compiled_features)
    assert len(distances) == 4 and max(distances) < 1e-3


def test_nccl_with_one_process(run_on_gpu, run_tool, data, tmp_path):
    """A process group of one, with SyncBN and mixed precision, trains, evaluates and saves."""
    recipe, _ = DEMOS['demo/upernet']
    with socket.socket() as free_socket:
        free_socket.bind(('127.0.0.1', 0))
        port = free_socket.getsockname()[1]
    rank_env = dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    process = run_tool(
        *('train.py', CONFIGS / 'demo/upernet.py', '--launcher', 'pytorch', '--work-dir', 'run', '--iters', 4),
        *('--cfg-options', f'optim_wrapper.type={load(recipe).optim_wrapper.type}', 'train_dataloader.batch_size=4'),
        *WITHOUT_WORKERS,
        SHAPES_ROOT=data,
        **rank_env,
        **gpu_environment(),
    )
    assert process.returncode == 0, process.stderr
    saved = torch.load((tmp_path / 'run/last_checkpoint').read_text().strip(), weights_only=False)
    assert saved['meta']['iter'] == 4 and 'loss_scaler' in saved['optimizer']
    assert load('demo/upernet').env_cfg.dist_cfg.backend == 'nccl'
