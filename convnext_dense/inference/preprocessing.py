"""The test pipeline of a config, for images that are already loaded."""

from mmengine.config import Config
from mmengine.registry import TRANSFORMS

from ..config.channels import channel_reader
from ..errors import UsageError
from ..type_names import is_type
from .images import ColorType


def is_resize(step: dict) -> bool:
    """Whether a transform of a pipeline resizes to a scale."""
    return is_type(step.get('type'), TRANSFORMS, 'Resize') and isinstance(step.get('scale'), (tuple, list))


def split_test_pipeline(config: Config) -> tuple[ColorType, list[dict]]:
    """Split the test pipeline of a config into how files are read, and the transforms after it.

    Raises:
        UsageError: If the pipeline does not load an image.
    """
    dataset = innermost_dataset(config.test_dataloader.get('dataset') or {})
    steps = [dict(step) for step in dataset.get('pipeline') or ()]
    loader = next((step for step in steps if is_type(step['type'], TRANSFORMS, 'LoadImageFromFile')), None)
    if loader is None:
        raise UsageError("the test pipeline of the config has no dict(type='LoadImageFromFile')")
    color_type = channel_reader(config) or loader.get('color_type', 'color').removesuffix('_ignore_orientation')
    steps = [step for step in steps if not is_type(step['type'], TRANSFORMS, 'LoadImageFromFile', 'LoadAnnotations')]
    if loader.get('to_float32'):
        steps.insert(0, dict(type='LoadImageFromNDArray', to_float32=True))
    return color_type, steps


def innermost_dataset(dataset: dict) -> dict:
    """Return the config of the data set inside wrappers (RepeatDataset, ConcatDataset); the first of several."""
    while 'pipeline' not in dataset and (dataset.get('dataset') or dataset.get('datasets')):
        dataset = dataset.get('dataset') or dataset['datasets'][0]
    return dataset
