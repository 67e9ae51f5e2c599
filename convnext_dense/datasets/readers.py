"""From a folder to checked data of the task that a recipe is for."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from ..errors import UsageError
from .image_sizes import LIMITS, Limit
from .layouts import describe_unsupported, find_annotations, find_folders
from .read_coco import find_files, read_detection
from .read_masks import read_segmentation
from .request import CheckedDataset, DatasetRequest

TASKS = {'mmdet': 'detection', 'mmseg': 'segmentation'}  # by the default_scope of a config
FINDERS = {'detection': find_annotations, 'segmentation': find_folders}
READERS = {'detection': read_detection, 'segmentation': read_segmentation}
DESCRIPTIONS = {'detection': 'COCO json', 'segmentation': 'label maps'}
RECIPES = {'detection': 'configs/cascade/convnext_t.py', 'segmentation': 'configs/upernet/convnext_t.py'}


def detect_tasks(request: DatasetRequest) -> list[str]:
    """For which tasks ('detection', 'segmentation') there are data.

    Raises:
        UsageError: for none, with what is there instead.
    """
    if request.files:
        return ['detection']
    root = request.root
    found = [task for task, find in FINDERS.items() if root.is_dir() and find(root)]
    if not found:
        raise UsageError(f'{root} {describe_unsupported(root)}')
    return found


def find_sources(request: DatasetRequest, task: str) -> tuple[str, dict]:
    """The layout of the data of a task, and the file or folders of each split.

    Raises:
        UsageError: there are none, or they are of the other task.
    """
    there = detect_tasks(request)
    if task not in there:
        raise UsageError(
            f'{request.root} holds {DESCRIPTIONS[there[0]]}, {task} takes {DESCRIPTIONS[task]}: '
            f'take a recipe of {there[0]}, such as {RECIPES[there[0]]}'
        )
    return find_files(request) if task == 'detection' else find_folders(request.root)


def read_data(
    request: DatasetRequest,
    task: str,
    splits: Sequence[str],
    classes: Sequence[str] | None = None,
    limits: Mapping[str, Limit] | None = None,
) -> CheckedDataset:
    """Find, read and check the data of a task in some splits ('train', 'val', 'test'; those that are there).

    Args:
        classes: the classes of a trained model, which then are the data's, in this order.
        limits: of the sizes of images in each split; the recipes' where none are given.

    Raises:
        UsageError: there are none, or they are of another kind; what is wrong with them is in the report.
    """
    find_sources(request, task)
    with _without_collector():
        return READERS[task](request, splits, classes, limits or LIMITS[task])


@contextmanager
def _without_collector() -> Iterator[None]:
    """The values of a file are millions and hold no cycles: Python's collector would walk all of them ever again, in
    more time than the checks take."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
