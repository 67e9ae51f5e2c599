"""The paper's multi-scale test in a segmentation config (table 4)."""

from collections.abc import Mapping

from mmengine.config import Config
from mmengine.registry import TRANSFORMS

from ..engine import progress_bar  # noqa: F401  (registers ProgressBarHook)
from ..errors import UsageError
from ..models import multiscale_tta  # noqa: F401  (registers MultiScaleSegmentor)
from ..type_names import is_type

SCALE_FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def set_multiscale(config: Config, options: Mapping[str, object] | None = None) -> None:
    """Turn the test of a segmentation config into the multi-scale one, at `RATIOS` of its own test scale.

    Raises:
        UsageError: it is no segmentation config, its test pipeline has no Resize to a scale, or the command line's
            `options` ask for another test.
    """
    for key, value in (('model.test_cfg.mode', 'whole'), ('test_dataloader.batch_size', 1)):
        if (options or {}).get(key, value) != value:
            raise UsageError(
                f'--cfg-options {key}={options[key]}: --multiscale tests with {value!r}: leave one of them out'
            )
    if config.get('default_scope') != 'mmseg':
        raise UsageError('--multiscale is for segmentation: the paper has no multi-scale figure for COCO')
    pipeline = config.test_dataloader.dataset.get('pipeline') or []
    resizes = (i for i, step in enumerate(pipeline) if is_type(step['type'], TRANSFORMS, 'Resize'))
    at = next((i for i in resizes if isinstance(pipeline[i].get('scale'), (tuple, list))), None)
    if at is None:
        raise UsageError("--multiscale needs dict(type='Resize', scale=(long, short)) in test_dataloader's pipeline")
    resize = pipeline[at]
    scales = [{**resize, 'scale': tuple(int(side * ratio) for side in resize['scale'])} for ratio in SCALE_FACTORS]
    flips = [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (0.0, 1.0)]
    steps = [scales, flips, *([step] for step in pipeline[at + 1 :])]
    config.test_dataloader.dataset.pipeline = [*pipeline[:at], dict(type='TestTimeAug', transforms=steps)]
    config.test_dataloader.batch_size = 1
    config.model.test_cfg = {**(config.model.get('test_cfg') or {}), 'mode': 'whole'}
    config.model = dict(type='MultiScaleSegmentor', module=config.model)
    config.custom_hooks = [*config.get('custom_hooks', []), dict(type='ProgressBarHook')]
