"""The ConvNeXt backbone for detection and segmentation.

Importing it registers everything with OpenMMLab that needs neither mmdet nor mmseg: the backbone `ConvNeXt`, its
initializer `PretrainedConvNeXt`, the optimizer-wrapper constructor `LayerDecayOptimWrapperConstructor` and the hook
`UpdateParamSchedulerHook`.
"""

try:
    from mmengine.config.utils import MODULE2PACKAGE
except ImportError as error:
    raise ImportError(f"{error}: run pip install --no-build-isolation 'convnext_dense[onedl]'") from error

from .backbone import ARCHS, ConvNeXt
from .errors import UsageError
from .fitting import UpdateParamSchedulerHook
from .layer_decay import LayerDecayOptimWrapperConstructor, layer_ids
from .weights import PretrainedConvNeXt, load_backbone

__version__ = '0.1.0'
__all__ = [
    'ARCHS',
    'ConvNeXt',
    'LayerDecayOptimWrapperConstructor',
    'PretrainedConvNeXt',
    'UpdateParamSchedulerHook',
    'UsageError',
    'layer_ids',
    'load_backbone',
]

# mmengine resolves `_base_ = 'convnext_dense::...'` only for the packages in its table.
MODULE2PACKAGE[__name__] = __name__
