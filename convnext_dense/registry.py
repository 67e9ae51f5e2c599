"""The scope `convnext_dense`, which mmengine looks for in this module.

All our parts are in mmengine's root registries. But to what comes from `_base_ = 'convnext_dense::...'` mmengine gives
the scope `convnext_dense`, and then looks for mmdet's and mmseg's parts in it as well. So this scope is a window: it
shows our parts, whatever else has their names, and otherwise what the scope around it finds.
"""

from mmengine.registry import Registry, root

from .mmengine_internals import default_scopes

SCOPE = 'convnext_dense'


class ScopedView(Registry):
    def get(self, key: str):
        ours = self.root.module_dict.get(key)
        if ours is not None and ours.__module__.split('.')[0] == SCOPE:
            return ours
        scopes = [name for name in default_scopes() if name != SCOPE]
        if not scopes:
            return self.root.get(key)
        with self.root.switch_scope_and_registry(scopes[-1]) as registry:
            return registry.get(key)


SCOPED_REGISTRIES = [
    ScopedView(registry.name, parent=registry, scope=SCOPE)
    for registry in vars(root).values()
    if isinstance(registry, Registry)
]
