"""What a config says about its training: recipe name, length, gradient accumulation, precision."""

from pathlib import Path

from mmengine.config import Config

from ..type_names import short_name

MACHINE_KEYS = (
    'batch_size',
    'num_workers',
    'persistent_workers',
    'prefetch_factor',
    'pin_memory',
    'accumulative_counts',
)
MACHINE_KEYS += (
    'data_root',
    'ann_file',
    'img',
    'img_path',
    'seg_map_path',
    'backend_args',
    'dtype',
    'loss_scale',
    'checkpoint',
)


def recipe_id(path: str) -> tuple[str, ...]:
    """What names a config among others: ('cascade', 'convnext_t') of .../configs/cascade/convnext_t.py, the file's name
    where it lies in no `configs`."""
    parts = Path(path).absolute().with_suffix('').parts
    folders = parts[:-1][::-1]
    return parts[len(parts) - 1 - folders.index('configs') :] if 'configs' in folders else parts[-1:]


def training_length(config: Config) -> float:
    """How long a config trains: epochs, or updates where it counts iterations."""
    train_cfg = config.get('train_cfg') or {}
    if 'max_epochs' in train_cfg:
        return train_cfg['max_epochs']
    return train_cfg.get('max_iters', 0) / accumulative_counts(config)


def accumulative_counts(config: Config) -> int:
    """Batches whose gradients a config adds up for one update."""
    return config.get('optim_wrapper', {}).get('accumulative_counts', 1)


def training_precision(config: Config) -> str:
    """'float16', 'bfloat16' or 'float32': what a config trains in."""
    wrapper = config.get('optim_wrapper', {})
    amp = short_name(wrapper.get('type')) == 'AmpOptimWrapper'
    return str(wrapper.get('dtype', 'float16')) if amp else 'float32'
