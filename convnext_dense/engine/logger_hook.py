"""A logger hook that survives a full disk."""

from mmengine.hooks import LoggerHook

from .atomic_files import warn_on_disk_full


class DiskFullTolerantLoggerHook(LoggerHook):
    """mmengine's hook; a full disk costs the metrics of a step, not the run."""

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        """Log training metrics."""
        with warn_on_disk_full(runner):
            super().after_train_iter(runner, *args, **kwargs)

    def after_val_epoch(self, runner, *args, **kwargs) -> None:
        """Log evaluation metrics."""
        with warn_on_disk_full(runner):
            super().after_val_epoch(runner, *args, **kwargs)
