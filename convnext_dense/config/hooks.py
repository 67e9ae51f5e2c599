"""Settings of hooks from the command line: checkpoints to keep, unreadable images to tolerate."""

from mmengine.config import Config
from mmengine.registry import METRICS

from ..errors import UsageError
from ..type_names import is_type
from .tree import as_list, iter_dicts


def set_checkpoint_retention(config: Config, n: int | None) -> None:
    """Keep the last `n` checkpoints and the one of the best evaluation (None: as the config says).

    Raises:
        UsageError: `n` is not positive.
    """
    if n is None:
        return
    if n < 1:
        raise UsageError(f'--max-keep-ckpts {n}: give a positive number of checkpoints')
    if not config.get('default_hooks'):
        config.default_hooks = {}
    best = {} if not config.get('val_evaluator') else dict(save_best=_best_metric(config.val_evaluator), rule='greater')
    hook = config.default_hooks.get('checkpoint') or dict(type='CheckpointHook', interval=1)
    config.default_hooks.checkpoint = {**best, **hook, 'max_keep_ckpts': n}


def _best_metric(evaluator) -> str:
    """The figure by which the best checkpoint is chosen: box AP, mIoU, or the first that the evaluator gives."""
    for metric in iter_dicts(evaluator):
        if is_type(metric.get('type'), METRICS, 'CocoMetric') and 'bbox' in as_list(metric.get('metric', 'bbox')):
            return f'{metric.get("prefix") or "coco"}/bbox_mAP'
        if is_type(metric.get('type'), METRICS, 'IoUMetric') and 'mIoU' in metric.get('iou_metrics', ['mIoU']):
            return 'mIoU'
    return 'auto'


def set_max_unreadable(config: Config, given: str | None) -> None:
    """How many training images may turn out unreadable: a number of them, or a share such as 0.5% (None: 0.1 %).

    Raises:
        UsageError: it is neither.
    """
    if given is None:
        return
    try:
        limit = float(given.removesuffix('%')) / 100 if given.endswith('%') else float(given)
    except ValueError:
        limit = -1.0
    if limit < 0 or (limit >= 1 and (given.endswith('%') or limit != int(limit))):
        raise UsageError(f"--max-unreadable '{given}': give a number of images, or a share below all such as 0.5%")
    config.max_unreadable = limit
