"""ConvNeXt: an image in, one normalised feature map a stage out ("A ConvNet for the 2020s", section 2).

With `grn` it is ConvNeXt V2 ("ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders", section 3).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule, PretrainedInit, initialize
from mmengine.registry import MODELS
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import UsageError
from ..ops import dispatch

# Tiny to xlarge: the paper's section 3; atto to nano and huge: of ConvNeXt V2, table 9.
ARCHS = {
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
DECAY_TYPES = ('layer_wise', 'stage_wise')
NORM_EPS = 1e-6


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of an N x C x H x W map."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OutputNorm(LayerNorm2d):
    """The norm of a map that is emitted."""

    FAST = 'output', ()  # the function of `fast` that may run the module, and the classes of the children that it wants

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = dispatch.output(self, x)
        return super().forward(x) if out is None else out


class DropPath(nn.Module):
    """Stochastic depth: in training each sample loses the branch with probability `rate`, the others are scaled up."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0:
            return x
        return x * self.draw(x).view(-1, *[1] * (x.ndim - 1)).to(x.dtype)

    def draw(self, x: torch.Tensor) -> torch.Tensor:
        """The factor of each sample's branch: 0, or what makes the mean 1."""
        keep = 1 - self.rate
        # Of a tensor of probabilities, not of a number: torch.compile would compile anew for each rate.
        return torch.full((len(x),), keep, device=x.device).bernoulli() / keep

    def extra_repr(self) -> str:
        return f'rate={self.rate:.3f}'


class GRN(nn.Module):
    """Global response normalisation of V2: each channel of an N x H x W x C map by its share of the response."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)  # squares of a whole map add up beyond fp16
        response = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=precise)
        share = response / (response.mean(-1, keepdim=True) + NORM_EPS)
        return self.gamma * (x * share.to(x.dtype)) + self.beta + x


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, LayerNorm, two Linears with GELU (V2: and GRN) between, layer scale, stochastic depth
    (figure 4)."""

    FAST = 'block', (nn.Conv2d, nn.LayerNorm, nn.Linear, nn.Identity, nn.Linear, DropPath)
    with_cp: bool | str = False  # as in `ConvNeXt`, which sets it

    def __init__(self, channels: int, kernel_size: int, drop_path: float, layer_scale: float, grn: bool = False):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.grn = GRN(4 * channels) if grn else nn.Identity()
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), float(layer_scale))) if layer_scale else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = dispatch.block(self, x)
        if out is not None:
            return out
        with_cp = self.with_cp if torch.is_grad_enabled() else False
        # Not the block itself: its hooks would run twice.
        return checkpoint(self.residual, x, use_reentrant=False) if with_cp is True else self.residual(x, with_cp)

    def residual(self, x: torch.Tensor, with_cp: bool | str = False) -> torch.Tensor:
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = checkpoint(self.mlp, y, use_reentrant=False) if with_cp == 'mlp' else self.mlp(y)
        return x + self.drop_path(y.permute(0, 3, 1, 2))

    def mlp(self, y: torch.Tensor) -> torch.Tensor:
        y = self.pwconv2(self.grn(F.gelu(self.pwconv1(self.norm(y)))))
        return y if self.gamma is None else self.gamma * y


class Patchify(nn.Sequential):
    """A convolution of patches that do not overlap, and a LayerNorm before or after it."""

    # Whether the blocks after it have a layer scale; set by `ConvNeXt`. The first of them, a float32 parameter, makes
    # the feature map float32 under autocast, so that the fast form need not round it to bfloat16 before.
    before_layer_scale = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = dispatch.patches(self, x)
        return super().forward(dispatch.layout(x)) if out is None else out


class Stem(Patchify):
    """Convolution of patches of 4 x 4 pixels, LayerNorm (section 2.3)."""

    FAST = 'patches', (nn.Conv2d, LayerNorm2d)

    def __init__(self, in_channels: int, channels: int):
        super().__init__(nn.Conv2d(in_channels, channels, 4, stride=4), LayerNorm2d(channels, eps=NORM_EPS))


class Downsample(Patchify):
    """LayerNorm, convolution of patches of 2 x 2 pixels (section 2.6)."""

    FAST = 'patches', (LayerNorm2d, nn.Conv2d)

    def __init__(self, in_channels: int, channels: int):
        super().__init__(LayerNorm2d(in_channels, eps=NORM_EPS), nn.Conv2d(in_channels, channels, 2, stride=2))


dispatch.know(nn.Conv2d, nn.LayerNorm, nn.Linear, nn.Identity, nn.Sequential)
dispatch.know(LayerNorm2d, OutputNorm, DropPath, ConvNeXtBlock, Stem, Downsample)


@MODELS.register_module()
class ConvNeXt(BaseModule):
    """The ConvNeXt trunk for dense prediction. Parameter names are those of the original code.

    Stage i works at stride 4 * 2**i and emits `norm{i}(x)`; the trunk goes on from the un-normalised x. Stages after
    the last chosen one are not built, nor are norms of stages that are not chosen: every parameter gets a gradient.

    Args:
        arch: a name in `ARCHS`, or `dict(depths=..., channels=...)` with any number of stages.
        in_channels: channels of the image.
        kernel_size: side of the depthwise kernels, odd.
        drop_path_rate: stochastic depth of the deepest block; it grows linearly from 0 at the first.
        layer_scale_init_value: initial layer scale (1.0 in every dense recipe of the paper); 0 leaves it out.
        grn: ConvNeXt V2: global response normalisation, and no layer scale.
        out_indices: the stages to emit, an int or a sequence of ints, in the order wanted; negative ones count from
            the last stage.
        frozen_stages: as in mmdet's backbones: -1 freezes nothing, 0 the stem, k the stem and the first k stages.
            Frozen parts stay in eval mode. Output norms are never frozen: no checkpoint fills them.
        with_cp: what the backward pass computes again instead of keeping it: True each block, 'mlp' each block but its
            depthwise convolution, which saves most of the memory and less time.
        init_cfg: `dict(type='Pretrained', checkpoint=...)` with a known name, a path or a URL, loaded by
            `convnext_dense.checkpoints`; None keeps the paper's random initialisation.

    Raises:
        UsageError: an argument that cannot be used, in one line.
    """

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        kernel_size: int = 7,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1.0,
        grn: bool = False,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool | str = False,
        init_cfg: dict | list | None = None,
    ):
        others, self.pretrained = _split_init_cfg(init_cfg)
        super().__init__(others)
        self.depths, self.channels = _resolve_arch(arch)
        self.out_indices = _resolve_indices(out_indices, len(self.depths))
        n_stages = max(self.out_indices) + 1
        for name, value, good, wanted in (
            ('in_channels', in_channels, _is_int(in_channels, 1), 'a positive int'),
            ('kernel_size', kernel_size, _is_int(kernel_size, 1) and kernel_size % 2, 'an odd int, such as 7'),
            ('drop_path_rate', drop_path_rate, _is_rate(drop_path_rate), 'a number in [0, 1)'),
            (
                'layer_scale_init_value',
                layer_scale_init_value,
                _is_number(layer_scale_init_value),
                'a number, such as 1.0',
            ),
            ('grn', grn, isinstance(grn, bool), 'True or False'),
            ('with_cp', with_cp, isinstance(with_cp, bool) or with_cp == 'mlp', "True, False or 'mlp'"),
            ('frozen_stages', frozen_stages, _is_int(frozen_stages, -1, n_stages), f'an int from -1 to {n_stages}'),
        ):
            if not good:
                raise UsageError(f'{name}={value!r}: give {wanted}')
        self.frozen_stages = frozen_stages

        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        self.grn, layer_scale = grn, 0 if grn else layer_scale_init_value
        n_blocks = sum(self.depths)
        rates = [drop_path_rate * i / max(n_blocks - 1, 1) for i in range(n_blocks)]
        for i, (depth, c) in enumerate(zip(self.depths[:n_stages], self.channels)):
            self.downsample_layers.append(Downsample(self.channels[i - 1], c) if i else Stem(in_channels, c))
            self.downsample_layers[i].before_layer_scale = bool(layer_scale)
            first = sum(self.depths[:i])
            self.stages.append(
                nn.Sequential(
                    *(ConvNeXtBlock(c, kernel_size, rate, layer_scale, grn) for rate in rates[first : first + depth])
                )
            )
        for i in sorted(self.out_indices):
            self.add_module(f'norm{i}', OutputNorm(self.channels[i], eps=NORM_EPS))
        self.with_cp = with_cp

        self.apply(_init_weights)
        for part in self._frozen_parts():
            part.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """N x in_channels x H x W, H and W at least 32 for four stages -> N x C_i x H_i x W_i for each chosen stage,
        contiguous.

        Odd sizes floor: H_0 = H // 4, H_i = H_{i-1} // 2.
        """
        maps = {}
        for i, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages)):
            norm = getattr(self, f'norm{i}') if i in self.out_indices else None
            in_one_call = dispatch.stage(downsample, stage, norm, x)
            if in_one_call is not None:
                x, maps[i] = in_one_call
                continue
            x = downsample(x)
            x = stage(x)
            if norm is not None:
                # mmcv's RoIAlign reads its input as contiguous without a check: any other layout gives it garbage.
                maps[i] = norm(x).contiguous()
        return tuple(maps[i] for i in self.out_indices)

    @property
    def with_cp(self) -> bool | str:
        return self._with_cp

    @with_cp.setter
    def with_cp(self, with_cp: bool | str) -> None:
        self._with_cp = with_cp
        for block in self._blocks():
            block.with_cp = with_cp

    def compile_blocks(self, **settings) -> None:
        """Have `torch.compile` (`settings` are its own) make a unit of each block when it first runs; blocks of one
        width share it, and other sizes of the input need no other."""
        import torch._dynamo.config as config  # takes a second

        limit = 'recompile_limit' if hasattr(config, 'recompile_limit') else 'cache_size_limit'  # before torch 2.6
        setattr(config, limit, max(getattr(config, limit), 64))  # widths, with and without gradients, training or not
        for block in self._blocks():
            block.compile(dynamic=True, **settings)

    def init_weights(self) -> None:
        """Run the initializers of `init_cfg`, pretrained weights last, once."""
        first_time = not self.is_init
        super().init_weights()
        if first_time and self.pretrained:
            initialize(self, self.pretrained)

    def train(self, mode: bool = True) -> 'ConvNeXt':
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    @property
    def num_layers(self) -> int:
        """N of layer-wise lr decay: three blocks of the third stage make a layer, any other stage is one."""
        return sum(_layers_per_stage(self.depths))

    def layer_id(self, name: str, decay_type: str = 'layer_wise') -> int:
        """How deep the parameter `name` of this backbone lies: 0 for the stem, N + 1 for what is no part of the trunk.

        Names may hold what wrappers add (`_orig_mod`, `module`, `_checkpoint_wrapped_module`).
        layer_wise is the paper's rule for COCO, stage_wise the one for ADE20K (appendix A.3).
        """
        if decay_type not in DECAY_TYPES:
            raise UsageError(f"decay_type='{decay_type}': give one of {', '.join(DECAY_TYPES)}")
        kind, *where = (part for part in name.split('.') if part != 'module' and not part.startswith('_'))
        if kind not in ('downsample_layers', 'stages'):
            return self.num_layers + 1
        stage = int(where[0])
        if decay_type == 'stage_wise':
            return 0 if kind == 'downsample_layers' else stage + 1
        first = 1 + sum(_layers_per_stage(self.depths)[:stage])
        if kind == 'downsample_layers':
            return 0 if stage == 0 else first
        if stage != 2:
            return first
        last = self.depths[2] - 1  # with which goes what a user has put beside or behind the blocks, such as an adapter
        block = next((int(part) for part in where[1:] if part.isdigit()), last)
        return first + min(block, last) // 3

    def _blocks(self) -> list[ConvNeXtBlock]:
        """All blocks, also those within what wraps a stage or a block."""
        return [module for module in self.modules() if isinstance(module, ConvNeXtBlock)]

    def _frozen_parts(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [*self.downsample_layers[: max(self.frozen_stages, 1)], *self.stages[: self.frozen_stages]]


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _layers_per_stage(depths: Sequence[int]) -> list[int]:
    return [math.ceil(depth / 3) if i == 2 else 1 for i, depth in enumerate(depths)]


def _split_init_cfg(init_cfg: dict | list | None) -> tuple[list, list]:
    """The other initializers and the pretrained weights, for which mmengine's 'Pretrained', which loads nothing from
    an original file and only warns, gives way to our loader."""
    others, pretrained = [], []
    for cfg in [init_cfg] if isinstance(init_cfg, dict) else init_cfg or []:
        if not isinstance(cfg, dict):
            raise UsageError(f"init_cfg={init_cfg!r}: give dict(type='Pretrained', checkpoint=...)")
        kind = cfg.get('type', 'Pretrained')
        if kind is PretrainedInit or str(kind).split('.')[-1] == 'Pretrained':
            pretrained.append({**cfg, 'type': 'PretrainedConvNeXt'})
        else:
            others.append(cfg)
    return others, pretrained


def _resolve_arch(arch: str | dict) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise UsageError(
                f"arch='{arch}' is not known: give one of {', '.join(ARCHS)}, or dict(depths=..., channels=...)"
            )
        arch = ARCHS[arch]
    if not isinstance(arch, dict) or set(arch) != {'depths', 'channels'}:
        raise UsageError(f'arch={arch!r}: give a name ({", ".join(ARCHS)}) or dict(depths=..., channels=...)')
    depths, channels = (_as_tuple(arch[key]) for key in ('depths', 'channels'))
    if not depths or len(depths) != len(channels) or not all(_is_int(n, 1) for n in depths + channels):
        raise UsageError(f'arch: depths={depths} and channels={channels} must be positive ints, one each a stage')
    return depths, channels


def _resolve_indices(out_indices: int | Sequence[int], n_stages: int) -> tuple[int, ...]:
    indices = _as_tuple(out_indices)
    if not indices or not all(_is_int(i, -n_stages, n_stages - 1) for i in indices):
        raise UsageError(
            f'out_indices={out_indices!r}: give ints from {-n_stages} to {n_stages - 1}, for {n_stages} stages'
        )
    indices = tuple(i % n_stages for i in indices)
    if len(set(indices)) < len(indices):
        raise UsageError(f'out_indices={out_indices!r} names a stage twice: name each once')
    return indices


def _as_tuple(value) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_rate(value) -> bool:
    return _is_number(value) and 0 <= value < 1
