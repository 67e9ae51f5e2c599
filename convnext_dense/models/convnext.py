"""ConvNeXt: an image in, one normalized feature map per stage out ("A ConvNet for the 2020s", section 2).

In reading order: norms and stochastic depth, stem, block, downsampling, and the backbone with its loop over stages.
Each `forward` first asks `ops.dispatch` for a faster implementation on the CPU, which computes the same.

With `use_grn` it is ConvNeXt V2 ("ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders", section 3).
"""

import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit, initialize
from mmengine.registry import MODELS
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import UsageError
from ..ops import dispatch
from ..ops.block_params import GRN_EPS

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
CP_SCOPES = ('block', 'mlp')
NORM_EPS = 1e-6


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a feature map (N, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize each pixel; the result is channels_last."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@dispatch.register('output_norm')
class OutputNorm(LayerNorm2d):
    """The norm of a feature map that the backbone returns.

    Attributes:
        channels_last (bool): Whether feature maps on a CPU leave the backbone in channels_last; set by `optimize` if
            the modules after it read that format.
    """

    channels_last = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize each pixel of a feature map (N, C, H, W)."""
        out = None if self.channels_last and x.device.type == 'cpu' else dispatch.norm_forward(self, x)
        return super().forward(x) if out is None else out


class DropPath(nn.Module):
    """Stochastic depth per sample: in training a sample loses the branch with probability `drop_prob`.

    Args:
        drop_prob: Probability in [0, 1). The branches of the other samples are scaled by 1 / (1 - drop_prob).
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale each sample of a branch (N, ...)."""
        if not self.training or self.drop_prob == 0:
            return x
        return x * self.sample_scale(x).view(-1, *[1] * (x.ndim - 1)).to(x.dtype)

    def sample_scale(self, x: torch.Tensor) -> torch.Tensor:
        """Draw the factor of each sample's branch, (N,): 0, or what makes the mean 1."""
        keep_prob = 1 - self.drop_prob
        # Of a tensor of probabilities, not of a number: torch.compile would recompile for each drop_prob.
        return torch.full((len(x),), keep_prob, device=x.device).bernoulli() / keep_prob

    def extra_repr(self) -> str:
        """Show the drop probability."""
        return f'drop_prob={self.drop_prob:.3f}'


class GRN(nn.Module):
    """Global response normalization of ConvNeXt V2 (its section 3).

    It scales each channel of a feature map (N, H, W, C) by its norm relative to the mean of all channels' norms.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize a feature map (N, H, W, C)."""
        acc_dtype = torch.promote_types(x.dtype, torch.float32)  # squares of a whole feature map add up beyond fp16
        gx = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=acc_dtype)
        nx = gx / (gx.mean(-1, keepdim=True) + GRN_EPS)
        return self.gamma * (x * nx.to(x.dtype)) + self.beta + x


class PatchEmbed(nn.Sequential):
    """A convolution of patches that do not overlap, and a LayerNorm before or after it."""

    # Whether the blocks after it have a layer scale; set by `ConvNeXt`. The first of them, a float32 parameter, makes
    # the feature map float32 under autocast, so that the fast implementation need not round it to bfloat16 before.
    before_layer_scale = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed patches of p x p pixels: (N, C, H, W) -> (N, C', H // p, W // p)."""
        out = dispatch.patch_embed_forward(self, x)
        return super().forward(dispatch.to_channels_last(x)) if out is None else out


@dispatch.register('patch_embed', nn.Conv2d, LayerNorm2d)
class Stem(PatchEmbed):
    """Convolution of patches of 4 x 4 pixels, LayerNorm (section 2.3)."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__(nn.Conv2d(in_channels, channels, 4, stride=4), LayerNorm2d(channels, eps=NORM_EPS))


@dispatch.register('block', nn.Conv2d, nn.LayerNorm, nn.Linear, (nn.Identity, GRN), nn.Linear, DropPath)
class ConvNeXtBlock(nn.Module):
    """Block of a stage (figure 4).

    Depthwise convolution, LayerNorm, two Linears with GELU (V2: and GRN) between them, layer scale, stochastic depth,
    shortcut.

    Args:
        channels: Channels of the feature map.
        kernel_size: Side of the depthwise kernel, odd.
        drop_path: Drop probability of stochastic depth.
        layer_scale: Initial layer scale; 0 for none.
        use_grn: Whether to add global response normalization.
    """

    with_cp: bool | str = False  # True: recompute the whole block; 'mlp': all but the depthwise convolution

    def __init__(self, channels: int, kernel_size: int, drop_path: float, layer_scale: float, use_grn: bool = False):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.grn = GRN(4 * channels) if use_grn else nn.Identity()
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), float(layer_scale))) if layer_scale else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block on a feature map (N, C, H, W)."""
        out = dispatch.block_forward(self, x)
        if out is not None:
            return out
        with_cp = self.with_cp if torch.is_grad_enabled() else False
        # Not the block itself: its hooks would run twice.
        return checkpoint(self.residual, x, use_reentrant=False) if with_cp is True else self.residual(x, with_cp)

    def residual(self, x: torch.Tensor, with_cp: bool | str = False) -> torch.Tensor:
        """Reference implementation of the block."""
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = checkpoint(self.mlp, y, use_reentrant=False) if with_cp == 'mlp' else self.mlp(y)
        return x + self.drop_path(y.permute(0, 3, 1, 2))

    def mlp(self, y: torch.Tensor) -> torch.Tensor:
        """What follows the depthwise convolution, on a feature map (N, H, W, C)."""
        y = self.pwconv2(self.grn(F.gelu(self.pwconv1(self.norm(y)))))
        return y if self.gamma is None else self.gamma * y


@dispatch.register('patch_embed', LayerNorm2d, nn.Conv2d)
class Downsample(PatchEmbed):
    """LayerNorm, convolution of patches of 2 x 2 pixels (section 2.6)."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__(LayerNorm2d(in_channels, eps=NORM_EPS), nn.Conv2d(in_channels, channels, 2, stride=2))


@MODELS.register_module()
class ConvNeXt(BaseModule):
    """ConvNeXt backbone for dense prediction, with one LayerNorm per output ("A ConvNet for the 2020s", section 2).

    Parameter names are those of the original code. Stage i has stride 4 * 2**i and returns `norm{i}(x)`; the next stage
    continues from the un-normalized x. Neither stages after the last one in `out_indices` nor norms of stages that are
    not in it are built, so that every parameter receives a gradient.

    Args:
        arch (str | dict): A name in `ARCHS`, or `dict(depths=..., channels=...)` with any number of stages.
            Defaults to 'tiny'.
        in_channels (int): Number of channels of the input image. Defaults to 3.
        kernel_size (int): Side of the depthwise kernels, odd. Defaults to 7.
        drop_path_rate (float): Stochastic depth rate of the deepest block; it grows linearly from 0 at the first one.
            Defaults to 0.
        layer_scale_init_value (float): Initial layer scale; 0 builds the blocks without one. Defaults to 1.0, as in
            every dense recipe of the paper.
        use_grn (bool, optional): Build ConvNeXt V2: global response normalization and no layer scale. Defaults to
            False.
        out_indices (int | Sequence[int]): Stages whose feature maps are returned, in this order; negative indices count
            from the last stage. Defaults to (0, 1, 2, 3).
        frozen_stages (int): As in mmdet's backbones: -1 freezes nothing, 0 the stem, k the stem and the first k stages.
            Frozen modules stay in eval mode. Output norms are never frozen, because no ImageNet checkpoint fills them.
            Defaults to -1.
        with_cp (bool): Use activation checkpointing: the backward pass recomputes what `cp_scope` names instead of
            keeping it in memory. Defaults to False.
        cp_scope (str): What is recomputed: 'block', the whole block, or 'mlp', the block without its depthwise
            convolution, which saves most of the memory in less time. Defaults to 'block'.
        init_cfg (dict | list, optional): `dict(type='Pretrained', checkpoint=...)` with a pretrained weight name, a
            path or a URL, loaded by `convnext_dense.checkpoints`. Defaults to None: the paper's random initialization.
        grn (bool, optional): Deprecated spelling of `use_grn`.

    Attributes:
        depths (tuple[int, ...]): Number of blocks of every stage of the arch, built or not.
        channels (tuple[int, ...]): Number of channels of every stage of the arch, built or not.
        out_channels (tuple[int, ...]): Number of channels of each output, in the order of `out_indices`.
        out_strides (tuple[int, ...]): Stride in pixels of each output, in the order of `out_indices`.
        num_layers (int): N of layer-wise lr decay.

    Raises:
        UsageError: If an argument is invalid.
    """

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        kernel_size: int = 7,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1.0,
        use_grn: bool | None = None,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        cp_scope: str = 'block',
        init_cfg: dict | list | None = None,
        grn: bool | None = None,
    ):
        other_init_cfg, self.pretrained = _split_init_cfg(init_cfg)
        super().__init__(other_init_cfg)
        self.depths, self.channels = _resolve_arch(arch)
        self.out_indices = _resolve_indices(out_indices, len(self.depths))
        use_grn = _resolve_use_grn(use_grn, grn)
        with_cp, cp_scope = _resolve_cp(with_cp, cp_scope)
        n_stages = max(self.out_indices) + 1
        is_rate = _is_number(drop_path_rate) and 0 <= drop_path_rate < 1
        for name, value, valid, expected in (
            ('in_channels', in_channels, _is_int(in_channels, 1), 'a positive int'),
            ('kernel_size', kernel_size, _is_int(kernel_size, 1) and kernel_size % 2, 'an odd int, such as 7'),
            ('drop_path_rate', drop_path_rate, is_rate, 'a number in [0, 1)'),
            (
                'layer_scale_init_value',
                layer_scale_init_value,
                _is_number(layer_scale_init_value),
                'a number, such as 1.0',
            ),
            ('use_grn', use_grn, isinstance(use_grn, bool), 'True or False'),
            ('with_cp', with_cp, isinstance(with_cp, bool), 'True or False'),
            ('cp_scope', cp_scope, cp_scope in CP_SCOPES, ' or '.join(map(repr, CP_SCOPES))),
            ('frozen_stages', frozen_stages, _is_int(frozen_stages, -1, n_stages), f'an int from -1 to {n_stages}'),
        ):
            if not valid:
                raise UsageError(f'{name}={value!r} is invalid: give {expected}')
        self.frozen_stages = frozen_stages

        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        self.use_grn, layer_scale = use_grn, 0 if use_grn else layer_scale_init_value
        n_blocks = sum(self.depths)
        rates = [drop_path_rate * i / max(n_blocks - 1, 1) for i in range(n_blocks)]
        for i, (depth, c) in enumerate(zip(self.depths[:n_stages], self.channels)):
            self.downsample_layers.append(Downsample(self.channels[i - 1], c) if i else Stem(in_channels, c))
            self.downsample_layers[i].before_layer_scale = bool(layer_scale)
            first_block = sum(self.depths[:i])
            stage_rates = rates[first_block : first_block + depth]
            blocks = (ConvNeXtBlock(c, kernel_size, rate, layer_scale, use_grn) for rate in stage_rates)
            self.stages.append(nn.Sequential(*blocks))
        for i in sorted(self.out_indices):
            self.add_module(f'norm{i}', OutputNorm(self.channels[i], eps=NORM_EPS))
        self._set_cp(with_cp, cp_scope)

        self.apply(_init_weights)
        for module in self._frozen_modules():
            module.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the feature maps of the stages in `out_indices`.

        Args:
            x: Images, (N, in_channels, H, W), with H and W of at least 32 for four stages.

        Returns:
            For each stage in `out_indices`, in this order, a contiguous feature map (N, C_i, H_i, W_i); on a CPU
            channels_last after `optimize`. Sizes are rounded down: H_0 = H // 4, H_i = H_{i-1} // 2.
        """
        outputs = {}
        for i, (downsample, blocks) in enumerate(zip(self.downsample_layers, self.stages)):
            norm = getattr(self, f'norm{i}') if i in self.out_indices else None
            channels_last = getattr(norm, 'channels_last', False) and x.device.type == 'cpu'
            stage = dispatch.stage_forward(downsample, blocks, None if channels_last else norm, x)
            x, outputs[i] = (blocks(downsample(x)), None) if stage is None else stage
            if norm is not None and outputs[i] is None:
                out = norm(x)
                # mmcv's RoIAlign reads its input as contiguous without a check: other layouts give it garbage.
                outputs[i] = out if channels_last else out.contiguous()
        return tuple(outputs[i] for i in self.out_indices)

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Number of channels of each output, in the order of `out_indices`."""
        return tuple(self.channels[i] for i in self.out_indices)

    @property
    def out_strides(self) -> tuple[int, ...]:
        """Stride in pixels of each output, in the order of `out_indices`."""
        return tuple(4 * 2**i for i in self.out_indices)

    @property
    def with_cp(self) -> bool:
        """Whether the backward pass recomputes activations; can be set at any time."""
        return self._with_cp

    @with_cp.setter
    def with_cp(self, with_cp: bool) -> None:
        self._set_cp(*_resolve_cp(with_cp, self.cp_scope))

    @property
    def cp_scope(self) -> str:
        """What is recomputed with `with_cp`, 'block' or 'mlp'; can be set at any time."""
        return self._cp_scope

    @cp_scope.setter
    def cp_scope(self, cp_scope: str) -> None:
        self._set_cp(self.with_cp, cp_scope)

    def _set_cp(self, with_cp: bool, cp_scope: str) -> None:
        self._with_cp, self._cp_scope = with_cp, cp_scope
        for block in self._blocks():
            block.with_cp = with_cp and (True if cp_scope == 'block' else cp_scope)

    def compile_blocks(self, **compile_kwargs) -> None:
        """Compile each block with `torch.compile` when it first runs.

        Blocks of one width share the compiled code, and other input sizes need no other.

        Args:
            **compile_kwargs: Arguments of `torch.compile`, such as `backend`.
        """
        import torch._dynamo.config as config  # takes a second

        limit = 'recompile_limit' if hasattr(config, 'recompile_limit') else 'cache_size_limit'  # before torch 2.6
        setattr(config, limit, max(getattr(config, limit), 64))  # widths, with and without gradients, training or not
        for block in self._blocks():
            block.compile(dynamic=True, **compile_kwargs)

    def init_weights(self) -> None:
        """Run the initializers of `init_cfg` once, pretrained weights last."""
        already_initialized = self.is_init
        super().init_weights()
        if self.pretrained and not already_initialized:
            initialize(self, self.pretrained)

    def train(self, mode: bool = True) -> 'ConvNeXt':
        """Set training mode, or evaluation mode if not `mode`; frozen modules stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    @property
    def num_layers(self) -> int:
        """N of layer-wise lr decay: three blocks of the third stage make a layer, any other stage is one."""
        return sum(_layers_per_stage(self.depths))

    def layer_id(self, name: str, decay_type: str = 'layer_wise') -> int:
        """Return the layer id of a parameter for layer-wise lr decay (appendix A.3).

        Args:
            name: Name of a parameter of this backbone. It may hold what wrappers add (`_orig_mod`, `module`,
                `_checkpoint_wrapped_module`).
            decay_type: 'layer_wise', the paper's rule for COCO, or 'stage_wise', the one for ADE20K.

        Returns:
            0 for the stem, rising with depth, N + 1 for what is not part of the trunk, such as the output norms.

        Raises:
            UsageError: If `decay_type` is unknown.
        """
        if decay_type not in DECAY_TYPES:
            raise UsageError(f"decay_type='{decay_type}' is unknown: give one of {', '.join(DECAY_TYPES)}")
        root, *indices = (part for part in name.split('.') if part != 'module' and not part.startswith('_'))
        if root not in ('downsample_layers', 'stages'):
            return self.num_layers + 1
        stage = int(indices[0])
        if decay_type == 'stage_wise':
            return 0 if root == 'downsample_layers' else stage + 1
        first_layer = 1 + sum(_layers_per_stage(self.depths)[:stage])
        if root == 'downsample_layers':
            return 0 if stage == 0 else first_layer
        if stage != 2:
            return first_layer
        # What a user adds next to or after the blocks, such as an adapter, counts as the last block.
        last_block = self.depths[2] - 1
        block = next((int(part) for part in indices[1:] if part.isdigit()), last_block)
        return first_layer + min(block, last_block) // 3

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Return the depth of a parameter, as mmpretrain's `LearningRateDecayOptimWrapperConstructor` asks for it.

        The depths are those of `layer_id(..., 'layer_wise')`. They equal mmpretrain's own for a third stage of 7 to 9
        blocks and of 25 to 27 (nano to huge); mmpretrain always counts 6 or 12 layers, also where the third stage has
        fewer (atto, femto, pico: 5).

        Args:
            param_name: Name of the parameter in the whole model.
            prefix: What names of this backbone's parameters start with, such as 'backbone.'. Defaults to ''.

        Returns:
            The layer id (0 for the stem, `num_layers - 1` for output norms and for parameters outside the backbone),
            and the number of layers: N + 2, with stem and head.
        """
        in_backbone = param_name.startswith(prefix)
        layer_id = self.layer_id(param_name.removeprefix(prefix)) if in_backbone else self.num_layers + 1
        return layer_id, self.num_layers + 2

    def _blocks(self) -> list[ConvNeXtBlock]:
        """Return all blocks, also those inside wrappers of a stage or a block."""
        return [module for module in self.modules() if isinstance(module, ConvNeXtBlock)]

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [*self.downsample_layers[: max(self.frozen_stages, 1)], *self.stages[: self.frozen_stages]]


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _layers_per_stage(depths: Sequence[int]) -> list[int]:
    return [math.ceil(depth / 3) if i == 2 else 1 for i, depth in enumerate(depths)]


def _resolve_use_grn(use_grn: bool | None, grn: bool | None) -> bool:
    """Merge `use_grn` with its deprecated spelling."""
    if grn is None:
        return False if use_grn is None else use_grn
    if use_grn is not None and use_grn != grn:
        raise UsageError(f'use_grn={use_grn} and grn={grn} contradict each other: give use_grn only')
    print_log('ConvNeXt: the argument grn is deprecated; use use_grn', logger='current', level=logging.WARNING)
    return grn


def _resolve_cp(with_cp: bool | str, cp_scope: str) -> tuple[bool, str]:
    """Translate the deprecated `with_cp='mlp'`."""
    if with_cp != 'mlp':
        return with_cp, cp_scope
    message = "ConvNeXt: with_cp='mlp' is deprecated; use with_cp=True, cp_scope='mlp'"
    print_log(message, logger='current', level=logging.WARNING)
    return True, 'mlp'


def _split_init_cfg(init_cfg: dict | list | None) -> tuple[list, list]:
    """Separate pretrained weights from the other initializers.

    mmengine's 'Pretrained' loads nothing from an original file and only warns; this package's loader replaces it.
    """
    other_init_cfg, pretrained = [], []
    for cfg in [init_cfg] if isinstance(init_cfg, dict) else init_cfg or []:
        if not isinstance(cfg, dict):
            raise UsageError(f"init_cfg={init_cfg!r} is invalid: give dict(type='Pretrained', checkpoint=...)")
        init_type = cfg.get('type', 'Pretrained')
        if init_type is PretrainedInit or str(init_type).split('.')[-1] == 'Pretrained':
            pretrained.append({**cfg, 'type': 'PretrainedConvNeXt'})
        else:
            other_init_cfg.append(cfg)
    return other_init_cfg, pretrained


def _resolve_arch(arch: str | dict) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise UsageError(
                f"arch='{arch}' is unknown: give one of {', '.join(ARCHS)}, or dict(depths=..., channels=...)"
            )
        arch = ARCHS[arch]
    if not isinstance(arch, dict) or set(arch) != {'depths', 'channels'}:
        raise UsageError(f'arch={arch!r}: give a name ({", ".join(ARCHS)}) or dict(depths=..., channels=...)')
    depths, channels = (_as_tuple(arch[key]) for key in ('depths', 'channels'))
    if not depths or len(depths) != len(channels) or not all(_is_int(n, 1) for n in depths + channels):
        raise UsageError(f'arch: depths={depths} and channels={channels} must be positive ints, one per stage')
    return depths, channels


def _resolve_indices(out_indices: int | Sequence[int], n_stages: int) -> tuple[int, ...]:
    indices = _as_tuple(out_indices)
    if not indices or not all(_is_int(i, -n_stages, n_stages - 1) for i in indices):
        raise UsageError(
            f'out_indices={out_indices!r} is invalid: give ints from {-n_stages} to {n_stages - 1} (the arch has '
            f'{n_stages} stages)'
        )
    indices = tuple(i % n_stages for i in indices)
    if len(set(indices)) < len(indices):
        raise UsageError(f'out_indices={out_indices!r} names a stage twice: name each once')
    return indices


def _as_tuple(value) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
