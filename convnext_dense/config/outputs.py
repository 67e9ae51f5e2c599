"""Where predictions and visualizations of an evaluation are written."""

import os
from collections.abc import Mapping

from mmengine.config import Config
from mmengine.registry import HOOKS, METRICS

from ..errors import UsageError
from ..type_names import is_type
from .options import is_explicit
from .tree import as_list


def set_visualization(
    config: Config, folder: str | None, show: bool, wait_time: float, options: Mapping[str, object] | None = None
) -> None:
    """Have the library's visualization hook draw predictions beside the truth, into a folder or a window.

    Raises:
        UsageError: the config has no such hook.
    """
    if not (folder or show):
        return
    if folder:
        _require_absent(folder, '--show-dir')
    hook = config.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise UsageError(
            'pictures need default_hooks.visualization in the config: DetVisualizationHook or SegVisualizationHook'
        )
    hook.update(draw=True, show=show, wait_time=wait_time)
    if not is_explicit(options or (), 'default_hooks.visualization.interval'):
        hook.interval = 1  # the classic mmseg draws every 50th by default
    if folder and is_type(hook.type, HOOKS, 'SegVisualizationHook'):
        config.visualizer.save_dir = folder
    elif folder:
        hook.test_out_dir = folder


def set_prediction_output(config: Config, out: str | None) -> None:
    """Have the predictions kept: label maps in a folder (segmentation) or a pickle file (detection)."""
    if out is None:
        return
    _require_absent(out, '--out')
    evaluators = as_list(config.test_evaluator)
    if config.get('default_scope') == 'mmseg':
        metric = next((e for e in evaluators if is_type(e.get('type'), METRICS, 'IoUMetric')), None)
        if metric is None:
            raise UsageError("--out needs dict(type='IoUMetric') among test_evaluator, which writes label maps")
        metric.output_dir = out
    elif not out.endswith(('.pkl', '.pickle')):
        raise UsageError(f"--out '{out}': detections are kept in a file whose name ends with .pkl")
    else:
        config.test_evaluator = [*evaluators, dict(type='DumpDetResults', out_file_path=out)]


def _require_absent(path: str, option: str) -> None:
    """Raise UsageError where a result would overwrite something."""
    if os.path.isfile(path) or (os.path.isdir(path) and os.listdir(path)):
        raise UsageError(f"{option} '{path}' exists already: give another place")
