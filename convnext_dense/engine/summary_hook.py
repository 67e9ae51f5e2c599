"""A summary of a training before it starts, and a warning about metrics from too few images."""

from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from ..errors import count
from ..mmengine_internals import accumulation_steps
from .datasets import count_images, leaf_datasets

MIN_IMAGES, MIN_OBJECTS = 20, 50  # with fewer, differences between metrics are mostly chance
WARMUP_RULES = ('Linear', 'Constant', 'QuadraticWarmup')  # prefixes of the class names of schedulers


class SummaryHook(Hook):
    """Logs images, optimizer steps, warmup and evaluations before a training, and warns about unreliable metrics."""

    priority = 'LOWEST'  # after the metrics are logged

    def before_train(self, runner) -> None:
        """Log the summary of the training."""
        if isinstance(runner.train_loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):  # others may count differently
            runner.logger.info(summarize_training(runner))

    def after_val_epoch(self, runner, metrics=None) -> None:
        """Warn about unreliable metrics of an evaluation during the training."""
        _mark_metrics(runner, runner.val_dataloader.dataset)

    def after_test_epoch(self, runner, metrics=None) -> None:
        """Warn about unreliable metrics of a test."""
        _mark_metrics(runner, runner.test_dataloader.dataset)


def summarize_training(runner) -> str:
    """Return a line with the images, optimizer steps, warmup steps and evaluations of a training."""
    loop, accumulation = runner.train_loop, accumulation_steps(runner.optim_wrapper)
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    steps = -(-loop.max_iters // accumulation)
    epochs = f' in {count(loop.max_epochs, "epoch")}' if by_epoch else ''
    parts = [f'training on {count_images(loop.dataloader.dataset):,} images: {count(steps, "optimizer step")}{epochs}']
    schedulers = runner.param_schedulers or []
    schedulers = schedulers if isinstance(schedulers, list) else [s for each in schedulers.values() for s in each]
    warmup = max((_warmup_steps(s, len(loop.dataloader) / accumulation) for s in schedulers), default=0)
    parts.append(f'{warmup:,} of them warmup')
    if runner.val_loop is not None:
        length = loop.max_epochs if by_epoch else loop.max_iters
        parts.append(count(_num_evaluations(length, loop.val_interval, loop.val_begin), 'evaluation'))
    return ', '.join(parts)


def _warmup_steps(scheduler, steps_per_epoch: float) -> int:
    """Return the number of warmup steps of a scheduler; 0 if it is not a warmup."""
    falls = getattr(scheduler, 'start_factor', 0) >= getattr(scheduler, 'end_factor', 1)
    if scheduler.begin > 0 or falls or not type(scheduler).__name__.startswith(WARMUP_RULES):
        return 0
    return round(scheduler.end * steps_per_epoch) if scheduler.by_epoch else max(scheduler.end - 1, 0)


def _num_evaluations(length: int, interval: int, begin: int) -> int:
    """Return the number of evaluations of a loop: at multiples of an interval and at its end."""
    interval, num_skipped = int(min(interval, length)), max(begin - 1, 0)
    return max(length // interval - num_skipped // interval, 0) + (length % interval > 0)


def describe_small_evaluation(dataset) -> str | None:
    """Describe an evaluation that is too small, such as '4 images and 17 objects'; None if it is large enough.

    Args:
        dataset: Data set of the evaluation; objects are only counted in detection.
    """
    images, objects = len(dataset), 0
    if images >= MIN_OBJECTS:  # with at least one object in each
        return None
    leaves = [leaf for leaf in leaf_datasets(dataset) if hasattr(leaf, 'get_data_info')]
    infos = [leaf.get_data_info(i) for leaf in leaves for i in range(len(leaf))]
    has_objects = any('instances' in info for info in infos)
    for info in infos:
        objects += sum(not instance.get('ignore_flag') for instance in info.get('instances') or ())
    if images >= MIN_IMAGES and (objects >= MIN_OBJECTS or not has_objects):
        return None
    return count(images, 'image') + (f' and {count(objects, "object")}' if has_objects else '')


def _mark_metrics(runner, dataset) -> None:
    """Warn if metrics come from too few images or objects."""
    size = describe_small_evaluation(dataset)
    if size:
        runner.logger.warning(f'These metrics come from only {size}: differences between models are mostly chance')
