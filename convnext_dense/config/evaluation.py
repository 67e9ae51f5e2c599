"""Options of a test: visualizations, predictions, reports, multi-scale testing."""

import importlib
import os
import time
from collections.abc import Mapping

from mmengine.config import Config
from mmengine.registry import HOOKS, METRICS, TRANSFORMS

from ..errors import UsageError
from ..models import multiscale_tta  # noqa: F401  (registers MultiScaleSegmentor)
from ..type_names import is_type, short_name
from .channels import channel_reader
from .options import is_explicit
from .tree import as_list

SCALE_FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # scales of the paper's multi-scale test


def multiscale_factors(config: Config) -> tuple[float, ...]:
    """Return the scales of a config's multi-scale test: its `multiscale_factors`, otherwise the paper's."""
    return tuple(config.get('multiscale_factors') or SCALE_FACTORS)


def set_multiscale(config: Config, options: Mapping[str, object] | None = None) -> None:
    """Turn the test of a segmentation config into the paper's multi-scale test (table 4).

    Each image is tested as a whole at `multiscale_factors` of the config's own test scale, with and without flip.

    Args:
        config: Config; it is changed in place.
        options: Settings from the command line, which must not ask for another test.

    Raises:
        UsageError: If it is not a segmentation config, its test pipeline does not resize to a scale, or `options` ask
            for another test.
    """
    for key, value in (('model.test_cfg.mode', 'whole'), ('test_dataloader.batch_size', 1)):
        if (options or {}).get(key, value) != value:
            raise UsageError(
                f'--cfg-options {key}={options[key]}: --multiscale tests with {value!r}: leave one of them out'
            )
    if config.get('default_scope') != 'mmseg':
        raise UsageError('--multiscale is for segmentation: the paper has no multi-scale result on COCO')
    pipeline = config.test_dataloader.dataset.get('pipeline') or []
    resizes = (i for i, step in enumerate(pipeline) if is_type(step['type'], TRANSFORMS, 'Resize'))
    i = next((i for i in resizes if isinstance(pipeline[i].get('scale'), (tuple, list))), None)
    if i is None:
        raise UsageError("--multiscale needs dict(type='Resize', scale=(long, short)) in test_dataloader's pipeline")
    resize = pipeline[i]
    scales = [
        {**resize, 'scale': tuple(int(side * factor) for side in resize['scale'])}
        for factor in multiscale_factors(config)
    ]
    flips = [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (0.0, 1.0)]
    transforms = [scales, flips, *([step] for step in pipeline[i + 1 :])]
    config.test_dataloader.dataset.pipeline = [*pipeline[:i], dict(type='TestTimeAug', transforms=transforms)]
    config.test_dataloader.batch_size = 1
    config.model.test_cfg = {**(config.model.get('test_cfg') or {}), 'mode': 'whole'}
    config.model = dict(type='MultiScaleSegmentor', module=config.model)
    config.custom_hooks = [*config.get('custom_hooks', []), dict(type='ProgressBarHook')]


def set_visualization(
    config: Config, folder: str | None, show: bool, wait_time: float, options: Mapping[str, object] | None = None
) -> None:
    """Have mmdet's or mmseg's visualization hook draw predictions next to the ground truth.

    Args:
        config: Config; it is changed in place.
        folder: Folder into which the images are written; None for no files.
        show: Whether to show the images in a window.
        wait_time: Seconds for which each image is shown.
        options: Settings from the command line; an `interval` of the hook among them is kept.

    Raises:
        UsageError: If the config has no such hook, or the folder is not empty.
    """
    if not (folder or show):
        return
    if folder:
        _require_absent(folder, '--show-dir')
    hook = config.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise UsageError(
            '--show and --show-dir need default_hooks.visualization in the config: DetVisualizationHook or '
            'SegVisualizationHook'
        )
    hook.update(draw=True, show=show, wait_time=wait_time)
    if not is_explicit(options or (), 'default_hooks.visualization.interval'):
        hook.interval = 1  # by default the mmseg of the classic distribution draws every 50th image
    if folder and is_type(hook.type, HOOKS, 'SegVisualizationHook'):
        config.visualizer.save_dir = folder
    elif folder:
        hook.test_out_dir = folder


def set_prediction_output(config: Config, out: str) -> None:
    """Have a test write its predictions.

    Args:
        config: Config; it is changed in place.
        out: Folder for segmentation masks, or pickle file for detections.

    Raises:
        UsageError: `out` exists or has the wrong suffix, or no evaluator can write masks.
    """
    _require_absent(out, '--out')
    evaluators = as_list(config.test_evaluator)
    if config.get('default_scope') == 'mmseg':
        metric = next((e for e in evaluators if is_type(e.get('type'), METRICS, 'IoUMetric')), None)
        if metric is None:
            raise UsageError("--out needs dict(type='IoUMetric') in test_evaluator to write segmentation masks")
        metric.output_dir = out
    elif not out.endswith(('.pkl', '.pickle')):
        raise UsageError(f"--out '{out}': detections are written into a file whose name ends in .pkl")
    else:
        config.test_evaluator = [*evaluators, dict(type='DumpDetResults', out_file_path=out)]


# By metric of mmdet and mmseg: the metric that also writes a report, and the module that registers it.
REPORTS = {
    'CocoMetric': ('DetectionReport', 'convnext_dense.evaluation.detection_report'),
    'IoUMetric': ('SegmentationReport', 'convnext_dense.evaluation.segmentation_report'),
}


def set_report(config: Config, out: str | None) -> None:
    """Have the metric of a test write a report.

    Args:
        config: Config; it is changed in place.
        out: Folder for the report; '' for one in the work dir; None for no report.

    Raises:
        UsageError: `out` exists, or the config has no metric with a report.
    """
    if out is None:
        return
    out = out or os.path.join(config.work_dir, time.strftime('report_%Y%m%d_%H%M%S'))
    _require_absent(out, '--report')
    config.test_evaluator = evaluators = as_list(config.test_evaluator)
    for evaluator in evaluators:
        for name, (report, module) in REPORTS.items():
            if short_name(evaluator.get('type')) == name and not evaluator.get('format_only'):
                importlib.import_module(module)
                evaluator.update(type=report, report_dir=os.path.abspath(out))
                reader = channel_reader(config)
                if reader:
                    evaluator['channels'] = reader._asdict()
                return
    raise UsageError("--report needs dict(type='CocoMetric') or dict(type='IoUMetric') in test_evaluator")


def _require_absent(path: str, option: str) -> None:
    """Raise UsageError if a path exists that a result would overwrite."""
    if os.path.isfile(path) or (os.path.isdir(path) and os.listdir(path)):
        raise UsageError(f"{option} '{path}' already exists: choose another path")
