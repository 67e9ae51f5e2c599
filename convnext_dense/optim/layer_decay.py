"""Layer-wise learning rate decay: parameter -> layer id -> lr ("A ConvNet for the 2020s", appendix A.3)."""

import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real

from mmengine.logging import MMLogger, print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS
from torch import nn

from ..errors import UsageError
from ..models.convnext import DECAY_TYPES

# Keys of `paramwise_cfg` for mmengine's constructor.
MULT_KEYS = ('bias_lr_mult', 'bias_decay_mult', 'norm_decay_mult', 'flat_decay_mult', 'dwconv_decay_mult')
MULT_KEYS += ('dcn_offset_lr_mult',)
DEFAULT_CONSTRUCTOR_KEYS = ('custom_keys', *MULT_KEYS, 'bypass_duplicate')
LAYER_DECAY_KEYS = ('decay_rate', 'decay_type', 'num_layers', 'backbone_lr_mult')


def layer_ids(model: nn.Module, decay_type: str) -> tuple[dict[str, int], int]:
    """Return the layer id of every parameter of a model.

    A backbone is any module, at any place, whose class has `layer_id(name, decay_type)` and `num_layers`.

    Args:
        model: Model that contains one backbone, or several with the same number of layers N.
        decay_type: 'layer_wise' or 'stage_wise'.

    Returns:
        The layer ids by parameter name, and N + 1, the id of every parameter outside the backbones.

    Raises:
        UsageError: If the model has no backbone, or several with different numbers of layers.
    """
    # Checked on the class, not on the object: wrappers such as torch.compile's forward unknown attributes.
    backbones = [module for module in model.modules() if hasattr(type(module), 'layer_id')]
    depths = {backbone.num_layers for backbone in backbones}
    if len(depths) != 1:
        problem = 'no backbone' if not depths else f'backbones of different depth (N = {sorted(depths)})'
        raise UsageError(
            f'layer-wise lr decay found {problem} in {type(model).__name__}: it needs one that tells the depth of its '
            "parameters, such as type='ConvNeXt' of convnext_dense"
        )
    head_layer_id = depths.pop() + 1
    # By object, not by name: a model may also hold a part of its backbone under another name.
    backbone_ids = {
        id(p): backbone.layer_id(name, decay_type) for backbone in backbones for name, p in backbone.named_parameters()
    }
    return {name: backbone_ids.get(id(p), head_layer_id) for name, p in model.named_parameters()}, head_layer_id


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's optimizer wrapper constructor with layer-wise lr decay.

    The lr of a parameter is `lr * lr_mult * decay_rate ** (N + 1 - layer_id)`, where `lr_mult` is 1 unless one of
    mmengine's keys sets it. As in the paper, biases and parameters of fewer than two dimensions have no weight decay
    unless one of mmengine's keys says otherwise. Parameters with the same settings share a parameter group, which also
    has its `layer_id` and `lr_scale`, the factor of the layer decay.

    Args:
        optim_wrapper_cfg (dict): As for `DefaultOptimWrapperConstructor`; `optimizer` needs an `lr`.
        paramwise_cfg (dict): Fields of its own are

            - `decay_rate` (float): Factor between layers, in (0, 1]. Required.
            - `decay_type` (str): 'layer_wise' or 'stage_wise'. Required.
            - `backbone_lr_mult` (float): Factor for the lr of all layers of the backbone. Defaults to 1.
            - `num_layers` (int): Optional, because N follows from the backbone; a given value has to equal N.

            and those of `DefaultOptimWrapperConstructor` with their meaning there: `custom_keys`, `bias_lr_mult`,
            `bias_decay_mult`, `norm_decay_mult`, `flat_decay_mult`, `dwconv_decay_mult`, `dcn_offset_lr_mult` and
            `bypass_duplicate` (duplicates are always bypassed). A parameter that matches one of `custom_keys` follows
            that key alone: its weight decay is `weight_decay * decay_mult`, with a `decay_mult` of 1 by default, also
            for biases and norms.

    Raises:
        UsageError: If a field is missing, unknown or invalid, or if the model has no backbone.

    Example:
        >>> optim_wrapper = dict(
        ...     constructor='LayerDecayOptimWrapperConstructor',
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        ...     paramwise_cfg=dict(
        ...         decay_rate=0.7, decay_type='layer_wise', custom_keys={'bbox_head': dict(lr_mult=10.0)}))
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        paramwise_cfg = dict(paramwise_cfg or {})
        for key in ('lr', 'weight_decay'):
            value = optim_wrapper_cfg['optimizer'].get(key)
            if value is not None:
                _check_not_negative(f'optim_wrapper.optimizer.{key}', value)
        _check_paramwise_cfg(paramwise_cfg, optim_wrapper_cfg['optimizer'].get('weight_decay'))
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        if self.base_lr is None:
            raise UsageError('optim_wrapper.optimizer has no lr: layer-wise decay scales it, so give one')
        if self.base_wd is None:
            self.base_wd = 0.0
        self.decay_rate, self.decay_type = paramwise_cfg['decay_rate'], paramwise_cfg['decay_type']
        self.backbone_lr_mult = paramwise_cfg.get('backbone_lr_mult', 1.0)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer of a model and its wrapper.

        Args:
            model: Model whose parameters are optimized; those that need no gradient are skipped.

        Returns:
            The optimizer wrapper.
        """
        optimizer_type = self.optimizer_cfg['type']
        if isinstance(optimizer_type, str) and OPTIMIZERS.get(optimizer_type) is None:
            raise UsageError(f"optim_wrapper.optimizer.type='{optimizer_type}' is unknown: give AdamW, SGD, ...")
        return super().__call__(model)

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module: bool | float | None = None
    ) -> None:
        """Add the parameter groups of a module to a list.

        Args:
            params: The list, which is modified in place.
            module: The module whose parameters are added.
            prefix: Name of the module in the model; '' for the model itself.
            is_dcn_module: Whether the module is a child of a deformable convolution.
        """
        if prefix:  # mmengine's method calls this one for every child
            super().add_params(params, module, prefix, is_dcn_module)
            return
        with _silent_logger():
            super().add_params(params, module, prefix, is_dcn_module)
        params[:] = self._scaled_groups(params, module)
        print_log(_format_param_groups(params, self.decay_type, self.decay_rate), logger='current')

    def _scaled_groups(self, params: list[dict], model: nn.Module) -> list[dict]:
        """Apply layer decay to groups of one parameter each and merge those with the same settings.

        The order is by layer id, then by weight decay, so that it does not depend on names.
        """
        ids, head_layer_id = layer_ids(model, self.decay_type)
        self._check_against_model(model, n_layers=head_layer_id - 1)
        names = {id(p): name for name, p in model.named_parameters()}
        merged = {}
        for group in params:
            (parameter,) = group.pop('params')
            name = names.pop(id(parameter), None)
            if name is None:  # a duplicate
                continue
            lr_scale = self.decay_rate ** (head_layer_id - ids[name])
            apply_weight_decay = parameter.ndim > 1 and name.rpartition('.')[2] != 'bias'
            group.setdefault('weight_decay', self.base_wd if apply_weight_decay else 0.0)
            mult = self.backbone_lr_mult if ids[name] < head_layer_id else 1.0
            group['lr'] = group.get('lr', self.base_lr) * lr_scale * mult
            group |= dict(lr_scale=lr_scale, layer_id=ids[name])
            key = (ids[name], group['weight_decay'], group['lr'], repr(sorted(group.items())))
            merged.setdefault(key, dict(params=[], **group))['params'].append(parameter)
        return [merged[key] for key in sorted(merged)]

    def _check_against_model(self, model: nn.Module, n_layers: int) -> None:
        num_layers = self.paramwise_cfg.get('num_layers', n_layers)
        if num_layers != n_layers:
            raise UsageError(
                f'paramwise_cfg: num_layers={num_layers}, but the backbone has {n_layers} layers: leave num_layers out'
            )
        for key in self.paramwise_cfg.get('custom_keys', ()):
            if not any(key in name for name, _ in model.named_parameters()):
                message = f"paramwise_cfg.custom_keys: no parameter of the model has '{key}' in its name"
                print_log(message, logger='current', level=logging.WARNING)


def _check_paramwise_cfg(cfg: dict, weight_decay: float | None) -> None:
    """Raise UsageError unless `paramwise_cfg` has the required fields and only known ones, with valid values."""
    unknown = sorted(set(cfg) - {*LAYER_DECAY_KEYS, *DEFAULT_CONSTRUCTOR_KEYS})
    if unknown or not {'decay_rate', 'decay_type'} <= set(cfg):
        problem = f'{", ".join(map(str, unknown))} is unknown' if unknown else f'{cfg} is incomplete'
        raise UsageError(
            f'paramwise_cfg: {problem}: give decay_rate, decay_type ({" or ".join(DECAY_TYPES)}) and, of mmengine, any '
            f'of {", ".join(DEFAULT_CONSTRUCTOR_KEYS)}'
        )
    if not _is_number(cfg['decay_rate']) or not 0 < cfg['decay_rate'] <= 1:
        raise UsageError(f'decay_rate={cfg["decay_rate"]!r} is invalid: give a number in (0, 1]')
    custom_keys = cfg.get('custom_keys', {})
    if not isinstance(custom_keys, dict) or not all(isinstance(value, dict) for value in custom_keys.values()):
        raise UsageError(f"custom_keys={custom_keys!r} is invalid: give such as {{'bbox_head': dict(lr_mult=10)}}")
    items = [(key, value) for key, value in cfg.items() if key in (*MULT_KEYS, 'backbone_lr_mult')]
    for name, settings in custom_keys.items():
        if not isinstance(name, str):
            raise UsageError(f'paramwise_cfg.custom_keys has the key {name!r}: give a part of a parameter name')
        items += [(f'custom_keys.{name}.{key}', value) for key, value in settings.items() if key.endswith('_mult')]
    for key, value in items:
        _check_not_negative(f'paramwise_cfg.{key}', value)
        if key.endswith('decay_mult') and weight_decay is None:
            raise UsageError(
                f'paramwise_cfg.{key} multiplies a weight decay: give optim_wrapper.optimizer.weight_decay'
            )


def _check_not_negative(key: str, value: object) -> None:
    if not _is_number(value) or not 0 <= value < math.inf:
        raise UsageError(f'{key}={value!r} is invalid: give a number that is not negative')


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@contextmanager
def _silent_logger() -> Iterator[None]:
    """Silence the logger: mmengine logs a line for every setting of every parameter, before layer decay."""
    logger = MMLogger.get_current_instance()
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _format_param_groups(groups: list[dict], decay_type: str, decay_rate: float) -> str:
    """Format a table of the lr (a range if there are several) and the number of parameters of each layer."""
    lrs, counts = defaultdict(set), defaultdict(int)
    for group in groups:
        lrs[group['layer_id']].add(group['lr'])
        counts[group['layer_id']] += sum(p.numel() for p in group['params'])
    columns = {i: '-'.join(f'{lr:.4g}' for lr in sorted({min(values), max(values)})) for i, values in lrs.items()}
    rows = [f'{i:>4}  {columns[i]:<10}  {counts[i]:>12,}' for i in lrs]
    return '\n'.join([f'{decay_type} lr decay, rate {decay_rate}:', '  id  lr            parameters', *rows])
