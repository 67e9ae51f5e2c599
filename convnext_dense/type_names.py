"""The types that configs name: with or without a scope, as classes, or derived from another."""

from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    EVALUATOR,
    HOOKS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    TASK_UTILS,
    TRANSFORMS,
    VISBACKENDS,
    VISUALIZERS,
    DefaultScope,
    Registry,
)

SCOPES = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'convnext_dense')
REGISTRIES = (TRANSFORMS, DATASETS, METRICS, HOOKS, OPTIM_WRAPPERS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS)
REGISTRIES += (PARAM_SCHEDULERS, LOOPS, MODELS, TASK_UTILS, DATA_SAMPLERS, EVALUATOR, VISUALIZERS, VISBACKENDS)


def short_name(kind: object) -> object:
    """The name of a type without its scope or module: 'CocoMetric' of 'mmdet.CocoMetric', of the class, and of the
    path of the class that a dumped config holds. Of what is no type, and of other packages' types, the value itself."""
    if isinstance(kind, type):
        kind = f'{kind.__module__}.{kind.__name__}'
    if not isinstance(kind, str) or kind.split('.')[0] not in SCOPES:
        return kind
    return kind.rsplit('.', 1)[-1]


def is_type(kind: object, registry: Registry, *names: str) -> bool:
    """Whether a config's `type`, text or class, is one of these classes of a registry or derived from one.

    What is not registered, such as a class of the user's own that nothing has imported, is judged by its name alone.
    """
    if short_name(kind) in names:
        return True
    found = class_of(kind, registry)
    return found is not None and any(base.__name__ in names for base in found.__mro__)


def class_of(kind: object, *registries: Registry) -> type | None:
    """The class that a config's `type` stands for in the default scope, of these registries or of any; None where none
    is registered under it."""
    if isinstance(kind, type):
        return kind
    if not isinstance(kind, str):
        return None
    scope = DefaultScope.get_current_instance()
    for registry in registries or REGISTRIES:
        with registry.switch_scope_and_registry(scope and scope.scope_name) as scoped:
            found = scoped.get(kind)
        if isinstance(found, type):
            return found
    return None
