"""Schedules that step once per optimizer step under gradient accumulation."""

from mmengine.hooks import ParamSchedulerHook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class UpdateParamSchedulerHook(ParamSchedulerHook):
    """Steps parameter schedulers once per optimizer step instead of once per iteration.

    Without gradient accumulation both are the same. Epoch-based schedulers are stepped as usual.
    """

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Step iteration-based schedulers if the iteration ended with an optimizer step."""
        if runner.optim_wrapper.should_update():
            super().after_train_iter(runner, batch_idx, data_batch, outputs)
