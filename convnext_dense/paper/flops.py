"""Parameters and FLOPs as the paper counts them (tables 3 and 4): of the layers, on paper, without any weights."""

from dataclasses import dataclass

import torch
from mmcv.cnn import get_model_complexity_info
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from ..errors import UsageError

NUM_BOX_ROIS, NUM_MASK_ROIS = 1000, 100  # RoIs on which the paper's counts run each box head and each mask head


@dataclass(frozen=True)
class Complexity:
    """`parameters` of the whole model; `flops`, multiply-adds, of one image of `size`, width x height."""

    parameters: int
    flops: int
    size: tuple[int, int]


def count_flops(config: Config, size: tuple[int, int]) -> Complexity:
    """Count a detector or segmentor of a config on the meta device: nothing is allocated.

    FLOPs are those of convolutions, Linears, batch norms, ReLUs and poolings; LayerNorm, GELU, RoIAlign and
    interpolation count 0. A two-stage detector is counted with every box head on 1000 and every mask head on 100 RoIs,
    a segmentor without its auxiliary heads (which its parameters include).

    Raises:
        UsageError: the model is of another kind, or the size is too small for it.
    """
    init_default_scope(config.get('default_scope', 'mmengine'))
    model_cfg = {key: value for key, value in config.model.items() if key != 'pretrained'}
    with torch.device('meta'):
        try:
            model = MODELS.build(model_cfg)
        except (KeyError, TypeError, AssertionError) as error:
            raise UsageError(f'the model cannot be built: {str(error).splitlines()[0]}') from error
        parameters = sum(p.numel() for p in model.parameters())
        counted = _FlopsForward(model)
        for module in counted.modules():
            _adapt_for_mmcv_counter(module)
        width, height = size
        try:
            flops, _ = get_model_complexity_info(
                counted, (3, height, width), print_per_layer_stat=False, as_strings=False
            )
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f'{type(model).__name__} cannot be counted at {width}x{height}: {str(error).splitlines()[0]}; '
                'give a larger size, or channels that fit each other'
            ) from error
        except (TypeError, AttributeError) as error:
            raise UsageError(f'{type(model).__name__} cannot be counted: its heads do not take feature maps') from error
    return Complexity(parameters, int(flops), size)


class _UncountedLayerNorm(nn.LayerNorm):
    pass


def _adapt_for_mmcv_counter(module: nn.Module) -> None:
    """mmcv's counter goes by exact types: it knows no SyncBatchNorm, and counts LayerNorm, which the paper did not."""
    if isinstance(module, nn.SyncBatchNorm):
        module.__class__ = nn.BatchNorm2d
    elif type(module) is nn.LayerNorm:
        module.__class__ = _UncountedLayerNorm


class _FlopsForward(nn.Module):
    """A model as one forward pass from an image, RoIAlign left out: its output is fed to the heads as it would be."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        if hasattr(model, 'roi_head'):
            self.count = self._two_stage
        elif hasattr(model, 'bbox_head'):
            self.count = self._one_stage
        elif hasattr(model, 'decode_head'):
            self.count = self._segmentor
        else:
            raise UsageError(
                f'{type(model).__name__} cannot be counted: it has no roi_head, bbox_head or decode_head (mmdet, mmseg)'
            )

    def forward(self, image):
        self.count(self.model.extract_feat(image))
        return image

    def _one_stage(self, maps):
        self.model.bbox_head(maps)

    def _segmentor(self, maps):
        first, *others = _as_list(self.model.decode_head)
        output = first(maps)
        for head in others:  # each refines what the one before it found
            output = head(maps, output)

    def _two_stage(self, maps):
        self.model.rpn_head(maps)
        roi_head = self.model.roi_head
        for kind, n in (('bbox', NUM_BOX_ROIS), ('mask', NUM_MASK_ROIS)):
            extractors = _as_list(getattr(roi_head, f'{kind}_roi_extractor', None))
            for extractor, head in zip(extractors, _as_list(getattr(roi_head, f'{kind}_head', None))):
                side = extractor.roi_layers[0].output_size
                head(maps[0].new_empty(n, extractor.out_channels, *side))


def _as_list(module) -> list:
    if module is None:
        return []
    return list(module) if isinstance(module, nn.ModuleList) else [module]
