"""How much a training learns from, in one line before it starts, and a mark on metrics of too few images."""

from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from ..errors import count
from ..mmengine_internals import accumulation_steps
from .datasets import count_images, leaf_datasets

MIN_IMAGES, MIN_OBJECTS = 20, 50  # below, differences between metrics are mostly chance
WARMUP_RULES = ('Linear', 'Constant', 'QuadraticWarmup')  # what the names of schedulers begin with


class SummaryHook(Hook):
    """Logs images, optimizer steps, warmup and evaluations before a training, and marks metrics of few images."""

    priority = 'LOWEST'  # after the metrics are logged

    def before_train(self, runner) -> None:
        """Log the summary of the training."""
        if isinstance(runner.train_loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):  # others count as they like
            runner.logger.info(summarize_training(runner))

    def after_val_epoch(self, runner, metrics=None) -> None:
        """Mark the metrics of an evaluation during the training."""
        _mark_metrics(runner, runner.val_dataloader.dataset)

    def after_test_epoch(self, runner, metrics=None) -> None:
        """Mark the metrics of a test."""
        _mark_metrics(runner, runner.test_dataloader.dataset)


def summarize_training(runner) -> str:
    """Return a line with images, optimizer steps, those of warmup, and evaluations of a training.

    Args:
        runner: whose training loop is built.
    """
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
    """The optimizer steps in which a scheduler warms up; 0 if it does something else."""
    falls = getattr(scheduler, 'start_factor', 0) >= getattr(scheduler, 'end_factor', 1)
    if scheduler.begin > 0 or falls or not type(scheduler).__name__.startswith(WARMUP_RULES):
        return 0
    return round(scheduler.end * steps_per_epoch) if scheduler.by_epoch else max(scheduler.end - 1, 0)


def _num_evaluations(length: int, interval: int, begin: int) -> int:
    """How often a loop evaluates: at multiples of an interval and at its end."""
    interval, num_skipped = int(min(interval, length)), max(begin - 1, 0)
    return max(length // interval - num_skipped // interval, 0) + (length % interval > 0)


def describe_small_evaluation(dataset) -> str | None:
    """Return what an evaluation has too little of, such as '4 images and 17 objects'; None if it is enough.

    Args:
        dataset: that is evaluated on; only detection counts objects.
    """
    images, objects = len(dataset), 0
    if images >= MIN_OBJECTS:  # an object in each
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
    """Warn where metrics come from too few images or objects."""
    size = describe_small_evaluation(dataset)
    if size:
        runner.logger.warning(f'These metrics come from only {size}: differences between models are mostly chance')
