"""From a folder to a checked data set of the task that a recipe is for."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from ..errors import UsageError
from .foreign_layouts import describe_unsupported
from .image_sizes import DEFAULT_LIMITS, ResizeLimit
from .layouts import find_annotations, find_folders
from .read_coco import find_files, read_detection
from .read_masks import read_segmentation
from .request import CheckedDataset, DatasetRequest

TASKS = {'mmdet': 'detection', 'mmseg': 'segmentation'}  # by the default_scope of a config
FINDERS = {'detection': find_annotations, 'segmentation': find_folders}
READERS = {'detection': read_detection, 'segmentation': read_segmentation}
DESCRIPTIONS = {'detection': 'COCO json', 'segmentation': 'segmentation masks'}
RECIPES = {'detection': 'configs/cascade/convnext_t.py', 'segmentation': 'configs/upernet/convnext_t.py'}


def detect_tasks(request: DatasetRequest) -> list[str]:
    """Return the tasks ('detection', 'segmentation') for which a data set has annotations.

    Raises:
        UsageError: there are none; the message says what the folder holds instead.
    """
    if request.ann_files:
        return ['detection']
    root = request.root
    tasks = [task for task, find in FINDERS.items() if root.is_dir() and find(root)]
    if not tasks:
        raise UsageError(f'{root} {describe_unsupported(root)}')
    return tasks


def find_sources(request: DatasetRequest, task: str) -> tuple[str, dict]:
    """Return the layout of a data set, and the file or folders of each split.

    Raises:
        UsageError: there are no annotations, or they are for the other task.
    """
    tasks = detect_tasks(request)
    if task not in tasks:
        raise UsageError(
            f'{request.root} holds {DESCRIPTIONS[tasks[0]]}, but {task} needs {DESCRIPTIONS[task]}: '
            f'use a {tasks[0]} recipe, such as {RECIPES[tasks[0]]}'
        )
    return find_files(request) if task == 'detection' else find_folders(request.root)


def read_data(
    request: DatasetRequest,
    task: str,
    splits: Sequence[str],
    classes: Sequence[str] | None = None,
    limits: Mapping[str, ResizeLimit] | None = None,
) -> CheckedDataset:
    """Find, read and check a data set.

    Args:
        request: names the data set.
        task: 'detection' or 'segmentation'.
        splits: of 'train', 'val', 'test'; those that do not exist are left out.
        classes: of a trained model, which then are the data set's, in this order.
        limits: of image sizes by split (default: those of the recipes).

    Returns:
        The usable part of the data set; problems are in its report.

    Raises:
        UsageError: there are no annotations, or they are for the other task.
    """
    find_sources(request, task)
    with _gc_disabled():
        return READERS[task](request, splits, classes, limits or DEFAULT_LIMITS[task])


@contextmanager
def _gc_disabled() -> Iterator[None]:
    """Disable Python's cyclic garbage collector.

    The millions of values of a large JSON file have no cycles, and walking them takes longer than the checks.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
