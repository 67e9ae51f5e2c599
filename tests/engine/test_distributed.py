import torch
import torch.distributed as dist
from mmengine.optim import build_optim_wrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from convnext_dense.models.convnext import ConvNeXt

STEPS, BATCH = 3, 4


class PixelMean(nn.Module):
    """The backbone under a loss that is a plain mean over pixels, so that ranks can be averaged."""

    def __init__(self):
        super().__init__()
        self.backbone = ConvNeXt(dict(depths=(1, 1, 2, 1), channels=(8, 16, 24, 32)))

    def forward(self, images):
        return sum((m - 0.5).square().mean() for m in self.backbone(images))


def train(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """The weights after three steps of AdamW with layer decay, on this rank's part of the same batches."""
    torch.manual_seed(0)
    model = reference = PixelMean().double()  # Adam divides by the gradient's size: float32 would amplify rounding
    if world_size > 1:
        model = DistributedDataParallel(reference)
    wrapper = build_optim_wrapper(
        model,
        dict(
            constructor='LayerDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.05),
            paramwise_cfg=dict(decay_type='layer_wise', decay_rate=0.8),
        ),
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        images = torch.randn(BATCH, 3, 64, 64, generator=generator, dtype=torch.float64)
        wrapper.update_params(model(images.chunk(world_size)[rank]))
    return reference.state_dict()


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    torch.save(train(rank, 2), f'{folder}/{rank}.pth')
    dist.destroy_process_group()


def test_two_ranks_train_to_same_weights_as_one(tmp_path):
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=2)
    expected = train(0, 1)
    for rank in range(2):
        actual = torch.load(tmp_path / f'{rank}.pth')
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(actual[name], tensor, rtol=1e-9, atol=1e-9)
    torch.manual_seed(0)
    initial = PixelMean().double().state_dict()
    assert all(
        not torch.equal(initial[name], tensor) for name, tensor in expected.items()
    )  # every parameter was trained
