"""The ConvNeXt backbone for detection and segmentation.

Importing it registers everything with OpenMMLab that needs neither mmdet nor mmseg: the backbone `ConvNeXt`, its
initializer `PretrainedConvNeXt`, the optimizer-wrapper constructor `LayerDecayOptimWrapperConstructor`, the hooks
`UpdateParamSchedulerHook` and `MosaicOffHook` and the backend `NoCodeWandbVisBackend`.
"""

try:
    from mmengine.config.utils import MODULE2PACKAGE
except ImportError as error:
    raise ImportError(
        f"{error}: run pip install --no-build-isolation 'convnext_dense[onedl]', or [openmmlab] for the classic line"
    ) from error

from . import _moved  # noqa: F401  (imports by old paths name the new one)
from .checkpoints import PretrainedConvNeXt, load_backbone
from .config.trackers import NoCodeWandbVisBackend, RunWandbVisBackend
from .engine.hooks import MosaicOffHook, UpdateParamSchedulerHook
from .errors import UsageError
from .models.convnext import ARCHS, ConvNeXt
from .models.optimize import optimize, optimize_for_inference
from .ops import export_ops  # noqa: F401  (operators that exported programs of detectors call)
from .optim.layer_decay import LayerDecayOptimWrapperConstructor, layer_ids

__version__ = '0.1.0'
__all__ = [
    'ARCHS',
    'ConvNeXt',
    'LayerDecayOptimWrapperConstructor',
    'MosaicOffHook',
    'NoCodeWandbVisBackend',
    'PretrainedConvNeXt',
    'RunWandbVisBackend',
    'UpdateParamSchedulerHook',
    'UsageError',
    'layer_ids',
    'load_backbone',
    'load_model',
    'optimize',
    'optimize_for_inference',
]

# mmengine resolves `_base_ = 'convnext_dense::...'` only for the packages in its table. By a module's name it finds the
# folder; by that of the distribution the classic one looks where an editable install has no files.
MODULE2PACKAGE[__name__] = f'{__name__}.errors'


def __getattr__(name: str) -> object:
    """Import what only predictions need when it is asked for: reading images takes more than the backbone does."""
    if name == 'load_model':
        from .inference.model import load_model

        return load_model
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
