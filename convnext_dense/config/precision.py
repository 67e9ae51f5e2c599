"""The precision of training."""

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import OPTIM_WRAPPERS

from ..errors import UsageError
from ..type_names import is_type

NO_AMP_DEVICES = ('cpu', 'mps')  # mmengine's AmpOptimWrapper refuses these


def set_precision(config: Config, amp_dtype: str | None) -> None:
    """Train in `amp_dtype` (None: as the recipe says).

    Raises:
        UsageError: mixed precision where only a CPU is there.
    """
    wrapper = config.optim_wrapper
    if amp_dtype == 'float32':
        wrapper.type = 'OptimWrapper'
        for key in ('dtype', 'loss_scale'):
            wrapper.pop(key, None)
    elif amp_dtype:
        if not is_type(wrapper.get('type'), OPTIM_WRAPPERS, 'AmpOptimWrapper'):  # it may be derived from it
            wrapper.type = 'AmpOptimWrapper'
        wrapper.dtype = amp_dtype
    if is_type(wrapper.get('type'), OPTIM_WRAPPERS, 'AmpOptimWrapper') and get_device() in NO_AMP_DEVICES:
        raise UsageError(
            f'mixed precision ({wrapper.get("dtype", "float16")}) needs a GPU and none was found: '
            '--amp-dtype float32 trains in full precision'
        )
