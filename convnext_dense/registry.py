"""The scope `convnext_dense`, which mmengine expects in this module.

All classes of this package are in mmengine's root registries. But configs inherited through `convnext_dense::` get
`_scope_='convnext_dense'`, and mmengine then looks up *every* type in that scope, including those of mmdet and mmseg.
These registries therefore return this package's classes first and delegate everything else to the most recent other
default scope.
"""

from mmengine.registry import Registry

from .mmengine_internals import default_scopes
from .type_names import REGISTRIES

SCOPE = 'convnext_dense'


class ScopedView(Registry):
    """Registry of the scope `convnext_dense`: this package's classes, then those of the surrounding scope."""

    def get(self, key: str) -> object:
        """Return the class or function that is registered under a name; None if there is none."""
        own_class = self.root.module_dict.get(key)
        if own_class is not None and own_class.__module__.split('.')[0] == SCOPE:
            return own_class
        scopes = [name for name in default_scopes() if name != SCOPE]
        if not scopes:
            return self.root.get(key)
        with self.root.switch_scope_and_registry(scopes[-1]) as registry:
            return registry.get(key)


SCOPED_REGISTRIES = [ScopedView(registry.name, parent=registry, scope=SCOPE) for registry in REGISTRIES]
