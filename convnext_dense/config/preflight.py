"""Checks before anything is built: installation, launcher, backbone, pretrained weights, data files."""

import importlib
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODELS

from ..checkpoints.hub import is_url, resolve
from ..checkpoints.pretrained import PretrainedConvNeXt, plan_load
from ..errors import UsageError, root_message
from ..models.convnext import ConvNeXt
from ..type_names import class_of, short_name
from .launch import world_size_from_env
from .tree import as_list, iter_dicts

# The lines of OpenMMLab, which have the same import names: distribution of mmengine -> our extra, its mmcv.
OPENMMLAB_DISTS = {'onedl-mmengine': ('onedl', 'onedl-mmcv==2.3.6'), 'mmengine': ('openmmlab', 'mmcv==2.1.0')}


def check_launcher(config: Config, launcher: str) -> None:
    """Raise UsageError where a launcher did not start this process, or its processes cannot be joined."""
    world_size_from_env(launcher)
    backend = ((config.get('env_cfg') or {}).get('dist_cfg') or {}).get('backend', 'nccl')
    if launcher != 'none' and backend == 'nccl' and get_device() == 'cpu':
        raise UsageError(f'--launcher {launcher} needs a GPU for each process and none was found: leave it out')
    if launcher == 'mpi' and 'MASTER_ADDR' not in os.environ:
        raise UsageError('--launcher mpi: MASTER_ADDR is not set; mpirun -x MASTER_ADDR=NODE gives it, the first node')


def check_installed(library: str) -> None:
    """Raise UsageError where mmcv lacks its operators, `library` (mmdet, mmseg) cannot be imported, or both lines of
    OpenMMLab are installed."""
    lines = [name for name in OPENMMLAB_DISTS if _is_installed(name)]
    if len(lines) > 1:
        raise UsageError(
            f'{" and ".join(lines)} are installed over one another: install one line of OpenMMLab, in a new environment'
        )
    extra, mmcv = OPENMMLAB_DISTS[lines[0] if lines else 'onedl-mmengine']
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
    """Raise UsageError where a ConvNeXt in a model config cannot be built; costs no memory."""
    for kind, settings in _iter_backbones(model):
        try:
            with torch.device('meta'):
                kind(**settings)
        except TypeError as error:
            raise UsageError(f'backbone: {root_message(error)}') from error


def check_levels(model: dict) -> None:
    """Raise UsageError where a dense head of a detector has anchors for another number of levels than the neck gives,
    which mmdet notices at the first image, in an AssertionError without a word."""
    neck = (as_list(model.get('neck')) or [{}])[-1]
    for name in ('rpn_head', 'bbox_head'):
        head = model.get(name)
        anchors = (head.get('anchor_generator') or {}) if isinstance(head, dict) else {}
        strides = anchors.get('strides') or ()
        if isinstance(neck.get('num_outs'), int) and strides and len(strides) != neck['num_outs']:
            raise UsageError(
                f'the neck gives {neck["num_outs"]} levels (num_outs), {name} has anchors for {len(strides)} '
                f'(anchor_generator.strides={list(strides)}): make them as many'
            )


def check_pretrained(model: dict) -> None:
    """Raise UsageError where the weights that a ConvNeXt's `init_cfg` names cannot be had or do not fit it. On the meta
    device, before data or a model take time; a download is left to the first process."""
    for kind, settings in _iter_backbones(model):
        with torch.device('meta'):
            backbone = kind(**settings)
        for cfg in backbone.pretrained:
            loader = PretrainedConvNeXt(**{k: v for k, v in cfg.items() if k != 'type'})
            if is_rank0() or not is_url(resolve(loader.checkpoint)):
                plan_load(backbone, loader.checkpoint, loader.final_norm)


def check_data(config: Config, splits: tuple[str, ...]) -> None:
    """Raise UsageError naming the first folder or annotation file of these splits ('train', 'val', 'test') that is
    not there."""
    for split in splits:
        for dataset in iter_dicts(config.get(f'{split}_dataloader') or {}):
            for path in _iter_data_paths(dataset):
                _require_path(path, split)
        for evaluator in iter_dicts(config.get(f'{split}_evaluator') or {}):
            if evaluator.get('ann_file'):
                _require_path(evaluator['ann_file'], split)


def _is_installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


def _iter_backbones(model: dict) -> Iterator[tuple[type, dict]]:
    """The class, ours or derived from it, and the arguments of every ConvNeXt in a model's config."""
    for holder in iter_dicts({'model': model}):
        for key, settings in holder.items():
            kind = settings.get('type') if isinstance(settings, dict) else None
            if short_name(kind) == 'ConvNeXt' or 'backbone' in key:
                found = ConvNeXt if short_name(kind) == 'ConvNeXt' else class_of(kind, MODELS)
                if found is not None and issubclass(found, ConvNeXt):
                    yield found, {k: v for k, v in settings.items() if k not in ('type', '_scope_')}


def _iter_data_paths(dataset: dict) -> Iterator[str]:
    """The folders and files a dataset config names, joined as mmengine's BaseDataset joins them."""
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
            f"no {split} data at '{os.path.abspath(path)}': put or link them there, or set COCO_ROOT, "
            'ADE20K_ROOT or SHAPES_ROOT to their folder (docs/datasets.md)'
        )
    if path.endswith('.json') and not _looks_like_complete_json(path):
        raise UsageError(f'{path} is not a whole JSON file: download or write it again')


def _looks_like_complete_json(path: str) -> bool:
    """Whether a file begins and ends as JSON, as a broken download does not; COCO's are too large to read twice."""
    with open(path, 'rb') as file:
        first = file.read(64).lstrip()[:1]
        file.seek(max(os.path.getsize(path) - 64, 0))
        return first + file.read().rstrip()[-1:] in (b'{}', b'[]')


def is_rank0() -> bool:
    ranks = (os.environ.get(name) for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'))
    return next((rank for rank in ranks if rank is not None), '0') == '0'
