"""Checks before a model is built: installed packages, backbone, pretrained weights, data files."""

import importlib
import os
from collections.abc import Iterator
from importlib.metadata import distributions

from mmengine.config import Config
from mmengine.registry import MODELS, WEIGHT_INITIALIZERS

from ..checkpoints.hub import is_url, resolve
from ..errors import UsageError, root_message
from ..models.convnext import ConvNeXt
from ..models.meta import meta_device
from ..models.swin import SwinMixin
from ..type_names import class_of, short_name
from .launch import is_rank0
from .tree import as_list, iter_dicts

# The distributions of OpenMMLab, which share import names: name of its mmengine -> (extra of this package, its mmcv).
OPENMMLAB_DISTS = {'onedl-mmengine': ('onedl', 'onedl-mmcv==2.3.6'), 'mmengine': ('openmmlab', 'mmcv==2.1.0')}


def check_installed(library: str) -> None:
    """Raise UsageError if a package that a config needs is not installed.

    Args:
        library: 'mmdet', 'mmseg' or 'mmengine'. mmcv with its compiled operators is required as well, and only one
            distribution of OpenMMLab may be installed.
    """
    dists = [name for name in OPENMMLAB_DISTS if [*distributions(name=name)]]
    if len(dists) > 1:
        raise UsageError(
            f'{" and ".join(dists)} are both installed and conflict: install one distribution of OpenMMLab, in a new '
            'environment'
        )
    extra, mmcv = OPENMMLAB_DISTS[dists[0] if dists else 'onedl-mmengine']
    try:
        importlib.import_module('mmcv')
        importlib.import_module(library)
    except ImportError as error:
        raise UsageError(f"{error}: run pip install --no-build-isolation 'convnext_dense[{extra}]'") from error
    try:
        importlib.import_module('mmcv._ext')
    except ImportError as error:
        raise UsageError(
            f'mmcv is installed without its operators ({root_message(error)}): run pip install --no-build-isolation '
            f'--no-cache-dir --no-deps --force-reinstall {mmcv}'
        ) from error


def check_backbones(model: dict) -> None:
    """Raise UsageError if a ConvNeXt or Swin of a model cannot be built; it is built on the meta device."""
    for _ in build_backbones(model):
        pass


def check_levels(model: dict) -> None:
    """Raise UsageError if a head has anchors for another number of feature levels than the neck returns.

    mmdet would only fail at the first image, with an AssertionError without a message.

    Args:
        model: Config of a model.
    """
    neck = (as_list(model.get('neck')) or [{}])[-1]
    for name in ('rpn_head', 'bbox_head'):
        head = model.get(name)
        anchors = (head.get('anchor_generator') or {}) if isinstance(head, dict) else {}
        strides = anchors.get('strides') or ()
        if isinstance(neck.get('num_outs'), int) and strides and len(strides) != neck['num_outs']:
            raise UsageError(
                f'the neck returns {neck["num_outs"]} feature levels (num_outs), {name} has anchors for {len(strides)} '
                f'(anchor_generator.strides={list(strides)}): the numbers must be equal'
            )


def check_pretrained(model: dict) -> None:
    """Raise UsageError if the pretrained weights of a ConvNeXt or Swin do not exist or do not fit it.

    This is checked on the meta device, before loading data and model takes time. Only rank 0 downloads.

    Args:
        model: Config of the whole model.
    """
    for backbone in build_backbones(model):
        for cfg in backbone.pretrained:
            loader = WEIGHT_INITIALIZERS.build(dict(cfg))
            if is_rank0() or not is_url(resolve(loader.checkpoint)):
                loader.plan(backbone)


def check_data(config: Config, splits: tuple[str, ...]) -> None:
    """Raise UsageError for the first data folder or annotation file of some splits that does not exist."""
    for split in splits:
        datasets, evaluators = (iter_dicts(config.get(f'{split}_{part}')) for part in ('dataloader', 'evaluator'))
        paths = [path for dataset in datasets for path in _iter_data_paths(dataset)]
        for path in [*paths, *(e['ann_file'] for e in evaluators if e.get('ann_file'))]:
            _require_path(path, split)


def build_backbones(model: dict) -> Iterator[ConvNeXt | SwinMixin]:
    """Build the ConvNeXt and strict Swin backbones of a model config, subclasses included, on the meta device."""
    for holder in iter_dicts({'model': model}):
        for key, cfg in holder.items():
            type_ = cfg.get('type') if isinstance(cfg, dict) else None
            is_convnext = short_name(type_) == 'ConvNeXt'
            cls = ConvNeXt if is_convnext else class_of(type_, MODELS) if 'backbone' in key else None
            if cls is not None and issubclass(cls, (ConvNeXt, SwinMixin)):
                try:
                    with meta_device():
                        backbone = cls(**{k: v for k, v in cfg.items() if k not in ('type', '_scope_')})
                except TypeError as error:
                    raise UsageError(f'backbone: {root_message(error)}') from error
                yield backbone


def _iter_data_paths(dataset: dict) -> Iterator[str]:
    """Iterate over the folders and files of a data set config, joined as mmengine's BaseDataset joins them."""
    if not ({'data_root', 'ann_file', 'data_prefix'} & set(dataset)) or dataset.get('backend_args'):
        return
    root = dataset.get('data_root') or ''
    prefixes = [p for p in (dataset.get('data_prefix') or {}).values() if isinstance(p, str)]
    for path in (root, dataset.get('ann_file'), *prefixes):
        if path and '://' not in os.path.join(root, path):
            yield os.path.join(root, path) if path != root else root


def _require_path(path: str, split: str) -> None:
    if not os.path.exists(path):
        raise UsageError(
            f"no {split} data at '{os.path.abspath(path)}': copy or symlink the data there, or set COCO_ROOT, "
            'ADE20K_ROOT or SHAPES_ROOT to their folder (docs/datasets.md)'
        )
    if path.endswith('.json') and not _looks_like_complete_json(path):
        raise UsageError(f'{path} is truncated or not valid JSON: download or write it again')


def _looks_like_complete_json(path: str) -> bool:
    """Whether a file begins and ends like JSON, unlike a truncated download; COCO's are too large to parse twice."""
    with open(path, 'rb') as file:
        first_byte = file.read(64).lstrip()[:1]
        file.seek(max(os.path.getsize(path) - 64, 0))
        return first_byte + file.read().rstrip()[-1:] in (b'{}', b'[]')
