"""Mixed training images: mosaics of four images, and copy-paste of objects from another image."""

import math

from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS, TRANSFORMS

from ..errors import UsageError
from ..type_names import is_type, short_name
from .channels import channel_reader
from .image_size import resize_scale
from .recipe import counts_epochs
from .training_set import leaf_dataset
from .tree import add_custom_imports, as_list, iter_dicts

MIX_TRANSFORMS = ('Mosaic', 'MixUp', 'CachedMixUp', 'CopyPaste')  # and their subclasses
MOSAIC_STEPS = ('Mosaic', 'RandomAffine')  # left out in the last epochs
MASK_KEYS = ('mask_head', 'loss_mask')  # of the parts of a model that are trained on masks
FRACTION_WITHOUT_MOSAICS = 0.1  # last part of the epochs; mmdet's RTMDet with 100 epochs has the same
# mmdet's thresholds for objects that a pasted one hides (change of the box in pixels, remaining mask area), for images
# of 1024 x 1024, and the power of the image's side with which they are scaled for smaller images.
OCCLUSION_THRESHOLDS = dict(bbox_occluded_thr=(10, 1), mask_occluded_thr=(300, 2))
COPY_PASTE_SIDE = 1024
COPY_PASTE = 'convnext_dense.datasets.copy_paste'  # imports mmdet, which this module must not


def set_mosaic(config: Config) -> str:
    """Train a detector on mosaics of four images in all but the last epochs, as YOLOX does, with mmdet's `Mosaic`.

    The mosaic replaces the image before the recipe's own augmentations. mmdet's cached variant would be faster, but a
    resumed run would lose its cache.

    Args:
        config: Config with its data and length; it is changed in place.

    Returns:
        One line for the log.

    Raises:
        UsageError: If the config also trains on masks, is iteration-based, or mixes images itself.
    """
    leaf = _unmixed_dataset(config, '--mosaic')
    if channel_reader(config):
        raise UsageError("--mosaic is for RGB: mmdet's Mosaic makes images of three channels")
    if _loads_masks(leaf) and any(key in part for part in iter_dicts(config.model) for key in MASK_KEYS):
        raise UsageError(
            "--mosaic is for boxes: mmdet's Mosaic does not move masks; use --copy-paste to mix images with masks"
        )
    scale, epochs = resize_scale(config), config.train_cfg.get('max_epochs')
    if not counts_epochs(config) or epochs < 2:
        problem = 'one epoch' if counts_epochs(config) else 'iterations instead of epochs'
        raise UsageError(
            f'--mosaic needs at least two epochs, as the last are without mosaics: the config has {problem}'
        )
    if scale is None:
        raise UsageError(
            "--mosaic needs dict(type='Resize', scale=(long, short)) in the test pipeline: it is the size of an image"
        )
    size = scale[1]
    steps = [
        dict(type='Mosaic', img_scale=(size, size), pad_val=114.0),
        dict(type='RandomAffine', border=(-size // 2, -size // 2)),  # as large as one image of the four
    ]
    for loader in _annotation_loaders(leaf):
        loader['with_mask'] = False  # the model is trained on boxes
    last_loader = max(i for i, step in enumerate(leaf['pipeline']) if _is_transform(step, 'LoadAnnotations'))
    _mix_images(config, leaf, last_loader + 1, steps)
    num_last_epochs = max(1, round(FRACTION_WITHOUT_MOSAICS * epochs))
    hook = dict(type='MosaicOffHook', num_last_epochs=num_last_epochs, skip_type_keys=list(MOSAIC_STEPS))
    config.custom_hooks = [*(config.get('custom_hooks') or []), hook]
    last_epochs = f'{num_last_epochs} epochs' if num_last_epochs > 1 else 'epoch'
    return f'mosaics of four images, but not in the last {last_epochs}'


def set_copy_paste(config: Config) -> str:
    """Copy objects from another image into each training image, after the recipe's augmentations of both images.

    Uses mmdet's `CopyPaste` (Ghiasi et al. 2021, Simple Copy-Paste).

    Args:
        config: Config with its data; it is changed in place.

    Returns:
        One line for the log.

    Raises:
        UsageError: If the config does not train on instance masks, or mixes images itself.
    """
    leaf = _unmixed_dataset(config, '--copy-paste')
    if not _loads_masks(leaf):
        raise UsageError(
            '--copy-paste needs the masks of objects, and here are boxes alone; use --mosaic to mix images with boxes'
        )
    for loader in _annotation_loaders(leaf):
        loader['poly2mask'] = True
    scale = resize_scale(config)
    ratio = min(1.0, math.sqrt(scale[0] * scale[1]) / COPY_PASTE_SIDE) if scale else 1.0
    thresholds = {key: max(1, round(value * ratio**power)) for key, (value, power) in OCCLUSION_THRESHOLDS.items()}
    _mix_images(config, leaf, len(leaf['pipeline']) - 1, [dict(type='AnySizeCopyPaste', **thresholds)])
    add_custom_imports(config, COPY_PASTE)
    return 'objects are copied from another image into each image'


def _unmixed_dataset(config: Config, flag: str) -> dict:
    """Return the config of the single training data set inside its wrappers, after the checks that both flags share."""
    if config.get('default_scope') != 'mmdet':
        raise UsageError(f'{flag} is for detection, not for segmentation')
    parts = [*iter_dicts(config.train_dataloader.dataset)]
    mixing = [part['type'] for part in parts if _is_transform(part, *MIX_TRANSFORMS)]
    mixing += [part['type'] for part in parts if is_type(part.get('type'), DATASETS, 'MultiImageMixDataset')]
    hooks = [hook.get('type') for hook in as_list(config.get('custom_hooks'))]
    mixing += [type_ for type_ in hooks if is_type(type_, HOOKS, 'PipelineSwitchHook', 'YOLOXModeSwitchHook')]
    if mixing:
        raise UsageError(f'{flag}: the config has {short_name(mixing[0])} already: change it there')
    leaf = leaf_dataset(config)
    if leaf is None or not any(_is_transform(step, 'LoadAnnotations') for step in leaf['pipeline']):
        raise UsageError(f'{flag} needs a single training data set whose pipeline has LoadAnnotations')
    if config.model.get('backbone', {}).get('in_channels', 3) != 3:
        raise UsageError(f'{flag} needs images of three channels: leave it out')
    return leaf


def _is_transform(step: dict, *names: str) -> bool:
    return is_type(step.get('type'), TRANSFORMS, *names)


def _annotation_loaders(leaf: dict) -> list[dict]:
    return [step for step in iter_dicts(leaf['pipeline']) if _is_transform(step, 'LoadAnnotations')]


def _loads_masks(leaf: dict) -> bool:
    return any(loader.get('with_mask') for loader in _annotation_loaders(leaf))


def _mix_images(config: Config, leaf: dict, index: int, steps: list[dict]) -> None:
    """Insert transforms that mix images into the pipeline of a data set; later transforms see mixed images.

    mmdet's wrapper raises an error if an image loses all of its objects instead of taking another one, so such images
    are kept.
    """
    pipeline = leaf['pipeline']
    leaf['pipeline'], mixing_steps = pipeline[:index], [*steps, *pipeline[index:]]
    for step in iter_dicts(mixing_steps):
        if _is_transform(step, 'FilterAnnotations'):
            step['keep_empty'] = False  # which in mmdet means that an image without boxes is kept
        elif _is_transform(step, 'RandomCrop'):
            step['allow_negative_crop'] = True
    loader = config.train_dataloader
    loader['dataset'] = dict(type='MultiImageMixDataset', dataset=loader['dataset'], pipeline=mixing_steps)
