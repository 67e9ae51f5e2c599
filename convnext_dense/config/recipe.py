"""Facts of a training config: recipe name, length, gradient accumulation, precision."""

from pathlib import Path

from mmengine.config import Config

from ..type_names import short_name

# Last parts of the keys of settings that depend on the machine and the location of the data, not on the recipe.
MACHINE_KEYS = ('batch_size', 'num_workers', 'persistent_workers', 'prefetch_factor', 'pin_memory')
MACHINE_KEYS += ('accumulative_counts', 'data_root', 'ann_file', 'img', 'img_path', 'seg_map_path', 'backend_args')
MACHINE_KEYS += ('dtype', 'loss_scale', 'checkpoint')


def recipe_id(path: str) -> tuple[str, ...]:
    """Return ('cascade', 'convnext_t') for .../configs/cascade/convnext_t.py; only the file name outside `configs`."""
    parts = Path(path).absolute().with_suffix('').parts
    folders = parts[:-1][::-1]
    return parts[len(parts) - 1 - folders.index('configs') :] if 'configs' in folders else parts[-1:]


def training_length(config: Config) -> float:
    """Return the length of a training in epochs, or in optimizer steps if the config is iteration-based."""
    if counts_epochs(config):
        return config['train_cfg']['max_epochs']
    return (config.get('train_cfg') or {}).get('max_iters', 0) / accumulative_counts(config)


def counts_epochs(config: Config) -> bool:
    """Return whether the length of a training is counted in epochs."""
    return 'max_epochs' in (config.get('train_cfg') or {})


def accumulative_counts(config: Config) -> int:
    """Return the number of iterations per optimizer step (gradient accumulation)."""
    return config.get('optim_wrapper', {}).get('accumulative_counts', 1)


def training_precision(config: Config) -> str:
    """Return the precision of a training: 'float16', 'bfloat16' or 'float32'."""
    wrapper = config.get('optim_wrapper', {})
    is_amp = short_name(wrapper.get('type')) == 'AmpOptimWrapper'
    return str(wrapper.get('dtype', 'float16')) if is_amp else 'float32'
