"""Layer-wise lr decay: parameter -> layer id -> lr (the paper's appendix A.3)."""

import copy
import inspect
from collections import defaultdict

from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

from ..errors import UsageError
from ..models.convnext import DECAY_TYPES


def layer_ids(model: nn.Module, decay_type: str) -> tuple[dict[str, int], int]:
    """The layer id of every parameter of `model` by name, and N + 1, the id of what lies in no backbone.

    A backbone is any module whose class has `layer_id(name, decay_type)` and `num_layers`, wherever it sits.

    Raises:
        UsageError: there is none, or several of different depth.
    """
    # The class is asked, not the object: wrappers such as torch.compile's pass unknown attributes on.
    backbones = [module for module in model.modules() if hasattr(type(module), 'layer_id')]
    depths = {backbone.num_layers for backbone in backbones}
    if len(depths) != 1:
        found = 'no module' if not depths else f'backbones of different depth (N = {sorted(depths)})'
        raise UsageError(
            f'layer-wise lr decay found {found} in {type(model).__name__}: it needs one backbone that '
            "says how deep its parameters are, such as type='ConvNeXt' of convnext_dense"
        )
    top = depths.pop() + 1
    # By object, not by name: a model may hold a part of its backbone under another name too.
    known = {
        id(p): backbone.layer_id(name, decay_type) for backbone in backbones for name, p in backbone.named_parameters()
    }
    ids = {name: known.get(id(p), top) for name, p in model.named_parameters()}
    return ids, top


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor:
    """Give each parameter the lr `decay_rate ** (N + 1 - id) * lr` and biases and vectors no weight decay.

    Args:
        optim_wrapper_cfg: as in any mmengine config: `optimizer` with `lr` and `weight_decay`, and the wrapper's own.
        paramwise_cfg: `dict(decay_rate=..., decay_type='layer_wise' or 'stage_wise')`. N follows from the backbone.

    Raises:
        UsageError: a setting that is missing or unknown; no backbone in the model.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        settings = dict(paramwise_cfg or {})
        if set(settings) != {'decay_rate', 'decay_type'}:
            raise UsageError(
                f'paramwise_cfg={settings}: give decay_rate and decay_type ({" or ".join(DECAY_TYPES)}), '
                'no more; the number of layers follows from the backbone'
            )
        self.decay_rate, self.decay_type = settings['decay_rate'], settings['decay_type']
        if not isinstance(self.decay_rate, (int, float)) or not 0 < self.decay_rate <= 1:
            raise UsageError(f'decay_rate={self.decay_rate!r}: give a number in (0, 1]')
        self.wrapper = dict(optim_wrapper_cfg)
        self.optimizer = dict(self.wrapper.pop('optimizer'))
        if 'lr' not in self.optimizer:
            raise UsageError('optim_wrapper.optimizer has no lr: layer-wise decay scales it, so give one')

    def __call__(self, model: nn.Module) -> OptimWrapper:
        ids, top = layer_ids(model, self.decay_type)
        lr, weight_decay = self.optimizer['lr'], self.optimizer.get('weight_decay', 0)
        groups = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                decays = parameter.ndim > 1 and not name.endswith('.bias')
                key = (ids[name], decays)
                scale = self.decay_rate ** (top - ids[name])
                groups.setdefault(
                    key,
                    dict(
                        params=[],
                        lr=lr * scale,
                        weight_decay=weight_decay if decays else 0.0,
                        lr_scale=scale,
                        layer_id=ids[name],
                    ),
                )
                groups[key]['params'].append(parameter)
        groups = [groups[key] for key in sorted(groups)]
        print_log(_format_param_groups(groups, self.decay_type, self.decay_rate), logger='current')
        return self._build(groups)

    def _build(self, groups: list[dict]) -> OptimWrapper:
        optimizer_type = self.optimizer['type']
        if isinstance(optimizer_type, str):
            optimizer_type = OPTIMIZERS.get(optimizer_type)
        if optimizer_type is None:
            raise UsageError(
                f"optim_wrapper.optimizer.type='{self.optimizer['type']}' is not known: give AdamW, SGD, ..."
            )
        # Not every optimizer calls its first argument `params`.
        first_argument = next(iter(inspect.signature(optimizer_type).parameters))
        optimizer = OPTIMIZERS.build({**self.optimizer, first_argument: groups})
        return OPTIM_WRAPPERS.build(
            {'type': 'OptimWrapper', **copy.deepcopy(self.wrapper)}, default_args=dict(optimizer=optimizer)
        )


def _format_param_groups(groups: list[dict], decay_type: str, decay_rate: float) -> str:
    lrs, counts = {}, defaultdict(int)
    for group in groups:
        lrs[group['layer_id']] = group['lr']
        counts[group['layer_id']] += sum(p.numel() for p in group['params'])
    rows = [f'{i:>4}  {lrs[i]:<10.4g}  {counts[i]:>12,}' for i in lrs]
    return '\n'.join([f'{decay_type} lr decay, rate {decay_rate}:', '  id  lr            parameters', *rows])
