"""A config filled in from checked data: data sets, evaluators, classes and their number in every head."""

import os
from collections.abc import Iterator, Mapping, Sequence

from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, MODELS, TRANSFORMS

from ..config.inputs import EXTRA_PIPELINE_KEYS
from ..config.tree import as_list, iter_dicts
from ..errors import UsageError
from ..type_names import class_of, is_type, short_name
from .request import CheckedDataset

SPLITS = ('train', 'val', 'test')
CLASS_AGNOSTIC_HEADS = ('rpn_head', 'semantic_head')  # what they count is not the data's classes
COUNTS = ('num_classes', 'num_things_classes', 'num_stuff_classes')  # of instance data all classes are things
COLOR_TYPES = (None, 'color', 'grayscale')  # as which mmcv turns images
MASKS = ('mask_head', 'mask_roi_extractor', 'mask_iou_head')
# Models that learn from masks and have no branch for them that could be taken out, but for those that draw them from
# boxes; so are the steps of a pipeline that take masks.
OF_MASKS = ('SingleStageInstanceSegmentor', 'MaskFormer', 'RTMDetInsHead')
OF_MASKS += ('MaskScoringRoIHead', 'PointRendRoIHead', 'SCNetRoIHead')
DRAWS_MASKS = 'BoxInstDataPreprocessor'
TAKE_MASKS = ('CopyPaste', 'InstaBoost')
# Settings of a data set that do not depend on where its data come from, and those that follow from the data.
KEPT = ('pipeline', 'test_mode', 'filter_cfg', 'indices', 'serialize_data', 'lazy_init', 'max_refetch')
KEPT += ('return_classes', '_scope_')
FROM_DATA = ('type', 'data_root', 'ann_file', 'data_prefix', 'metainfo')
# What other steps of a pipeline read, which boxes, masks and label maps are not.
UNFED = {
    'LoadPanopticAnnotations': 'panoptic segmentation',
    'LoadProposals': 'proposals of another model',
    'LoadTrackAnnotations': 'videos',
    'LoadTextAnnotations': 'texts',
    'LoadDepthAnnotation': 'depth',
}
OTHER_METRICS = ('LVISMetric', 'CocoVideoMetric')  # derived from CocoMetric, and of other annotations


def apply_dataset(config: Config, data: CheckedDataset, files: Mapping[str, str], masks: bool) -> None:
    """Make a config one of `data`, whose splits are written in `files`; a split without one takes val's. `masks` is
    whether the model keeps its mask branch.

    Raises:
        UsageError: the config has something that does not follow from the data.
    """
    if not data.masks and 'train' in files:
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
        imports = config.setdefault('custom_imports', dict(imports=[], allow_failed_imports=False))
        imports['imports'] = [*dict.fromkeys([*as_list(imports['imports']), 'convnext_dense.datasets.paired_dataset'])]
    if not masks:
        for part in MASKS:
            (config.model.get('roi_head') or {}).pop(part, None)


def _check_needs_no_masks(config: Config) -> None:
    """Raise UsageError where a training takes masks that neither can be left out nor follow from boxes."""
    kinds = [part['type'] for part in iter_dicts(config.model) if part.get('type') is not None]
    of_masks = next((kind for kind in kinds if is_type(kind, MODELS, *OF_MASKS)), None)
    if of_masks is not None and not any(is_type(kind, MODELS, DRAWS_MASKS) for kind in kinds):
        raise UsageError(
            f'{short_name(of_masks)} learns from masks, the data have boxes alone: take a recipe whose mask branch can '
            'be taken out, such as configs/mask_rcnn/convnext_t.py, or a detector of boxes'
        )
    for part in ('train_dataloader', *EXTRA_PIPELINE_KEYS):
        for step in iter_dicts(config.get(part)):
            if is_type(step.get('type'), TRANSFORMS, *TAKE_MASKS):
                raise UsageError(
                    f'{part}: {short_name(step["type"])} takes masks, the data have boxes alone: take it out of the '
                    'config'
                )


def set_num_classes(model: dict, n: int) -> None:
    """Set the number of classes in every head of a model's config, and of class weights in it."""
    for head in iter_class_heads(model):
        before = count_of(head)
        for key in COUNTS:
            if key in head:
                head[key] = 0 if key == 'num_stuff_classes' else n
        counts_classes = head.get('out_channels') == before or (head.get('out_channels') == 1 and n > 2)
        if counts_classes and 'num_queries' not in head:  # there it is the width of the queries
            head['out_channels'] = n
        for holder in iter_dicts(head):
            if isinstance(holder.get('class_weight'), (list, tuple)):
                holder['class_weight'] = _class_weights(holder['class_weight'], before, n, head)
    _bound_detections(model, n)


def _bound_detections(model: dict, n: int) -> None:
    """Ask for no more detections than queries give with `n` classes: topk takes no more than there are."""
    queries = [
        settings['num_queries'] for settings in iter_dicts(model) if isinstance(settings.get('num_queries'), int)
    ]
    for key in ('max_per_img', 'max_per_image'):
        asked = (model.get('test_cfg') or {}).get(key)
        if queries and asked and asked > min(queries) * n:
            model['test_cfg'][key] = min(queries) * n


def _class_weights(weights: Sequence[float], before: int, n: int, head: dict) -> list[float]:
    """As many weights as there are classes, where all classes have the same one; the last may be that of no object."""
    if len(weights) in (before, before + 1) and len({*weights[:before]}) == 1:
        return [weights[0]] * n + list(weights[before:])
    if len(weights) not in (n, n + 1):
        raise UsageError(
            f'class_weight of {short_name(head.get("type"))} has {len(weights)} values, the data {n} classes'
        )
    return list(weights)


def iter_class_heads(value) -> Iterator[dict]:
    """The parts of a model's config that count the data's classes."""
    if isinstance(value, dict):
        if any(key in value for key in COUNTS):
            yield value
        value = [v for k, v in value.items() if k not in CLASS_AGNOSTIC_HEADS]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from iter_class_heads(item)


def count_of(head: dict) -> int:
    """How many classes a part of a model counts."""
    if 'num_classes' in head:
        return head['num_classes']
    return (head.get('num_things_classes') or 0) + (head.get('num_stuff_classes') or 0)


def check_cfg_options(options: Mapping, n: int) -> None:
    """Raise UsageError where the command line's settings say another number of classes than the data have, or where the
    data are."""
    for key, value in _flat(options):
        parts = key.split('.')
        if parts[-1] in COUNTS[:2] and value != n and not set(parts) & set(CLASS_AGNOSTIC_HEADS):
            raise UsageError(
                f'--cfg-options {key}={value}: it follows from the data, which have {n} classes: leave it out'
            )
        place = [part for part in parts[1:] if part not in ('dataset', 'datasets') and not part.isdigit()]
        of_data = parts[0].endswith('_dataloader') and 'dataset' in parts[1:2] and place and place[0] in FROM_DATA
        if of_data or (parts[0].endswith('_evaluator') and parts[-1] == 'ann_file'):
            raise UsageError(f'--cfg-options {key}={value}: it follows from --data: leave one of them out')


def check_classes(config: Config) -> None:
    """Raise UsageError where a part of the model counts other classes than the config names for training."""
    classes = (_unwrap_dataset(config.train_dataloader.dataset).get('metainfo') or {}).get('classes')
    if not isinstance(classes, (list, tuple)):
        return
    for head in iter_class_heads(config.model):
        if count_of(head) != len(classes):
            key = next(key for key in COUNTS if key in head)
            raise UsageError(
                f'{short_name(head.get("type"))} has {key}={head[key]}, the data set names {len(classes)} classes: '
                'make them agree, or let them follow from the data by --data PATH'
            )


def _unwrap_dataset(settings: Mapping) -> Mapping:
    """The settings of the data set within those that wrap it; of several the first."""
    while isinstance(settings.get('dataset'), Mapping) or settings.get('datasets'):
        settings = settings['dataset'] if isinstance(settings.get('dataset'), Mapping) else settings['datasets'][0]
    return settings


def _dataset(settings: dict, data: CheckedDataset, file: str, where: str) -> dict:
    """A data set of the recipe's pipeline and filter on the data, within the wrappers (RepeatDataset, ...) that the
    recipe has around it. Data sets that are joined become one where they differ in their data alone.

    Raises:
        UsageError: a wrapper or a step of the pipeline has no meaning on the data.
    """
    _fill_pipeline(settings.get('pipeline'), data, where)
    if settings.get('datasets'):
        parts = [_dataset(part, data, file, where) for part in settings['datasets']]
        if any(part != parts[0] for part in parts):
            raise UsageError(
                f'{where}: {short_name(settings.get("type"))} joins data sets with pipelines or filters of their own, '
                '--data gives one data set: leave one of them in the config'
            )
        return parts[0]
    if isinstance(settings.get('dataset'), dict):
        if data.task == 'segmentation' and is_type(settings.get('type'), DATASETS, 'ClassBalancedDataset'):
            raise UsageError(
                f'{where}: ClassBalancedDataset needs classes of whole images, label maps have them by pixel'
            )
        return {**settings, 'dataset': _dataset(settings['dataset'], data, file, where)}
    kept = {k: settings[k] for k in KEPT if k in settings}
    meta = dict(classes=tuple(data.classes))
    if data.palette:
        meta['palette'] = data.palette
    common = dict(data_root=data.root, ann_file=os.path.abspath(file), metainfo=meta)
    if data.task == 'detection':
        return dict(type='CocoDataset', **common, data_prefix=dict(img=''), **kept)
    prefix = dict(img_path='', seg_map_path='')
    return dict(type='PairedSegDataset', **common, data_prefix=prefix, **data.settings, **kept)


def _fill_pipeline(steps, data: CheckedDataset, where: str) -> None:
    for step in iter_dicts(steps):
        kind = step.get('type')
        if kind is None:
            continue
        unfed = next((what for name, what in UNFED.items() if is_type(kind, TRANSFORMS, name)), None)
        if is_type(kind, TRANSFORMS, 'LoadAnnotations'):
            if data.task == 'detection' and step.get('with_seg'):
                unfed = 'segmentation of stuff (with_seg=True)'
            if step.get('with_mask'):
                step['with_mask'] = data.masks
        if not data.masks and step.get('by_mask') and is_type(kind, TRANSFORMS, 'FilterAnnotations'):
            step['by_mask'] = False
        if unfed:
            raise UsageError(
                f'{where}: {short_name(kind)} reads {unfed}, --data gives {data.task}: take another recipe'
            )
        if not data.turn and is_type(kind, TRANSFORMS, 'LoadImageFromFile') and step.get('color_type') in COLOR_TYPES:
            step['color_type'] = f'{step.get("color_type", "color")}_ignore_orientation'


def _fill_evaluators(evaluators, data: CheckedDataset, file: str, split: str) -> None:
    for evaluator in as_list(evaluators):
        kind = evaluator.get('type')
        if is_type(kind, METRICS, 'CocoMetric') and not is_type(kind, METRICS, *OTHER_METRICS):
            evaluator['ann_file'] = os.path.abspath(file)
            if not data.masks:
                evaluator['metric'] = [m for m in as_list(evaluator.get('metric', 'bbox')) if m != 'segm'] or ['bbox']
        elif data.task == 'detection' and (evaluator.get('ann_file') or _is_mmdets(kind)):
            raise UsageError(
                f'{split}_evaluator: {short_name(kind)} reads annotations of another kind than --data gives: '
                "give dict(type='CocoMetric', metric=['bbox', 'segm'])"
            )


def _is_mmdets(kind) -> bool:
    """Whether a metric is one of mmdet's own, which all but those that dump predictions want their own data set."""
    found = class_of(kind, METRICS)
    return found is not None and found.__module__.startswith('mmdet.') and not found.__name__.startswith('Dump')


def _flat(options: Mapping, key: str = '') -> Iterator[tuple[str, object]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f'{key}{name}.')
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield from _flat(dict(enumerate(value)), f'{key}{name}.')
        else:
            yield f'{key}{name}', value
