"""Schedules that step once per optimizer step under gradient accumulation."""

from mmengine.hooks import ParamSchedulerHook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class UpdateParamSchedulerHook(ParamSchedulerHook):
    """mmengine's hook where gradients are added up: schedules that count iterations count updates instead."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.optim_wrapper.should_update():
            super().after_train_iter(runner, batch_idx, data_batch, outputs)
