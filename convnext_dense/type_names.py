"""Resolve the `type` of a config: a name with or without scope, a class, or a subclass."""

from mmengine.registry import DefaultScope, Registry, root

SCOPES = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'convnext_dense')
TASKS = {'mmdet': 'detection', 'mmseg': 'segmentation'}  # by the default_scope of a config
REGISTRIES = [registry for registry in vars(root).values() if isinstance(registry, Registry)]


def short_name(type_: object) -> object:
    """Return the name of a type without its scope or module.

    Args:
        type_: `type` in a config: 'mmdet.CocoMetric', the class, or its full path, as in a dumped config.

    Returns:
        'CocoMetric'; the value itself if it is not a type or belongs to another package.
    """
    if isinstance(type_, type):
        type_ = f'{type_.__module__}.{type_.__name__}'
    if not isinstance(type_, str) or type_.split('.')[0] not in SCOPES:
        return type_
    return type_.rsplit('.', 1)[-1]


def is_type(type_: object, registry: Registry, *names: str) -> bool:
    """Whether a config's `type` is one of several classes or a subclass of one.

    A class that is not registered, such as a user's class that is not imported yet, is compared by name only.

    Args:
        type_: A name, with or without scope, or a class.
        registry: Registry in which a name is looked up.
        names: Names of the classes, without scope.
    """
    if short_name(type_) in names:
        return True
    cls = class_of(type_, registry)
    return cls is not None and any(base.__name__ in names for base in cls.__mro__)


def class_of(type_: object, *registries: Registry) -> type | None:
    """Return the class that a config's `type` refers to in the default scope.

    Args:
        type_: A name, with or without scope, or a class.
        registries: Registries in which a name is looked up. Defaults to all of `REGISTRIES`.

    Returns:
        The class; None if no class is registered under the name.
    """
    if isinstance(type_, type):
        return type_
    if not isinstance(type_, str):
        return None
    scope = DefaultScope.get_current_instance()
    for registry in registries or REGISTRIES:
        with registry.switch_scope_and_registry(scope and scope.scope_name) as scoped:
            cls = scoped.get(type_)
        if isinstance(cls, type):
            return cls
    return None
