"""A config filled in from checked data: data sets, evaluators, classes and their number in every head."""

import os
from collections.abc import Iterator, Mapping, Sequence

from mmengine.config import Config

from ..errors import UsageError
from ..fitting import dicts_in, listed
from .asking import Data

SPLITS = ('train', 'val', 'test')
NO_CLASSES = ('rpn_head', 'semantic_head')  # what they count is not the data's classes
COLOUR_TYPES = (None, 'color', 'grayscale')  # as which mmcv turns images
MASKS = ('mask_head', 'mask_roi_extractor', 'mask_iou_head')


def fill(config: Config, data: Data, files: Mapping[str, str], masks: bool) -> None:
    """Make a config one of `data`, whose splits are written in `files`; a split without one takes val's. `masks` is
    whether the model keeps its mask branch.

    Raises:
        UsageError: the config has something that does not follow from the data.
    """
    for split in SPLITS:
        loader = config.get(f'{split}_dataloader')
        if loader:
            file = files.get(split) or files.get('val') or files.get('test') or files['train']
            loader.dataset = _dataset(loader.dataset, data, file)
            _fill_evaluators(config.get(f'{split}_evaluator'), data, file)
    set_classes(config.model, len(data.classes))
    if data.task == 'segmentation':
        imports = config.setdefault('custom_imports', dict(imports=[], allow_failed_imports=False))
        imports['imports'] = [*dict.fromkeys([*listed(imports['imports']), 'convnext_dense.data.pairs'])]
    if not masks:
        for part in MASKS:
            (config.model.get('roi_head') or {}).pop(part, None)


def set_classes(model: dict, n: int) -> None:
    """Set the number of classes in every head of a model's config."""
    for head in heads(model):
        before, head['num_classes'] = head['num_classes'], n
        if head.get('out_channels') == before or (head.get('out_channels') == 1 and n > 2):
            head['out_channels'] = n
        weights = next((d['class_weight'] for d in dicts_in(head) if isinstance(d.get('class_weight'), list)), None)
        if weights and len(weights) not in (n, n + 1):
            raise UsageError(f'class_weight of {head.get("type")} has {len(weights)} values, the data {n} classes')


def heads(value) -> Iterator[dict]:
    """The parts of a model's config that count the data's classes."""
    if isinstance(value, dict):
        if 'num_classes' in value:
            yield value
        value = [v for k, v in value.items() if k not in NO_CLASSES]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from heads(item)


def check_options(options: Mapping, n: int) -> None:
    """Raise UsageError where the command line's settings say another number of classes than the data have."""
    for key, value in _flat(options):
        if key.split('.')[-1] == 'num_classes' and value != n and not set(key.split('.')) & set(NO_CLASSES):
            raise UsageError(
                f'--cfg-options {key}={value}: it follows from the data, which have {n} classes: leave it out'
            )


def check_classes(config: Config) -> None:
    """Raise UsageError where a part of the model counts other classes than the config names for training."""
    classes = (_inner(config.train_dataloader.dataset).get('metainfo') or {}).get('classes')
    if not isinstance(classes, (list, tuple)):
        return
    for head in heads(config.model):
        if head['num_classes'] != len(classes):
            raise UsageError(
                f'{head.get("type")} has num_classes={head["num_classes"]}, the data set names {len(classes)} classes: '
                'make them agree, or let them follow from the data by --data PATH'
            )


def _inner(settings: Mapping) -> Mapping:
    """The settings of the data set within those that repeat or join; of several the first."""
    while 'pipeline' not in settings and ('dataset' in settings or 'datasets' in settings):
        settings = settings.get('dataset') or settings['datasets'][0]
    return settings


def _dataset(settings: Mapping, data: Data, file: str) -> dict:
    """A data set of the recipe's pipeline and filter, on the data. Of several that are joined the first is taken."""
    settings = _inner(settings)
    kept = {k: settings[k] for k in ('pipeline', 'test_mode', 'filter_cfg', '_scope_') if k in settings}
    for step in dicts_in(kept['pipeline']):
        if step.get('type') == 'LoadAnnotations' and step.get('with_mask'):
            step['with_mask'] = data.masks
        if not data.turn and step.get('type') == 'LoadImageFromFile' and step.get('color_type') in COLOUR_TYPES:
            step['color_type'] = f'{step.get("color_type", "color")}_ignore_orientation'
    meta = dict(classes=tuple(data.classes))
    if data.palette:
        meta['palette'] = data.palette
    common = dict(data_root=data.root, ann_file=os.path.abspath(file), metainfo=meta)
    if data.task == 'detection':
        return dict(type='CocoDataset', **common, data_prefix=dict(img=''), **kept)
    prefix = dict(img_path='', seg_map_path='')
    return dict(type='PairedSegDataset', **common, data_prefix=prefix, **data.settings, **kept)


def _fill_evaluators(evaluators, data: Data, file: str) -> None:
    for evaluator in listed(evaluators):
        if evaluator.get('type') == 'CocoMetric':
            evaluator['ann_file'] = os.path.abspath(file)
            if not data.masks:
                evaluator['metric'] = [m for m in listed(evaluator.get('metric', 'bbox')) if m != 'segm'] or ['bbox']


def _flat(options: Mapping, key: str = '') -> Iterator[tuple[str, object]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f'{key}{name}.')
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield from _flat(dict(enumerate(value)), f'{key}{name}.')
        else:
            yield f'{key}{name}', value
