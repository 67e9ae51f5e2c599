"""Count parameters and FLOPs as the paper does (tables 3 and 4), without allocating weights."""

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from mmcv.cnn import get_model_complexity_info
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import BaseDataElement
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import UsageError
from ..models.meta import meta_device
from ..models.optimize import as_modules

NUM_BOX_ROIS, NUM_MASK_ROIS = 1000, 100  # RoIs per box head and mask head in the paper's counts
# Parts that only some published counts include: SyncBN (as BatchNorm), LayerNorm, and the two matmuls of attention
# (queries with keys, weights with values), for Swin with the padded windows of mmdet and mmseg.
OPTIONAL_PARTS = ('SyncBN', 'LayerNorm', 'attention')


@dataclass(frozen=True)
class Complexity:
    """Size and cost of a model.

    Attributes:
        parameters: Number of parameters of the whole model.
        flops: Multiply-accumulates (MACs) for one image.
        size: (width, height) of the image.
    """

    parameters: int
    flops: int
    size: tuple[int, int]


def build_on_meta(model_cfg: dict) -> nn.Module:
    """Build a model on the meta device, where its parameters take no memory."""
    with meta_device():
        return MODELS.build(model_cfg).to('meta')  # torch.Tensor(2, 3) still creates tensors on the CPU


def count_flops(
    config: Config, size: tuple[int, int], counted: Collection[str] = frozenset({'SyncBN', 'attention'})
) -> Complexity:
    """Count the parameters and FLOPs of a detector or segmentor on the meta device.

    FLOPs include convolutions, Linears, batch norms, ReLUs and poolings, and `counted`. GELU, RoIAlign and
    interpolation (also in deformable attention) count 0. In a two-stage detector, every box head runs on 1000 RoIs and
    every mask head on 100. DINO is counted without denoising queries, a segmentor without its auxiliary heads (although
    its parameters include them).

    Args:
        config: Config of the model.
        size: (width, height) of the image.
        counted: Which of `OPTIONAL_PARTS` to count; published counts differ in this (`PaperResult.counted`).

    Returns:
        Parameters and FLOPs.

    Raises:
        UsageError: If the model is not supported, or the image is too small for it.
    """
    init_default_scope(config.get('default_scope', 'mmengine'))
    model_cfg = {key: value for key, value in config.model.items() if key != 'pretrained'}
    try:
        model = build_on_meta(model_cfg)
    except (KeyError, TypeError, AssertionError) as error:
        raise UsageError(f'the model cannot be built: {str(error).splitlines()[0]}') from error
    attention = _AttentionCounter('attention' in counted)
    with torch.device('meta'):
        parameters = sum(p.numel() for p in model.parameters())
        flops_model = _FlopsForward(model)
        for module in flops_model.modules():
            _adapt_for_mmcv_counter(module, counted)
            attention.watch(module)
        width, height = size
        try:
            with _SizesOnCPU():
                flops, _ = get_model_complexity_info(
                    flops_model, (3, height, width), print_per_layer_stat=False, as_strings=False
                )
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f'{type(model).__name__} cannot be counted at {width}x{height}: {str(error).splitlines()[0]}; '
                'give a larger size, or channels that fit each other'
            ) from error
        except (TypeError, AttributeError) as error:
            raise UsageError(f'{type(model).__name__} cannot be counted: its heads do not take feature maps') from error
    return Complexity(parameters, int(flops) + attention.flops, size)


class _SizesOnCPU(TorchFunctionMode):
    """Keeps tensors of feature map sizes on the CPU, because deformable attention reads their values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and args[0].device.type == 'cpu':
            return args[0]
        is_division = func in (torch.Tensor.__truediv__, torch.Tensor.div)
        if is_division and args[0].is_meta and isinstance(args[1], torch.Tensor):
            args = args[0], args[1].to('meta')
        return func(*args, **(kwargs or {}))


class _AttentionCounter:
    """Counts attention with forward hooks; mmcv's counter only sees Linears, and none in nn.MultiheadAttention.

    Args:
        counts_products: Whether to count the matmuls of queries with keys and of weights with values.
    """

    def __init__(self, counts_products: bool):
        self.flops, self.counts_products = 0, counts_products

    def watch(self, module: nn.Module) -> None:
        """Count a module when it runs, if it is an attention."""
        if type(module).__name__ == 'WindowMSA':
            module.register_forward_hook(self._window)
        elif isinstance(module, nn.MultiheadAttention):
            module.register_forward_hook(self._multi_head, with_kwargs=True)
        elif type(module).__name__ == 'MultiScaleDeformableAttention':
            module.forward = partial(_project, module)

    def _window(self, module, inputs, output):
        windows, tokens, channels = inputs[0].shape
        self._add_products(windows * tokens, tokens, channels)

    def _multi_head(self, module, inputs, named_inputs, output):
        query, key = named_inputs['query'], named_inputs['key']
        channels, n, tokens = module.embed_dim, query[..., 0].numel(), key[..., 0].numel()
        self.flops += 2 * (n + tokens) * channels**2  # projections of queries and output, of keys and values
        self._add_products(n, tokens, channels)

    def _add_products(self, queries: int, keys: int, channels: int) -> None:
        self.flops += 2 * queries * keys * channels * self.counts_products


def _project(module: nn.Module, query, key=None, value=None, **kwargs) -> torch.Tensor:
    """Run the Linears of deformable attention without the sampling, which needs the values of its offsets."""
    module.value_proj(query if value is None else value)
    module.sampling_offsets(query)
    module.attention_weights(query)
    return module.output_proj(query)


class _UncountedLayerNorm(nn.LayerNorm):
    pass


class _UncountedSyncBN(nn.BatchNorm2d):
    pass


def _adapt_for_mmcv_counter(module: nn.Module, counted: Collection[str]) -> None:
    """Change the class of a norm so that mmcv's counter, which goes by exact types, counts it or not."""
    if isinstance(module, nn.SyncBatchNorm):  # does not run on the meta device
        module.__class__ = nn.BatchNorm2d if 'SyncBN' in counted else _UncountedSyncBN
    elif type(module) is nn.LayerNorm and 'LayerNorm' not in counted:
        module.__class__ = _UncountedLayerNorm


class _FlopsForward(nn.Module):
    """A model as a single forward pass from an image; instead of RoIAlign's result, heads get a tensor of its shape."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        if hasattr(model, 'roi_head'):
            self.forward_heads = self._two_stage
        elif hasattr(model, 'dn_query_generator'):
            self.forward_heads = self._dino
        elif hasattr(model, 'bbox_head'):
            self.forward_heads = self._one_stage
        elif hasattr(model, 'decode_head'):
            self.forward_heads = self._segmentor
        elif hasattr(model, 'panoptic_head'):
            self.forward_heads = self._mask_former
        else:
            raise UsageError(
                f'{type(model).__name__} cannot be counted: it has no roi_head, bbox_head, panoptic_head or '
                'decode_head (mmdet, mmseg)'
            )

    def forward(self, image):
        self.forward_heads(self.model.extract_feat(image))
        return image

    def _one_stage(self, features):
        self.model.bbox_head(features)

    def _dino(self, features):
        """Run every Linear on its number of tokens or queries; on meta there are no positions."""
        model, head, depth = self.model, self.model.bbox_head, self.model.decoder.num_layers
        tokens = torch.cat([feature.flatten(2) for feature in features], 2).mT
        queries = tokens.new_empty(1, model.num_queries, tokens.shape[2])
        for layer in model.encoder.layers:
            self._transformer_layer(layer, tokens, tokens)
        proposals = model.memory_trans_norm(model.memory_trans_fc(tokens))
        for branches in (head.cls_branches, head.reg_branches):
            branches[depth](proposals)
            for branch in branches[:depth]:
                branch(queries)
        for layer in model.decoder.layers:
            model.decoder.ref_point_head(queries.repeat(1, 1, 2))
            self._transformer_layer(layer, queries, tokens)
            model.decoder.norm(queries)

    def _transformer_layer(self, layer, queries, values):
        """Run a layer of Deformable DETR's encoder or decoder without its use of positions."""
        layer.self_attn(queries)
        if hasattr(layer, 'cross_attn'):
            layer.cross_attn(queries, value=values)
        layer.ffn(queries)
        for norm in layer.norms:
            norm(queries)

    def _mask_former(self, features):
        self.model.panoptic_head(features, [BaseDataElement(metainfo={})])

    def _segmentor(self, features):
        first_head, *refining_heads = as_modules(self.model.decode_head)
        with_samples = 'batch_data_samples' in inspect.signature(first_head.forward).parameters
        output = first_head(features, *[[BaseDataElement(metainfo={})]] * with_samples)
        for head in refining_heads:  # each refines the output of the previous one
            output = head(features, output)

    def _two_stage(self, features):
        self.model.rpn_head(features)
        roi_head = self.model.roi_head
        for kind, num_rois in (('bbox', NUM_BOX_ROIS), ('mask', NUM_MASK_ROIS)):
            extractors = as_modules(getattr(roi_head, f'{kind}_roi_extractor', None))
            for extractor, head in zip(extractors, as_modules(getattr(roi_head, f'{kind}_head', None))):
                side = extractor.roi_layers[0].output_size
                head(features[0].new_empty(num_rois, extractor.out_channels, *side))
