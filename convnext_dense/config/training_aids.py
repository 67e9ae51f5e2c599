"""Training aids behind flags: early stopping, weight averaging, frozen stages, images without objects."""

import argparse

from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, TRANSFORMS

from ..errors import UsageError
from ..models.convnext import ConvNeXt
from ..optim.layer_decay import MULT_KEYS, LayerDecayOptimWrapperConstructor
from ..type_names import class_of, is_type, short_name
from .options import argument_names
from .preflight import build_backbones
from .training import best_metric
from .tree import as_list, iter_dicts

EMA_DECAY = 0.999
EMA_GAMMA = 10  # after n steps the average spans n / 10 of them, at most 1 / (1 - decay)
MIN_IMPROVEMENT = {'mIoU': 0.1}  # a tenth of a point: mIoU is in percent, AP is a fraction
DEFAULT_MIN_IMPROVEMENT = 0.001


def add_training_aids(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this module, `class_balance` and `mixed_images`."""
    add = parser.add_argument_group('training aids').add_argument
    text = 'stop after this many evaluations in a row that are not better by a tenth of a point'
    add('--early-stop', type=int, metavar='PATIENCE', help=text)
    text = f'evaluate and save an exponential moving average of the weights (default decay: {EMA_DECAY})'
    add('--ema', type=float, nargs='?', const=EMA_DECAY, metavar='DECAY', help=text)
    text = 'freeze the stem and the first STAGES stages of the backbone, 0 the stem alone; all: the whole backbone'
    add('--freeze', metavar='STAGES', help=text)
    text = 'multiply the learning rate of the backbone by this, in addition to layer-wise decay'
    add('--backbone-lr', type=float, metavar='FACTOR', help=text)
    text = "detection: train on images without objects or leave them out (default: the recipe's)"
    add('--negatives', choices=('keep', 'drop'), help=text)
    text = 'detection: repeat images with rare classes; segmentation: give rare classes more weight in the loss'
    add('--balance', action='store_true', help=text)
    text = 'detection of boxes: train on mosaics of four images, but not in the last tenth of the epochs'
    add('--mosaic', action='store_true', help=text)
    text = 'instance segmentation: copy objects from another image into each image'
    add('--copy-paste', action='store_true', help=text)


def set_early_stopping(config: Config, patience: int) -> None:
    """Stop a training when its box AP or mIoU no longer improves.

    Args:
        config: Config; it is changed in place.
        patience: Consecutive evaluations without improvement.

    Raises:
        UsageError: If the number is not positive, or the config evaluates neither box AP nor mIoU.
    """
    if patience < 1:
        raise UsageError(f'--early-stop {patience}: give a positive number of evaluations')
    _check_no_hook(config, 'EarlyStoppingHook', '--early-stop')
    metric = best_metric(config.get('val_evaluator'))
    if not config.get('val_dataloader') or metric == 'auto':
        raise UsageError(
            '--early-stop needs an evaluation of box AP or mIoU: a CocoMetric or IoUMetric in val_evaluator'
        )
    min_delta = MIN_IMPROVEMENT.get(metric, DEFAULT_MIN_IMPROVEMENT)
    hook = dict(type='EarlyStoppingHook', monitor=metric, rule='greater', min_delta=min_delta, patience=patience)
    config.custom_hooks = [*(config.get('custom_hooks') or []), hook]


def set_ema(config: Config, decay: float) -> None:
    """Evaluate and save an exponential moving average of the weights.

    Args:
        config: Config without gradient accumulation; it is changed in place.
        decay: Decay of the average, which it reaches after a while.

    Raises:
        UsageError: If the decay is not between 0 and 1, or the config averages weights itself.
    """
    if not 0 < decay < 1:
        raise UsageError(f'--ema {decay:g}: give a decay between 0 and 1, such as {EMA_DECAY}')
    _check_no_hook(config, 'EMAHook', '--ema')
    momentum = float(f'{1 - decay:.6g}')
    hook = dict(type='EMAHook', ema_type='MomentumAnnealingEMA', momentum=momentum, gamma=EMA_GAMMA, interval=1)
    config.custom_hooks = [*(config.get('custom_hooks') or []), dict(**hook, update_buffers=True)]


def freeze_backbone(config: Config, stages: str) -> None:
    """Freeze the first stages of the backbone; its output norms, which have no pretrained weights, are trained.

    Args:
        config: Config; it is changed in place.
        stages: Number of stages; '0' for only the stem, 'all' for all stages.

    Raises:
        UsageError: If the value is neither, or the backbone cannot be frozen.
    """
    backbone = config.model.get('backbone') or {}
    cls = class_of(backbone.get('type'), MODELS)
    if cls is None or 'frozen_stages' not in argument_names(cls):
        raise UsageError('--freeze: the model has no backbone with frozen_stages')
    total = len(next(build_backbones(config.model)).stages) if issubclass(cls, ConvNeXt) else None
    if stages == 'all' and total is None:
        raise UsageError(f'--freeze all is for ConvNeXt: give the number of stages that {cls.__name__} freezes')
    if stages != 'all' and not stages.isdecimal():
        raise UsageError(f"--freeze '{stages}': give a number of stages, or all")
    number = total if stages == 'all' else int(stages)
    if total is not None and number > total:
        raise UsageError(f'--freeze {stages}: the backbone has {total} stages')
    backbone['frozen_stages'] = number


def scale_backbone_lr(config: Config, factor: float) -> None:
    """Multiply the learning rates of the backbone.

    Args:
        config: Config; it is changed in place.
        factor: Factor for the whole backbone, in addition to layer-wise decay.

    Raises:
        UsageError: If the factor is not positive, or the optimizer wrapper constructor has no setting for it.
    """
    if not 0 < factor < float('inf'):
        raise UsageError(f'--backbone-lr {factor:g}: give a positive factor; --freeze all does not train the backbone')
    wrapper = config.optim_wrapper
    settings = wrapper['paramwise_cfg'] = wrapper.get('paramwise_cfg') or {}
    constructor = wrapper.get('constructor') or 'DefaultOptimWrapperConstructor'
    # A parameter that matches one of custom_keys ignores the other multipliers, so a new key would disable them.
    adds_key = 'backbone' not in settings.get('custom_keys', {})
    if short_name(constructor) == LayerDecayOptimWrapperConstructor.__name__:
        settings['backbone_lr_mult'] = factor
    elif short_name(constructor) != 'DefaultOptimWrapperConstructor' or (adds_key and set(MULT_KEYS) & set(settings)):
        raise UsageError(
            f'--backbone-lr: give the factor in optim_wrapper.paramwise_cfg, where {short_name(constructor)} '
            'has a place for it'
        )
    else:
        keys = settings.setdefault('custom_keys', {})
        keys.setdefault('backbone', {})
        for name, key in keys.items():
            if name.startswith('backbone'):
                key['lr_mult'] = factor * key.get('lr_mult', 1.0)


def set_negatives(config: Config, negatives: str) -> None:
    """Train on images without objects, or leave them out.

    Args:
        config: Config whose images are not counted yet; it is changed in place.
        negatives: 'keep' or 'drop'.

    Raises:
        UsageError: If the config is not for detection.
    """
    if config.get('default_scope') != 'mmdet':
        raise UsageError('--negatives is for detection: segmentation trains on all images')
    keeps = negatives == 'keep'
    for part in iter_dicts(config.train_dataloader.dataset):
        if {'ann_file', 'filter_cfg'} & set(part):
            part['filter_cfg'] = {**(part.get('filter_cfg') or {}), 'filter_empty_gt': not keeps}
    for part in iter_dicts([config.train_dataloader, config.get('custom_hooks')]):
        if is_type(part.get('type'), TRANSFORMS, 'FilterAnnotations'):
            part['keep_empty'] = not keeps  # True in mmdet means that an image without boxes is dropped
        elif is_type(part.get('type'), TRANSFORMS, 'RandomCrop') and 'allow_negative_crop' in part and keeps:
            part['allow_negative_crop'] = True


def _check_no_hook(config: Config, name: str, flag: str) -> None:
    if any(is_type(hook.get('type'), HOOKS, name) for hook in as_list(config.get('custom_hooks'))):
        raise UsageError(f'{flag}: custom_hooks of the config has an {name} already: change it there')
