"""Adapting a config to a checked data set: datasets, evaluators, classes and their number in every head."""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, MODELS, TRANSFORMS

from ..config.tree import EXTRA_PIPELINE_KEYS, add_custom_imports, as_list, flatten, iter_dicts
from ..errors import UsageError
from ..type_names import class_of, is_type, short_name
from . import SPLITS
from .request import CheckedDataset

CLASS_AGNOSTIC_HEADS = ('rpn_head', 'semantic_head')  # their num_classes is not the number of classes of the data set
COUNT_KEYS = ('num_classes', 'num_things_classes', 'num_stuff_classes')  # all classes are things
COLOR_TYPES = (None, 'color', 'grayscale')  # with which mmcv applies EXIF rotation
MASK_BRANCH_KEYS = ('mask_head', 'mask_roi_extractor', 'mask_iou_head')
# Models that cannot be trained without masks, unless they make masks from boxes; and transforms that need masks.
MASK_MODELS = ('SingleStageInstanceSegmentor', 'MaskFormer', 'RTMDetInsHead')
MASK_MODELS += ('MaskScoringRoIHead', 'PointRendRoIHead', 'SCNetRoIHead')
MASKS_FROM_BOXES = 'BoxInstDataPreprocessor'
MASK_TRANSFORMS = ('CopyPaste', 'InstaBoost')
# Arguments of a dataset that the recipe decides, and those that follow from the data set.
RECIPE_KEYS = ('pipeline', 'test_mode', 'filter_cfg', 'indices', 'serialize_data', 'lazy_init', 'max_refetch')
RECIPE_KEYS += ('return_classes', '_scope_')
DATA_KEYS = ('type', 'data_root', 'ann_file', 'data_prefix', 'metainfo')
# Transforms that load annotations which a custom data set does not have, and what they load.
UNSUPPORTED_LOADERS = {
    'LoadPanopticAnnotations': 'panoptic segmentation',
    'LoadProposals': 'proposals of another model',
    'LoadTrackAnnotations': 'videos',
    'LoadTextAnnotations': 'texts',
    'LoadDepthAnnotation': 'depth',
}
PAIRED_DATASET = 'convnext_dense.datasets.paired_dataset'  # imports mmseg, which this module must not
OTHER_COCO_METRICS = ('LVISMetric', 'CocoVideoMetric')  # derived from CocoMetric, for other annotations


def apply_dataset(config: Config, data: CheckedDataset, files: Mapping[str, str], keep_mask_branch: bool) -> None:
    """Adapt a config to a checked data set, in place.

    Args:
        config: config of a recipe.
        data: the data set.
        files: file with the annotations of each split; a split without one uses val's.
        keep_mask_branch: whether the model keeps its mask branch.

    Raises:
        UsageError: the config has a part that cannot be used with the data set.
    """
    if not data.has_masks and 'train' in files:
        _check_needs_no_masks(config)
    for split in SPLITS:
        loader = config.get(f'{split}_dataloader')
        if loader:
            file = files.get(split) or files.get('val') or files.get('test') or files['train']
            loader.dataset = _dataset(loader.dataset, data, file, f'{split}_dataloader')
            _fill_evaluators(config.get(f'{split}_evaluator'), data, file, split)
    for part in EXTRA_PIPELINE_KEYS:
        _fill_pipeline(config.get(part), data, part)
    set_num_classes(config.model, len(data.classes))
    if data.task == 'segmentation':
        add_custom_imports(config, PAIRED_DATASET)
    if not keep_mask_branch:
        for part in MASK_BRANCH_KEYS:
            (config.model.get('roi_head') or {}).pop(part, None)


def _check_needs_no_masks(config: Config) -> None:
    """Raise UsageError if a model or a transform cannot be trained without masks."""
    types = [part.get('type') for part in iter_dicts(config.model)]
    mask_model = next((type_ for type_ in types if is_type(type_, MODELS, *MASK_MODELS)), None)
    if mask_model is not None and not any(is_type(type_, MODELS, MASKS_FROM_BOXES) for type_ in types):
        raise UsageError(
            f'{short_name(mask_model)} is trained on masks, but the data set has only boxes: use a recipe whose mask '
            'branch can be removed, such as configs/mask_rcnn/convnext_t.py, or a box detector'
        )
    for part in ('train_dataloader', *EXTRA_PIPELINE_KEYS):
        for step in iter_dicts(config.get(part)):
            if is_type(step.get('type'), TRANSFORMS, *MASK_TRANSFORMS):
                text = 'needs masks, but the data set has only boxes: remove it from the config'
                raise UsageError(f'{part}: {short_name(step["type"])} {text}')


def set_num_classes(model: dict, num_classes: int) -> None:
    """Set the number of classes and of class weights in every head of a model's config, in place.

    Raises:
        UsageError: a head has class weights that differ, and not one per class.
    """
    for head in iter_class_heads(model):
        old, counted = count_of(head), (1,) if num_classes > 2 else ()
        for key in COUNT_KEYS:
            if key in head:
                head[key] = 0 if key == 'num_stuff_classes' else num_classes
        if head.get('out_channels') in (old, *counted) and 'num_queries' not in head:  # else it is the width of queries
            head['out_channels'] = num_classes
        for part in iter_dicts(head):
            if isinstance(part.get('class_weight'), (list, tuple)):
                part['class_weight'] = _adapt_class_weights(part['class_weight'], old, num_classes, head)
    # A query-based head takes the topk of its scores, which have to be that many.
    queries = [part['num_queries'] for part in iter_dicts(model) if isinstance(part.get('num_queries'), int)]
    for key in ('max_per_img', 'max_per_image') if queries else ():
        max_detections = (model.get('test_cfg') or {}).get(key)
        if max_detections:
            model['test_cfg'][key] = min(max_detections, min(queries) * num_classes)


def _adapt_class_weights(weights: Sequence[float], old_n: int, n: int, head: dict) -> list[float]:
    """Return one weight per class if all are equal; the last may be that of the background class."""
    if len(weights) in (old_n, old_n + 1) and len({*weights[:old_n]}) == 1:
        return [weights[0]] * n + list(weights[old_n:])
    if len(weights) not in (n, n + 1):
        holder = f'class_weight of {short_name(head.get("type"))}'
        raise UsageError(f'{holder} has {len(weights)} values, but the data set {n} classes')
    return list(weights)


def iter_class_heads(value) -> Iterator[dict]:
    """Iterate over the parts of a model's config that have a number of classes of the data set."""
    if isinstance(value, dict):
        if any(key in value for key in COUNT_KEYS):
            yield value
        value = [v for k, v in value.items() if k not in CLASS_AGNOSTIC_HEADS]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from iter_class_heads(item)


def count_of(head: dict) -> int:
    """Return the number of classes of a head's config."""
    if 'num_classes' in head:
        return head['num_classes']
    return (head.get('num_things_classes') or 0) + (head.get('num_stuff_classes') or 0)


def check_cfg_options(options: Mapping, num_classes: int) -> None:
    """Check `--cfg-options` against a custom data set.

    Raises:
        UsageError: an option sets another number of classes, or paths of a dataset.
    """
    for key, value in chain.from_iterable(flatten(key, value) for key, value in options.items()):
        parts = key.split('.')
        if parts[-1] in COUNT_KEYS[:2] and value != num_classes and not set(parts) & set(CLASS_AGNOSTIC_HEADS):
            raise UsageError(f'--cfg-options {key}={value}: leave it out; the data set has {num_classes} classes')
        inner = [part for part in parts[1:] if part not in ('dataset', 'datasets') and not part.isdigit()]
        sets_data = parts[0].endswith('_dataloader') and 'dataset' in parts[1:2] and inner and inner[0] in DATA_KEYS
        if sets_data or (parts[0].endswith('_evaluator') and parts[-1] == 'ann_file'):
            raise UsageError(f'--cfg-options {key}={value}: leave it out or --data, which sets it')


def check_classes(config: Config) -> None:
    """Check the number of classes of each head against the classes that the config names for training.

    Raises:
        UsageError: they differ.
    """
    metainfo = (settings.get('metainfo') for settings in iter_dicts(config.train_dataloader.dataset))
    classes = next(filter(None, metainfo), {}).get('classes')  # of several datasets those of the first
    if not isinstance(classes, (list, tuple)):
        return
    for head in iter_class_heads(config.model):
        if count_of(head) != len(classes):
            key = next(key for key in COUNT_KEYS if key in head)
            text = f'the data set names {len(classes)} classes: make them agree, or use --data PATH, which sets both'
            raise UsageError(f'{short_name(head.get("type"))} has {key}={head[key]}, but {text}')


def _dataset(settings: dict, data: CheckedDataset, file: str, loader: str) -> dict:
    """Return a dataset config with the recipe's pipeline, filter and wrappers (RepeatDataset, ...) on the data set.

    Concatenated datasets become one if they differ only in their data.

    Raises:
        UsageError: a wrapper or a transform cannot be used with the data set.
    """
    _fill_pipeline(settings.get('pipeline'), data, loader)
    if settings.get('datasets'):
        parts = [_dataset(part, data, file, loader) for part in settings['datasets']]
        if any(part != parts[0] for part in parts):
            text = 'datasets with different pipelines or filters, but --data gives one data set: keep one of them'
            raise UsageError(f'{loader}: {short_name(settings.get("type"))} concatenates {text} in the config')
        return parts[0]
    if isinstance(settings.get('dataset'), dict):
        if data.task == 'segmentation' and is_type(settings.get('type'), DATASETS, 'ClassBalancedDataset'):
            text = 'ClassBalancedDataset needs classes per image, but segmentation masks have them per pixel'
            raise UsageError(f'{loader}: {text}')
        return {**settings, 'dataset': _dataset(settings['dataset'], data, file, loader)}
    recipe = {k: settings[k] for k in RECIPE_KEYS if k in settings}
    meta = dict(classes=tuple(data.classes)) | (dict(palette=data.palette) if data.palette else {})
    common = dict(data_root=data.root, ann_file=os.path.abspath(file), metainfo=meta)
    if data.task == 'detection':
        return dict(type='CocoDataset', **common, data_prefix=dict(img=''), **recipe)
    prefix = dict(img_path='', seg_map_path='')
    return dict(type='PairedSegDataset', **common, data_prefix=prefix, **data.dataset_kwargs, **recipe)


def _fill_pipeline(steps, data: CheckedDataset, loader: str) -> None:
    for step in iter_dicts(steps):
        type_ = step.get('type')
        loads = next((what for name, what in UNSUPPORTED_LOADERS.items() if is_type(type_, TRANSFORMS, name)), None)
        is_loader = is_type(type_, TRANSFORMS, 'LoadAnnotations')
        if is_loader and step.get('with_seg') and data.task == 'detection':
            loads = 'segmentation of stuff (with_seg=True)'
        if loads:
            text = f'loads {loads}, but --data gives {data.task}: use another recipe'
            raise UsageError(f'{loader}: {short_name(type_)} {text}')
        for key, has_key in (('with_mask', is_loader), ('by_mask', is_type(type_, TRANSFORMS, 'FilterAnnotations'))):
            if has_key and step.get(key):
                step[key] = data.has_masks
        loads_image = is_type(type_, TRANSFORMS, 'LoadImageFromFile')
        if loads_image and not data.apply_exif and step.get('color_type') in COLOR_TYPES:
            step['color_type'] = f'{step.get("color_type", "color")}_ignore_orientation'


def _fill_evaluators(evaluators, data: CheckedDataset, file: str, split: str) -> None:
    for evaluator in as_list(evaluators):
        type_ = evaluator.get('type')
        if is_type(type_, METRICS, 'CocoMetric') and not is_type(type_, METRICS, *OTHER_COCO_METRICS):
            evaluator['ann_file'] = os.path.abspath(file)
            if not data.has_masks:
                evaluator['metric'] = [m for m in as_list(evaluator.get('metric', 'bbox')) if m != 'segm'] or ['bbox']
        elif data.task == 'detection':
            cls = class_of(type_, METRICS)
            is_mmdet = cls is not None and cls.__module__.startswith('mmdet.')
            if evaluator.get('ann_file') or (is_mmdet and not cls.__name__.startswith('Dump')):  # of predictions
                raise UsageError(
                    f'{split}_evaluator: {short_name(type_)} needs other annotations than --data gives: '
                    "use dict(type='CocoMetric', metric=['bbox', 'segm'])"
                )
