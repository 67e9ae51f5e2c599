"""Options of a training: precision, checkpoint retention, unreadable images."""

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import METRICS, OPTIM_WRAPPERS

from ..errors import UsageError
from ..type_names import is_type
from .tree import as_list, iter_dicts

NO_AMP_DEVICES = ('cpu', 'mps')  # devices that mmengine's AmpOptimWrapper refuses


def set_precision(config: Config, amp_dtype: str | None) -> None:
    """Set the precision of training.

    Args:
        config: Config; it is changed in place.
        amp_dtype: 'float16' or 'bfloat16' for mixed precision, 'float32' for none; None to keep the config's.

    Raises:
        UsageError: If mixed precision is asked for without a GPU.
    """
    wrapper = config.optim_wrapper
    if amp_dtype == 'float32':
        wrapper.type = 'OptimWrapper'
        for key in ('dtype', 'loss_scale'):
            wrapper.pop(key, None)
    elif amp_dtype:
        if not is_type(wrapper.get('type'), OPTIM_WRAPPERS, 'AmpOptimWrapper'):  # it may be derived from it
            wrapper.type = 'AmpOptimWrapper'
        wrapper.dtype = amp_dtype
    if is_type(wrapper.get('type'), OPTIM_WRAPPERS, 'AmpOptimWrapper') and get_device() in NO_AMP_DEVICES:
        raise UsageError(
            f'mixed precision ({wrapper.get("dtype", "float16")}) needs a GPU and none was found: '
            'use --amp-dtype float32 to train in full precision'
        )


def set_checkpoint_retention(config: Config, max_keep_ckpts: int) -> None:
    """Keep the last checkpoints and the one of the best evaluation.

    Args:
        config: Config; it is changed in place.
        max_keep_ckpts: Number of latest checkpoints to keep.

    Raises:
        UsageError: If the number is not positive.
    """
    if max_keep_ckpts < 1:
        raise UsageError(f'--max-keep-ckpts {max_keep_ckpts}: give a positive number of checkpoints')
    if not config.get('default_hooks'):
        config.default_hooks = {}
    best = {} if not config.get('val_evaluator') else dict(save_best=best_metric(config.val_evaluator), rule='greater')
    hook = config.default_hooks.get('checkpoint') or dict(type='CheckpointHook', interval=1)
    config.default_hooks.checkpoint = {**best, **hook, 'max_keep_ckpts': max_keep_ckpts}


def best_metric(evaluator: object) -> str:
    """Return the name of the metric by which the best checkpoint is chosen.

    Args:
        evaluator: Config of an evaluator, or a list of them.

    Returns:
        The name of box AP or mIoU; 'auto', the first metric, for any other evaluator.
    """
    for metric in iter_dicts(evaluator):
        if is_type(metric.get('type'), METRICS, 'CocoMetric') and 'bbox' in as_list(metric.get('metric', 'bbox')):
            return f'{metric.get("prefix") or "coco"}/bbox_mAP'
        if is_type(metric.get('type'), METRICS, 'IoUMetric') and 'mIoU' in metric.get('iou_metrics', ['mIoU']):
            return 'mIoU'
    return 'auto'


def set_max_unreadable(config: Config, limit: str) -> None:
    """Set how many unreadable training images are replaced by others before the training stops.

    Args:
        config: Config; it is changed in place.
        limit: A number of images, or a percentage such as '0.5%'.

    Raises:
        UsageError: If the limit is neither.
    """
    try:
        value = float(limit.removesuffix('%')) / 100 if limit.endswith('%') else float(limit)
    except ValueError:
        value = -1.0
    if value < 0 or (value >= 1 and (limit.endswith('%') or value != int(value))):
        raise UsageError(f"--max-unreadable '{limit}': give a number of images, or a percentage below 100 such as 0.5%")
    config.max_unreadable = value
